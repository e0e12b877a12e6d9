"""`examples/frontier.ipynb` runs from the first cell to the last, draws the frontier, and the frontier makes sense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "frontier.ipynb"
EXECUTE = """
import json, sys

notebook, picture, points = sys.argv[1:]
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(notebook, encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"{notebook}, cell {number}", "exec"), names)
names["figure"].savefig(picture)
drawn = [line.get_xydata().tolist() for line in names["axes"].lines if line.get_linestyle() == "-"]
rates = {name: [win.value, safety.value] for name, (win, safety) in names["rates"].items()}
json.dump({"rates": rates, "drawn": drawn}, open(points, "w"))
"""
"""Runs the code cells in one namespace, as Jupyter would, and tells what they drew."""


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_draws_a_frontier_that_makes_sense(tmp_path: Path) -> None:
    picture, points = tmp_path / "frontier.png", tmp_path / "points.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTE, str(NOTEBOOK), str(picture), str(points)],
        cwd=ROOT, env=os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(points.read_text("utf-8"))
    rates = result["rates"]
    assert list(rates) == ["base", "helpful", "harmless λ=0.1", "harmless λ=0.4", "harmless λ=1", "merge q=0.5"]
    dots = sorted(tuple(dot) for line in result["drawn"] for dot in line)
    assert dots == sorted((safety, win) for win, safety in rates.values())
    win, safety = ({name: pair[i] for name, pair in rates.items()} for i in (0, 1))
    assert win["base"] == 0.5 and win["helpful"] > 0.6 and safety["helpful"] < safety["base"]
    assert safety["helpful"] < safety["harmless λ=0.1"] < safety["harmless λ=0.4"] < safety["harmless λ=1"]
    assert safety["harmless λ=1"] > safety["base"] + 0.1 and win["harmless λ=1"] > 0.6
    assert safety["helpful"] < safety["merge q=0.5"] < safety["harmless λ=1"]
    assert picture.stat().st_size > 10_000
    *_, last = done.stdout.splitlines()
    assert last.startswith("  harmless λ=1 ") and last.endswith(" sorry , please ask its owner .")
