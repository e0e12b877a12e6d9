"""How people write dialogues: text, messages of several dialects, content in parts, HH-RLHF's markup."""

import re
from typing import Any

from models.data.dialogue import Message
from models.data.readers import Unusable, parse, sound

SPEAKERS = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
"""What a turn's speaker is called → its role."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
RENDERED = re.compile(
    r"\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|user\|>"
    r"|<\|system\|>|<\|endoftext\|>|<｜|\[gMASK\]|\[INST\]|### (Instruction|Human|User):|BEGINNING OF CONVERSATION:"
    r"|Below is an instruction that describes a task|A chat between a curious"
    r"|(Human|User|USER):.*\s(Assistant|ASSISTANT):\s*$)",
    re.DOTALL,
)
"""How a prompt begins that a chat template has rendered already: rendered twice, it would be trained on as words."""
BEGUN = re.compile(r"\s*(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|user\|>|<\|assistant\|>|Assistant:)")
CLOSED = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")
"""How an answer begins, and ends, that holds a template's markup."""
IN_A_CELL = re.compile(r"""\s*\[\s*\{.*?['"](role|from)['"]\s*:""", re.DOTALL)
"""How messages begin that stand as text in the cell of a table."""
ONE_IN_A_CELL = re.compile(r"""\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""How a single one begins; an answer in JSON may begin so too."""


def turns(value: Any, name: str, role: str, one: bool = True) -> list[Message]:
    """Return text as one turn of `role` (HH-RLHF's markup as its turns), and messages as they are.

    Args:
        value: text; a message; a list of messages with `role` and `content`, or `from` and `value`; either of them as
            JSON in a text.
        name: what the column is called, for the sentence.
        role: who says a plain text; empty: it must be a dialogue in HH-RLHF's markup.
        one: a text that is a single message in JSON is read as one.

    Raises:
        Unusable: it is none of these, or empty.
    """
    if isinstance(value, str) and IN_A_CELL.match(value):
        value = _in_a_cell(value, name)
    elif one and isinstance(value, str) and ONE_IN_A_CELL.match(value):
        value = _one_in_a_cell(value, name)
    if isinstance(value, str):
        return _plain(text(value, name), name, role)
    if isinstance(value, dict):
        value = [value]
    if value is None:
        raise Unusable(f"{name}: is null")
    if not isinstance(value, list) or not value:
        raise Unusable(f"{name}: must be text or a list of messages")
    return [_turn(turn, name) for turn in value]


def text(value: Any, name: str) -> str:
    """Return a text that is not empty, or raise Unusable."""
    if not isinstance(value, str):
        raise Unusable(f"{name}: {'is null' if value is None else 'must be text'}")
    if not value.strip():
        raise Unusable(f"{name}: is empty")
    return value


def behind(system: Message, turns: list[Message]) -> list[Message] | None:
    """Return turns behind a system message, which may stand there already; None if they begin with another one."""
    if turns[0]["role"] != "system":
        return [system, *turns]
    return turns if turns[0] == system else None


def dialogue(value: str) -> list[Message]:
    """Split HH-RLHF's text into its turns.

    Raises:
        Unusable: it does not begin with a turn.
    """
    first, *parts = re.split(f"({HUMAN}|{ASSISTANT})", "\n\n" + value.lstrip())
    if first.strip():
        raise Unusable("the dialogue does not begin with a turn")
    role = {HUMAN: "user", ASSISTANT: "assistant"}
    return [Message(role=role[mark], content=said.strip()) for mark, said in zip(parts[::2], parts[1::2], strict=True)]


def _plain(value: str, name: str, role: str) -> list[Message]:
    if not role and ASSISTANT not in value:
        raise Unusable(f"{name}: has no 'Assistant:' turn")
    if not role or value.startswith(HUMAN) or (value.lstrip().startswith("Human:") and ASSISTANT in value):
        found = dialogue(value)
        waits = role == "user" and not found[-1]["content"]  # "… Assistant:" and nothing more
        return found[:-1] if waits else found
    if RENDERED.match(value) if role == "user" else BEGUN.match(value) or value.rstrip().endswith(CLOSED):
        raise Unusable(f"{name}: was rendered by a chat template; give the messages, without its markup")
    return [Message(role=role, content=value)]


def _in_a_cell(value: str, name: str) -> Any:
    try:
        found = sound(parse(value)[0])
    except (ValueError, RecursionError):
        raise Unusable(f"{name}: looks like a list of messages, but is not JSON") from None
    if isinstance(found, Unusable):
        raise Unusable(f"{name}: {found}")
    return found


def _one_in_a_cell(value: str, name: str) -> Any:
    """Return the message that a text holds as JSON, or the text where it is an answer in JSON or in a language."""
    try:
        found = sound(parse(value)[0])
    except (ValueError, RecursionError):
        if re.match(r"\s*\{'(role|from)': '\w+', '(content|value)': ['\"]", value):
            raise Unusable(f"{name}: looks like a message, but is not JSON") from None
        return value
    message = found if isinstance(found, dict) else {}
    speaker = message.get("role", message.get("from"))
    known = isinstance(speaker, str) and speaker.lower() in SPEAKERS
    return found if known and ("content" in message or "value" in message) else value


def _turn(turn: Any, name: str) -> Message:
    told = turn if isinstance(turn, dict) else {}
    speaker, content = told.get("role", told.get("from")), told.get("content", told.get("value"))
    if isinstance(content, list):
        content = _joined(content, name)
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise Unusable(f"{name}: every message needs a role and a content, both text")
    if speaker.lower() not in SPEAKERS or told.get("tool_calls"):
        who = "a tool" if told.get("tool_calls") else f"{speaker[:20]!r}"
        raise Unusable(f"{name}: a turn of {who}; known are system, user, assistant")
    if told.get("reasoning_content"):
        raise Unusable(f"{name}: a turn with reasoning_content; write it into the content, or take it out")
    return Message(role=SPEAKERS[speaker.lower()], content=content)


def _joined(parts: list[Any], name: str) -> str:
    """Return content in parts (`[{"type": "text", "text": …}, …]`) as one text."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise Unusable(f"{name}: a message holds a part that is no text")
    return "".join(part["text"] for part in parts)
