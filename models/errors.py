"""The errors that sacpo raises by itself; the message of each is one sentence with a remedy.

SacpoError                    exit code 1
├── BadInput                  exit code 2: an input of the user cannot be used; nothing was written
│   ├── BadRecipe             unknown key, value out of range
│   ├── BadData               missing, empty, cut off, wrong format, too many bad rows
│   ├── BadPolicy             no such base, unknown architecture, vocabulary or template changed
│   └── BadPlace              runs folder not writable, disk full, server that does not answer
├── Stale                     exit code 2: somebody else decided first; look again
├── BrokenInvariant           exit code 3: the method's own guard failed; the weights must not be used
│   └── Damaged               files changed since they were made; the same command makes them again
├── Undecided                 exit code 4: the run is complete, and no candidate passed the gate
└── NoVerdict                 exit code 5: a judge failed too often, or its budget is spent; what it said is kept
"""

from pathlib import Path


class SacpoError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""

    exit_code = 1


class BadInput(SacpoError):
    """An input of the user cannot be used."""

    exit_code = 2


class BadRecipe(BadInput):
    """A recipe, or a `--set`, that says something impossible."""


class BadData(BadInput):
    """A data file that cannot be read, or holds too many bad rows."""


class BadPolicy(BadInput):
    """A policy that cannot be loaded, or does not fit the step before."""


class BadPlace(BadInput):
    """A folder, disk or server that cannot take our results."""


class Stale(SacpoError):
    """Somebody else moved the champion between our look and our decision."""

    exit_code = 2


class BrokenInvariant(SacpoError):
    """A guard of the method failed: reference mixed up, NaN, log-probs that moved on disk."""

    exit_code = 3


class Damaged(BrokenInvariant):
    """A policy's files are not the ones that its digest names."""

    def __init__(self, folder: Path, actual: str, digest: str) -> None:
        # Unpickling calls the class with what `super` got, so it gets all three: a worker process pickles the error
        super().__init__(folder, actual, digest)
        self.folder, self.actual, self.digest = folder, actual, digest

    def __str__(self) -> str:
        return (
            f"{self.folder}: weights have digest {self.actual[:12]}, the record says {self.digest[:12]}; "
            "if they were made here, the same command makes them again"
        )


class Undecided(SacpoError):
    """The run ended well, and its candidate did not pass the gate: nothing was promoted."""

    exit_code = 4


class NoVerdict(SacpoError):
    """A judge failed on more answers than the recipe allows, or may cost no more."""

    exit_code = 5
