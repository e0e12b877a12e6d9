"""Kill a small run at times drawn uniformly over an undisturbed one, start it again, and compare what it ends with.

The signals are SIGKILL, SIGTERM, SIGINT, SIGSTOP then SIGCONT, and SIGSTOP then SIGKILL, in turn, each to the main
process alone or to its whole group, as a terminal's Ctrl-C is, by the draw. A run that had ended before its signal does
not count. Final weights must be those of the undisturbed run, bit for bit, and the registry must hold one version,
which serves. SIGTERM and SIGINT must end the process with exit code 143 and 130 within a minute, SIGCONT must let the
run go on to its end by itself.

Each signal appends a line to a table, and a line that is there is not tried again: many can be gathered in several
sittings. The first line is the undisturbed run.

    python benchmarks/chaos.py PYTHON N SEED [--table chaos.jsonl] [--minutes M]

PYTHON is the interpreter of the installation, N the number of signals of each kind that the table shall hold.
"""

import argparse
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from faults import CHANGES

KINDS = ("KILL", "TERM", "INT", "STOP CONT", "STOP KILL")
ROOT = Path(__file__).parent.parent
STOPPED = 3.0
"""Seconds for which a process stands still."""
SOON = 60.0
"""Seconds in which SIGTERM or SIGINT must have ended the process, also on a busy machine."""
LONGEST = 3600.0
"""Seconds after which a run hangs."""
Row = dict[str, Any]


def main() -> None:
    """Gather lines until the table holds N of each kind, or the time is over; print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", type=Path)
    parser.add_argument("n", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--table", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and what it starts
    python = options.python.absolute()  # a virtual environment's is a link, which must not be followed
    end = time.monotonic() + 60 * options.minutes
    if not options.table.exists():
        append(options.table, undisturbed(python))
    rows = read(options.table)
    whole = rows[0]
    print(f"undisturbed: {whole['seconds']:.0f} s, {len(whole['ended']['weights'])} policies", flush=True)
    trial = 0
    while min(counts(rows).get(kind, 0) for kind in KINDS) < options.n and time.monotonic() < end:
        kind = KINDS[trial % len(KINDS)]
        tried = {(row["seed"], row["trial"]) for row in rows[1:]}
        if (options.seed, trial) not in tried and counts(rows).get(kind, 0) < options.n:
            lately = [row["seconds"] for row in rows if "seconds" in row][-1]
            found = one(python, kind, options.seed, trial, whole, lately)
            append(options.table, {"seed": options.seed, "trial": trial, **found})
            print(json.dumps(found | {"ended": ""}), flush=True)
            rows = read(options.table)  # somebody with another seed may gather beside us
        trial += 1
    bad = [row for row in rows[1:] if not row["good"]]
    print(f"{counts(rows)}: {len(bad)} with another result")
    sys.exit(bool(bad))


def counts(rows: list[Row]) -> Counter[str]:
    """Return how often each kind of signal came before the end of a run."""
    return Counter(row["kind"] for row in rows[1:] if row["counts"])


def read(table: Path) -> list[Row]:
    """Return the undisturbed run, and one line for each signal."""
    return [json.loads(line) for line in table.read_text().splitlines()]


def append(table: Path, row: Row) -> None:
    """Append a line."""
    with table.open("a") as file:
        file.write(json.dumps(row) + "\n")


def undisturbed(python: Path) -> Row:
    """Run once without a signal."""
    with folder() as runs:
        begun = time.monotonic()
        process = start(python, runs)
        code = process.wait(LONGEST)
        assert code == 0, (runs.parent / "log.txt").read_text()
        return {"seconds": time.monotonic() - begun, "ended": ended(runs)}


def one(python: Path, kind: str, seed: int, trial: int, whole: Row, seconds: float) -> Row:
    """Send one signal to one run, let the same command end it, and return what became of it.

    Args:
        whole: the undisturbed run.
        seconds: what the last undisturbed one took; a machine is busy now and idle then.
    """
    draw = Random(f"{seed} {trial}")
    at, group = draw.uniform(0, seconds), draw.random() < 0.5
    row: Row = {"kind": kind, "to": "group" if group else "main process", "at": round(at, 1)}
    with folder() as runs:
        process = start(python, runs)
        begun = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(at)  # it may have ended: one more that nobody disturbed
            good = process.returncode == 0 and ended(runs) == whole["ended"]
            return row | {"counts": False, "seconds": time.monotonic() - begun, "good": good}
        load = os.getloadavg()[0]
        row |= {"counts": True, "load": round(load, 1), **disturbed(process, kind, group)}
        with suppress(ProcessLookupError):  # what a machine that goes down takes along
            os.killpg(process.pid, signal.SIGKILL)
        again = 0 if row["code"] == 0 else start(python, runs).wait(LONGEST)
        found = ended(runs) if again == 0 else {}
        good = found == whole["ended"] and row.pop("as it should")
        return row | {"good": good} | ({} if good else {"ended": found, "log": log(runs)})


def disturbed(process: "subprocess.Popen[bytes]", kind: str, group: bool) -> Row:
    """Send the signals, wait for the end, and return the exit code and whether the process ended as it should."""
    names = kind.split()
    begun = time.monotonic()
    for name in names:
        number = getattr(signal, f"SIG{name}")
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        if name == "STOP":
            time.sleep(STOPPED)
    code = process.wait(LONGEST)
    seconds = time.monotonic() - begun
    right = {
        "KILL": code in (-9, 0),
        "TERM": code in (143, -15, 0) and seconds < SOON,
        "INT": code in (130, -2, 0) and seconds < SOON,
        "CONT": code == 0,
    }[names[-1]]
    return {"code": code, "after": round(seconds, 1), "as it should": right}


def start(python: Path, runs: Path) -> "subprocess.Popen[bytes]":
    """Start the run in a group of its own, with Prefect's temporary server."""
    sets = [part for change in [*CHANGES, "compute.processes=1"] for part in ("--set", change)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    with (runs.parent / "log.txt").open("ab") as file:
        return subprocess.Popen(
            [python, "-m", "flows", "run", "quickstart", *sets], cwd=ROOT, stdout=file, stderr=file,
            env=environment | {"SACPO_RUNS": str(runs)}, start_new_session=True,
        )  # fmt: skip


def ended(runs: Path) -> Row:
    """Return what a run has left: weights by name, versions, and who serves."""
    (path,) = runs.glob("quickstart/*/report.json")
    candidates = json.loads(path.read_text("utf-8"))["candidates"]
    weights = {candidate["name"]: candidate["digest"] for candidate in candidates}
    with closing(sqlite3.connect(runs / "mlflow.db")) as registry:
        versions = registry.execute("SELECT count(*) FROM model_versions").fetchone()[0]
        aliases = dict(registry.execute("SELECT alias, version FROM registered_model_aliases").fetchall())
        running = registry.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0]
    return {"weights": weights, "versions": versions, "aliases": aliases, "running": running}


def log(runs: Path) -> str:
    """Return the end of what the commands said."""
    return (runs.parent / "log.txt").read_text("utf-8", "replace")[-4000:]


@contextmanager
def folder() -> Iterator[Path]:
    """A runs folder in a temporary place; what a killed run left behind ends with it."""
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    yield place / "runs"
    mark = f"PREFECT_HOME={place / 'runs' / 'prefect'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
