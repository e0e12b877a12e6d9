"""What it costs that OpenMP's threads spin where they wait: a chain of small products, beside busy loops or not.

    python benchmarks/waiting.py [--busy N] [--repeat 3]

Each way of waiting runs in a process of its own, in turn: as OpenMP has it, asleep at once
(`tasks.work.workers.WAITING`), and asleep after 1,000 rounds. Wall and CPU seconds, and context switches: of its own
accord, and because another wanted the core.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from smollm2_speed import beside

from tasks.work.workers import WAITING

WAYS: dict[str, dict[str, str]] = {"as it is": {}, "asleep": WAITING, "1,000 rounds": {"GOMP_SPINCOUNT": "1000"}}


def main() -> None:
    """Run every way with one and with two threads, and print a table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--busy", type=int, default=0)
    asked.add_argument("--repeat", type=int, default=3)
    asked.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.threads:
        print(json.dumps(chain(args.threads)))
        return
    print("| waiting | threads | wall s | CPU s | slept | preempted |\n|---|---|---|---|---|---|")
    with beside(args.busy):
        for _ in range(args.repeat):
            for name, own in WAYS.items():
                for threads in (1, 2):
                    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
                    command = [sys.executable, __file__, "--threads", str(threads)]
                    done = subprocess.run(command, env=env | own, capture_output=True, text=True, check=True)
                    spent = " | ".join(f"{value:.5g}" for value in json.loads(done.stdout).values())
                    print(f"| {name} | {threads} | {spent} |", flush=True)


def chain(threads: int, rows: int = 600, width: int = 576, steps: int = 200) -> dict[str, float]:
    """Run products and norms of SmolLM2-135M's width, one after the other, and return what they spent."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = start = torch.randn(rows, width)
    weight = torch.randn(width, width) / width**0.5
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        x = torch.nn.functional.silu(x @ weight) + start
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": time.perf_counter() - begun,
        "cpu": spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime,
        "slept": spent.ru_nvcsw - before.ru_nvcsw,
        "preempted": spent.ru_nivcsw - before.ru_nivcsw,
    }


if __name__ == "__main__":
    main()
