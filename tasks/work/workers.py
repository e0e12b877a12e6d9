"""Stages run in worker processes: with a fixed number of threads, side by side, and never longer than their parent.

The parent imports no torch. A worker imports torch and trl while Prefect is still starting. Workers stay in the
parent's process group, so that a cancelled run takes them along; one whose parent was killed ends by itself.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.artifacts import Noun
from models.errors import SacpoError
from models.files.kept import Kept
from models.recipe import Compute
from tasks.work import store
from tasks.work.processes import end_with
from tasks.work.store import N, Stage

Watch = Callable[[Stage[Any], dict[str, Any]], None]
"""Called about twice a second with the newest line of a running stage's `progress.jsonl`."""

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""glibc keeps the memory of large tensors and uses it again, instead of unmapping and mapping it at every step: a third
of the CPU time of training SmolLM2-135M was spent in the kernel."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads sleep where they wait for each other. GNU's OpenMP, which torch brings, lets them turn in a loop of 300,000
rounds instead; on cores that others want too, they burn the time that the thread they wait for needs."""
GRACE = 10.0
"""Seconds for all workers together to write their checkpoints."""

_compute: Compute | None = None  # inside `workers`
_pool: Executor | None = None
_stopped = False  # the workers were told to end: they did not die
_waking = threading.Lock()  # of several stages that come after a rest, one starts the workers
_logs = Path()


@contextmanager
def workers(compute: Compute, root: Path) -> Iterator[None]:
    """Keep `compute.processes` workers for the time of a run; their output goes to `root/logs`.

    Inside another `workers` this does nothing: the command line starts them before Prefect, a deployed flow does not.
    """
    global _compute, _pool, _logs, _stopped
    if begun():
        yield
        return
    _stopped = False
    _logs = root / Kept.logs
    _logs.mkdir(parents=True, exist_ok=True)
    threads = str(compute.threads)
    for name, value in (ALLOCATOR | WAITING).items():  # glibc reads its own when a process starts
        os.environ.setdefault(name, value)
    # OpenMP reads these when torch is imported, so they are set before the worker exists
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    try:
        _compute, _pool = compute, _begin(compute)
        yield
    except BaseException:
        stop()
        raise
    finally:
        if _pool is not None:
            _pool.shutdown(cancel_futures=True)
        _compute = _pool = None


def _begin(compute: Compute) -> Executor:
    """Start all the workers now: importing torch and trl takes them seconds."""
    pool: Executor
    if compute.processes:
        context = multiprocessing.get_context("spawn")
        settings = (os.getpid(), str(_logs), compute.threads, context.Value("i", 0))
        pool = ProcessPoolExecutor(compute.processes, context, _settle, settings)
    else:
        pool = ThreadPoolExecutor(1, initializer=_alone, initargs=(compute.threads,))
    for _ in range(max(1, compute.processes)):
        pool.submit(_ready)
    return pool


def begun() -> bool:
    """Return whether `workers` is around this: the command line starts them once it has checked the recipe."""
    return _compute is not None


def rest() -> None:
    """End the workers until a stage needs them: a run that waits for a person for days keeps no memory and no GPU."""
    global _pool, _stopped
    stop()
    _pool, _stopped = None, False


def stop() -> None:
    """End the workers and what they do; a killed training goes on from its checkpoint with the next command.

    Without worker processes what runs goes on to its end, and nothing is started after it.
    """
    global _stopped
    _stopped = _pool is not None
    processes = list((getattr(_pool, "_processes", None) or {}).values())
    if _pool is not None:
        _pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()


def run(root: Path, stage: Stage[N], watch: Watch) -> N:
    """Return the stage's result, from the store or from a worker.

    Raises:
        SacpoError: the stage failed, or its process was killed.
    """
    global _pool
    found = store.find(root, stage)
    if found is not None:
        return found
    if _compute is None:
        raise RuntimeError("workers.run needs workers.workers around it")
    with _waking:
        _pool = _pool or _begin(_compute)
    progress = stage.partial(root) / "progress.jsonl"
    try:
        future = _pool.submit(_work, root, stage.request())
        while not wait([future], timeout=0.5).done:
            line = _last_line(progress)
            if line:
                watch(stage, line)
        noun = future.result()
        assert isinstance(noun, stage.makes)
        return noun
    except (BrokenProcessPool, CancelledError) as error:
        if _stopped:
            raise SacpoError(f"{stage.title}: stopped; the same command goes on from the last checkpoint") from error
        raise SacpoError(
            f"{stage.title}: its process was killed, often because memory ran out; see {_logs}. The same command "
            "goes on from the last checkpoint"
        ) from error


def _work(root: Path, request: str) -> Noun:
    logs = multiprocessing.parent_process() is not None  # what a worker prints goes to its log
    try:
        stage: Stage[Noun] = store.requested(request)
        if logs:
            print(f"[{time.strftime('%H:%M:%S')}] {stage.title}", flush=True)
        return store.make(root, stage)
    except BaseException:
        if logs:
            traceback.print_exc()
        raise


def _settle(parent: int, logs: str, threads: int, started: Any) -> None:
    """Make this process a worker: output to a log file, no longer alive than its parent, fixed threads, one GPU.

    Args:
        started: a shared counter of the workers that were started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    log = os.open(Path(logs) / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with started.get_lock():
        number = started.value
        started.value += 1
    _import(threads)
    own_gpu(number)


def _alone(threads: int) -> None:
    """Make this process its own and only worker."""
    _import(threads)
    own_gpu(0)


def own_gpu(number: int) -> None:
    """Let worker `number` see one GPU of those that this run may use, in turn; without GPUs nothing happens.

    A trainer that sees several would spread every batch over them, and all workers would share the first.
    """
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = visible or [str(i) for i in range(torch.cuda.device_count())]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def _import(threads: int) -> None:
    """Import what takes seconds, and fix the number of threads."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, of which a killed worker leaves a warning

    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging
    from trl import DPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    disable_progress_bar()


def _ready() -> None:
    pass


def _last_line(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = [line for line in file.read().splitlines() if line.endswith(b"}") and line.startswith(b"{")]
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, json.JSONDecodeError):
        return {}
