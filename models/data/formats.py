"""From a row to a comparison: one small function per layout, and one entry in FORMATS."""

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import NamedTuple

from models.data.dialogue import Message
from models.data.fields import Fields, number, truth
from models.data.messages import ASSISTANT, HUMAN, behind, text, turns
from models.data.readers import Dropped, Unusable
from models.errors import BadData

PKU_LABEL = {"helpful": "better_response_id", "harmless": "safer_response_id"}
NEUTRAL = (
    ("answer_a", "response_a", "answer_1", "response_1"),
    ("answer_b", "response_b", "answer_2", "response_2"),
)
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns that say how good both answers are."""
LIKELY = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "context", "messages"),
    "chosen": ("chosen", "preferred", "better", "best", "winning", "good", *NEUTRAL[0]),
    "rejected": ("reject", "worse", "worst", "losing", "bad", *NEUTRAL[1]),
    "completion": ("completion", "response", "answer", "output"),
    "label": ("label", "desirable", "good", "safe", "thumb", "rating"),
}
"""What a column is often called, in part, for a first guess at a mapping."""
OTHERWISE = re.compile(r"(^|_)(id|model|rating|score|dis\w+|not|down|harm\w*)$|^un|_un|toxic")
"""What is called so is no text of a comparison, or says the contrary of what a label should say."""
DECIDES = ("prefer", "win", "label", "score", "rating", "better", "best", "choice")
"""Where a column is called so, in part, the names of two answers (`answer_a`) do not tell which one is better."""


class Pair(NamedTuple):
    """One comparison: the answer `chosen` was preferred to `rejected` for this prompt."""

    prompt: list[Message]
    chosen: str
    rejected: str


class Judged(NamedTuple):
    """One answer to a prompt, and whether it is desirable."""

    prompt: list[Message]
    answer: str
    desirable: bool


class Example(NamedTuple):
    """What one row gives: a pair where it holds two answers; for KTO the single answers, too."""

    pair: Pair | None
    answers: list[Judged]


class Format(NamedTuple):
    """A layout: what it is called, the columns that it is known by, and how a row of it is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[..., Pair | Judged]

    @property
    def unpaired(self) -> bool:
        """Whether a row holds one answer, good or bad: data for KTO alone."""
        return self.read in (judged, ended)


def label_of(metric: str) -> str:
    """Return the column of PKU-SafeRLHF, or one named alike, that holds the label of a metric."""
    return PKU_LABEL.get(metric, f"{metric}_response_id")


def pku(row: Fields, prompt: str, first: str, second: str) -> Pair:
    """Two answers, and in the label's column the index of the preferred one (Dai et al. 2024)."""
    asked = _prompt(row, prompt)
    answers = [row.text(first), row.text(second)]
    label = row.label or label_of(row.metric)
    told = row.get(label)
    if label not in row.row:
        raise Unusable(f"{label}: no such column; name the column that holds the label with `label` in the step")
    if told not in (0, 1, "0", "1") or isinstance(told, bool):
        raise Unusable(f"{label}: must be 0 or 1")
    return _pair(row, asked, answers[int(told)], answers[1 - int(told)])


def scaled(row: Fields, prompt: str, first: str, second: str, preference: str) -> Pair:
    """Two answers, and a preference from −3 (the first is much better) to 3 (Wang et al. 2025)."""
    asked = _prompt(row, prompt)
    one, other = row.text(first), row.text(second)
    degree = number(row.get(preference))
    if not -3 <= degree <= 3:
        raise Unusable(f"{row.called(preference)}: must be a number from -3 to 3")
    if degree == 0:
        raise Dropped("a tie: neither answer is preferred")
    return _pair(row, asked, one, other) if degree < 0 else _pair(row, asked, other, one)


def numbered(row: Fields, prompt: str, first: str, second: str, label: str) -> Pair:
    """Two answers, and 1 where the first is preferred, 0 where the second is (Ethayarajh et al. 2022)."""
    context, one, other = _prompt(row, prompt), row.text(first), row.text(second)
    return _pair(row, context, one, other) if row.truth(label) else _pair(row, context, other, one)


def arena(row: Fields, first: str, second: str, winner: str) -> Pair:
    """Two whole dialogues with one user, and which model the user preferred (Chiang et al. 2024)."""
    preferred = str(row.get(winner))
    if preferred in ("tie", "tie (bothbad)", "both_bad"):
        raise Dropped("a tie: neither answer is preferred")
    if preferred not in ("model_a", "model_b"):
        raise Unusable(f"{winner}: must be model_a, model_b or a tie")
    *context, _ = row.turns(first, "")
    *other, _ = row.turns(second, "")
    if len(context) > 1 and context != other:
        raise Dropped("the two dialogues differ before their last answers")
    return _compared(row, [], *((first, second) if preferred == "model_a" else (second, first)), speaker="")


def outputs(row: Fields, request: str, chosen: str, rejected: str) -> Pair:
    """OpenAI's fine-tuning on preferences: a request that holds messages, and two outputs of one message each."""
    asked = row.get(request)
    if not isinstance(asked, dict):
        raise Unusable(f"{request}: must hold messages")
    if asked.get("tools"):
        raise Unusable(f"{request}: tools are not supported")
    return _compared(row, turns(asked.get("messages"), f"{request}.messages", "user"), chosen, rejected)


def compared(row: Fields, prompt: str, chosen: str, rejected: str) -> Pair:
    """A prompt and two answers, alone or as whole dialogues that hold the prompt: TRL, UltraFeedback, Orca, Alpaca."""
    return _compared(row, _prompt(row, prompt), chosen, rejected)


def dialogues(row: Fields, chosen: str, rejected: str) -> Pair:
    """Two whole dialogues that differ in their last answer, as messages or in HH-RLHF's markup (Bai et al. 2022)."""
    return _compared(row, [], chosen, rejected, speaker="")


def replaced(row: Fields, messages: str, rejected: str) -> Pair:
    """ms-swift: messages that end with the preferred answer, and the other answer, alone or with what was asked."""
    context, answer = _answer([], row.turns(messages, "user"), row.called(messages))
    other, worse = _answer(context, row.turns(rejected, "assistant"), row.called(rejected))
    return _pair(row, _same(context, other, row, messages, rejected), answer, worse)


def judged(row: Fields, prompt: str, answer: str, flag: str) -> Judged:
    """One answer, and whether it is desirable: TRL, BeaverTails, Alpaca."""
    if flag == "is_safe" and row.metric == "helpful":
        raise Unusable("is_safe: says what is safe, not what is helpful; name the column to use in `columns`")
    context, said = _answer(_prompt(row, prompt), row.turns(answer, "assistant"), row.called(answer))
    return _judged(row, context, said, row.truth(flag))


def ended(row: Fields, messages: str, flag: str) -> Judged:
    """Messages that end with the answer, and whether it is desirable: ShareGPT, ms-swift."""
    context, said = _answer([], row.turns(messages, "user"), row.called(messages))
    return _judged(row, context, said, row.truth(flag))


FORMATS = (
    Format("PKU-SafeRLHF", ("prompt", "response_0", "response_1"), pku),
    Format("HelpSteer3", ("context", "response1", "response2", "overall_preference"), scaled),
    Format("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), outputs),
    Format("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), numbered),
    Format("Chatbot Arena", ("conversation_a", "conversation_b", "winner"), arena),
    Format("ms-swift preference", ("messages", "rejected_response"), replaced),
    Format("ms-swift preference, two dialogues", ("messages", "rejected_messages"), replaced),
    Format("TRL preference", ("prompt", "chosen", "rejected"), compared),
    Format("Orca", ("question", "chosen", "rejected"), compared),
    Format("Alpaca preference", ("instruction", "chosen", "rejected"), compared),
    Format("distilabel Orca", ("input", "chosen", "rejected"), compared),
    Format("ShareGPT preference", ("conversations", "chosen", "rejected"), compared),
    Format("messages with two answers", ("messages", "chosen", "rejected"), compared),
    Format("HH-RLHF", ("chosen", "rejected"), dialogues),
    Format("TRL unpaired", ("prompt", "completion", "label"), judged),
    Format("BeaverTails", ("prompt", "response", "is_safe"), judged),
    Format("Alpaca KTO", ("instruction", "output", "kto_tag"), judged),
    Format("ShareGPT KTO", ("conversations", "kto_tag"), ended),
    Format("ms-swift KTO", ("messages", "label"), ended),
)
"""The first one whose columns all stand in the first row reads the file; `read` is given the row and these columns."""


CORPORA = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("messages",),
    ("conversations",),
)
"""Columns of a corpus for supervised fine-tuning: prompt and answer, or messages that end with the answer."""


def taught(row: Fields) -> tuple[list[Message], str]:
    """Return prompt and answer of a row of a corpus.

    Raises:
        Unusable: why the row cannot be taught.
    """
    columns = next((one for one in CORPORA if set(one) <= row.names), ())
    if not columns:
        raise Unusable(f"needs prompt and completion, or messages; its columns are {_list(row.names)}")
    if bad := next((name for name in ("is_safe", "kto_tag", "label") if truth(row.row.get(name)) is False), ""):
        raise Unusable(f"{bad}: is false, so the answer is not one to be taught; take such rows out")
    prompt, *answer = columns
    asked = _prompt(row, prompt) if answer else []
    context, said = _answer(asked, row.turns((*answer, prompt)[0], "assistant"), row.called((*answer, prompt)[0]))
    _answered(said, "answer")
    return _asked(row, context), said


def format_of(row: Fields, where: str, like: Format | None = None) -> Format:
    """Return the format of this row, by its columns.

    Args:
        where: the file, for the sentence.
        like: the format of the rows before.

    Raises:
        BadData: no known format has these columns, or the recipe names one that is not there.
    """
    named = set(row.columns) - {"system"}
    found = next((one for one in FORMATS if named <= set(one.columns) <= row.names), like)
    if like and found:
        return found  # a row that lacks a column is told so by the format of the others
    for name, column in row.columns.items():
        if column not in row.row:
            raise BadData(f"{where}: columns.{name}: no column {column!r}; the file has {_list(set(row.row))}")
    if found is None or _no_dialogue(row, found):
        raise BadData(f"{where}: {_unknown(row)}")
    if row.label and found.read is not pku:
        raise BadData(f"{where}: label {row.label!r}: {found.name} needs none; take it out, or name it in `columns`")
    return found


def _no_dialogue(row: Fields, found: Format) -> bool:
    """Whether two answers only look like two dialogues, since the column with the prompt has a name of its own."""
    if found.read is not dialogues or isinstance(row.row["chosen"], list) or ASSISTANT in str(row.row["chosen"]):
        return False
    return _guessed(row, ("prompt",))["prompt"] != "…"


def example(row: Fields, known: Format, paired: bool) -> Example:
    """Read one row for a loss that compares pairs, or for one that learns from single answers, as KTO.

    For single answers, both answers of a PKU row are taken by `is_response_i_safe`, where the metric is harmless
    and no label is named; any other pair as one desirable and one undesirable answer.

    Raises:
        Unusable: why the row is not used.
    """
    found = known.read(row, *known.columns)
    if isinstance(found, Judged):
        if paired:
            raise Unusable('the row holds one answer, DPO needs two; use method = "kto" for unpaired data')
        return Example(None, [found])
    if paired:
        return Example(found, [])
    if known.read is pku and row.metric == "harmless" and not row.label:
        told = [(row.text(f"response_{i}"), row.truth(f"is_response_{i}_safe")) for i in (0, 1)]
        return Example(found, [_judged(row, found.prompt, answer, safe) for answer, safe in told])
    return Example(found, [Judged(found.prompt, found.chosen, True), Judged(found.prompt, found.rejected, False)])


def _prompt(row: Fields, name: str) -> list[Message]:
    """Return what was asked; Alpaca's `input` follows the instruction, its and ms-swift's `history` goes before."""
    asked = row.turns(name, "user")
    if not {name, row.called(name)} & {"instruction", "query"}:
        return asked
    if asked and "instruction" in (name, row.called(name)) and (more := row.get("input")):
        last = Message(role="user", content=f"{asked[-1]['content']}\n{text(more, row.called('input'))}")
        asked = [*asked[:-1], last]
    before = row.get("history") or []
    if not isinstance(before, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in before
    ):
        raise Unusable("history: must be a list of [question, answer]")
    roles = ("user", "assistant")
    return [Message(role=roles[i], content=pair[i]) for pair in before for i in (0, 1)] + asked


def _answer(asked: list[Message], side: list[Message], name: str) -> tuple[list[Message], str]:
    """Return (context, answer) of a side that is an answer alone, or a whole dialogue that holds what was asked."""
    *context, last = side
    if last["role"] != "assistant":
        raise Unusable(f"{name}: ends with a turn of the {last['role']}; the last turn must be the assistant's")
    held = {turn["content"].strip() for turn in context}
    if context and any(turn["content"].strip() not in held for turn in asked if turn["role"] != "system"):
        raise Unusable(f"{name}: is a dialogue that does not hold the prompt")
    if context and asked and asked[0]["role"] == "system":
        whole = behind(asked[0], context)
        if whole is None:
            raise Unusable(f"{name}: begins with another system message than the prompt")
        return whole, last["content"]
    return context or asked, last["content"]


def _compared(row: Fields, asked: list[Message], chosen: str, rejected: str, speaker: str = "assistant") -> Pair:
    if row.get("status") == "tie" or any(number(row.get(one)) == number(row.get(other)) for one, other in SCORES):
        raise Dropped("a tie: neither answer is preferred")
    cells = row.holds_a_message(chosen) and row.holds_a_message(rejected)  # one alone is an answer in JSON
    (context, answer), (other, worse) = (
        _answer(asked, row.turns(name, speaker, cells), row.called(name)) for name in (chosen, rejected)
    )
    return _pair(row, _same(context, other, row, chosen, rejected), answer, worse)


def _same(context: list[Message], other: list[Message], row: Fields, *names: str) -> list[Message]:
    """Return the context that both answers have."""
    ours, theirs = ([(turn["role"], turn["content"].strip()) for turn in told] for told in (context, other))
    if ours != theirs:
        raise Unusable(f"{' and '.join(map(row.called, names))} have different contexts")
    return context


def _pair(row: Fields, context: list[Message], chosen: str, rejected: str) -> Pair:
    _answered(chosen, "chosen")
    _answered(rejected, "rejected")
    if chosen == rejected:
        raise Unusable("the two answers are identical")
    return Pair(_asked(row, context), chosen, rejected)


def _judged(row: Fields, context: list[Message], answer: str, desirable: bool) -> Judged:
    _answered(answer, "answer")
    return Judged(_asked(row, context), answer, desirable)


def _answered(answer: str, name: str) -> None:
    if not answer.strip():
        raise Unusable(f"{name}: the answer is empty")
    if HUMAN in answer:
        raise Unusable(f"{name}: the answer goes on with a turn of the user ('Human:')")


def _asked(row: Fields, context: list[Message]) -> list[Message]:
    """Return the context, after the system message of a column `system` or `system_prompt`."""
    if not context or context[-1]["role"] != "user":
        raise Unusable("prompt: must end with a turn of the user")
    if not context[-1]["content"].strip():
        raise Unusable("prompt: the last turn of the user is empty")
    name = next((name for name in ("system", "system_prompt") if row.get(name)), "")
    if not name:
        return context
    system = Message(role="system", content=text(row.get(name), row.called(name)))
    whole = behind(system, context)
    if whole is None:
        raise Unusable(f"{row.called(name)}: the dialogue begins with another system message")
    return whole


def _unknown(row: Fields) -> str:
    """Say which columns there are, which format is the nearest, and how to name the columns."""
    pairs, alone = (
        _guessed(row, names) for names in (("prompt", "chosen", "rejected"), ("prompt", "completion", "label"))
    )
    two = list(pairs.values()).count("…") <= list(alone.values()).count("…")
    two = two or any(word in column.lower() for column in row.row for word in NEUTRAL[1])
    known = [one for one in FORMATS if (one.read in (judged, ended)) is not two]
    near = max(known, key=lambda one: sum(_likeness(column, row.names) for column in one.columns) / len(one.columns))
    mapping = ", ".join(f'{name} = "{column}"' for name, column in (pairs if two else alone).items())
    unsure = "; where … stands, make a column of what the file has" if "…" in mapping else ""
    return (
        f"no known format has the columns {_list(set(row.row))}; the nearest is {near.name} ({', '.join(near.columns)})"
        f"; name the columns in the recipe: columns = {{ {mapping} }} (docs/data.md){unsure}"
    )


def _guessed(row: Fields, names: tuple[str, ...]) -> dict[str, str]:
    """Return our name → the column that is most likely meant, `…` for none; each column once."""
    left, found = [column for column in sorted(row.row) if not OTHERWISE.search(column.lower())], {}
    decided = any(word in column.lower() for column in row.row for word in DECIDES)
    neutral = {*NEUTRAL[0], *NEUTRAL[1]} if decided else set()
    for name in names:
        words = [word for word in LIKELY[name] if word not in neutral]
        found[name] = next((column for word in words for column in left if word in column.lower()), "…")
        left = [column for column in left if column != found[name]]
    return found


def _likeness(column: str, names: set[str]) -> float:
    return max((SequenceMatcher(None, column, name).ratio() for name in names), default=0.0)


def _list(names: set[str]) -> str:
    """Return up to twenty names."""
    shown = sorted(names)
    return (", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")) or "(none)"
