"""Kill a run at every point where it creates, opens for writing, renames or removes a file; start it again; compare.

The recipe is the quickstart in 20 updates per step. One process runs it and is stopped (SIGSTOP, all its threads) at
each of its file events, while its runs folder is copied: the copy is what SIGKILL would have left at that moment. Then,
for every copy, the same command runs on it: final weights must be those of the undisturbed run, bit for bit, and the
registry must hold one version. Everything runs in forks of one process that has imported what it needs.

Of the events that the same line of code causes, called from the same lines, only the first is tried, unless --all.

    python benchmarks/faults.py [--all] [--every K] [--first N] [--last N]
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.copyfile"}
DIGEST = 8
CHANGES = [
    "sft.updates=20",
    "sft.save_every=5",
    "steps.0.updates=20",
    "steps.0.save_every=5",
    "steps.1.updates=20",
    "steps.1.save_every=5",
    "steps.1.lambda=[0.4]",
    "merge.weights=[0.5]",
    "constraint.at_least=0.05",
    "data.heldout=50",
    "evaluation.kl_prompts=16",
    "compute.processes=0",
]


def main() -> None:
    """Run the sweep and print one line per failure and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="try every event, not one of each call stack")
    parser.add_argument("--every", type=int, default=1, help="try every K-th point")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=100_000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    server = start_server(folder)
    try:
        warm()
        chosen = range(options.first, options.last + 1, options.every)
        undisturbed = record(folder, chosen, options.all)
        weights, events, points = undisturbed["weights"], undisturbed["events"], undisturbed["points"]
        size = f"{events} file events from {undisturbed['stacks']} call stacks, {len(weights)} policies"
        print(f"undisturbed: {size}, {undisturbed['seconds']:.1f} s", flush=True)
        bad = 0
        for tried, point in enumerate(points, 1):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            (folder / f"at-{point}").rename(folder / "runs")
            again = trial(folder)
            good = again.get("weights") == weights and again.get("versions") == 1
            bad += not good
            if not good:
                print(f"point {point}: {again}", flush=True)
                shutil.copyfile(folder / "log.txt", f"faults-{point}.log")
            elif tried % 20 == 0:
                print(f"{tried} of {len(points)} done, the last in {again['seconds']:.1f} s", flush=True)
        print(f"{len(points)} kills, {bad} with another result")
        sys.exit(bad > 0)
    finally:
        server.terminate()
        shutil.rmtree(folder, ignore_errors=True)


def record(folder: Path, chosen: range, every: bool) -> dict[str, Any]:
    """Run the recipe once, with a copy of its runs folder as it was before each of the chosen file events."""
    points: list[int] = []
    stacks: set[bytes] = set()

    def keep(count: int, stack: bytes) -> None:
        fresh = stack not in stacks
        stacks.add(stack)
        if count in chosen and (fresh or every):
            (folder / "runs").mkdir(exist_ok=True)
            shutil.copytree(folder / "runs", folder / f"at-{count}", symlinks=True)
            points.append(count)

    return trial(folder, keep) | {"points": points, "stacks": len(stacks)}


def start_server(folder: Path) -> "subprocess.Popen[bytes]":
    """Start one Prefect server for all trials."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(Path(sys.executable).parent / "prefect"),
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=2).close()
            return server
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the Prefect server did not start")


def warm() -> None:
    """Import everything once; trials are forks of this process."""
    import mlflow  # noqa: F401
    import prefect  # noqa: F401
    import torch
    import trl
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import flows.align  # noqa: F401

    torch.set_num_threads(1)
    assert trl


def trial(where: Path, before: Callable[[int, bytes], None] | None = None) -> dict[str, Any]:
    """Run the recipe in a fork, in `where`/runs, and return what it left.

    Args:
        before: called with 1, 2, … and a digest of the call stack before each file event, while all threads of the
            process stand still.
    """
    result_file, log = where / "told.json", where / "log.txt"
    result_file.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    started = time.monotonic()
    (asks, ask), (answers, answer) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(asks)
        try:
            _run(where, (ask, answers) if before else None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(ask)
    count = 0
    while before and (stack := os.read(asks, DIGEST)):  # ends with the process
        count += 1
        os.kill(pid, signal.SIGSTOP)
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the recorded run died: see {log}"
        before(count, stack)
        os.kill(pid, signal.SIGCONT)
        os.write(answer, b".")
    _, status = os.waitpid(pid, 0)
    for end in (asks, answers, answer):
        os.close(end)
    if result_file.exists():
        return json.loads(result_file.read_text()) | {"seconds": time.monotonic() - started}
    return {"status": status}


def _stack() -> bytes:
    """Return what names the lines of code that are being run in this thread."""
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_stack(None)]
    return hashlib.sha256(repr(lines).encode()).digest()[:DIGEST]


def _run(where: Path, ends: tuple[int, int] | None) -> None:
    log = os.open(where / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["SACPO_RUNS"] = str(where / "runs")
    root = str(where / "runs")
    count = 0
    one_at_a_time = threading.RLock()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in EVENTS:
            path = arguments[0]
        else:
            return
        if not str(path).startswith(root):
            return
        with one_at_a_time:
            count += 1
            os.write(ends[0], _stack())
            os.read(ends[1], 1)

    if ends:
        sys.addaudithook(watch)
    from flows.align import align
    from models.recipe.toml import read

    outcome = align(read("quickstart", CHANGES))
    events = count
    import mlflow

    report = json.loads((Path(outcome["report"]) / "report.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    found = {
        "weights": {c["name"]: c["digest"] for c in report["candidates"]},
        "versions": len(client.search_model_versions("name = 'quickstart'")),
        "champion": client.get_model_version_by_alias("quickstart", "champion").version,
        "events": events,
    }
    (where / "told.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
