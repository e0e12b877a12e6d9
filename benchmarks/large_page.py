"""The report of large suites and many candidates: bytes of its page, seconds and memory to make it, seconds to draw it.

    python benchmarks/large_page.py FOLDER [ROWS CANDIDATES CHARACTERS]

Without the three numbers: all of 10,000 and 200,000 prompts, 2 and 30 candidates, answers of 60 and 2,000 characters.
FOLDER gets `ROWS-CANDIDATES-CHARACTERS/` with the report, without its tables, and the screenshots.

What is judged is made up, and written as a run writes it: answers, grades and comparisons of `models/judges/judge.py`,
progress of trainings, held-out margins. From there on it is a run's own way: the gate chooses and decides, and
`report.build` and `report.write` make the report, in a process of its own with at most LIMIT of memory; `build`,
`tables` and `page` are its seconds of processor. Texts are pieces of one text of made-up words with what answers have,
too: commas, line breaks, backquotes, angle brackets, letters beyond ASCII. Then a headless Chromium without a GPU opens
the page: `drawn` is seconds of the clock from the call until the frame with all of it, `search` from a word typed until
the frame that follows, `differ` from a click on "only where verdicts differ".
"""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 12 * 2**30
"""Bytes that a report may take, so that the machine goes on."""
CASES = [(rows, count, length) for rows in (10_000, 200_000) for count in (2, 30) for length in (60, 2000)]
WRITTEN = {10_000: 30, 200_000: 6}
"""Prompts → candidates of whom everything is made up; all others lead to the files of one of these, but the base's."""
ROLES = {"helpful": 0.45, "harmless": 0.45, "over_refusal": 0.09, "must_pass": 0.01}
"""Role → its share of the prompts."""
CATEGORIES = 14
UPDATES = 2000
PAIRS = 500
"""Held-out pairs of each metric and split."""


def main() -> None:
    """Measure all cases, or the one that is asked for, and print a row of the table for each."""
    folder = Path(sys.argv[1])
    asked = [tuple(map(int, sys.argv[2:5]))] if len(sys.argv) > 2 else CASES
    print(
        "| prompts | candidates | characters | build | tables | page | peak MiB | page MB | drawn | search | differ |"
    )
    print("|---" * 11 + "|", flush=True)
    for rows, candidates, characters in asked:
        place = folder / f"{rows}-{candidates}-{characters}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        evidence(place / "evidence", rows, candidates, characters)
        done = subprocess.run([sys.executable, __file__, "--report", str(place)], capture_output=True, text=True)
        shutil.rmtree(place / "evidence")
        cells = [f"{rows:,}", f"{candidates}", f"{characters:,}"]
        if done.returncode:
            print(f"| {' | '.join(cells)} | {(done.stderr.strip().splitlines() or ['killed'])[-1]} |", flush=True)
            continue
        figures = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(place / "out" / "tables")
        html = place / "out" / "report.html"
        cells += [f"{figures[name]:.1f}" for name in ("build", "tables", "page")]
        cells += [f"{figures['peak']:.0f}", f"{html.stat().st_size / 1e6:.2f}"]
        cells += [f"{spent:.2f}" for spent in drawn(html, place)]
        print(f"| {' | '.join(cells)} |", flush=True)


class Writer:
    """Made-up texts: pieces of one text, each as long as is asked for."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiouäé"]
        words = ["".join(self.draw.choices(syllables, k=self.draw.randint(1, 4))) for _ in range(5000)]
        often = [1 / rank for rank in range(1, len(words) + 1)]
        ends = self.draw.choices([" ", ", ", ". ", "\n\n", " <b>", " & ", "` "], [80, 8, 6, 2, 1, 1, 1], k=400_000)
        self.text = "".join(w + e for w, e in zip(self.draw.choices(words, often, k=len(ends)), ends, strict=True))

    def piece(self, length: int) -> str:
        """Return about so many characters."""
        length = int(length * self.draw.uniform(0.7, 1.3))
        start = self.draw.randrange(len(self.text) - length)
        return self.text[start : start + length].strip() or "no"


def evidence(folder: Path, rows: int, candidates: int, characters: int) -> None:
    """Write what a run with so many prompts and candidates has made before its report; the chosen one's test, too."""
    writer = Writer()
    for split in ("validation", "test"):
        prompts = list(_prompts(writer, rows, characters, split))
        (folder / split).mkdir(parents=True)
        for role in ROLES:
            with (folder / split / f"{role}.jsonl").open("w") as file:
                file.writelines(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts if row["suite"] == role)
        base = [writer.piece(characters) for _ in prompts]
        scored: list[float] = []  # of the base, where answers are compared
        for number in range(candidates if split == "validation" else 1):
            place = folder / split / str(number)
            if number >= WRITTEN.get(rows, candidates):
                place.symlink_to(str(1 + number % (WRITTEN[rows] - 1)))
                continue
            place.mkdir()
            scored = _candidate(place, writer, prompts, base, characters, 0 if split == "test" else number, scored)


def _prompts(writer: Writer, rows: int, characters: int, split: str) -> Iterator[dict[str, Any]]:
    for role, share in ROLES.items():
        for i in range(round(rows * share)):
            category = f"category {i % CATEGORIES}" if role == "harmless" else ""
            text = f"{split} {i}: {writer.piece(max(60, characters // 8))}"
            yield {"suite": role, "prompt": text, "category": category, "sample": 0}


def _candidate(
    place: Path,
    writer: Writer,
    prompts: list[dict[str, Any]],
    base: list[str],
    characters: int,
    number: int,
    scored: list[float],
) -> list[float]:
    """Write one candidate's answers, verdicts, distances, margins and progress; return the base's scores."""
    from models.files import jsonl
    from models.judges import judge
    from models.judges import rows as judge_rows
    from models.judges.protocol import Comparison, Grade

    draw = random.Random(number)
    safe = 0.7 + 0.25 * number / 30
    graded: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    answers, ours = [], []
    for i, row in enumerate(prompts):
        text = base[i] if number == 0 or draw.random() < 0.2 else writer.piece(characters)
        answers.append({**row, "answer": text, "tokens": len(text) // 4, "tie": -1})
        metric = {"must_pass": "harmless"}.get(row["suite"], row["suite"])
        score = draw.gauss(0.0 if number == 0 else 0.2, 1.0)
        if metric == "harmless":
            good = row["suite"] == "must_pass" or draw.random() < safe
            grade = Grade(abs(score) if good else -abs(score), good)
        elif metric == "over_refusal":
            label = draw.choices(["compliance", "partial refusal", "full refusal"], [90, 6, 4])[0]
            grade = Grade(float(label != "full refusal"), label != "full refusal", label)
        else:
            grade = Grade(score)
        failed = row["suite"] != "must_pass" and draw.random() < 0.005
        graded.append(judge_rows.score_line(metric, answers[-1], Grade(failed="made up") if failed else grade))
        if metric != "over_refusal":
            ours.append(score if metric == "helpful" else grade.score)
            other = (scored or ours)[len(ours) - 1]
            win = Comparison(failed="made up") if failed else Comparison(judge.win(ours[-1], other))
            compared += [judge_rows.comparison_line(metric, answers[-1], name, win) for name in ("base", "reference")]
    jsonl.write(place / "answers.jsonl", answers)
    jsonl.write(place / "scores.jsonl", graded)
    jsonl.write(place / "comparisons.jsonl", compared)
    walks = [{"suite": r["suite"], "prompt": r["prompt"], "tokens": characters // 4} for r in prompts[::4]]
    jsonl.write(
        place / "kl.jsonl",
        ({**row, "base": draw.expovariate(1 / (1 + number)), "reference": draw.expovariate(1)} for row in walks),
    )
    jsonl.write(
        place / "margins.jsonl",
        (
            {"metric": metric, "split": split, "prompt": f"{pair}", "tokens": [40, 50]}
            | {"chosen": draw.gauss(number, 5), "rejected": draw.gauss(0, 5)}
            for metric in ("helpful", "harmless")
            for split in ("validation", "test")
            for pair in range(PAIRS)
        ),
    )
    jsonl.write(
        place / "progress.jsonl",
        (
            {"done": k, "of": UPDATES, "clipped": False, "loss": 0.7 / (1 + k / 400) + draw.gauss(0, 0.05)}
            | {"margin": k / 300 * (1 + number / 10) + draw.gauss(0, 1), "accuracy": 0.5 + draw.uniform(0, 0.4)}
            for k in range(1, UPDATES + 1)
        ),
    )
    return scored or ours


def report(folder: Path) -> None:
    """Make the report of what `evidence` has written; print seconds and peak memory as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    from models.artifacts import Sources
    from models.gate import facts, gate
    from models.metrics import figures
    from models.recipe import toml
    from models.report import page, tables
    from models.report import report as reports

    spent: dict[str, float] = {}

    def timed(module: Any, function: str, name: str) -> None:
        whole = getattr(module, function)

        def call(*arguments: Any) -> Any:
            started = time.process_time()
            result = whole(*arguments)
            spent[name] = time.process_time() - started
            return result

        setattr(module, function, call)

    timed(page, "html", "page")
    timed(tables, "write", "tables")
    recipe = toml.read("quickstart", ["constraint.at_least=0.65"])
    held = folder / "evidence"
    files = {f"suite/{role}/{s}": str(held / s / f"{role}.jsonl") for role in ROLES for s in ("validation", "test")}
    sources = Sources(path=held, digest="sources", files=files)
    names = sorted(int(path.name) for path in (held / "validation").iterdir() if path.is_dir())
    policies = _policies(held / "validation", len(names))
    candidates = [_told(policy, policy.path, "validation") for policy in policies]
    started = time.process_time()
    choice = gate.choose([facts.safety_counts(candidate) for candidate in candidates[1:]], recipe.bound)
    chosen = next((one for one in candidates if one.policy.name == choice.name), candidates[-1])
    tested = _told(chosen.policy, held / "test" / "0", "test")
    verdict = gate.decide(
        facts.safety_counts(tested),
        gate.Facts(wins={"base": figures.at_worst(*_wins(tested))}, spent={"harmless": 0.0}),
        recipe.constraint,
        recipe.gate,
    )
    findings = reports.Findings(candidates, choice, [verdict], tested)
    tree = reports.build(recipe, findings, sources, None, {}, None, {})
    spent["build"] = time.process_time() - started
    out = folder / "out"
    out.mkdir()
    reports.write(tree, findings, [], out)
    print(json.dumps(spent | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def _wins(tested: Any) -> tuple[Any, Any, float]:

    return tested.compared("helpful", "base"), lambda row: row.win, 0.0


def _told(policy: Any, place: Path, split: str) -> Any:
    from models.artifacts import Answers, Distances, Margins, Scores
    from models.metrics.candidate import Candidate

    own = {"path": place, "digest": str(place), "policy": policy.digest}
    judges = {m: {"name": f"a judge of {m}", "version": "1"} for m in ("helpful", "harmless", "over_refusal")}
    verdicts = Scores(**own, split=split, judges=judges, failed=0)
    return Candidate(policy, Answers(**own, split=split), verdicts, Distances(**own), Margins(**own))


def _policies(held: Path, count: int) -> list[Any]:
    """Return the base, a policy of the helpful step, those of the safety step with their λ, and a quarter of merges."""
    from models.artifacts import Policy

    merges = (count - 2) // 4
    made = []
    for number in range(count):
        own: dict[str, Any] = {"path": held / str(number), "digest": f"policy{number}" * 8}
        place = number - (count - merges)
        if number == 0:
            own |= {"name": "base", "kind": "base"}
        elif place >= 0:
            q = (place + 1) / (merges + 1)
            parents = (made[-1 - place].digest, made[1].digest)
            own |= {"name": f"merge q={q:.3g}", "kind": "merge", "step": 2, "parents": parents, "merge_weight": q}
        else:
            metric, step = ("helpful", 1) if number == 1 else ("harmless", 2)
            lambda_ = 1.0 if number == 1 else round(0.05 * 1.2 ** (number - 2), 4)
            parents = (made[min(number, 2) - 1].digest,)
            own |= {"name": f"{metric} λ={lambda_:g}", "kind": "step", "step": step, "metric": metric, "method": "dpo"}
            own |= {"parents": parents, "beta": 0.1, "lambda_": lambda_, "beta_over_lambda": 0.1 / lambda_}
        made.append(Policy(**own))
    return made


FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"


def drawn(html: Path, shots: Path) -> list[float]:
    """Open the page; return seconds until it is drawn, until a search is, and until only what differs is shown."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page(viewport={"width": 1300, "height": 1000})
        wrong: list[Any] = []
        opened.on("pageerror", lambda error: wrong.append(error))
        opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        opened.set_default_timeout(300_000)
        seconds = []

        def timed(act: Any) -> None:
            started = time.perf_counter()
            act()
            opened.evaluate(FRAME)
            seconds.append(time.perf_counter() - started)

        timed(lambda: opened.goto(html.as_uri(), wait_until="load"))
        opened.screenshot(path=shots / "top.png")
        opened.evaluate("document.getElementById('answers').scrollIntoView()")
        opened.screenshot(path=shots / "answers.png")
        timed(lambda: opened.fill("#find", "ba"))
        timed(lambda: opened.click("#differ"))
        opened.screenshot(path=shots / "filtered.png")
        if opened.locator("#curves").count():
            opened.evaluate("document.getElementById('curves').scrollIntoView()")
            opened.screenshot(path=shots / "curves.png")
        browser.close()
    assert not wrong, wrong
    return seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        report(Path(sys.argv[2]))
    else:
        main()
