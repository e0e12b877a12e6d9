"""The files that a run starts from: the user's own, named by content, or the embedded town's."""

import json
from pathlib import Path

from models import town
from models.artifacts import Sources, content_digest, tree_digest
from models.errors import BadData
from models.hub import local
from models.preferences import split_of
from models.readers import rows
from models.recipe import TOWN, Data, Recipe
from models.tokens import Message

HALF = Data(test=0.5, validation=0.0)


def named(recipe: Recipe) -> dict[str, str]:
    """Return role → file path or `town`, for everything that the recipe reads."""
    roles = {f"steps.{k}": step.data for k, step in enumerate(recipe.steps)}
    roles |= {f"suite/{role}": place for role, place in recipe.evaluation.suites if place}
    return roles | ({"sft": recipe.sft.data} if recipe.sft.data else {})


def digests(recipe: Recipe) -> dict[str, str]:
    """Return role → what names its content, for all that the recipe reads: what makes a run the same run."""
    return {role: digest(role, place) for role, place in named(recipe).items()}


def digest(role: str, place: str) -> str:
    """Return the sha256 of the user's data, or `town` and its version.

    Raises:
        BadData: the file does not exist or cannot be read.
    """
    if place == TOWN:
        return f"{TOWN} {town.VERSION}"
    try:
        return tree_digest(local(place, "dataset"))
    except OSError as error:
        raise BadData(f"{role}.data {place!r}: {error.strerror or error}; give a file that can be read") from error


def gather(files: dict[str, str], sha256: dict[str, str], seed: int, out: Path) -> Sources:
    """Write the town's files where it is asked for, and name the user's files by content.

    Args:
        files: role → path, or `town`.
        sha256: role → digest that the file had when the run was planned.

    Raises:
        BadData: a file changed since then.
    """
    written = town.write(out, seed) if TOWN in files.values() else {}
    found = {role: written[role] for role in written if role.startswith("suite/")}
    for role, place in files.items():
        if place == TOWN:
            found[role] = written["sft" if role == "sft" else "helpful"]
            continue
        path = local(place, "dataset").resolve()
        if tree_digest(path) != sha256[role]:
            raise BadData(f"{role} {place!r}: the file changed while the run was starting; start again")
        found |= _halves(role, path, out) if role.startswith("suite/") else {role: str(path)}
    content = content_digest({role: tree_digest(out / place) for role, place in found.items()})
    return Sources(path=out, digest=content, files=found)


def _halves(role: str, path: Path, out: Path) -> dict[str, str]:
    """Write the validation and the test half of a user's suite; a prompt's half follows from the prompt alone."""
    halves: dict[str, list[str]] = {"validation": [], "test": []}
    for number, row in rows(path):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadData(f"{path}: row {number} of the {role} needs a `prompt` with text")
        told = {"prompt": prompt, "category": str(row.get("category", "")) if isinstance(row, dict) else ""}
        half = "test" if split_of([Message(role="user", content=prompt)], HALF) == "test" else "validation"
        halves[half].append(json.dumps(told, ensure_ascii=False) + "\n")
    files = {f"{role}/{half}": f"{role.replace('/', '-')}-{half}.jsonl" for half in halves}
    for half, lines in halves.items():
        (out / files[f"{role}/{half}"]).write_text("".join(lines), "utf-8")
    return files
