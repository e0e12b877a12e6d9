"""Every noun that flows through a run: a small frozen record that names files and carries its parents.

None holds tensors; this module imports no torch. `path` is the folder in which the noun's files lie.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

SETTLED = 2.0
"""Seconds after which a file that is written again has another time of change, on every file system."""
_digests: dict[tuple[str, int, int, int, int], str] = {}
"""(path, size, mtime, ctime, inode) → sha256, as this process read it."""


@dataclass(frozen=True, kw_only=True)
class Noun:
    """Something a stage made. `digest` identifies its content, wherever it lies."""

    path: Path
    digest: str

    def at(self, path: Path) -> Self:
        """Return the same noun in another folder."""
        return replace(self, path=path)

    def identity(self) -> object:
        """Return a JSON value that changes iff a stage would make something else of this noun."""
        return self.digest

    def facts(self) -> dict[str, Any]:
        """Return all fields but the path, as JSON values."""
        facts = asdict(self)
        del facts["path"]
        return facts


@dataclass(frozen=True, kw_only=True)
class Sources(Noun):
    """The files that a run starts from: a corpus, comparisons per metric, suites. The digest is of their content."""

    files: dict[str, str]
    """Role (`sft`, `helpful`, `suite/harmful/test`, …) to file path; relative ones lie in `path`."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Role, or `tasks.k` → digest of what the user named, as it was when the run began."""

    def file(self, role: str) -> Path:
        """Return where the file with this role lies."""
        return self.path / self.files[role]

    def suites(self, split: str) -> dict[str, Path]:
        """Return role → file of prompts, for `validation` or `test`."""
        parts = [role.split("/") for role in self.files if role.startswith("suite/")]
        return {suite: self.file(f"suite/{suite}/{part}") for _, suite, part in parts if part == split}


@dataclass(frozen=True, kw_only=True)
class Preferences(Noun):
    """Validated, split pairs of one metric."""

    metric: str
    counts: dict[str, int]
    """Rows per split: train, validation, test; and `quarantined`."""
    splits: dict[str, str] = field(default_factory=dict)
    """Split → digest of its rows."""

    def identity(self) -> object:
        """Return the digest and the metric, which results copy."""
        return {"digest": self.digest, "metric": self.metric}

    def of(self, *splits: str) -> Self:
        """Return the same comparisons for a stage that reads these splits alone, and runs again iff one changes."""
        return replace(self, digest=content_digest({name: self.splits[name] for name in splits}))


@dataclass(frozen=True, kw_only=True)
class Policy(Noun):
    """Weights and tokenizer, and how they came to be. The digest covers both, bit for bit."""

    name: str
    kind: str
    """`base`, `step` or `merge`."""
    step: int = 0
    """0 for the base, k for the policy of step k (merges carry the last step's number)."""
    metric: str = ""
    method: str = ""
    parents: tuple[str, ...] = ()
    """Digests of the policies it was made from; the first is the reference it was trained against."""
    beta: float = 0.0
    lambda_: float = 0.0
    beta_over_lambda: float = 0.0
    merge_weight: float = -1.0
    """q of a merge; −1 for all others."""
    rows: int = 0
    """Pairs it was trained on."""
    vocabulary: str = ""
    """sha256 of the vocabulary and chat template; may never change between steps."""

    @property
    def along(self) -> tuple[int, float, float]:
        """How far along the method it is: its step, the weight of the safe policy in it, and λ."""
        return self.step, self.merge_weight if self.kind == "merge" else 1.0, self.lambda_

    def identity(self) -> object:
        """Return the digest of the weights and how they came to be, which results copy."""
        # the vocabulary is part of the weights' digest, and no result copies the number of rows
        return {key: value for key, value in self.facts().items() if key not in ("rows", "vocabulary")}


@dataclass(frozen=True, kw_only=True)
class Reference(Noun):
    """Tokenised pairs with the log-probs of one reference policy: computed once, used for every λ."""

    policy: str
    """Digest of the reference policy."""
    preferences: str
    """Digest of the pairs."""
    counts: dict[str, int]
    """Rows per split, after long rows were dropped, and `dropped`."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Noun):
    """What one split asks: `prompts.jsonl`, and of these, in `kl.jsonl`, what is asked to estimate KL."""

    split: str
    digests: dict[str, str]
    """Table → digest of its rows."""

    def identity(self) -> object:
        """Return the digest and the split, which results copy."""
        return {"digest": self.digest, "split": self.split}

    def of(self, table: str) -> Self:
        """Return the same for a stage that reads this table alone, and runs again iff its rows change."""
        return replace(self, digest=self.digests[table])


@dataclass(frozen=True, kw_only=True)
class Answers(Noun):
    """One policy's answers to the suites of one split: `answers.jsonl`, one row per prompt and sample."""

    policy: str
    """Digest of the policy that answered."""
    split: str


@dataclass(frozen=True, kw_only=True)
class Distances(Noun):
    """How far one policy is from others: `kl.jsonl`, one row per answer that it sampled."""

    policy: str
    """Digest of the policy that sampled."""


@dataclass(frozen=True, kw_only=True)
class Scores(Noun):
    """The verdicts of judges on one policy's answers: `scores.jsonl` and `comparisons.jsonl`."""

    policy: str
    """Digest of the policy that answered."""
    split: str
    judges: dict[str, dict[str, str]]
    """Metric to name and version of its judge."""
    failed: int
    """Verdicts that could not be had; running the judge again may have them."""


@dataclass(frozen=True, kw_only=True)
class Margins(Noun):
    """How one policy weighs the held-out pairs, relative to the base."""

    policy: str
    """Digest of the policy."""


@dataclass(frozen=True, kw_only=True)
class Benchmarks(Noun):
    """What one policy can do on tasks of lm-evaluation-harness: `tasks.jsonl`, one row per task and metric."""

    policy: str
    """Digest of the policy."""
    harness: str
    """Version of lm-evaluation-harness."""


@dataclass(frozen=True, kw_only=True)
class Calibration(Noun):
    """The verdicts of judges on answers that people had judged: `METRIC.jsonl`, one row per answer."""

    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """A file in which finished work is remembered, so that it is not done twice. No result depends on it."""

    path: Path


def content_digest(value: object) -> str:
    """Return the sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def tree_digest(path: Path, files: Iterable[Path] | None = None) -> str:
    """Return the sha256 of a file, or one over the files of a folder, by name.

    Args:
        files: of the folder; without them, all that it holds.

    Raises:
        OSError: there is nothing at this path.
    """
    if not path.is_dir():
        return file_digest(path)
    files = files if files is not None else (file for file in path.rglob("*") if file.is_file())
    return content_digest({str(file.relative_to(path)): file_digest(file) for file in files})


def file_digest(path: Path) -> str:
    """Return the sha256 of a file; one that lay unchanged for a while is read once per process.

    Raises:
        OSError: there is no such file, or the disk cannot read it.
    """
    before = path.stat()
    key = (str(path.absolute()), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
    if key not in _digests:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file that was written a moment ago may be written again within the same tick of the file system's clock
        if time.time() - before.st_mtime < SETTLED:
            return digest
        _digests[key] = digest
    return _digests[key]
