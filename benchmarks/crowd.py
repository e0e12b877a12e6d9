"""Many runs at once in one runs folder: eight commands side by side, and fifty flow runs that wait in a queue.

    python benchmarks/crowd.py PYTHON [commands] [queue]

`commands`: one small run alone, then eight at once, four of the same recipe and four that differ from it in the seed.
All must end with a decision, and with the weights of one alone. Printed: wall time over that of one alone, and the
memory of all processes together (proportional shares, so that what they share counts once) at its highest.

`queue`: `sacpo up`, then fifty flow runs of five recipes into the queue of trainings; all must end as completed.

PYTHON is the interpreter of the installation.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from faults import CHANGES

from models.recipe.toml import read
from tasks.access import passwords
from tasks.servers.environment import request_json

ROOT = Path(__file__).parent.parent
TOGETHER, QUEUED = 8, 50
SMALL = [*CHANGES, "compute.processes=1", "gate.margin=0.5"]
"""Twenty updates teach little: a gate with a narrow margin would let some seeds pass and others not."""
SEEDS = (0, 0, 0, 0, 1, 2, 3, 4)
"""Of the commands; the first four are the same one."""
LONGEST = 3600.0
"""Seconds after which something hangs."""


def main() -> None:
    """Run the parts that are asked for, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path)
    parser.add_argument("parts", nargs="*", default=["commands", "queue"], choices=["commands", "queue"])
    chosen = parser.parse_args()
    python = chosen.python.absolute()  # a virtual environment's is a link, which must not be followed
    for part in chosen.parts:
        {"commands": commands, "queue": queue}[part](python)


def commands(python: Path) -> None:
    """Compare eight commands at once with one alone."""
    alone, seconds = {}, 0.0
    for seed in sorted(set(SEEDS)):
        with folder() as runs:
            begun = time.monotonic()
            process = start(python, runs, seed)
            assert process.wait(LONGEST) == 0, log(runs)
            seconds = seconds or time.monotonic() - begun
            alone |= results(runs)
    print(f"one alone: {seconds:.0f} s")
    with folder() as runs, memory(runs) as most:
        begun = time.monotonic()
        processes = [start(python, runs, seed) for seed in SEEDS]
        codes = Counter(process.wait(LONGEST) for process in processes)
        whole = time.monotonic() - begun
        together = results(runs)
        assert set(codes) <= {0, 4}, (codes, log(runs))  # 4: the gate says no, beside the champion of that moment
    same = sum(together.get(digest) == weights for digest, weights in alone.items())
    print(f"{TOGETHER} at once: {whole:.0f} s, {whole / seconds:.1f} times one alone")
    print(f"exit codes {dict(codes)}")
    print(f"highest memory of all processes together: {max(most) / 2**30:.1f} GiB")
    print(f"same weights as alone: {same} of {len(alone)} recipes; {len(together)} reports")
    assert same == len(alone) == len(together)


def queue(python: Path) -> None:
    """Let fifty flow runs wait for each other."""
    with folder() as runs, up(python, runs) as environment:
        named = {"deployments": {"name": {"any_": ["quickstart"]}}}
        (deployment,) = request_json("PREFECT_API_URL", "/deployments/filter", environment, named)
        begun = time.monotonic()
        for number in range(QUEUED):
            recipe = read("quickstart", [*SMALL, f"seed={number % 5}"])
            body = {"parameters": {"recipe": recipe.model_dump(mode="json", by_alias=True, exclude_none=True)}}
            request_json("PREFECT_API_URL", f"/deployments/{deployment['id']}/create_flow_run", environment, body)
        states: Counter[str] = Counter()
        while time.monotonic() - begun < LONGEST:
            filtered = {"deployments": {"id": {"any_": [deployment["id"]]}}, "limit": 200}
            found = request_json("PREFECT_API_URL", "/flow_runs/filter", environment, filtered)
            now = Counter(one["state"]["type"] for one in found)
            if now != states:
                states = now
                print(f"{time.monotonic() - begun:5.0f} s  {dict(states)}", flush=True)
            if set(states) <= {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} and states.total() == QUEUED:
                break
            time.sleep(2)
        print(f"{QUEUED} queued flow runs of five recipes: {dict(states)} after {time.monotonic() - begun:.0f} s")
        assert states == {"COMPLETED": QUEUED}
        assert len(results(runs)) == 5


def start(python: Path, runs: Path, seed: int) -> "subprocess.Popen[bytes]":
    """Start a small run, with Prefect's temporary server."""
    sets = [part for change in [*SMALL, f"seed={seed}"] for part in ("--set", change)]
    with (runs.parent / "log.txt").open("ab") as file:
        return subprocess.Popen(
            [python, "-m", "flows", "run", "quickstart", *sets], cwd=ROOT, stdout=file, stderr=file,
            env=clean() | {"SACPO_RUNS": str(runs)}, start_new_session=True,
        )  # fmt: skip


@contextmanager
def up(python: Path, runs: Path) -> Iterator[dict[str, str]]:
    """Start both servers and a worker; yield the environment that lets us in."""
    ports = ["--mlflow-port", "15000", "--prefect-port", "14200"]
    with (runs.parent / "log.txt").open("ab") as file:
        process = subprocess.Popen(
            [python, "-m", "flows", "up", *ports], cwd=ROOT, stdout=file, stderr=file,
            env=clean() | {"SACPO_RUNS": str(runs)}, start_new_session=True,
        )  # fmt: skip
    try:
        while "Ctrl-C stops" not in log(runs):
            assert process.poll() is None, log(runs)
            time.sleep(0.5)
        named = {"PREFECT_API_URL": "http://127.0.0.1:14200/api"}
        yield named | passwords.credentials(runs, named)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@contextmanager
def memory(runs: Path) -> Iterator[list[int]]:
    """Look every second at the bytes of all processes of a runs folder."""
    most, over = [0], threading.Event()

    def look() -> None:
        mark = str(runs)
        while not over.wait(1):
            total = 0
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.environ().get("SACPO_RUNS") == mark:
                        total += process.memory_full_info().pss
            most.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def results(runs: Path) -> dict[str, Any]:
    """Return digest of a run → weights of its candidates."""
    found = {}
    for path in runs.glob("quickstart/*/report.json"):
        report = json.loads(path.read_text("utf-8"))
        found[path.parent.name] = {candidate["name"]: candidate["digest"] for candidate in report["candidates"]}
    return found


def clean() -> dict[str, str]:
    """Return the environment without the servers that it may name."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}


def log(runs: Path) -> str:
    """Return what the commands said of errors, and the end of the rest."""
    text = (runs.parent / "log.txt").read_text("utf-8", "replace")
    return "\n".join(line for line in text.splitlines() if "sacpo:" in line) + text[-2000:]


@contextmanager
def folder() -> Iterator[Path]:
    """A runs folder in a temporary place."""
    place = Path(tempfile.mkdtemp(prefix="crowd-"))
    try:
        yield place / "runs"
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
