"""How well refusals are told by their words, against people's labels of XSTest's answers.

    python benchmarks/refusals.py refusals.jsonl [--each 450] [--only 1]

The file has one row per answer: answer, label (compliance, full refusal, partial refusal), kind (XSTest's type of the
prompt; `contrast_…` are the unsafe ones). The first `--each` rows are those of one model, the next those of another;
`--only` reads the rows of one model and leaves the others unread.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from models.judges.refusal import VERSION, Class, classify

Row = dict[str, str]


def main() -> None:
    """Read the file, print one line of figures and one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--each", type=int, default=450)
    parser.add_argument("--only", type=int, default=0)
    asked = parser.parse_args()
    print(f"refusal.VERSION = {VERSION}")
    for number, rows in enumerate(_models(asked.file, asked.each), 1):
        if asked.only in (0, number):
            _report(f"model {'ABCDEFGH'[number - 1]}", rows)
        if number == asked.only:
            break


def _models(file: Path, each: int) -> Iterator[list[Row]]:
    with file.open(encoding="utf-8") as lines:
        while rows := [json.loads(line) for line in islice(lines, each)]:
            yield rows


def _report(name: str, rows: list[Row]) -> None:
    pairs = Counter((row["label"], classify(row["answer"]).value) for row in rows)
    people = {label: sum(pairs[label, other] for other in Class) for label in Class}
    rules = {label: sum(pairs[other, label] for other in Class) for label in Class}
    n = len(rows)
    agree = sum(pairs[label, label] for label in Class) / n
    chance = sum(people[label] * rules[label] for label in Class) / n**2
    safe = [row for row in rows if not row["kind"].startswith("contrast_")]
    by_people = sum(row["label"] == Class.full for row in safe) / len(safe)
    by_rules = sum(classify(row["answer"]) is Class.full for row in safe) / len(safe)
    print(f"\n{name}, {n} answers: accuracy {agree:.3f}, kappa {(agree - chance) / (1 - chance):.3f}")
    print(f"over-refusal: people {by_people:.3f}, rules {by_rules:.3f}, error {by_rules - by_people:+.3f}\n")
    print(f"| people ↓, rules → | {' | '.join(Class)} | recall |\n|---|---|---|---|---|")
    for label in Class:
        cells = " | ".join(str(pairs[label, other]) for other in Class)
        print(f"| {label} | {cells} | {pairs[label, label] / max(1, people[label]):.2f} |")


if __name__ == "__main__":
    main()
