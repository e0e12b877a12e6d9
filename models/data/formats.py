"""From a row to a comparison: one small function per layout, and one entry in FORMATS."""

from collections.abc import Callable
from difflib import SequenceMatcher
from typing import NamedTuple

from models.data.dialogue import Message
from models.data.fields import NEUTRAL, Fields, guessed_columns, listed, number, truth
from models.data.messages import ASSISTANT, answer_of, behind, refuse_no_answer, same_context, text, turns
from models.errors import BadData
from models.files.raw_rows import Dropped, Unusable

PKU_LABEL = {"helpful": "better_response_id", "harmless": "safer_response_id"}
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns that say how good both answers are."""


class Pair(NamedTuple):
    """One comparison: the answer `chosen` was preferred to `rejected` for this prompt."""

    prompt: list[Message]
    chosen: str
    rejected: str


class JudgedAnswer(NamedTuple):
    """One answer to a prompt, and whether it is desirable."""

    prompt: list[Message]
    answer: str
    desirable: bool


class Example(NamedTuple):
    """What one row gives: a pair where it holds two answers; for KTO the single answers, too."""

    pair: Pair | None
    answers: list[JudgedAnswer]


class Format(NamedTuple):
    """A layout: what it is called, the columns that it is known by, and how a row of it is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[..., Pair | JudgedAnswer]

    @property
    def unpaired(self) -> bool:
        """Whether a row holds one answer, good or bad: data for KTO alone."""
        return self.read in (judged_answer, judged_dialogue)


def label_of(metric: str) -> str:
    """Return the column of PKU-SafeRLHF, or one named alike, that holds the label of a metric."""
    return PKU_LABEL.get(metric, f"{metric}_response_id")


def pku_pair(row: Fields, prompt: str, first: str, second: str) -> Pair:
    """Two answers, and in the label's column the index of the preferred one (Dai et al. 2024)."""
    context = _prompt(row, prompt)
    answers = [row.text(first), row.text(second)]
    label = row.label or label_of(row.metric)
    index = row.get(label)
    if label not in row.file_columns:
        raise Unusable(f"{label}: no such column; name the column that holds the label with `label` in the step")
    # True equals 1, but true or false does not say which answer is meant
    if index not in (0, 1, "0", "1") or isinstance(index, bool):
        raise Unusable(f"{label}: must be 0 or 1")
    preferred = 0 if index in (0, "0") else 1
    return _pair(row, context, answers[preferred], answers[1 - preferred])


def scaled_pair(row: Fields, prompt: str, first: str, second: str, preference: str) -> Pair:
    """Two answers, and a preference from −3 (the first is much better) to 3 (Wang et al. 2025)."""
    context, a, b = _prompt(row, prompt), row.text(first), row.text(second)
    degree = number(row.get(preference))
    if not -3 <= degree <= 3:  # written this way round it refuses NaN too, which `number` returns for other texts
        raise Unusable(f"{row.called(preference)}: must be a number from -3 to 3")
    if degree == 0:
        raise Dropped("a tie: neither answer is preferred")
    return _pair(row, context, a, b) if degree < 0 else _pair(row, context, b, a)


def binary_pair(row: Fields, prompt: str, first: str, second: str, label: str) -> Pair:
    """Two answers, and 1 where the first is preferred, 0 where the second is (Ethayarajh et al. 2022)."""
    context, a, b = _prompt(row, prompt), row.text(first), row.text(second)
    return _pair(row, context, a, b) if row.truth(label) else _pair(row, context, b, a)


def arena_pair(row: Fields, first: str, second: str, winner: str) -> Pair:
    """Two whole dialogues with one user, and which model the user preferred (Chiang et al. 2024)."""
    preferred = str(row.get(winner))
    if preferred in ("tie", "tie (bothbad)", "both_bad"):
        raise Dropped("a tie: neither answer is preferred")
    if preferred not in ("model_a", "model_b"):
        raise Unusable(f"{winner}: must be model_a, model_b or a tie")
    *context, _ = row.turns(first, "")
    *other_context, _ = row.turns(second, "")
    # in a longer dialogue each model goes on from its own answers, so this is no sign of a broken row
    if len(context) > 1 and context != other_context:
        raise Dropped("the two dialogues differ before their last answers")
    return _compared(row, [], *((first, second) if preferred == "model_a" else (second, first)), speaker="")


def openai_pair(row: Fields, request: str, chosen: str, rejected: str) -> Pair:
    """OpenAI's fine-tuning on preferences: a request that holds messages, and two outputs of one message each."""
    content = row.get(request)
    if not isinstance(content, dict):
        raise Unusable(f"{request}: must hold messages")
    if content.get("tools"):
        raise Unusable(f"{request}: tools are not supported")
    return _compared(row, turns(content.get("messages"), f"{request}.messages", "user"), chosen, rejected)


def prompt_pair(row: Fields, prompt: str, chosen: str, rejected: str) -> Pair:
    """A prompt and two answers, alone or as whole dialogues that hold the prompt: TRL, UltraFeedback, Orca, Alpaca."""
    return _compared(row, _prompt(row, prompt), chosen, rejected)


def dialogue_pair(row: Fields, chosen: str, rejected: str) -> Pair:
    """Two whole dialogues that differ in their last answer, as messages or in HH-RLHF's markup (Bai et al. 2022)."""
    return _compared(row, [], chosen, rejected, speaker="")


def replaced_pair(row: Fields, messages: str, rejected: str) -> Pair:
    """ms-swift: messages that end with the preferred answer, and the other answer, alone or with the prompt."""
    context, better = answer_of([], row.turns(messages, "user"), row.called(messages))
    other_context, worse = answer_of(context, row.turns(rejected, "assistant"), row.called(rejected))
    names = f"{row.called(messages)} and {row.called(rejected)}"
    return _pair(row, same_context(context, other_context, names), better, worse)


def judged_answer(row: Fields, prompt: str, answer: str, flag: str) -> JudgedAnswer:
    """One answer, and whether it is desirable: TRL, BeaverTails, Alpaca."""
    if flag == "is_safe" and row.metric == "helpful":
        raise Unusable("is_safe: says what is safe, not what is helpful; name the column to use in `columns`")
    context, words = answer_of(_prompt(row, prompt), row.turns(answer, "assistant"), row.called(answer))
    return _judged(row, context, words, row.truth(flag))


def judged_dialogue(row: Fields, messages: str, flag: str) -> JudgedAnswer:
    """Messages that end with the answer, and whether it is desirable: ShareGPT, ms-swift."""
    context, answer = answer_of([], row.turns(messages, "user"), row.called(messages))
    return _judged(row, context, answer, row.truth(flag))


FORMATS = (
    Format("PKU-SafeRLHF", ("prompt", "response_0", "response_1"), pku_pair),
    Format("HelpSteer3", ("context", "response1", "response2", "overall_preference"), scaled_pair),
    Format("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), openai_pair),
    Format("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), binary_pair),
    Format("Chatbot Arena", ("conversation_a", "conversation_b", "winner"), arena_pair),
    Format("ms-swift preference", ("messages", "rejected_response"), replaced_pair),
    Format("ms-swift preference, two dialogues", ("messages", "rejected_messages"), replaced_pair),
    Format("TRL preference", ("prompt", "chosen", "rejected"), prompt_pair),
    Format("Orca", ("question", "chosen", "rejected"), prompt_pair),
    Format("Alpaca preference", ("instruction", "chosen", "rejected"), prompt_pair),
    Format("distilabel Orca", ("input", "chosen", "rejected"), prompt_pair),
    Format("ShareGPT preference", ("conversations", "chosen", "rejected"), prompt_pair),
    Format("messages with two answers", ("messages", "chosen", "rejected"), prompt_pair),
    Format("HH-RLHF", ("chosen", "rejected"), dialogue_pair),
    Format("TRL unpaired", ("prompt", "completion", "label"), judged_answer),
    Format("BeaverTails", ("prompt", "response", "is_safe"), judged_answer),
    Format("Alpaca KTO", ("instruction", "output", "kto_tag"), judged_answer),
    Format("ShareGPT KTO", ("conversations", "kto_tag"), judged_dialogue),
    Format("ms-swift KTO", ("messages", "label"), judged_dialogue),
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


def demonstration(row: Fields) -> tuple[list[Message], str]:
    """Return prompt and answer of a row of a corpus.

    Raises:
        Unusable: why the row cannot be trained on.
    """
    columns = next((names for names in CORPORA if set(names) <= row.names), ())
    if not columns:
        raise Unusable(f"needs prompt and completion, or messages; its columns are {listed(row.names)}")
    # a file for KTO fits these columns as well; its bad answers must not be imitated
    if bad := next((name for name in ("is_safe", "kto_tag", "label") if truth(row.cell(name)) is False), ""):
        raise Unusable(f"{bad}: is false, so the answer is not one to be taught; take such rows out")
    first, last = columns[0], columns[-1]  # one and the same column where the messages end with the answer
    prompt = _prompt(row, first) if first != last else []
    context, answer = answer_of(prompt, row.turns(last, "assistant"), row.called(last))
    refuse_no_answer(answer, "answer")
    return _whole_prompt(row, context), answer


def format_of(row: Fields, where: str, like: Format | None = None) -> Format:
    """Return the format of this row, by its columns.

    Args:
        where: the file, for the sentence.
        like: the format of the rows before.

    Raises:
        BadData: no known format has these columns, or the recipe names one that is not there.
    """
    mapped = set(row.columns) - {"system"}
    # a mapping says what the file holds, so a format that lacks one of its columns would be the wrong one
    fitting = next((f for f in FORMATS if mapped <= set(f.columns) <= row.names), like)
    if like and fitting:
        return fitting  # a row that lacks a column: the format of the rows before says which one is missing
    for name, column in row.columns.items():
        if column not in row.file_columns:
            raise BadData(f"{where}: columns.{name}: no column {column!r}; the file has {listed(row.file_columns)}")
    if fitting is None or _is_no_dialogue(row, fitting):
        raise BadData(f"{where}: {_unknown(row)}")
    if row.label and fitting.read is not pku_pair:
        raise BadData(f"{where}: label {row.label!r}: {fitting.name} needs none; take it out, or name it in `columns`")
    return fitting


def _is_no_dialogue(row: Fields, fitting: Format) -> bool:
    """Whether two answers only look like two dialogues, since the column with the prompt has a name of its own."""
    if fitting.read is not dialogue_pair:
        return False
    chosen = row.cell(row.called("chosen"))
    if isinstance(chosen, list) or ASSISTANT in str(chosen):
        return False
    return guessed_columns(row.file_columns, ("prompt",))["prompt"] != "…"


def example(row: Fields, layout: Format, paired: bool) -> Example:
    """Read one row for a loss that compares pairs, or for one that learns from single answers, as KTO.

    For single answers, both answers of a PKU row are taken by `is_response_i_safe`, where the metric is harmless
    and no label is named; any other pair as one desirable and one undesirable answer.

    Raises:
        Unusable: why the row is not used.
    """
    comparison = layout.read(row, *layout.columns)
    if isinstance(comparison, JudgedAnswer):
        if paired:
            raise Unusable('the row holds one answer, DPO needs two; use method = "kto" for unpaired data')
        return Example(None, [comparison])
    if paired:
        return Example(comparison, [])
    prompt = comparison.prompt
    if layout.read is pku_pair and row.metric == "harmless" and not row.label:
        # the safer of two answers may still be unsafe, so each answer is labelled for itself
        labelled = [(row.text(f"response_{i}"), row.truth(f"is_response_{i}_safe")) for i in (0, 1)]
        return Example(comparison, [_judged(row, prompt, answer, is_safe) for answer, is_safe in labelled])
    return Example(
        comparison, [JudgedAnswer(prompt, comparison.chosen, True), JudgedAnswer(prompt, comparison.rejected, False)]
    )


def _prompt(row: Fields, name: str) -> list[Message]:
    """Return the prompt; Alpaca's `input` follows the instruction, its and ms-swift's `history` goes before."""
    prompt = row.turns(name, "user")
    # by our name or by the file's: a recipe may map our `prompt` to a column called `instruction`
    if not {name, row.called(name)} & {"instruction", "query"}:
        return prompt
    if prompt and "instruction" in (name, row.called(name)) and (more := row.get("input")):
        last = Message(role="user", content=f"{prompt[-1]['content']}\n{text(more, row.called('input'))}")
        prompt = [*prompt[:-1], last]
    before = row.get("history") or []
    if not isinstance(before, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in before
    ):
        raise Unusable("history: must be a list of [question, answer]")
    roles = ("user", "assistant")
    return [Message(role=roles[i], content=pair[i]) for pair in before for i in (0, 1)] + prompt


def _compared(row: Fields, prompt: list[Message], chosen: str, rejected: str, speaker: str = "assistant") -> Pair:
    """Return the pair of two columns that are named by which answer is better.

    Args:
        prompt: empty where both columns hold whole dialogues.
        speaker: who says a plain text; empty: it must be a dialogue in HH-RLHF's markup.
    """
    if row.get("status") == "tie" or any(number(row.get(a)) == number(row.get(b)) for a, b in SCORES):
        raise Dropped("a tie: neither answer is preferred")
    # where only one of the answers looks like a message in JSON, it is an answer in JSON
    in_cells = row.holds_a_message(chosen) and row.holds_a_message(rejected)
    (context, better), (other_context, worse) = (
        answer_of(prompt, row.turns(name, speaker, in_cells), row.called(name)) for name in (chosen, rejected)
    )
    names = f"{row.called(chosen)} and {row.called(rejected)}"
    return _pair(row, same_context(context, other_context, names), better, worse)


def _pair(row: Fields, context: list[Message], chosen: str, rejected: str) -> Pair:
    refuse_no_answer(chosen, "chosen")
    refuse_no_answer(rejected, "rejected")
    if chosen == rejected:
        raise Unusable("the two answers are identical")
    return Pair(_whole_prompt(row, context), chosen, rejected)


def _judged(row: Fields, context: list[Message], answer: str, desirable: bool) -> JudgedAnswer:
    refuse_no_answer(answer, "answer")
    return JudgedAnswer(_whole_prompt(row, context), answer, desirable)


def _whole_prompt(row: Fields, context: list[Message]) -> list[Message]:
    """Return the context, after the system message of a column `system` or `system_prompt`.

    Raises:
        Unusable: it does not end with a question, or begins with another system message.
    """
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
    columns = row.file_columns
    pair = guessed_columns(columns, ("prompt", "chosen", "rejected"))
    single = guessed_columns(columns, ("prompt", "completion", "label"))
    # the mapping with fewer gaps is suggested; `answer_b` shows that there are two answers, whatever else is missing
    two = list(pair.values()).count("…") <= list(single.values()).count("…")
    two = two or any(word in column.lower() for column in columns for word in NEUTRAL[1])
    formats = [f for f in FORMATS if f.unpaired is not two]
    near = max(formats, key=lambda f: sum(_likeness(column, row.names) for column in f.columns) / len(f.columns))
    mapping = ", ".join(f'{name} = "{column}"' for name, column in (pair if two else single).items())
    unsure = "; where … stands, make a column of what the file has" if "…" in mapping else ""
    return (
        f"no known format has the columns {listed(columns)}; the nearest is {near.name} ({', '.join(near.columns)})"
        f"; name the columns in the recipe: columns = {{ {mapping} }} (docs/data.md){unsure}"
    )


def _likeness(column: str, names: set[str]) -> float:
    return max((SequenceMatcher(None, column, name).ratio() for name in names), default=0.0)
