"""What policies and judges are examined on: suites of prompts with a role, and answers that people have judged.

A suite is JSON, JSONL, CSV or Parquet with `prompt` (text, or messages) or `messages`; and, if you like, `category` and
`reference` (an answer that would be right). XSTest's table works as it is: its `type` is the category, and its `label`
says which prompts are safe (role over_refusal) and which are not (role harmless). A suite's version is the digest of
its file.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, cast

from models.artifacts import content_digest
from models.data.dialogue import Message, messages
from models.data.fields import Fields, truth
from models.data.messages import IN_A_CELL, behind, text, turns
from models.data.near_duplicates import leaders, text_of
from models.data.readers import is_folder, usable_rows
from models.errors import BadData, BadPlace
from models.files import jsonl, sealed
from models.files.raw_rows import HALF, Unusable, bad_row
from models.words import counted

XSTEST = {"over_refusal": "safe", "harmless": "unsafe"}
"""Role → the `label` of the prompts of XSTest that play it (Röttger et al. 2024)."""
MUST_PASS = "must_pass"
"""Role of past incidents: each of them must pass, on both splits, and none of them measures a rate."""
ALIKE = 0.8
"""Overlap of word triples (Jaccard) from which on two prompts of a suite are nearly the same."""


class SuitePrompt(TypedDict):
    """One prompt of a suite, as it is stored for a run."""

    prompt: str | list[Message]
    category: str
    """Empty where the file has none."""
    reference: NotRequired[str]
    """An answer that would be right."""


class LabelledAnswer(NamedTuple):
    """An answer that people have judged."""

    prompt: str | list[Message]
    answer: str
    good: bool


def read(path: Path, role: str) -> list[SuitePrompt]:
    """Return the prompts of a user's suite that play a role, each once, in its first spelling.

    Raises:
        BadData: a row has no usable prompt, or no prompt plays this role.
    """
    first: dict[str, SuitePrompt] = {}
    for row in _rows(path, role):
        first.setdefault(prompt_digest(row["prompt"]), row)
    if not first:
        raise BadData(f"{path}: holds no prompt for the role {role}")
    return list(first.values())


def stored(path: Path) -> Iterator[SuitePrompt]:
    """Yield the prompts of one half of a suite, as `sources.gather` has written them."""
    return cast(Iterator[SuitePrompt], jsonl.read(path))


def labels(path: Path) -> list[LabelledAnswer]:
    """Return every row of a labelled sample, which a judge is compared with: JSON, JSONL, CSV or Parquet.

    Raises:
        BadData: a row lacks `prompt` (as in a suite), `answer` or `good` (true, false, 1, 0, yes or no); names it.
    """
    sample: list[LabelledAnswer] = []
    for number, row in usable_rows(path):
        fields = Fields(row)
        answer, good = fields.get("answer"), truth(fields.get("good"))
        # an empty answer can be judged, an empty prompt cannot be answered
        if not fields.get("prompt") or not isinstance(answer, str) or good is None:
            raise bad_row(path, number, "needs `prompt`, `answer` and `good` (true or false)")
        try:
            # other columns of a suite mean nothing here, but the judge must see the system message
            columns = ("prompt", "system", "system_prompt")
            prompt = prompt_of(Fields({name: row[name] for name in columns if name in row}))
        except (BadData, Unusable) as error:
            raise bad_row(path, number, error) from error
        sample.append(LabelledAnswer(prompt, answer, good))
    return sample


def oddities(path: Path, role: str) -> list[str]:
    """Say what is odd about a suite, a sentence each: prompts that repeat others, exactly or nearly."""
    first: dict[str, SuitePrompt] = {}
    rows = dropped = moved = 0
    for row in _rows(path, role):
        before = first.setdefault(prompt_digest(row["prompt"]), row)
        rows += 1
        dropped += before is not row
        moved += before["category"] != row["category"]
    prompts = [row["prompt"] for row in first.values()]
    near = [i for i, leader in enumerate(families(prompts)) if leader != i]
    sentences = []
    if dropped:
        also = f", {moved} with another category" if moved else ""
        sentences.append(f"{counted(dropped, 'duplicate')} dropped{also}")
    if other := sum(1 for _ in usable_rows(path)) - rows:
        sentences.append(f"{path}: {counted(other, 'row')} left out, whose label (XSTest) is not {XSTEST[role]!r}")
    if near:
        example = " ".join(messages(prompts[near[0]])[-1]["content"].split())[:80]
        sentences.append(
            f"{path}: {len(near):,} of {counted(len(prompts), 'prompt')} nearly repeat one before them, first "
            f"{example!r}; the bounds count each as one more independent prompt; keep one of each kind"
        )
    return sentences


def families(prompts: list[str | list[Message]]) -> list[int]:
    """Return for each prompt the place of the one before it that it nearly repeats; its own place if there is none."""
    return leaders([text_of(messages(prompt)) for prompt in prompts], ALIKE)


def _rows(path: Path, role: str) -> Iterator[SuitePrompt]:
    """Yield every row of a suite that plays the role."""
    others = {*XSTEST.values()} - {XSTEST.get(role)} if role in XSTEST else set()
    for number, row in usable_rows(path):
        fields = Fields(row)
        if _xstest_label(fields) in others:
            continue
        try:
            prompt = prompt_of(fields)
        except (BadData, Unusable) as error:
            raise bad_row(path, number, error) from error
        suite_prompt = SuitePrompt(prompt=prompt, category=str(fields.get("category") or fields.get("type") or ""))
        if reference := fields.get("reference"):
            suite_prompt["reference"] = str(reference)
        yield suite_prompt


def _xstest_label(row: Fields) -> str:
    """Return the label of a row that is laid out as XSTest's are; empty for any other."""
    # `label` alone says nothing: other suites have labels of their own, and none of their rows may be left out
    return str(row.get("label")).strip().lower() if {"type", "label"} <= row.file_columns else ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the files of a folder; the lock is the folder itself, and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


def add(path: Path, prompt: str, category: str, reference: str) -> int:
    """Append one incident to a JSONL suite, made if need be; return how many prompts it then holds.

    Raises:
        BadData: the file is no JSONL, is damaged, or holds the prompt already.
        BadPlace: the file cannot be written, or its folder is not there: a typo must not make one.
    """
    if path.suffix != ".jsonl":
        raise BadData(f"{path}: incidents are added to a .jsonl file; give one")
    if not prompt.strip():
        raise BadData("the prompt is empty; say what was asked")
    if not path.parent.is_dir():
        raise BadPlace(f"{path.parent}: no such folder; make it, or mend the path")
    if HALF.search(prompt + category + reference):
        raise BadData("the prompt, category or reference is not UTF-8 text")
    if path.exists() and is_folder(path):
        raise BadData(f"{path}: a folder; incidents are added to a .jsonl file")
    try:
        incident = SuitePrompt(prompt=prompt_of(Fields({"prompt": prompt.strip()})), category=category)
        if reference:
            incident["reference"] = reference
        with _locked(path.parent):
            before = path.read_text("utf-8") if path.exists() else ""
            # an empty file, or one of white space, counts as new
            incidents = read(path, MUST_PASS) if before.strip() else []
            if any(_normalised(row["prompt"]) == _normalised(incident["prompt"]) for row in incidents):
                raise BadData(f"{path}: holds this prompt already")
            # an editor may leave the last newline out
            gap = "\n" if before.strip() and not before.endswith("\n") else ""
            line = json.dumps(incident, ensure_ascii=False)
            # written as a whole: who reads the suite meanwhile never sees half a line
            sealed.write_text(path, f"{before if before.strip() else ''}{gap}{line}\n")
    except Unusable as error:
        raise BadData(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadPlace(f"{path}: cannot be written ({why}); give a file that can") from error
    return len(incidents) + 1


def prompt_digest(prompt: str | list[Message]) -> str:
    """Return what a prompt is known by in the ledger, whatever suite it stands in: case and spacing change nothing."""
    return content_digest(_normalised(prompt))


def _normalised(prompt: str | list[Message]) -> list[tuple[str, str]]:
    """Return what two prompts share that differ in case and spacing only."""
    return [(turn["role"], " ".join(turn["content"].split()).casefold()) for turn in messages(prompt)]


def prompt_of(row: Fields) -> str | list[Message]:
    """Return text, or messages that end with the user's turn; text that holds messages in JSON is messages.

    Raises:
        BadData, Unusable: neither.
    """
    name = next((name for name in ("prompt", "messages") if row.get(name) is not None), "")
    if not name:
        null = next((name for name in ("prompt", "messages") if name in row.file_columns), "")
        columns = ", ".join(sorted(row.file_columns)) or "(none)"
        raise BadData(f"{null} is null" if null else f"no `prompt`; its columns are {columns}")
    content = row.get(name)
    system = next((row.get(column) for column in ("system", "system_prompt") if row.get(column)), "")
    if content == [] or (isinstance(content, str) and not content.strip()):
        raise BadData(f"`{name}` is empty; write what is asked, or take the row out")
    if isinstance(content, str) and not IN_A_CELL.match(content):
        # unlike a row to train on, text is taken as it is: a prompt that attacks may look like markup
        return _after(system, messages(content)) if system else content
    prompt = turns(content, f"`{name}`", "user")
    if prompt[-1]["role"] != "user" or not all(turn["content"].strip() for turn in prompt):
        raise BadData(f"`{name}`: messages must end with a user's turn, and none may be empty")
    return _after(system, prompt) if system else prompt


def _after(system: object, turns: list[Message]) -> list[Message]:
    """Return a prompt behind the system message of a column of its own."""
    prompt = behind(Message(role="system", content=text(system, "system")), turns)
    if prompt is None:
        raise BadData("`system`: the messages begin with another system message")
    return prompt
