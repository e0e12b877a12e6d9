"""The tokens that a classifier reads of a dialogue. No text of a prompt or an answer can become control tokens."""

import re
from typing import TYPE_CHECKING, NamedTuple

from models.artifacts import content_digest
from models.data.dialogue import Message
from models.files.foreign import refuse_if_it_fails

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Unwritable(Exception):
    """The judge cannot be shown this dialogue; says why. Its verdict has failed."""


class Part(NamedTuple):
    """A piece of a rendered dialogue."""

    text: str
    spoken: bool
    """It is what a turn says; else the template wrote it."""


def read_as(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str) -> list[int]:
    """Return the token ids that a judge reads of a dialogue, which ends with the answer.

    Args:
        text: how prompt and answer are written; empty means the chat template.

    Raises:
        Unwritable: the template refuses or drops a turn, or one holds control tokens that cannot be read as words.
    """
    parts = _parts(tokenizer, turns, text)
    whole = _whole(tokenizer, turns, text, parts)
    ids = [int(i) for i in tokenizer(whole, add_special_tokens=bool(text))["input_ids"]]
    # A chat template writes the special tokens at the ends itself; to a text the tokenizer adds them.
    before, after = _around(tokenizer) if text else ([], [])
    template_ids = [i for part in parts if not part.spoken for i in _ids(tokenizer, part.text, plain=False)]
    control = _control(tokenizer, template_ids)
    if sum(i in control for i in ids) == sum(i in control for i in [*before, *template_ids, *after]):
        return ids
    # Some turn spells a control token. So each part is tokenised alone, turns without any special tokens; words may be
    # cut otherwise where two parts meet, which is why this is not done always.
    rows = [(_ids(tokenizer, part.text, plain=part.spoken), part.spoken) for part in parts]
    if any(spoken and control & {*row} for row, spoken in rows):
        raise Unwritable("prompt or answer holds control tokens that the judge cannot read as words")
    return [*before, *(i for row, _ in rows for i in row), *after]


def _parts(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str) -> list[Part]:
    """Return the rendered dialogue in parts, of which each is either what a turn says or what the template writes."""
    if text:
        content_of = {"{prompt}": "\n\n".join(turn["content"] for turn in turns[:-1]), "{answer}": turns[-1]["content"]}
        rendered = text
    else:
        # The template renders marks in place of the turns, which are then easy to find in what it wrote.
        mark = content_digest([turn["content"] for turn in turns])[:32]  # no turn can hold its own hash
        content_of = {f"{mark}{i:04}": turn["content"] for i, turn in enumerate(turns)}
        marked = [Message(role=turn["role"], content=mark) for turn, mark in zip(turns, content_of, strict=True)]
        rendered = _rendered(tokenizer, marked)
    if any(mark not in rendered for mark in content_of):
        raise Unwritable("the judge's chat template leaves a turn out, or changes what it says")
    pieces = re.split("(" + "|".join(map(re.escape, content_of)) + ")", rendered)
    return [Part(content_of.get(piece, piece), piece in content_of) for piece in pieces if piece]


def _whole(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], text: str, parts: list[Part]) -> str:
    """Return the dialogue as the template writes it, or its parts together where the template would hide some text.

    The two can differ: a template may cut a part of what a turn says, but cannot cut a part of a mark.
    """
    rendered = "" if text else _rendered(tokenizer, turns)
    hides = any(turn["content"].strip() not in rendered for turn in turns)  # a template may strip spaces
    return "".join(part.text for part in parts) if text or hides else rendered


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: list[Message]) -> str:
    """Return what the chat template writes; raises Unwritable where it fails."""
    with refuse_if_it_fails(Unwritable, "the judge's chat template cannot write these messages"):
        return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, plain: bool) -> list[int]:
    """Return the ids of a text alone; `plain` reads control tokens in it as words."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]]


def _control(tokenizer: "PreTrainedTokenizerBase", template_ids: list[int]) -> set[int]:
    """Return the ids that divide turns and texts: all special ones but those of unknown words and of mere padding.

    Some are called special by the list of added tokens alone, as Llama 3's `<|start_header_id|>`; they count too.

    Args:
        template_ids: ids that the template writes itself; a template may end turns with the token that also pads.
    """
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    dividing = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id} - {None}
    padding = {tokenizer.pad_token_id} - {*template_ids}
    return (special - {tokenizer.unk_token_id} - padding) | dividing


def _around(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text, seen on a text of one letter."""
    bare = _ids(tokenizer, "a", plain=False)
    full = [int(i) for i in tokenizer("a")["input_ids"]]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:start], full[start + len(bare) :]
