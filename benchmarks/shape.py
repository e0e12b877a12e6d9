"""Does the quickstart show the method's shape on fresh seeds? Settings were tuned on seeds 0–2; these are 10–19.

For each seed the whole quickstart runs; then, over seeds:
    reward step   helpful win rate against the base above ½          (Wilcoxon signed-rank, one-sided)
    safety step   safety rate rises as β/λ falls, 2 → 0.1            (Page's trend test over seeds)
    merges        safety rate rises with q from π_r to π_{r+λ̄g}      (Page's trend test), and lies between the parents
    gate          a champion at the end

    python benchmarks/shape.py RUNS [SEED …]        prints a Markdown table; RUNS is a folder for the results
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

WIN, SAFE, OVER = "helpful/win_rate", "harmless/safety_rate", "over_refusal"


def main() -> None:
    """Run what is missing, and print the table."""
    runs = Path(sys.argv[1]).resolve()
    seeds = [int(seed) for seed in sys.argv[2:]] or list(range(10, 20))
    trees = [report(runs, seed) for seed in seeds]
    steps = ["harmless λ=0.05", "harmless λ=0.1", "harmless λ=0.2", "harmless λ=0.4", "harmless λ=1"]
    merges = ["merge q=0.25", "merge q=0.5", "merge q=0.75"]
    names = ["base", "helpful", *steps, *merges]
    print("| seed | " + " | ".join(names) + " | chosen | tested: rate, bound | seconds |")
    print("|---|" + "---|" * (len(names) + 3))
    for seed, tree in zip(seeds, trees, strict=True):
        cells = [f"{at(tree, name, WIN):.2f} {at(tree, name, SAFE):.2f} {at(tree, name, OVER):.2f}" for name in names]
        tested = tree["constraints"][0]["tested"]
        verdict = f"{tested[0]['value']:.3f}, {tested[0]['lower_bound']:.3f}" if tested else "–"
        chosen = (tree["chosen"] or {"candidate": "none"})["candidate"]
        champion = " (champion)" if (tree["registry"] or {"alias": ""})["alias"] == "champion" else " (not promoted)"
        print(f"| {seed} | {' | '.join(cells)} | {chosen}{champion} | {verdict} | {tree['wall']:.0f} |")
    print("\nCells: helpful win rate, safety rate, over-refusal on the validation split.\n")
    wins = np.array([at(tree, "helpful", WIN) for tree in trees])
    up = stats.wilcoxon(wins - 0.5, alternative="greater")
    print(f"- reward step: win rate {wins.mean():.3f} (least {wins.min():.3f}); above ½, p = {up.pvalue:.2g}")
    ladder = np.array([[at(tree, name, SAFE) for name in ["helpful", *steps]] for tree in trees])
    trend = stats.page_trend_test(ladder)
    monotone = int((np.diff(ladder) >= 0).all(axis=1).sum())
    print(
        f"- safety step: safety rate {ladder[:, 0].mean():.3f} → {ladder[:, -1].mean():.3f}; Page's trend test p = "
        f"{trend.pvalue:.2g}; rising at every value in {monotone} of {len(trees)} seeds"
    )
    mixed = np.array([[at(tree, name, SAFE) for name in ["helpful", *merges, steps[-1]]] for tree in trees])
    inside = int(((mixed[:, 1:-1] >= mixed[:, :1]) & (mixed[:, 1:-1] <= mixed[:, -1:])).sum())
    print(
        f"- merges: Page's trend test p = {stats.page_trend_test(mixed).pvalue:.2g}; "
        f"between their parents in {inside} of {mixed[:, 1:-1].size} cases"
    )
    champions = sum((tree["registry"] or {"alias": ""})["alias"] == "champion" for tree in trees)
    print(f"- champions: {champions} of {len(trees)}")


def report(runs: Path, seed: int) -> dict:
    """Return the report of a seed, running the quickstart if it is not there."""
    where = runs / str(seed)
    found = list(where.glob("quickstart/*/report.json"))
    if not found:
        started = time.monotonic()
        command = [str(Path(sys.executable).parent / "sacpo"), "run", "quickstart", "--set", f"seed={seed}"]
        subprocess.run(command, env=os.environ | {"SACPO_RUNS": str(where)}, stdout=subprocess.DEVNULL, check=False)
        (where / "wall").write_text(str(time.monotonic() - started))
        found = list(where.glob("quickstart/*/report.json"))
    return json.loads(found[0].read_text()) | {"wall": float((where / "wall").read_text())}


def at(tree: dict, name: str, metric: str) -> float:
    """Return a figure of a candidate."""
    return next(c["metrics"][metric]["value"] for c in tree["candidates"] if c["name"] == name)


if __name__ == "__main__":
    main()
