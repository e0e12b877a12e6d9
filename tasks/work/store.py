"""Where a stage's result lives: a folder named by content, a manifest, a lock, an atomic rename.

A stage is done iff its folder holds a manifest that verifies. Work happens in `NAME.partial`, where a killed run
finds its checkpoints again, and is renamed when complete.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as installed
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar, cast

from filelock import FileLock
from pydantic import BaseModel, JsonValue, TypeAdapter
from typing_extensions import TypedDict

from models.artifacts import Memory, Noun, content_digest, file_digest
from models.errors import BadInput, BadPlace, Damaged
from models.files import sealed
from models.files.kept import RunsFolderEntry
from models.policy.headers import WEIGHTS
from models.policy.weights import device_kind, precision
from models.recipe import Compute
from models.recipe.places import by_content
from models.stage import hints_of, mark_of
from models.words import first_line
from tasks.work import progress_rows

N = TypeVar("N", bound=Noun)
N_co = TypeVar("N_co", bound=Noun, covariant=True)
Arguments = dict[str, Any]
"""A stage's arguments but the folder, by name: nouns, recipe records, plain values. Each stage has its own."""
Facts = dict[str, Any]
"""A noun's fields but its path, as JSON values (`Noun.facts`). Each kind of noun has its own."""

MANIFEST = "manifest.json"
FULL_DISK_TEXTS = ("No space left", "disk is full")
"""What the errors of Python and of sqlite say of a full disk."""
LEAST_FREE = 2**20
"""Bytes; with less on the disk any error of a stage is taken for one of a full disk."""
HASHED_UP_TO = 64 * 2**20
"""Bytes. Larger files of weights are checked by size here, and by content by whatever reads them."""

_log = logging.getLogger(__name__)


class FileRecord(TypedDict):
    """One file of a result."""

    sha256: str
    bytes: int


class Manifest(TypedDict):
    """What a result is, what it was made of, and which files it holds: `manifest.json` in its folder."""

    stage: str
    title: str
    version: int
    key: str
    given: dict[str, JsonValue]
    """The arguments, as `content_of` returns them."""
    noun: Facts
    files: dict[str, FileRecord]
    """Path from the folder → digest and size."""
    seconds: float
    """Spent on it by all attempts together."""
    finished: str
    """When, in UTC."""


@dataclass(frozen=True)
class Stage(Generic[N_co]):
    """One call of one plain function. Equal calls have equal keys, in every process and run, and share one folder."""

    does: Callable[..., N_co]
    """A function of models/ that `@stage` marks. Its module imports no torch, since this process imports it too."""
    title: str
    """Its name for a person: `harmless · dpo · λ=0.4 (β/λ=0.25)`."""
    arguments: Arguments = field(hash=False)

    @property
    def name(self) -> str:
        """`alignment.dpo`: its name in manifests; the name of a folder begins with the last part."""
        return mark_of(self.does).name

    @property
    def version(self) -> int:
        """The version of what the function computes; source code itself is not hashed."""
        return mark_of(self.does).version

    @cached_property
    def makes(self) -> type[N_co]:
        """The noun that the function returns."""
        kind: type[N_co] = hints_of(self.does)["return"]
        return kind

    @cached_property
    def key(self) -> str:
        """Digest (sha256) of the name, the version and the arguments, as `content_of` returns them."""
        return content_digest({"stage": self.name, "version": self.version, "given": content_of(self.arguments)})

    def folder(self, root: Path) -> Path:
        """Return where the result lives, whether it exists or not."""
        return root / RunsFolderEntry.store / f"{self.name.rpartition('.')[2]}-{self.key[:16]}"

    def partial(self, root: Path) -> Path:
        """Return where the work is done, and where a killed run finds its checkpoints again."""
        return self.folder(root).with_name(self.folder(root).name + ".partial")

    def request(self) -> str:
        """Return the call as JSON, for a process that shares nothing with this one but the code."""
        hints = hints_of(self.does)
        call: _Call = {
            "does": f"{self.does.__module__}:{self.does.__qualname__}",
            "title": self.title,
            "arguments": {
                name: TypeAdapter(hints[name]).dump_json(value, by_alias=True).decode()
                for name, value in self.arguments.items()
            },
        }
        return json.dumps(call)


class _Call(TypedDict):
    """A stage as JSON."""

    does: str
    """The function, as `module:name`."""
    title: str
    arguments: dict[str, str]
    """Name → JSON text, of the type that the function's parameter has."""


def requested(request: str) -> Stage[Noun]:
    """Return the stage that `Stage.request` wrote; imports the module of its function.

    Raises:
        TypeError: the function is no stage.
        pydantic.ValidationError: an argument is not of the type of its parameter.
    """
    call: _Call = json.loads(request)
    does = resolve_name(call["does"])
    mark_of(does)
    hints = hints_of(does)
    arguments = {name: TypeAdapter(hints[name]).validate_json(text) for name, text in call["arguments"].items()}
    return Stage(does, call["title"], arguments)


def content_of(value: object) -> JsonValue:
    """Return a JSON value that changes iff the meaning of an argument does; the places of files are not part of it.

    Raises:
        TypeError: the value is of a type that no argument of a stage may have.
    """
    if isinstance(value, Noun):
        return content_of(value.identity())
    if isinstance(value, Memory):
        # a cache makes a result faster, and never another one
        return "remembered"
    if isinstance(value, Compute):
        # floats depend on the versions of the libraries, the kind of device and the number of threads
        computes: dict[str, JsonValue] = {name: installed(name) for name in ("torch", "transformers", "trl", "peft")}
        device = device_kind(value.device)
        return computes | {"device": device, "dtype": precision(device), "threads": value.threads}
    if isinstance(value, BaseModel):
        return cast(JsonValue, by_content(value))  # its type allows dates, but the JSON that it dumps holds none
    if isinstance(value, dict):
        return {key: content_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [content_of(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a stage cannot be named by a {type(value).__name__}")


def find(root: Path, stage: Stage[N]) -> N | None:
    """Return the stage's result if it is complete, else None."""
    return load(stage.folder(root), stage.makes)


def load(folder: Path, kind: type[N]) -> N | None:
    """Return the noun in a folder if its manifest verifies, else None."""
    manifest = verified(folder)
    if manifest is None:
        return None
    # JSON has no tuples, and a noun no lists
    facts: Facts = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["noun"].items()}
    return kind(path=folder, **facts)


def verified(folder: Path) -> Manifest | None:
    """Return the manifest of a folder if every file that it names is there and unchanged, else None."""
    manifest = sealed.read(folder / MANIFEST, Manifest)
    if manifest is None or not all(_matches(folder / name, record) for name, record in manifest["files"].items()):
        return None
    return manifest


def _matches(path: Path, record: FileRecord) -> bool:
    """Return whether a file is the one that a manifest names."""
    try:
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        # Weights of gigabytes would be hashed at every look. Tables are hashed at any size: decisions rest on them.
        size_is_enough = path.match(WEIGHTS) and record["bytes"] > HASHED_UP_TO
        return size_is_enough or file_digest(path) == record["sha256"]
    except OSError:  # the disk can no longer read the file
        return False


def invalidate(folder: Path) -> None:
    """Set the manifest of a result aside whose files are not what it says: the next run makes the result again."""
    # it may be gone already
    with suppress(OSError):
        sealed.set_aside(folder / MANIFEST)


def progress_of_killed(root: Path, stage: Stage[Noun]) -> int:
    """Return how far a killed attempt had come, in the stage's own unit; 0 if there was none."""
    return progress_rows.most_done(stage.partial(root))


def seconds(noun: Noun) -> float:
    """Return the seconds that a noun took to make; 0 where its manifest cannot be read."""
    manifest = sealed.read(noun.path / MANIFEST, Manifest)
    return manifest["seconds"] if manifest else 0.0


def make(root: Path, stage: Stage[N]) -> N:
    """Return the stage's result; do the work unless it is done. A second process doing the same waits here.

    Raises:
        BadPlace: the disk is full.
        BadInput, Damaged: as the stage's function.
    """
    folder = stage.folder(root)
    partial = stage.partial(root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        existing = load(folder, stage.makes)
        if existing is not None:
            return existing
        sealed.remove(folder)  # its manifest does not verify, so what is there is damaged
        if partial.is_file():
            partial.unlink()
        partial.mkdir(exist_ok=True)
        earlier, start = progress_rows.seconds_spent(partial), time.monotonic()
        noun = _attempt(root, stage, partial)
        spent = earlier + time.monotonic() - start
        manifest: Manifest = {
            "stage": stage.name,
            "title": stage.title,
            "version": stage.version,
            "key": stage.key,
            "given": {name: content_of(value) for name, value in stage.arguments.items()},
            "noun": noun.facts(),
            "files": _file_records(partial),
            "seconds": round(spent, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        # The manifest is the last file, and the rename comes after it: a folder without `.partial` is complete.
        sealed.write(partial / MANIFEST, manifest)
        partial.rename(folder)
        return noun.at(folder)


def _attempt(root: Path, stage: Stage[N], partial: Path) -> N:
    """Call the stage's function; leave in `partial` what a next attempt can use."""
    try:
        return stage.does(partial, **stage.arguments)
    except BadInput:
        # no attempt can go on from here; the folder stays only if it holds refused rows, for a person to look at
        if not _quarantined(partial):
            shutil.rmtree(partial)
        raise
    except Damaged as error:
        invalidate(error.folder)
        raise
    except Exception as error:
        # any type may come: torch and safetensors have errors of their own for a full disk
        _log.info("%s failed: %r", stage.title, error)
        if any(text in str(error) for text in FULL_DISK_TEXTS) or shutil.disk_usage(partial).free < LEAST_FREE:
            _log.warning("%s failed, and the disk of %s is full: %s", stage.title, root, first_line(error))
            raise BadPlace(f"{root}: the disk is full; free space, or set SACPO_RUNS to another disk") from error
        raise


def _file_records(folder: Path) -> dict[str, FileRecord]:
    return {
        str(path.relative_to(folder)): {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _quarantined(partial: Path) -> bool:
    """Return whether refused rows lie in a folder."""
    rows = partial / "quarantine.jsonl"
    return rows.exists() and rows.stat().st_size > 0
