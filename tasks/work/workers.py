"""Stages run in worker processes: with a fixed number of threads, side by side, and never longer than their parent.

The parent imports no torch. A worker imports torch and trl while Prefect is still starting. Workers stay in the
parent's process group, so that a cancelled run takes them along. A worker whose parent was killed ends by itself.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from models.artifacts import Noun
from models.errors import SacpoError
from models.files.kept import RunsFolderEntry
from models.recipe import Compute
from tasks.work import progress_rows, store
from tasks.work.processes import end_with
from tasks.work.progress_rows import ProgressRow
from tasks.work.store import N, Stage

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

Watch = Callable[[Stage[Noun], ProgressRow], None]
"""Called about twice a second with the newest row of a running stage's `progress.jsonl`."""

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""With these glibc keeps the memory of large tensors and uses it again, instead of unmapping and mapping it at every
step: a third of the CPU time of training SmolLM2-135M was spent in the kernel."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""With this threads sleep while they wait for each other. GNU's OpenMP, which torch brings, lets them run through a
loop of 300,000 rounds first; on cores that are shared, this takes time from the thread that they wait for."""
GRACE = 10.0
"""Seconds for all workers together to write their checkpoints."""

_compute: Compute | None = None
"""What `workers` was called with; None outside of it."""
_pool: Executor | None = None
"""The workers; None outside of `workers`, and while they rest."""
_stopped = False
"""Whether `stop` ended the workers: if not, a broken pool means that one of them was killed."""
_pool_lock = threading.Lock()
"""Of several stages that come after a rest at the same time, one starts the workers."""
_logs = Path()


@contextmanager
def workers(compute: Compute, root: Path) -> Iterator[None]:
    """Keep `compute.processes` workers for the time of a run; their output goes to `root/logs`.

    Inside another `workers` this does nothing: the command line starts them before Prefect, a deployed flow starts them
    here.
    """
    global _compute, _pool, _logs, _stopped
    if are_running():
        yield
        return
    _stopped = False
    _logs = root / RunsFolderEntry.logs
    _logs.mkdir(parents=True, exist_ok=True)
    threads = str(compute.threads)
    # The workers inherit these variables. glibc reads its own when a process starts, and OpenMP when torch is imported,
    # so a worker could not set them for itself.
    for name, value in (ALLOCATOR | WAITING).items():
        os.environ.setdefault(name, value)
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    with ExitStack() as stack:
        stack.callback(_close)
        stack.push(_stop_after_error)
        _compute, _pool = compute, _start_pool(compute)
        yield


def _close() -> None:
    """Wait for the workers' end, and forget them."""
    global _compute, _pool
    if _pool is not None:
        _pool.shutdown(cancel_futures=True)
    _compute = _pool = None


def _stop_after_error(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    """End the workers at once where a `with` block ends with an error: an unneeded training could go on for hours."""
    if error is not None:
        stop()


def _start_pool(compute: Compute) -> Executor:
    """Start all workers."""
    pool: Executor
    if compute.processes:
        # not `fork`: Prefect runs threads in this process, and a child could inherit a lock that one of them has taken
        context = multiprocessing.get_context("spawn")
        settings = (os.getpid(), str(_logs), compute.threads, context.Value("i", 0))
        pool = ProcessPoolExecutor(compute.processes, context, _become_worker, settings)
    else:
        pool = ThreadPoolExecutor(1, initializer=_become_only_worker, initargs=(compute.threads,))
    # A pool starts a worker when there is work for it. Importing torch and trl takes a worker seconds, so each gets an
    # empty task now.
    for _ in range(max(1, compute.processes)):
        pool.submit(_ready)
    return pool


def are_running() -> bool:
    """Return whether this is called inside `workers`."""
    return _compute is not None


def pause() -> None:
    """End the workers until the next stage needs them.

    A run may wait for a person's answer for days, and uses no memory and no GPU in that time.
    """
    global _pool, _stopped
    stop()
    _pool, _stopped = None, False


def stop() -> None:
    """End the workers and what they do; a training goes on from its checkpoint with the next command.

    Without worker processes the stage that runs goes on to its end, and no other one begins.
    """
    global _stopped
    _stopped = _pool is not None
    # Before Python 3.14 (`terminate_workers`) an executor has no public way to its processes; one of threads has no
    # processes. They are looked up before `shutdown`, which forgets them.
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

    Args:
        watch: called with the stage's progress while it runs.

    Raises:
        SacpoError: the stage failed, or its process was killed or stopped.
    """
    global _pool
    existing = store.find(root, stage)
    if existing is not None:
        return existing
    if _compute is None:
        raise RuntimeError("workers.run needs workers.workers around it")
    with _pool_lock:
        _pool = _pool or _start_pool(_compute)
    try:
        future = _pool.submit(_do_stage, root, stage.request())
        while not wait([future], timeout=0.5).done:
            row = progress_rows.last_row(stage.partial(root))
            if row:
                watch(stage, row)
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


def _do_stage(root: Path, request: str) -> Noun:
    """Do a stage, in a worker: what it prints goes to the worker's log."""
    # without worker processes the stage runs in the user's process, whose output is the terminal
    is_worker = multiprocessing.parent_process() is not None
    with ExitStack() as stack:
        if is_worker:
            stack.push(_print_traceback)
        stage = store.requested(request)
        if is_worker:
            print(f"[{time.strftime('%H:%M:%S')}] {stage.title}", flush=True)
        return store.make(root, stage)


def _print_traceback(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    """Write an error that ends a `with` block to the log: the user sees one line of it, from the parent."""
    if error is not None:
        traceback.print_exception(error)


def _become_worker(parent: int, logs: str, threads: int, counter: "Synchronized[int]") -> None:
    """Make this process a worker: output to a log file, no longer alive than its parent, fixed threads, one GPU.

    Args:
        parent: its process id.
        logs: the folder for log files.
        counter: how many workers have started before this one; shared by all of them.
    """
    # the terminal sends Ctrl-C to the whole process group; the parent decides what to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    log = os.open(Path(logs) / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # the descriptors are replaced, since libraries in C write to stdout and stderr too
    os.dup2(log, 1)
    os.dup2(log, 2)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    _import_libraries(threads)
    own_gpu(number)


def _become_only_worker(threads: int) -> None:
    """Make this process the only worker, for a run without worker processes."""
    _import_libraries(threads)
    own_gpu(0)


def own_gpu(number: int) -> None:
    """Let worker `number` see one GPU of those that this run may use, in turn; without GPUs do nothing.

    A trainer that sees several GPUs would spread every batch over all of them, and all workers would share the first.
    """
    import torch

    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = gpus or [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _import_libraries(threads: int) -> None:
    """Import the libraries that take seconds, and fix the number of threads."""
    from tqdm import tqdm

    # tqdm's own lock is a semaphore of the system; a killed worker that has one leaves a warning about it
    tqdm.set_lock(threading.RLock())

    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging
    from trl import DPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    disable_progress_bar()


def _ready() -> None:
    """Do nothing: the worker that is asked for this has been started."""
