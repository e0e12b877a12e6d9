"""Talk with a policy in the terminal."""

from pathlib import Path

from models.artifacts import Policy
from models.data.dialogue import Message, prompt_texts
from models.errors import BadPolicy
from models.policy import generate, headers, probe
from models.policy.generate import Ask
from models.policy.weights import digest, load
from models.preflight import made_here
from models.recipe import Compute, Evaluation


def talk(folder: str, temperature: float, longest: int, kept: Path) -> None:
    """Read turns from standard input until an empty line, and print the policy's answers.

    Args:
        kept: folder of the store; a policy from elsewhere is looked at before it is loaded.

    Raises:
        BadPolicy: the folder holds no policy, a damaged one, or one that cannot be used.
    """
    from transformers.utils import logging

    path = Path(folder).expanduser()
    if not list(path.glob("*.safetensors")):
        raise BadPolicy(f"{folder}: holds no policy; the paths of a run's policies stand in its report.json")
    headers.tensors(path)
    if not made_here(folder, "policy", kept):
        probe.look([probe.Subject(f"policy {folder!r}", str(path))], kept)
    logging.disable_progress_bar()
    model, tokenizer = load(Policy(path=path, digest=digest(path), name=path.name, kind="base"), Compute())
    config = Evaluation(temperature=temperature, max_new_tokens=longest)
    said: list[Message] = []
    while turn := _asked():
        said.append(Message(role="user", content=turn))
        (text,) = prompt_texts(tokenizer, [said])
        ((_, answer),) = generate.answer(model, tokenizer, [Ask(text)], config, seed=len(said))
        print(answer.text, flush=True)
        said.append(Message(role="assistant", content=answer.text))


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
