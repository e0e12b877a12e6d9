"""The files that a run starts from: the user's own, named by content, or the embedded town's."""

from pathlib import Path

from models import town
from models.artifacts import Sources, content_digest, tree_digest
from models.errors import BadData
from models.hub import local
from models.recipe import TOWN, Recipe


def named(recipe: Recipe) -> dict[str, str]:
    """Return role → file path or `town`, for everything that the recipe reads."""
    roles = {f"steps.{k}": step.data for k, step in enumerate(recipe.steps)}
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
            raise BadData(f"{role} data {place!r}: the file changed while the run was starting; start again")
        found[role] = str(path)
    content = content_digest({role: tree_digest(out / place) for role, place in found.items()})
    return Sources(path=out, digest=content, files=found)
