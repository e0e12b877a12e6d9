"""The tokens that a classifier reads of a dialogue. What people wrote in it cannot become control tokens."""

import re
from typing import TYPE_CHECKING

from models.artifacts import content_digest
from models.data.dialogue import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Unwritable(Exception):
    """The judge cannot be shown this dialogue; says why, and the verdict has failed."""


def read_as(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str) -> list[int]:
    """Return the token ids that a judge reads of a dialogue, which ends with the answer.

    Args:
        text: how prompt and answer are written; empty means the chat template.

    Raises:
        Unwritable: the template refuses or drops a turn, or one holds control tokens that cannot be read as words.
    """
    parts = _written(tokenizer, turns, text)
    whole = _whole(tokenizer, turns, text, parts)
    ids = [int(i) for i in tokenizer(whole, add_special_tokens=bool(text))["input_ids"]]
    before, after = _around(tokenizer) if text else ([], [])
    written = [i for part, said in parts if not said for i in _ids(tokenizer, part, plain=False)]
    control = _control(tokenizer, written)
    if sum(i in control for i in ids) == sum(i in control for i in [*before, *written, *after]):
        return ids
    # What people wrote holds control tokens. Each part alone, words may be cut otherwise where two parts meet.
    told = [(_ids(tokenizer, part, plain=said), said) for part, said in parts]
    if any(said and control & {*row} for row, said in told):
        raise Unwritable("prompt or answer holds control tokens that the judge cannot read as words")
    return [*before, *(i for row, _ in told for i in row), *after]


def _written(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str) -> list[tuple[str, bool]]:
    """Return the dialogue in parts, and of each whether people wrote it."""
    if text:
        said = {"{prompt}": "\n\n".join(turn["content"] for turn in turns[:-1]), "{answer}": turns[-1]["content"]}
        written = text
    else:
        mark = content_digest([turn["content"] for turn in turns])[:32]  # no turn can hold its own hash
        said = {f"{mark}{i:04}": turn["content"] for i, turn in enumerate(turns)}
        marked = [Message(role=turn["role"], content=mark) for turn, mark in zip(turns, said, strict=True)]
        written = _rendered(tokenizer, marked)
    if any(mark not in written for mark in said):
        raise Unwritable("the judge's chat template leaves a turn out, or changes what it says")
    parts = re.split("(" + "|".join(map(re.escape, said)) + ")", written)
    return [(said.get(part, part), part in said) for part in parts if part]


def _whole(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str, parts: list[tuple[str, bool]]) -> str:
    """Return the dialogue as the template writes it; where that would hide a part of a turn, with all that was said."""
    rendered = "" if text else _rendered(tokenizer, turns)
    hides = any(turn["content"].strip() not in rendered for turn in turns)  # it may trim
    return "".join(part for part, _ in parts) if text or hides else rendered


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: list[Message]) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template may fail anyhow
        why = " ".join(str(error).split()) or type(error).__name__
        raise Unwritable(f"the judge's chat template cannot write these messages ({why[:200]})") from error


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, plain: bool) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]]


def _control(tokenizer: "PreTrainedTokenizerBase", written: list[int]) -> set[int]:
    """Return the ids that part turns and texts: all special ones but those of unknown words and of mere padding.

    Those that only the list of added tokens calls special are among them, as Llama 3's `<|start_header_id|>` is.

    Args:
        written: ids that the template writes itself; it may end turns with what also pads.
    """
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    parting = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id} - {None}
    padding = {tokenizer.pad_token_id} - {*written}
    return (special - {tokenizer.unk_token_id} - padding) | parting


def _around(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    bare = _ids(tokenizer, "a", plain=False)
    full = [int(i) for i in tokenizer("a")["input_ids"]]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:start], full[start + len(bare) :]
