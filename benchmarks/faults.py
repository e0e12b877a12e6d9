"""Kill a run at every point where it creates, opens for writing, renames or removes a file; start it again; compare.

The recipe is the quickstart in 20 updates per step. Each trial forks a process that has imported everything, kills it
with SIGKILL at its n-th file event, and runs the same command again: final weights must be those of an undisturbed
run, bit for bit, and the registry must hold one version.

    python benchmarks/faults.py [--every K] [--first N] [--last N]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from pathlib import Path

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.copyfile"}
CHANGES = [
    "sft.updates=20",
    "sft.save_every=5",
    "steps.0.updates=20",
    "steps.0.save_every=5",
    "steps.1.updates=20",
    "steps.1.save_every=5",
    "steps.1.lambda=[0.2,1]",
    "merge.weights=[0.5]",
    "constraint.at_least=0.05",
    "data.heldout=50",
    "evaluation.kl_prompts=16",
    "compute.processes=0",
]


def main() -> None:
    """Run the sweep and print one line per failure and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every K-th point")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=100_000)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    server = start_server(folder)
    try:
        warm()
        undisturbed = trial(folder / "undisturbed", 0)
        weights, events = undisturbed["weights"], undisturbed["events"]
        print(f"undisturbed: {events} file events, {len(weights)} policies, {undisturbed['seconds']:.1f} s", flush=True)
        bad = tried = 0
        for point in range(given.first, min(events, given.last) + 1, given.every):
            where = folder / "trial"
            shutil.rmtree(where, ignore_errors=True)
            if trial(where, point).get("weights"):
                continue  # this time the run had fewer events
            again = trial(where, 0)
            tried += 1
            good = again.get("weights") == weights and again.get("versions") == 1
            bad += not good
            if not good:
                print(f"point {point}: {again}", flush=True)
        print(f"{tried} kills, {bad} with another result")
        sys.exit(bad > 0)
    finally:
        server.terminate()
        shutil.rmtree(folder, ignore_errors=True)


def start_server(folder: Path) -> "subprocess.Popen[bytes]":
    """Start one Prefect server for all trials."""
    port = 4299
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


def trial(where: Path, kill_at: int) -> dict:
    """Run the recipe in a fork, killed at its `kill_at`-th file event (0: never); return what it left."""
    where.mkdir(exist_ok=True)
    told = where / "told.json"
    told.unlink(missing_ok=True)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            _run(where, kill_at)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if told.exists():
        return json.loads(told.read_text()) | {"seconds": time.monotonic() - started}
    return {"status": status}


def _run(where: Path, kill_at: int) -> None:
    log = os.open(where / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["SACPO_RUNS"] = str(where / "runs")
    root = str(where / "runs")
    count = 0

    def watch(event: str, given: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = given
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in EVENTS:
            path = given[0]
        else:
            return
        if not str(path).startswith(root):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    from flows.align import align
    from models.recipe_file import read

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
