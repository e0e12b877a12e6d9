"""The files that a run starts from: the user's own, named by content, or the embedded town's."""

from pathlib import Path

from models import town
from models.artifacts import Sources, content_digest, file_digest
from models.errors import BadData
from models.recipe import TOWN, Recipe


def named(recipe: Recipe) -> dict[str, str]:
    """Return role → file path or `town`, for everything that the recipe reads."""
    roles = {f"steps.{k}": step.data for k, step in enumerate(recipe.steps)}
    return roles | ({"sft": recipe.sft.data} if recipe.sft.data else {})


def digests(recipe: Recipe) -> dict[str, str]:
    """Return role → sha256 of the user's file (or `town` and its version): what makes a run the same run.

    Raises:
        BadData: a file does not exist or cannot be read.
    """
    found = {}
    for role, place in named(recipe).items():
        try:
            found[role] = f"{TOWN} {town.VERSION}" if place == TOWN else file_digest(Path(place).expanduser())
        except OSError as error:
            raise BadData(f"{role} data {place!r}: {error.strerror or error}; give a file that can be read") from error
    return found


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
        found[role] = (
            written["sft" if role == "sft" else "helpful"] if place == TOWN else str(Path(place).expanduser().resolve())
        )
        if place != TOWN and file_digest(Path(found[role])) != sha256[role]:
            raise BadData(f"{role} data {place!r}: the file changed while the run was starting; start again")
    digest = content_digest({role: file_digest(out / place) for role, place in found.items()})
    return Sources(path=out, digest=digest, files=found)
