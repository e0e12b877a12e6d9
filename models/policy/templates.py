"""A chat template is tried before anything is trained: it must write the prompt and the answer.

transformers renders in jinja's sandbox. Here it is checked what the sandbox allows: a template may never end, may lose
a turn, may draw random numbers, and may ask for names that it must not have, which jinja prints as nothing.
"""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from models.data.dialogue import Message, prompt_texts, rendered
from models.errors import BadPolicy
from models.words import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5
"""CPU seconds in which a template must have rendered a dialogue; real ones need milliseconds."""
DRAWS = 20
"""A template that flips a coin gives the same text this often once in half a million times."""
OUTSIDE = {"os", "sys", "subprocess", "builtins", "importlib", "open", "eval", "exec", "globals", "self"}
"""Names that a template of a dialogue has no use for."""
ROLES = ("user", "assistant", "user", "assistant")
SYSTEM = "Answer in one short sentence."
TURNS = ("What is the colour of a clear sky?", "It is blue by day.", "And of fresh snow?", "Snow is white, of course.")


class _TooSlow(BadPolicy):
    """A template that may never end."""


def try_out(tokenizer: "PreTrainedTokenizerBase", shapes: Sequence[Sequence[str]] = ()) -> None:
    """Write a question and a longer dialogue as training does; each turn must stand there once, and in order.

    Args:
        shapes: roles of the turns of prompts that a suite has, as `("system", "user")`: each must be written too.

    Raises:
        BadPolicy: the template cannot be trained with; names the tokenizer's `name_or_path`, and what to do.
    """
    where = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise BadPolicy(f"{where}: holds no chat template; give one as `template` in the recipe")
    with _in_time(where):
        fault = _forbidden(tokenizer.chat_template) or _lost_turns(tokenizer) or _variation(tokenizer)
        for shape in shapes:
            fault = fault or _fault_in_prompt(tokenizer, shape)
    if fault:
        raise BadPolicy(f"{where}: the chat template {fault}; mend it, or give another as `template` in the recipe")


def try_out_judge(tokenizer: "PreTrainedTokenizerBase", shapes: Sequence[Sequence[str]] = ()) -> None:
    """Let the template of a judge write a question and its answer, and a prompt of each shape that it will read.

    Args:
        shapes: roles of the turns of a prompt, as `("system", "user")`.

    Raises:
        BadPolicy: it cannot.
    """
    where = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise BadPolicy(f"{where}: holds no chat template; say in `text` how prompt and answer are written")
    with _in_time(where):
        fault = _forbidden(tokenizer.chat_template)
        for shape in (ROLES[:1], *shapes):
            fault = fault or _fault_in_prompt(tokenizer, shape, TURNS[1])
    if fault:
        raise BadPolicy(f"{where}: the chat template {fault}; say in `text` what the judge reads")


# Each function down to `_variation` says what is wrong, to follow "the chat template" in a sentence; or nothing


def _fault_in_prompt(tokenizer: "PreTrainedTokenizerBase", shape: Sequence[str], answer: str = "") -> str:
    """Say what is wrong with a prompt of this shape, and with the answer to it if there is one, as written."""
    turns = [
        Message(role=role, content=SYSTEM if role == "system" else f"{TURNS[0]} {number}")
        for number, role in enumerate(shape)
    ]
    answered = [Message(role="assistant", content=answer)] if answer else []
    try:
        (text,) = prompt_texts(tokenizer, [[*turns, *answered]])
    except _TooSlow:
        raise
    except BadPolicy as error:
        return f"cannot write a prompt of the turns {', '.join(shape)} ({first_line(error.__cause__ or error)})"
    if answer not in text:
        return "drops the answer"
    lost = next((turn["role"] for turn in turns if turn["content"] not in text), "")
    return f"drops the {lost} turn of a prompt of the turns {', '.join(shape)}" if lost else ""


def _forbidden(template: str) -> str:
    """Say whether the template does not parse, or names something outside of the sandbox."""
    from jinja2 import TemplateError, meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Parsed, not rendered: the sandbox prints a forbidden attribute as nothing, so the text would not show it
    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except (TemplateError, RecursionError) as error:
        return f"is no Jinja ({(str(error).splitlines() or ['nested too deeply'])[0]})"
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {str(node.arg.value) for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)}
    forbidden = {name for name in names if name.startswith("__")} | (meta.find_undeclared_variables(tree) & OUTSIDE)
    return f"reaches for {min(forbidden)}" if forbidden else ""


def _lost_turns(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say what is wrong with a question and a longer dialogue as written.

    A template may refuse a longer dialogue, or a system message, with an error. It may not leave a turn out.
    """
    turns = [Message(role=role, content=text) for role, text in zip(ROLES, TURNS, strict=True)]
    fault = _misplaced(rendered(tokenizer, turns[:1], TURNS[1]), TURNS[:1], TURNS[1])
    for dialogue in ([Message(role="system", content=SYSTEM), *turns[:3]], turns[:3]):
        try:
            texts = rendered(tokenizer, dialogue, TURNS[3])
        except _TooSlow:
            raise
        except BadPolicy:
            continue
        return fault or _misplaced(texts, TURNS[:3], TURNS[3])
    return fault


def _misplaced(texts: tuple[str, str, str], turns: Sequence[str], answer: str) -> str:
    """Say what is wrong with a dialogue as written.

    Args:
        texts: the prompt, prompt and answer, and what is trained on, as `rendered` returns them.
        turns: of the prompt.
        answer: to it.
    """
    prompt, whole, taught = texts
    lost = next((text for text in turns if prompt.count(text) != 1), "")
    if lost:
        return f"writes a turn of the prompt {prompt.count(lost)} times instead of once"
    if whole.count(answer) != 1:
        return f"writes the answer {whole.count(answer)} times instead of once"
    places = [whole.find(text) for text in (*turns, answer)]
    if -1 in places or places != sorted(places):
        return "writes prompt and answer in another order"
    return "" if answer in taught else "ends the turn before the answer"


def _variation(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say whether the same messages are written differently each time, by chance or by the clock."""
    texts = set()
    for seed in range(DRAWS):
        random.seed(seed)  # jinja's filter `random` draws from the module's generator
        texts.add(rendered(tokenizer, [Message(role="user", content=TURNS[0])], TURNS[1]))
        # A template may write the date, which changes once a day, but not the second
        if seed == 0 and "strftime_now" in tokenizer.chat_template:
            time.sleep(1.1)
    return "writes the same messages differently each time" if len(texts) > 1 else ""


@contextmanager
def _in_time(where: str) -> Iterator[None]:
    """End a block after SECONDS of CPU time, not of wall time: a busy machine makes no template bad."""

    def stop(*_: object) -> None:
        raise _TooSlow(f"{where}: the chat template does not end within {SECONDS} s; give another as `template`")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
