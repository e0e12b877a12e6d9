"""What `gpu.py` runs, each unit in a process of its own: everything is imported where it is used."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import NEEDED, Tell, missing
from gpu_numbers import answers, attention, first, head, numerics, profile
from gpu_shapes import arm, make
from gpu_town import town

if TYPE_CHECKING:
    pass


def machine(tell: Tell, folder: Path, tiny: bool) -> None:
    """Say what is missing, which versions and which card."""
    with tell.stage("imports") as facts:
        facts |= {"missing": ", ".join(missing()) or "nothing", "python": sys.version.split()[0]}
        facts |= {name: _version(name) for name in NEEDED}
    with tell.stage("card") as facts:
        query = "name,driver_version,memory.total,memory.used,compute_mode"
        facts["nvidia_smi"] = _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    with tell.stage("torch") as facts:
        facts |= _torch()
    with tell.stage("trl") as facts:
        from trl.kernels import chunked_logprob

        facts["triton_head"] = bool(chunked_logprob._TRITON_AVAILABLE)
    with tell.stage("sacpo") as facts:
        from models import plan
        from models.alignment import dpo
        from models.policy import answers as answering
        from models.policy.weights import device_kind
        from models.recipe import Device

        facts |= {"device": device_kind(Device.auto), "modules": [m.__name__ for m in (dpo, answering, plan)]}


def _version(name: str) -> str:
    try:
        return version("PyYAML" if name == "yaml" else name)
    except PackageNotFoundError:
        return "–"


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    facts["devices"] = torch.cuda.device_count()
    if facts["devices"]:
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
        }
        facts |= {"bf16": torch.cuda.is_bf16_supported(), "cudnn": torch.backends.cudnn.version()}
    return facts | {"tf32": torch.backends.cuda.matmul.allow_tf32, "precision": torch.get_float32_matmul_precision()}


# A GPU of one's own


def own_gpu(tell: Tell, folder: Path, number: str, tiny: bool) -> None:
    """Do what a worker does when it starts, and say what it sees before and after."""
    with tell.stage("own_gpu") as facts:
        import torch

        from tasks.work import workers as launch

        launch._import_libraries(1)
        facts |= {"initialised_by_imports": torch.cuda.is_initialized(), "before": torch.cuda.device_count()}
        launch.own_gpu(int(number))
        facts |= _seen()


def _seen() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"visible": os.environ.get("CUDA_VISIBLE_DEVICES", "–"), "after": torch.cuda.device_count()}
    if facts["after"]:
        torch.ones(1, device="cuda")
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "uuid": str(getattr(card, "uuid", "–"))}
    return facts


def hidden(tell: Tell, folder: Path, tiny: bool) -> None:
    """Hide all GPUs after the imports: if one is still seen, the variable comes too late."""
    with tell.stage("hidden after the imports") as facts:
        import torch

        from tasks.work import workers as launch

        launch._import_libraries(1)
        facts["before"] = torch.cuda.device_count()
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        facts |= {"after": torch.cuda.device_count(), "available": torch.cuda.is_available()}
        try:
            torch.ones(1, device="cuda")
            facts["too_late"] = True
        except (RuntimeError, AssertionError) as error:
            facts |= {"too_late": False, "allocation": str(error).splitlines()[0]}


def workers(tell: Tell, folder: Path, tiny: bool) -> None:
    """Start two real workers, and ask each what it sees."""
    from models.recipe import Compute
    from tasks.work import workers as launch

    with tell.stage("two workers") as facts, launch.workers(Compute(processes=2), folder):
        pool = launch._pool
        facts["seen"] = [future.result(240) for future in [pool.submit(_slow_seen) for _ in range(2)]] if pool else []


def _slow_seen() -> dict[str, Any]:
    import time

    time.sleep(1)  # so that the other worker takes the other call
    return {"pid": os.getpid()} | _seen()


UNITS: dict[str, Callable[..., None]] = {
    "machine": machine, "town": town,
    "own_gpu": own_gpu, "hidden": hidden, "workers": workers, "make": make, "arm": arm, "numerics": numerics,
    "first": first, "attention": attention, "head": head, "profile": profile, "answers": answers,
}  # fmt: skip
