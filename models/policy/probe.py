"""Let a process of its own examine whether a base can be trained, once per content; this process imports no torch.

The findings on a usable base are stored, so that the next `check` or `run` only reads a small file.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from models.artifacts import content_digest, file_digest
from models.errors import BadPolicy
from models.files import sealed
from models.files.hub import local
from models.policy import headers
from models.policy.weights import CONFIGS, TOKENIZER
from models.recipe.places import TOWN

CHECKOUT = Path(__file__).parents[2]
VERSION = 2
"""To be raised when the examination changes: stored findings of another version are not used."""
SECONDS = 240
"""Wall-clock time after which the process is killed: importing torch alone may take a minute on a busy machine."""
CPU = 40
"""Seconds of CPU time that the process may use for the first place, importing the libraries (about 4) included."""
CPU_OF_NEXT = 15
"""Seconds of CPU time for each further place."""
HEAD = 64 * 2**20
"""Bytes at the start of a GGUF file that stand for all of it: its settings, vocabulary and list of tensors."""
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights from which a tokenizer may be made."""
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "AUTH")
"""Words in the names of environment variables that are withheld from the process."""


class Subject(NamedTuple):
    """A base, or a judge, to be examined."""

    name: str
    """What it is called in the sentence that says what is wrong with it."""
    place: str
    """`town`, a folder, a `.gguf` file, or a hub id that is on this disk."""
    template: str = ""
    """Chat template of the recipe; empty means the tokenizer's own."""
    judge: str = ""
    """`template` or `text` of a sequence classifier: what writes the dialogues that it reads."""
    shapes: tuple[tuple[str, ...], ...] = ()
    """Roles of the turns of the prompts that its template will have to write."""


@dataclass(frozen=True)
class Findings:
    """What is known of a usable base."""

    parameters: int = -1
    """Number of parameters; −1 for the town."""
    town_unknown: float = 0.0
    """Share of the town's words that its tokenizer does not know."""


def examine_all(subjects: Sequence[Subject], folder: Path) -> list[Findings]:
    """Return the findings on each subject: on config, tokenizer, names and shapes of the weights, chat template.

    All subjects without stored findings are examined by one process.

    Args:
        folder: where findings are stored.

    Raises:
        BadPolicy: one cannot be used; one sentence with the file and what to do.
    """
    files = [_file(subject, folder) for subject in subjects]
    findings = {file: stored for file in files if (stored := sealed.read(file, Findings))}
    missing = {file: subject for file, subject in zip(files, subjects, strict=True) if file not in findings}
    if missing:
        findings |= dict(zip(missing, _examined(list(missing.values())), strict=True))
        with suppress(OSError):  # where nothing can be written, the next command examines them again
            for file in missing:
                _store(file, findings[file])
    return [findings[file] for file in files]


def _file(subject: Subject, folder: Path) -> Path:
    """Return where the findings on a subject are stored."""
    try:
        return folder / f"probe-{_digest(subject)[:32]}.json"
    except BadPolicy as error:
        raise BadPolicy(f"{subject.name}: {error}") from error


def _store(file: Path, findings: Findings) -> None:
    # Both folders are made, the runs folder for its owner only: `check` may be the first command that writes there
    file.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    sealed.write(file, asdict(findings))


def _digest(subject: Subject) -> str:
    """Return what changes iff the findings may change: the small files, the headers of the weights, the libraries."""
    content = {
        "version": VERSION,
        "libraries": {name: version(name) for name in ("torch", "transformers", "jinja2")},
        "template": subject.template,
        "judge": subject.judge,
        "shapes": subject.shapes,
    }
    place = Path(_here(subject.place))
    if subject.place == TOWN:
        return content_digest(content)
    if place.suffix == ".gguf":
        headers.gguf(place)
        with place.open("rb") as file:
            head = hashlib.sha256(file.read(HEAD)).hexdigest()
        return content_digest({**content, "head": [place.stat().st_size, head]})
    names = {*CONFIGS, *TOKENIZER, headers.INDEX} | {f.name for pattern in SMALL for f in place.glob(pattern)}
    # Headers instead of weights: the examination reads names and shapes only, and weights may be many gigabytes
    tensors = headers.tensors(place)
    digests = {name: file_digest(headers.regular(place / name)) for name in sorted(names) if (place / name).exists()}
    return content_digest({**content, "tensors": tensors, **digests})


def named_error(why: str, name: str) -> BadPolicy:
    """Return the error that names the base, or the recipe's own template."""
    return BadPolicy(why if why.startswith("template: ") else f"{name}: {why}")


def _examined(subjects: Sequence[Subject]) -> list[Findings]:
    """Start the process, and return its findings on each, or raise what it says of the first that is wrong."""
    cpu = CPU + CPU_OF_NEXT * (len(subjects) - 1)
    local_subjects = [subject._asdict() | {"place": _here(subject.place)} for subject in subjects]
    out, end = _run(json.dumps({"cpu": cpu, "subjects": local_subjects}))
    # Lines without a brace are what libraries print by themselves
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    findings = [Findings(**line) for line in lines if "parameters" in line]
    if len(findings) == len(subjects):
        return findings
    # Subjects are examined in order, so the process ended in the first one without findings. A process that a limit
    # killed says nothing more; its last line says at which file it was
    subject, last = subjects[len(findings)], lines[-1] if lines else {}
    if "bad" in last:
        raise named_error(last["bad"], subject.name)
    raise BadPolicy(
        f"{subject.name}: {last.get('at', subject.place)}: cannot be looked at within {cpu} s and 4 GiB ({end}); look "
        "for impossible sizes there, or give another"
    )


def _here(place: str) -> str:
    return place if place == TOWN else str(local(place, "model").resolve())


def _run(request: str) -> tuple[str, str]:
    """Return what the process prints, and the last line of its errors, or the signal that ended it.

    The process is killed after SECONDS.
    """
    # The process reads files of others, so it gets no secrets, and it asks neither the hub nor a GPU. It gets one
    # thread, since the time of all threads counts against its CPU time
    environment = {name: value for name, value in os.environ.items() if not any(word in name for word in SECRET)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "models.policy.examination"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment, text=True, cwd=CHECKOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(request, SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
        finally:
            # After Ctrl-C too: the process has a session of its own, so the terminal's signal does not reach it
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return out, (errors.strip().splitlines() or [f"signal {-process.returncode}"])[-1][:200]
