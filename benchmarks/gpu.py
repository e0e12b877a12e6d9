r"""What today's code does on a CUDA machine: one command, unattended, no network, random weights of real shapes.

    python benchmarks/gpu.py [--out FOLDER] [--wheels FOLDER] [--parts town,numerics] [--minutes 9]
    python benchmarks/gpu.py --list          the parts
    python benchmarks/gpu.py --tiny          everything at a tiny size, on the CPU if there is no GPU

Every part has at most nine minutes, every unit of it a process of its own: what crashes, hangs or lacks memory loses
nothing else, and is a result. FOLDER gets `results.jsonl` (a line as soon as something is known), `summary.md` and
`log.txt`; weights go to a temporary folder, at most 20 GiB.

The machine needs Python 3.11 or newer and torch with CUDA. What else is missing is said at once. Without a registry,
carry wheels and give their folder: they are unpacked into a temporary folder, before all else on the path of every
process. For Python 3.12, with torch, numpy, pandas, scipy, pyarrow, regex, jinja2, PyYAML, tqdm, packaging, typer and
fsspec there, these 22 wheels do (29 MB):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux2010_x86_64 -d wheels -c constraints.txt $(python benchmarks/gpu.py --needs)

Compiled, so of that Python or newer and that platform only: pydantic-core, tokenizers, hf-xet, xxhash, safetensors,
psutil; the rest is pure Python. The largest are transformers (13 MB), hf-xet (4) and tokenizers (3). pyarrow would be
50 MB more, and torch alone does not bring it: with it 79 MB, above what a carrier of 64 MiB takes. Then leave out what
the machine has. The fewest, beside its own transformers 5.17, peft and accelerate, are eight: trl, datasets, pydantic,
pydantic-core, annotated-types, typing-inspection, dill and multiprocess (tried while datasketch was needed as well).

Begin with `--tiny`. On a machine that is lent for ten minutes a call, these three calls should do (not tried):

    python benchmarks/gpu.py --minutes 9 --parts machine,own_gpu,town,numerics
    python benchmarks/gpu.py --minutes 9 --parts lora,large
    python benchmarks/gpu.py --minutes 9 --parts full,kernels,answers
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 9 * 60
"""Seconds that a part may take."""
TOLD = 3
"""Exit code of a unit of which a stage failed, and was noted."""
ARMS = "ours plain best shared"
HEADS = ("part", "unit", "stage", "ok", "losses", "updates")
NEEDED = (
    "torch", "transformers", "trl", "datasets", "peft", "accelerate", "tokenizers", "safetensors", "pydantic",
    "filelock", "numpy", "scipy", "pandas", "pyarrow", "psutil", "jinja2", "yaml", "regex",
)  # fmt: skip
WHEELS = (
    "trl transformers datasets huggingface_hub tokenizers peft accelerate pydantic pydantic-core annotated-types "
    "typing-inspection typing_extensions dill multiprocess httpx2 httpcore2 truststore hf-xet xxhash "
    "safetensors filelock psutil"
)


class Part(NamedTuple):
    """Units that run one after the other; what `make` makes serves all parts."""

    says: str
    units: list[str]


def speed(shape: str, adapter: str, arms: str, times: int) -> list[str]:
    """Return the units of a comparison: the arms in turn."""
    rounds = [f"arm {shape} {adapter} {arm} {number}" for number in range(times) for arm in arms.split()]
    return [f"make {shape}", *rounds]


def parts(tiny: bool) -> dict[str, Part]:
    """Return the parts by name."""
    small, times = ("tiny", 1) if tiny else ("135m", 2)
    found = {
        "machine": Part("card, versions, what cannot be imported", ["machine"]),
        "own_gpu": Part("does a worker get a GPU of its own", ["own_gpu 0", "own_gpu 1", "hidden", "workers"][tiny:]),
        "town": Part("every stage of the quickstart, on its real data", ["town"]),
        "numerics": Part("float32 against bfloat16; the first loss against ln 2",
                         [f"make {small}", f"numerics {small}", f"first {small} lora", f"first {small} full"]),
        "lora": Part(f"{small}, LoRA: ours against TRL; peak memory", speed(small, "lora", ARMS, times)),
        "full": Part(f"{small}, all weights: the same", speed(small, "full", ARMS, times)),
        "large": Part("1b, LoRA: the same", speed("1b", "lora", "ours best shared", 1)),
        "kernels": Part("attention kernels with our mask; TRL's head; what a step runs",
                        ["attention", f"make {small}", f"head {small}", f"profile {small}"]),
        "answers": Part("prompts answered per second", [f"make {small}", f"answers {small}"]),
    }  # fmt: skip
    return {name: part for name, part in found.items() if not (tiny and name == "large")}


# What runs in the parent: it imports nothing that is not Python's own


def main() -> int:
    """Run the parts that were asked for, and return how many units failed, at most 99."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"))
    asked.add_argument("--parts", default="", help="names, separated by commas; all by default")
    asked.add_argument("--wheels", type=Path, help="folder of wheels to unpack first")
    asked.add_argument("--minutes", type=float, default=0, help="end after so long; 0: each part has its nine minutes")
    asked.add_argument("--tiny", action="store_true", help="tiny sizes")
    asked.add_argument("--list", action="store_true", help="show the parts")
    asked.add_argument("--needs", action="store_true", help="print the wheels to carry")
    asked.add_argument("--unit", nargs=2, help=argparse.SUPPRESS)
    args = asked.parse_args()
    known = parts(args.tiny)
    if args.unit:
        return run_unit(*args.unit, args.out, args.tiny)
    if args.list or args.needs:
        print(WHEELS if args.needs else "\n".join(f"{name:10}{part.says}" for name, part in known.items()))
        return 0
    chosen = [name for name in args.parts.split(",") if name] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        asked.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sacpo-gpu-") as work:
        return run_parts({name: known[name] for name in chosen}, args, Path(work))


def run_parts(chosen: dict[str, Part], args: argparse.Namespace, work: Path) -> int:
    """Run parts one after the other; the summary is written after each."""
    end = time.monotonic() + (args.minutes * 60 or 10**6)
    env, failed, made = environment(args, work), 0, set()
    for name, part in chosen.items():
        print(f"\n# {name}: {part.says}", flush=True)
        until = min(end, time.monotonic() + LONGEST)
        for unit in [unit for unit in part.units if unit not in made]:
            well = spawn(name, unit, work, until - time.monotonic(), args, env)
            failed += not well
            made |= {unit} if well and unit.startswith("make") else set()
        (args.out / "summary.md").write_text(summary(args.out), "utf-8")
    print(summary(args.out), flush=True)
    return min(failed, 99)


def environment(args: argparse.Namespace, work: Path) -> dict[str, str]:
    """Unpack the wheels, and return what every process is given: their place first, our code, no network."""
    target = work / "site"
    for wheel in sorted(args.wheels.glob("*.whl")) if args.wheels else []:
        with zipfile.ZipFile(wheel) as packed:  # all that an installation without needs, scripts and bytecode does
            packed.extractall(target)
    own = {
        "PYTHONPATH": os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(work / "triton"), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # as every worker has it
    }  # fmt: skip
    return os.environ | own | ({"OMP_NUM_THREADS": "1"} if args.tiny else {})


def spawn(part: str, unit: str, folder: Path, seconds: float, args: argparse.Namespace, env: dict[str, str]) -> bool:
    """Run one unit in a process group of its own until it ends or its time is up, and note how it ended."""
    if seconds < 5:
        show(append(args.out, part=part, unit=unit, stage="", ok=False, error="not started: the time is up"))
        return False
    results, log, started = args.out / "results.jsonl", folder / "unit.log", time.monotonic()
    size_before = results.stat().st_size if results.exists() else 0
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out.resolve()), "--unit", unit, part]
    with log.open("w") as file:
        code, error = wait(command + ["--tiny"] * args.tiny, seconds, stdout=file, cwd=folder, env=env)
    if results.exists():
        for line in results.read_bytes()[size_before:].splitlines():
            show(json.loads(line))
    text = log.read_text("utf-8", "replace")
    with (args.out / "log.txt").open("a", encoding="utf-8") as whole:
        whole.write(f"\n===== {part} · {unit}\n{text[-20000:]}")
    ended = {"error": "\n".join([error, *text.splitlines()[-15:]])} if error else {}
    took = round(time.monotonic() - started, 1)
    show(append(args.out, part=part, unit=unit, stage="", ok=code == 0, seconds=took, **ended))
    return code == 0


def wait(command: list[str], seconds: float, **options: Any) -> tuple[int, str]:
    """Return the exit code, and what went wrong if the process did not say so itself; nothing of it is left."""
    child = subprocess.Popen(command, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        code = child.wait(seconds)
        return code, "" if code in (0, TOLD) else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def append(out: Path, **line: Any) -> dict[str, Any]:
    """Write one line of results."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def show(line: dict[str, Any]) -> None:
    """Print one line of results."""
    facts = {key: value for key, value in line.items() if key not in HEADS}
    print(f"{'ok  ' if line['ok'] else 'FAIL'} {line['unit']} · {line['stage']} {str(facts)[:1200]}", flush=True)


def summary(out: Path) -> str:
    """Return the results as Markdown: the machine, ratios, everything measured, what failed."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    text = [f"# sacpo on a CUDA machine, {time.strftime('%Y-%m-%d %H:%M')}", ""]
    text += ["| arm | s/pair, third update on | s/pair, reference | fixed s | peak GiB | plan's GiB | against best |"]
    text += [
        "|---|---|---|---|---|---|---|",
        *ratios([line for line in lines if line["stage"] == "arm" and line["ok"]]),
    ]
    text += ["", "| part | unit | stage | ok | what |", "|---|---|---|---|---|"]
    for line in lines:
        elsewhere = ("part", "unit", "stage", "ok", "error", "updates", "losses")
        figures = {key: value for key, value in line.items() if key not in elsewhere}
        what = "; ".join(f"{key} {value}" for key, value in figures.items()).replace("|", "\\|")
        text.append(
            f"| {line['part']} | {line['unit']} | {line['stage']} | {'yes' if line['ok'] else '**no**'} | {what} |"
        )
    for line in lines:
        if line.get("error"):
            text += ["", f"**{line['part']} · {line['unit']} · {line['stage']}**", "", "```", line["error"], "```"]
    return "\n".join(text) + "\n"


def ratios(lines: list[dict[str, Any]]) -> list[str]:
    """Return a row per arm: the median of its updates over all rounds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        kind, arm = line["unit"].split()[1:3], line["unit"].split()[3]
        groups.setdefault((" ".join(kind), arm), []).append(line)
    median = {key: _median([s for line in found for s in line["updates"][2:] or line["updates"]]) / found[0]["batch"]
              for key, found in groups.items()}  # fmt: skip
    rows = []
    for (kind, arm), found in groups.items():
        scored, fixed = (_median([line[key] for line in found]) for key in ("reference_wall", "fixed_wall"))
        top, planned = (max(line[key] for line in found) for key in ("peak_gib", "plan_gib"))
        best = median.get((kind, "best"), float("nan"))
        figures = (median[kind, arm], scored / found[0]["pairs"], fixed, top, planned, median[kind, arm] / best)
        rows.append(f"| {kind} {arm} | {' | '.join(f'{figure:.3g}' for figure in figures)} |")
    return rows


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# What runs in a process of its own


class Tell:
    """Writes what a unit found; a stage that fails is noted, and the unit goes on."""

    def __init__(self, unit: str, out: Path, part: str) -> None:
        self.unit, self.out, self.part, self.failed = unit, out, part, 0

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage, note what it puts into the dictionary, its peak memory, or its traceback."""
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        try:
            yield facts
            if cuda := _cuda():
                cuda.synchronize()
            facts = {"seconds": round(time.perf_counter() - started, 2)} | facts
            if cuda and cuda.max_memory_allocated():
                facts.setdefault("peak_gib", round(cuda.max_memory_allocated() / 2**30, 3))
            append(self.out, part=self.part, unit=self.unit, stage=name, ok=True, **facts)
        except Exception:
            self.fails(name, facts)

    def fails(self, name: str, facts: dict[str, Any]) -> None:
        """Note the exception in flight."""
        self.failed += 1
        error = "\n".join(traceback.format_exc().splitlines()[-12:])
        append(self.out, part=self.part, unit=self.unit, stage=name, ok=False, **facts, error=error)


def _cuda() -> Any:
    """Return torch.cuda where this process has begun to use it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def run_unit(unit: str, part: str, out: Path, tiny: bool) -> int:
    """Run one unit in this process, in its working folder; what it raises outside of its stages is told as well."""
    from gpu_units import UNITS

    name, *parameters = unit.split()
    tell = Tell(unit, out, part)
    try:
        UNITS[name](tell, Path.cwd(), *parameters, tiny=tiny)
    except Exception:
        tell.fails("", {})
    return TOLD if tell.failed else 0


def missing() -> list[str]:
    """Return what cannot be found here of what training imports."""
    return [name for name in NEEDED if find_spec(name) is None]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
