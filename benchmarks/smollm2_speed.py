"""LoRA DPO of SmolLM2-135M on real pairs: seconds per pair, ours against plain TRL with its defaults and at its best.

    python benchmarks/smollm2_speed.py BASE PAIRS TABLE [--pairs 24,128] [--threads 1,2] [--repeat 3] [--busy N]
    python benchmarks/smollm2_speed.py - - TABLE          only the figures of a table

BASE is a .gguf file or a folder, PAIRS a JSONL file of comparisons, TABLE a JSONL file that gets one line per arm and
round. Arms are those of `arms.py`, each in a process of its own, in turn, and every round begins with another one. What
stands in the table is not measured again: the same command goes on where it was stopped. `--busy N` keeps N loops busy
beside the arms, at the same priority. `--spin` leaves the threads' waiting as OpenMP has it, to see what it costs.

`ours` and `best` have the same threads, allocator, waiting and dtype; `plain` has the threads only, as a user of TRL
would start it. A pair costs its share of the training and of the reference, which a grid of two λ uses twice: TRL keeps
its precomputed log-probs in a file too. What does not grow with the pairs is `fixed`. CPU seconds hardly depend on
what else runs, but for threads that spin.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tasks.work.workers import ALLOCATOR, WAITING

GRID, BATCH = 2, 4
KEY = ("arm", "threads", "pairs", "round", "busy", "spin")
Line = dict[str, Any]


def main() -> None:
    """Measure what the table lacks, and print it."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "table"):
        asked.add_argument(name)
    asked.add_argument("--pairs", default="24,128", help="how many pairs; several, separated by commas")
    asked.add_argument("--threads", default="1,2")
    asked.add_argument("--arms", default="ours,plain,best")
    asked.add_argument("--repeat", type=int, default=3)
    asked.add_argument("--busy", type=int, default=0)
    asked.add_argument("--spin", action="store_true")
    asked.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.arm:
        print(json.dumps(measured(args.arm[0], Path(args.arm[1]), int(args.threads))))
        return
    table = Path(args.table)
    if args.base != "-":
        with tempfile.TemporaryDirectory() as folder, beside(args.busy):
            measure(args, table, Path(folder))
    print(figures(read(table)))


def read(table: Path) -> list[Line]:
    """Return the lines of a table; a kill may have left half a line."""
    lines = table.read_text("utf-8").splitlines() if table.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def measure(args: argparse.Namespace, table: Path, folder: Path) -> None:
    """Run the arms in turn, each at every number of pairs and threads, and add a line for each."""
    known, arms = {tuple(line[key] for key in KEY) for line in read(table)}, args.arms.split(",")
    sizes = [(int(threads), int(count)) for count in args.pairs.split(",") for threads in args.threads.split(",")]
    for number in range(args.repeat):
        for threads, count in sizes:
            place = folder / str(count)
            for k in range(len(arms)):
                arm = arms[(number + k) % len(arms)]
                key = (arm, threads, count, number, args.busy, args.spin)
                if key in known:
                    continue
                if not place.exists():
                    prepare(args.base, args.data, count, place)
                when = {"date": time.strftime("%F %T"), "load": os.getloadavg()[0]}
                line = json.dumps(dict(zip(KEY, key, strict=True)) | when | spawn(arm, place, threads, args.spin))
                with table.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                print(line[:300], flush=True)


def spawn(arm: str, place: Path, threads: int, spin: bool) -> Line:
    """Run one arm in a process of its own, and return what it spent."""
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if arm != "plain":
        own |= ALLOCATOR | ({} if spin else WAITING)
    command = [sys.executable, __file__, "-", "-", "-", "--threads", str(threads), "--arm", arm, str(place)]
    done = subprocess.run(command, check=False, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: Line = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(base: str, pairs: str, count: int, folder: Path) -> None:
    """Write the base policy and the pairs."""
    from models.artifacts import Sources
    from models.data import preferences
    from models.policy import weights
    from models.recipe import Data, Selection

    for place in (folder, folder / "base", folder / "pairs"):
        place.mkdir()
    made = weights.base(folder / "base", base, "", 0, weights.base_digest(base))
    sources = Sources(path=folder, digest="", files={"steps.0": str(Path(pairs).resolve())})
    config = Data(max_tokens=384, validation=0.1, test=0.1)
    selection = Selection(metric="helpful", paired=True, limit=count)
    found = preferences.prepare(folder / "pairs", sources, "steps.0", selection, config)
    (folder / "made.json").write_text(json.dumps({"policy": made.facts(), "preferences": found.facts()}))


def measured(name: str, folder: Path, threads: int) -> Line:
    """Run one arm in this process."""
    import arms

    from models.artifacts import Policy, Preferences
    from models.recipe import Compute, Data, Step

    made = json.loads((folder / "made.json").read_text())
    step = Step(
        metric="helpful", data="-", adapter_rank=16, learning_rate=2e-4, epochs=1, batch=BATCH, similar_lengths=True,
        save_every=10**6,
    )  # fmt: skip
    task = arms.Task(
        Policy(path=folder / "base", **made["policy"]), Preferences(path=folder / "pairs", **made["preferences"]), step,
        Compute(device="cpu", threads=threads), Data(max_tokens=384),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return arms.run(name, task, Path(out) / "arm")


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Keep `count` loops busy meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def per_pair(line: Line, kind: str = "wall") -> float:
    """Return seconds per pair, `wall` or `cpu`, without what is fixed."""

    def spent(part: str) -> float:
        names = ["wall"] if kind == "wall" else ["user", "system"]
        return sum(float(line[f"{part}_{name}"]) for name in names)

    return (spent("training") + spent("reference") / GRID) / float(line["pairs"])


def figures(lines: list[Line]) -> str:
    """Return a Markdown table: per setting the seconds per pair of each arm, and our ratios, median and worst."""
    heads = "threads, pairs, busy|arm|s/pair|CPU s/pair|fixed s|switches/s: slept, preempted|GiB|ours / it|worst"
    text = [f"| {' | '.join(heads.split('|'))} |"]
    text.append("|---|---|---|---|---|---|---|---|---|")
    settings = sorted({tuple(line[key] for key in ("threads", "pairs", "busy", "spin")) for line in lines})
    for setting in settings:
        some = [line for line in lines if tuple(line[key] for key in ("threads", "pairs", "busy", "spin")) == setting]
        ours = {line["round"]: per_pair(line) for line in some if line["arm"] == "ours"}
        for arm in sorted({line["arm"] for line in some}):
            found = [line for line in some if line["arm"] == arm]
            ratios = [ours[line["round"]] / per_pair(line) for line in found if line["round"] in ours]
            named = f"{setting[0]}, {setting[1]}, {setting[2]}{', spinning' if setting[3] else ''}"
            text.append(f"| {named} | {arm} | {_row(found)} | {_ratio(ratios)} |")
    return "\n".join(text)


def _row(found: list[Line]) -> str:
    wall, cpu = median(map(per_pair, found)), median(per_pair(line, "cpu") for line in found)
    fixed, held = (median(line[key] for line in found) for key in ("fixed_wall", "resident_gib"))
    slept, preempted = (median(line[f"training_{key}"] / line["training_wall"] for line in found)
                        for key in ("waited", "preempted"))  # fmt: skip
    return f"{wall:.2f} | {cpu:.2f} | {fixed:.1f} | {slept:.0f}, {preempted:.0f} | {held:.1f}"


def _ratio(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} | {max(ratios):.2f}" if ratios else "– | –"


if __name__ == "__main__":
    main()
