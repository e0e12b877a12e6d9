"""Workers: what each may use."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.data import sources
from models.recipe import Compute
from tasks.work import workers
from tasks.work.store import Stage


def test_each_worker_gets_a_gpu_of_its_own_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for number in range(5):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
        workers.own_gpu(number)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "6", "7", "4", "6"]


def test_without_gpus_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored at the end, unlike a variable that was not there
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    workers.own_gpu(1)
    assert not os.environ["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    workers.own_gpu(3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_stage_runs_in_a_worker_with_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is another process; what it prints goes to its log. Its threads sleep where they wait."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")  # OpenMP says what it has understood
    stage = Stage(sources.gather, "data", {"files": {"sft": "town"}, "sha256": {}, "seed": 0})
    with workers.workers(Compute(device="cpu", processes=1, threads=1), tmp_path):
        made = workers.run(tmp_path, stage, lambda *_: None)
    assert made.path == stage.folder(tmp_path) and (made.path / "manifest.json").exists()
    (log,) = (tmp_path / "logs").glob("worker-*.log")
    assert log.name != f"worker-{os.getpid()}.log" and "data" in log.read_text()
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", log.read_text()) == ["0"]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_stage_runs_after_a_rest_too(processes: int, tmp_path: Path) -> None:
    """While a person is asked there is no worker; the next stage starts one again."""
    with workers.workers(Compute(device="cpu", processes=processes, threads=1), tmp_path):
        for number in range(2):
            settings = {"files": {"sft": "town"}, "sha256": {}, "seed": number}
            stage = Stage(sources.gather, "data", settings)
            assert (workers.run(tmp_path, stage, lambda *_: None).path / "manifest.json").exists()
            workers.pause()
            assert workers._pool is None


def test_without_workers_a_failure_leaves_nothing_to_start(tmp_path: Path) -> None:
    """The queue is emptied: a grid of trainings ends with the first that fails."""
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.3)
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="0"), workers.workers(Compute(device="cpu", processes=0), tmp_path):
        pool = workers._pool
        assert pool is not None
        futures = [pool.submit(work, number) for number in range(4)]
        futures[0].result()
    assert begun in ([0], [0, 1])  # the second may have begun before anyone knew


def test_a_run_goes_on_when_nobody_reads_what_it_says() -> None:
    """As after the death of the worker that started it."""
    code = (
        "import os, time, rich.console; from tasks.work import terminal; time.sleep(1); own = rich.console.Console()\n"
    )
    code += "for say in (terminal.say, terminal.say, own.print): say('on')\nos._exit(7)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stdout
    process.stdout.close()
    assert process.wait(600) == 7
