"""Where a stage's result lives: a folder named by content, a manifest, a lock, an atomic rename.

A stage is done iff its folder holds a manifest that verifies. Work happens in `NAME.partial`, where a killed run
finds its checkpoints again, and is renamed when complete.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from filelock import FileLock
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from models.artifacts import Memory, Noun, content_digest, file_digest
from models.errors import BadInput, BadPlace, Damaged
from models.files import jsonl, sealed
from models.files.kept import Kept
from models.policy.headers import WEIGHTS
from models.policy.weights import device_kind, precision
from models.recipe import Compute
from models.recipe.places import by_content
from models.stage import hints_of, mark_of

N = TypeVar("N", bound=Noun)

MANIFEST = "manifest.json"
FULL = ("No space left", "disk is full")
HASHED_UP_TO = 64 * 2**20
"""Bytes. Larger files of weights are checked by size here, and by content when somebody reads them."""


class Held(TypedDict):
    """One file of a result."""

    sha256: str
    bytes: int


class Manifest(TypedDict):
    """What a result is, what it was made of, and which files it holds."""

    stage: str
    title: str
    version: int
    key: str
    given: dict[str, Any]
    noun: dict[str, Any]
    files: dict[str, Held]
    seconds: float
    finished: str


@dataclass(frozen=True)
class Stage(Generic[N]):
    """One call of one plain function. Equal calls have equal keys, whoever makes them, and meet in one folder."""

    does: Callable[..., N]
    """A function of models/ that `@stage` marks; its module is imported here, and imports no torch."""
    title: str
    """How a person calls it: `harmless · dpo · λ=0.4 (β/λ=0.25)`."""
    arguments: dict[str, Any] = field(hash=False)
    """All but the folder, by name: nouns, recipe records, plain values."""

    @property
    def name(self) -> str:
        """`alignment.dpo`: what manifests call it; a folder takes the last part."""
        return mark_of(self.does).name

    @property
    def version(self) -> int:
        """The version of what the function computes; source code itself is not hashed."""
        return mark_of(self.does).version

    @cached_property
    def makes(self) -> type[N]:
        """The noun that the function returns."""
        made: type[N] = hints_of(self.does)["return"]
        return made

    @cached_property
    def key(self) -> str:
        """Digest of the version, the arguments (nouns by identity) and, for work with tensors, of what computes."""
        return content_digest({"stage": self.name, "version": self.version, "given": plain(self.arguments)})

    def folder(self, root: Path) -> Path:
        """Return where the result lives, whether it exists or not."""
        return root / Kept.store / f"{self.name.rpartition('.')[2]}-{self.key[:16]}"

    def partial(self, root: Path) -> Path:
        """Return where work on it goes on, and where a killed run finds its checkpoints again."""
        return self.folder(root).with_name(self.folder(root).name + ".partial")

    def request(self) -> str:
        """Return the call as JSON, for a process that shares nothing with this one but the code."""
        hints = hints_of(self.does)
        arguments = {
            name: TypeAdapter(hints[name]).dump_json(value, by_alias=True).decode()
            for name, value in self.arguments.items()
        }
        does = f"{self.does.__module__}:{self.does.__qualname__}"
        return json.dumps({"does": does, "title": self.title, "arguments": arguments})


def requested(request: str) -> Stage[Any]:
    """Return the call that `Stage.request` wrote; imports the module of its function."""
    call = json.loads(request)
    does = resolve_name(call["does"])
    mark_of(does)
    hints = hints_of(does)
    arguments = {name: TypeAdapter(hints[name]).validate_json(text) for name, text in call["arguments"].items()}
    return Stage(does, call["title"], arguments)


def plain(value: Any) -> Any:
    """Return a JSON value that changes iff the meaning of an argument does; where a file lies has none."""
    if isinstance(value, Noun):
        return plain(value.identity())
    if isinstance(value, Memory):
        return "remembered"
    if isinstance(value, Compute):
        libraries = {name: installed(name) for name in ("torch", "transformers", "trl", "peft")}
        device = device_kind(value.device)
        return libraries | {"device": device, "dtype": precision(device), "threads": value.threads}
    if isinstance(value, BaseModel):
        return by_content(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a stage cannot be named by a {type(value).__name__}")


def find(root: Path, stage: Stage[N]) -> N | None:
    """Return the stage's result if it is complete, else None."""
    return opened(stage.folder(root), stage.makes)


def opened(folder: Path, kind: type[N]) -> N | None:
    """Return the noun in a folder if its manifest verifies."""
    manifest = verified(folder)
    if manifest is None:
        return None
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["noun"].items()}
    return kind(path=folder, **facts)


def verified(folder: Path) -> Manifest | None:
    """Return the manifest of a folder if every file in it is the one that the manifest names."""
    manifest = sealed.read(folder / MANIFEST, Manifest)
    if manifest is None or not all(_is(folder / name, held) for name, held in manifest["files"].items()):
        return None
    return manifest


def _is(path: Path, held: Held) -> bool:
    """Return whether a file is the one that a manifest names; tables of any size are evidence, and are read for it."""
    try:
        if not path.is_file() or path.stat().st_size != held["bytes"]:
            return False
        by_size = path.match(WEIGHTS) and held["bytes"] > HASHED_UP_TO
        return by_size or file_digest(path) == held["sha256"]
    except OSError:  # the disk cannot read it any more
        return False


def distrust(folder: Path) -> None:
    """Take the manifest from a result whose content is another one than it says: it is then made again."""
    with suppress(OSError):
        sealed.aside(folder / MANIFEST)


def begun(root: Path, stage: Stage[Any]) -> int:
    """Return how far a killed attempt had come, in the stage's own count; 0 if there was none."""
    return max(
        (int(row["done"]) for row in jsonl.whole(stage.partial(root) / "progress.jsonl") if "done" in row), default=0
    )


def seconds(noun: Noun) -> float:
    """Return how long the noun took to make."""
    manifest = sealed.read(noun.path / MANIFEST, Manifest)
    return manifest["seconds"] if manifest else 0.0


def make(root: Path, stage: Stage[N]) -> N:
    """Return the stage's result; do the work unless it is done. A second process doing the same waits here."""
    folder = stage.folder(root)
    partial = stage.partial(root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        found = opened(folder, stage.makes)
        if found is not None:
            return found
        sealed.remove(folder)  # what is there is damaged: its manifest no longer verifies
        if partial.is_file():
            partial.unlink()
        partial.mkdir(exist_ok=True)
        before, started = _spent(partial), time.monotonic()
        try:
            noun = stage.does(partial, **stage.arguments)
        except BadInput:
            if not _quarantined(partial):
                shutil.rmtree(partial)
            raise
        except Damaged as error:
            distrust(error.folder)
            raise
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            if any(said in str(error) for said in FULL) or shutil.disk_usage(partial).free < 2**20:
                raise BadPlace(f"{root}: the disk is full; free space, or set SACPO_RUNS to another disk") from error
            raise
        spent = before + time.monotonic() - started
        files: dict[str, Held] = {
            str(path.relative_to(partial)): {"sha256": file_digest(path), "bytes": path.stat().st_size}
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        manifest: Manifest = {
            "stage": stage.name,
            "title": stage.title,
            "version": stage.version,
            "key": stage.key,
            "given": plain(stage.arguments),
            "noun": noun.facts(),
            "files": files,
            "seconds": round(spent, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        sealed.write(partial / MANIFEST, manifest)
        partial.rename(folder)
        return noun.at(folder)


def _quarantined(partial: Path) -> bool:
    """Return whether refused rows lie here, for a person to look at."""
    rows = partial / "quarantine.jsonl"
    return rows.exists() and rows.stat().st_size > 0


def _spent(partial: Path) -> float:
    """Return the seconds that killed attempts spent on this stage, as far as their progress tells."""
    times = [row["time"] for row in jsonl.whole(partial / "progress.jsonl") if "time" in row]
    gaps = [later - earlier for earlier, later in pairwise(times)]  # less than nothing where the clock was set back
    return float(sum(min(max(gap, 0), 60) for gap in gaps))  # not the hours in between
