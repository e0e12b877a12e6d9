"""How people write dialogues: text, messages of several dialects, content in parts, HH-RLHF's markup."""

import re

from models.data.dialogue import Message
from models.files.raw_rows import Unusable, parse, sound

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


def turns(value: object, name: str, role: str, single_in_json: bool = True) -> list[Message]:
    """Return text as one turn of `role` (HH-RLHF's markup as its turns), and messages as they are.

    Args:
        value: text; a message; a list of messages with `role` and `content`, or `from` and `value`; either of them as
            JSON in a text.
        name: what the column is called, for the sentence.
        role: who says a plain text; empty: it must be a dialogue in HH-RLHF's markup.
        single_in_json: a text that is a single message in JSON is read as one.

    Raises:
        Unusable: it is none of these, or empty.
    """
    if isinstance(value, str) and IN_A_CELL.match(value):
        value = _in_a_cell(value, name)
    elif single_in_json and isinstance(value, str) and ONE_IN_A_CELL.match(value):
        value = _one_in_a_cell(value, name)
    if isinstance(value, str):
        return _plain(text(value, name), name, role)
    if isinstance(value, dict):  # LLaMA-Factory writes an answer as one message, without a list around it
        value = [value]
    if value is None:
        raise Unusable(f"{name}: is null")
    if not isinstance(value, list) or not value:
        raise Unusable(f"{name}: must be text or a list of messages")
    return [_turn(turn, name) for turn in value]


def text(value: object, name: str) -> str:
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
    # the marks begin with two line breaks, which the first turn of a stripped text lacks
    first, *parts = re.split(f"({HUMAN}|{ASSISTANT})", "\n\n" + value.lstrip())
    if first.strip():
        raise Unusable("the dialogue does not begin with a turn")
    role = {HUMAN: "user", ASSISTANT: "assistant"}
    marks, contents = parts[::2], parts[1::2]
    return [Message(role=role[mark], content=words.strip()) for mark, words in zip(marks, contents, strict=True)]


def answer_of(prompt: list[Message], side: list[Message], name: str) -> tuple[list[Message], str]:
    """Return (context, answer) of a side that is an answer alone, or a whole dialogue that holds the prompt.

    Args:
        prompt: empty where the side must be a whole dialogue.
        name: what the side's column is called, for the sentence.

    Raises:
        Unusable: the side does not end with an answer, or its dialogue goes with another prompt.
    """
    *context, last = side
    if last["role"] != "assistant":
        raise Unusable(f"{name}: ends with a turn of the {last['role']}; the last turn must be the assistant's")
    contents = {turn["content"].strip() for turn in context}
    if context and any(turn["content"].strip() not in contents for turn in prompt if turn["role"] != "system"):
        raise Unusable(f"{name}: is a dialogue that does not hold the prompt")
    if context and prompt and prompt[0]["role"] == "system":
        # the system message may stand in the prompt's column alone; without it the answer would be to something else
        whole = behind(prompt[0], context)
        if whole is None:
            raise Unusable(f"{name}: begins with another system message than the prompt")
        return whole, last["content"]
    return context or prompt, last["content"]


def same_context(context: list[Message], other_context: list[Message], names: str) -> list[Message]:
    """Return the context that both answers have; white space around a turn makes no difference.

    Raises:
        Unusable: they differ; `names` says which columns they come from.
    """
    first, second = ([(turn["role"], turn["content"].strip()) for turn in c] for c in (context, other_context))
    if first != second:
        raise Unusable(f"{names} have different contexts")
    return context


def refuse_no_answer(answer: str, name: str) -> None:
    """Raise Unusable where a text is not one answer: it is empty, or the dialogue goes on in it."""
    if not answer.strip():
        raise Unusable(f"{name}: the answer is empty")
    if HUMAN in answer:
        raise Unusable(f"{name}: the answer goes on with a turn of the user ('Human:')")


def _plain(value: str, name: str, role: str) -> list[Message]:
    if not role and ASSISTANT not in value:
        raise Unusable(f"{name}: has no 'Assistant:' turn")
    if not role or value.startswith(HUMAN) or (value.lstrip().startswith("Human:") and ASSISTANT in value):
        messages = dialogue(value)
        # a prompt in this markup often ends with "Assistant:", which asks for the answer and is no turn
        awaits_answer = role == "user" and not messages[-1]["content"]
        return messages[:-1] if awaits_answer else messages
    if RENDERED.match(value) if role == "user" else BEGUN.match(value) or value.rstrip().endswith(CLOSED):
        raise Unusable(f"{name}: was rendered by a chat template; give the messages, without its markup")
    return [Message(role=role, content=value)]


def _in_a_cell(value: str, name: str) -> object:
    """Return what a text holds as JSON that begins as messages do.

    Raises:
        Unusable: it is no JSON; Python's own notation, `[{'role': …}]`, is none.
    """
    try:
        content = sound(parse(value)[0])
    except (ValueError, RecursionError):
        raise Unusable(f"{name}: looks like a list of messages, but is not JSON") from None
    if isinstance(content, Unusable):
        raise Unusable(f"{name}: {content}")
    return content


def _one_in_a_cell(value: str, name: str) -> object:
    """Return the message that a text holds as JSON, or the text where it is an answer in JSON or in a language."""
    try:
        content = sound(parse(value)[0])
    except (ValueError, RecursionError):
        # an answer may well begin with a brace, so only what looks in full like a message in Python's notation is bad
        if re.match(r"\s*\{'(role|from)': '\w+', '(content|value)': ['\"]", value):
            raise Unusable(f"{name}: looks like a message, but is not JSON") from None
        return value
    message = content if isinstance(content, dict) else {}
    speaker = message.get("role", message.get("from"))
    is_speaker = isinstance(speaker, str) and speaker.lower() in SPEAKERS
    return content if is_speaker and ("content" in message or "value" in message) else value


def _turn(turn: object, name: str) -> Message:
    """Return one turn in our words, whichever dialect it is written in.

    Raises:
        Unusable: it is no message of text, or holds what a policy could not be trained to say.
    """
    message = turn if isinstance(turn, dict) else {}
    speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _joined(content, name)
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise Unusable(f"{name}: every message needs a role and a content, both text")
    if speaker.lower() not in SPEAKERS or message.get("tool_calls"):
        who = "a tool" if message.get("tool_calls") else f"{speaker[:20]!r}"
        raise Unusable(f"{name}: a turn of {who}; known are system, user, assistant")
    if message.get("reasoning_content"):
        # if it were left out silently, the answer would be trained on without its reasoning
        raise Unusable(f"{name}: a turn with reasoning_content; write it into the content, or take it out")
    return Message(role=SPEAKERS[speaker.lower()], content=content)


def _joined(parts: list[object], name: str) -> str:
    """Return content in parts (`[{"type": "text", "text": …}, …]`) as one text."""
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Unusable(f"{name}: a message holds a part that is no text")  # an image, a sound, a call of a tool
        texts.append(part["text"])
    return "".join(texts)
