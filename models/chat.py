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


def talk(folder: str, temperature: float, longest: int, store: Path) -> None:
    """Read turns from standard input until an empty line, and print the policy's answers.

    Args:
        folder: of the policy.
        temperature: 0 is greedy.
        longest: most tokens of an answer.
        store: folder of the runs' results; a policy from elsewhere is examined before it is loaded.

    Raises:
        BadPolicy: the folder holds no policy, a damaged one, or one that cannot be used.
    """
    from transformers.utils import logging

    path = Path(folder).expanduser()
    if not list(path.glob("*.safetensors")):
        raise BadPolicy(f"{folder}: holds no policy; the paths of a run's policies stand in its report.json")
    headers.tensors(path)  # refuses weights that are cut off
    if not made_here(folder, "policy", store):
        probe.examine_all([probe.Subject(f"policy {folder!r}", str(path))], store)
    logging.disable_progress_bar()
    model, tokenizer = load(Policy(path=path, digest=digest(path), name=path.name, kind="base"), Compute())
    config = Evaluation(temperature=temperature, max_new_tokens=longest)
    dialogue: list[Message] = []
    while turn := _turn():
        dialogue.append(Message(role="user", content=turn))
        (text,) = prompt_texts(tokenizer, [dialogue])
        ((_, answer),) = generate.answer(model, tokenizer, [Ask(text)], config, seed=len(dialogue))
        print(answer.text, flush=True)
        dialogue.append(Message(role="assistant", content=answer.text))


def _turn() -> str:
    """Return a line of the user; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
