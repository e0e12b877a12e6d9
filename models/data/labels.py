"""Answers that people have judged: what a judge is compared with."""

from pathlib import Path

from models.data.dialogue import Message
from models.data.fields import truth
from models.data.readers import Unusable, every
from models.data.suites import prompt_of
from models.errors import BadData


def labels(path: Path) -> list[tuple[str | list[Message], str, bool]]:
    """Return (prompt, answer, good) of every row of a labelled sample: JSON, JSONL, CSV or Parquet.

    Raises:
        BadData: a row lacks `prompt` (as in a suite), `answer` or `good` (true, false, 1, 0, yes or no); names it.
    """
    found = []
    for number, row in every(path):
        good = truth(row.get("good"))
        if not row.get("prompt") or not isinstance(row.get("answer"), str) or good is None:
            raise BadData(f"{path}: row {number}: needs `prompt`, `answer` and `good` (true or false)")
        try:
            asked = prompt_of({"prompt": row["prompt"]})
        except (BadData, Unusable) as error:
            raise BadData(f"{path}: row {number}: {error}") from error
        found.append((asked, row["answer"], good))
    return found
