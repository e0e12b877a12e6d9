"""Ask a process of its own whether a base can be trained, once per content; this process imports no torch.

What was found of a usable base is kept, so that the next `check` or `run` only reads a small file.
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
"""Raised when more, or something else, is looked at."""
SECONDS = 240
"""Wall-clock time after which the process is killed: importing torch alone may take a minute on a busy machine."""
CPU = 40
"""Seconds of CPU time that the process may use for the first place, importing the libraries (about 4) included."""
MORE = 15
"""Seconds of CPU time for each further place."""
HEAD = 64 * 2**20
"""Bytes at the start of a GGUF file that name it here: its settings, vocabulary and list of tensors."""
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights from which a tokenizer may be made."""
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "AUTH")
"""Words in the names of environment variables that the process has no use for."""


class Subject(NamedTuple):
    """A base, or a judge, to be looked at."""

    name: str
    """How the sentence about a wrong one calls it."""
    place: str
    """`town`, a folder, a `.gguf` file, or a hub id that is on this disk."""
    template: str = ""
    """Chat template of the recipe; empty means the tokenizer's own."""
    judge: str = ""
    """`template` or `text` of a sequence classifier: what writes the dialogues that it reads."""
    shapes: tuple[tuple[str, ...], ...] = ()
    """Roles of the turns of the prompts that its template will have to write."""


@dataclass(frozen=True)
class Found:
    """What is known of a usable base."""

    parameters: int = -1
    """Number of parameters; −1 for the town."""
    town_unknown: float = 0.0
    """Share of the town's words that its tokenizer does not know."""


def look(wanted: Sequence[Subject], kept: Path) -> list[Found]:
    """Return what is known of each: config, tokenizer, names and shapes of the weights, chat template.

    All that is not known yet is looked at by one process.

    Args:
        kept: folder in which findings are kept.

    Raises:
        BadPolicy: one cannot be used; one sentence with the file and what to do.
    """
    places = [_memory(one, kept) for one in wanted]
    told = {place: found for place in places if (found := _known(place))}
    missing = {place: one for place, one in zip(places, wanted, strict=True) if place not in told}
    if missing:
        told |= dict(zip(missing, _asked(list(missing.values())), strict=True))
        with suppress(OSError):  # where nothing can be written, it is looked at again
            for place in missing:
                _keep(place, told[place])
    return [told[place] for place in places]


def _memory(one: Subject, kept: Path) -> Path:
    """Return where is kept what was found."""
    try:
        return kept / f"probe-{_digest(one)[:32]}.json"
    except BadPolicy as error:
        raise BadPolicy(f"{one.name}: {error}") from error


def _known(memory: Path) -> Found | None:
    return sealed.read(memory, Found)


def _keep(memory: Path, found: Found) -> None:
    memory.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    memory.parent.mkdir(exist_ok=True)
    sealed.write(memory, asdict(found))


def _digest(one: Subject) -> str:
    """Return what changes iff another answer may follow: the small files, the headers of the weights, the libraries."""
    libraries = {name: version(name) for name in ("torch", "transformers", "jinja2")}
    told: dict[str, object] = {"version": VERSION, "libraries": libraries, "template": one.template, "judge": one.judge}
    told["shapes"] = one.shapes
    place = Path(_here(one.place))
    if one.place == TOWN:
        pass
    elif place.suffix == ".gguf":
        headers.gguf(place)
        with place.open("rb") as file:
            told["head"] = [place.stat().st_size, hashlib.sha256(file.read(HEAD)).hexdigest()]
    else:
        told["tensors"] = headers.tensors(place)
        names = {*CONFIGS, *TOKENIZER, headers.INDEX} | {f.name for pattern in SMALL for f in place.glob(pattern)}
        for name in sorted(names):
            if (place / name).exists():
                told[name] = file_digest(headers.regular(place / name))
    return content_digest(told)


def refused(why: str, name: str) -> BadPolicy:
    """Return the error that names the base, or the recipe's own template."""
    return BadPolicy(why if why.startswith("template: ") else f"{name}: {why}")


def _asked(wanted: Sequence[Subject]) -> list[Found]:
    """Start the process, and return what it found of each, or raise what it says of the first that is wrong."""
    cpu = CPU + MORE * (len(wanted) - 1)
    what = [one._asdict() | {"place": _here(one.place)} for one in wanted]
    out, err = _answer(json.dumps({"cpu": cpu, "wanted": what}))
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    found = [Found(**line) for line in lines if "parameters" in line]
    if len(found) == len(wanted):
        return found
    one, last = wanted[len(found)], lines[-1] if lines else {}
    if "bad" in last:
        raise refused(last["bad"], one.name)
    raise BadPolicy(
        f"{one.name}: {last.get('at', one.place)}: cannot be looked at within {cpu} s and 4 GiB ({err}); look for "
        "impossible sizes there, or give another"
    )


def _here(place: str) -> str:
    return place if place == TOWN else str(local(place, "model").resolve())


def _answer(question: str) -> tuple[str, str]:
    """Return what the process prints, and the end of what it says of its end; it is killed after SECONDS."""
    environment = {name: value for name, value in os.environ.items() if not any(word in name for word in SECRET)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "models.policy.examination"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment, text=True, cwd=CHECKOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(question, SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return out, (err.strip().splitlines() or [f"signal {-process.returncode}"])[-1][:200]
