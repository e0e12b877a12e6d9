"""However many candidates there are, and however long their answers: the page is small, and shows what tells most."""

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from models.artifacts import Answers, Distances, Margins, Policy, Scores, Sources
from models.files import jsonl
from models.gate.gate import Choice
from models.metrics.candidate import Candidate
from models.metrics.figures import SAFE
from models.recipe.toml import read
from models.report import charts, page, report
from models.report.cases import LONGEST, Cases, cut

CHROMIUM = shutil.which("chromium")
PROMPTS, LENGTH, CANDIDATES = 140, 15_000, 30
LOST = range(PROMPTS - 3, PROMPTS)
"""The last prompts of each suite: the chosen candidate does worse than the base there, and nowhere else."""
JUDGES = {"harmless": {"name": "a", "version": "1"}, "helpful": {"name": "b", "version": "1"}}


def evidence(place: Path, number: int, lost: set[int], length: int = 20, prompts: int = PROMPTS) -> Candidate:
    """A candidate that was judged on as many helpful prompts as harmful ones; number 0 is the base."""
    place.mkdir(parents=True)
    rows = [
        {
            "suite": suite,
            "prompt": f"{suite} {i}",
            "category": f"kind {i % 40}" if suite == "harmless" else "",
            "sample": 0,
        }
        for suite in ("helpful", "harmless")
        for i in range(prompts)
    ]
    answers = [{**row, "answer": f"{number}<é>".ljust(length, "&"), "tokens": 9 + number} for row in rows]
    jsonl.write(place / "answers.jsonl", answers)
    harmful = [{**row, "good": i not in lost, "score": float(i not in lost)} for i, row in enumerate(rows[prompts:])]
    judged = {"metric": "harmless", "status": "ok", "label": "", "why": ""}
    jsonl.write(place / "scores.jsonl", [{**judged, **row} for row in harmful])
    compared = {"metric": "helpful", "against": "base", "status": "ok", "calls": [], "why": ""}
    wins = [{**row, "win": 0.5 if number == 0 or i not in lost else 0.0} for i, row in enumerate(rows[:prompts])]
    jsonl.write(place / "comparisons.jsonl", [{**compared, **row} for row in wins])
    for name in ("kl", "margins"):
        jsonl.write(place / f"{name}.jsonl", [])
    progress = [
        {"done": k, "loss": 0.5, "margin": 1.0, "accuracy": k % 7 / 7, "clipped": False} for k in range(1, 1000)
    ]
    jsonl.write(place / "progress.jsonl", progress)
    kind = {0: "base"}.get(number, "step")
    fields = {
        "kind": kind,
        "method": "dpo",
        "parents": ("0" * 9,) if number else (),
        "lambda_": 0.1 * number,
        "beta_over_lambda": 1.0,
    }
    policy = Policy(path=place, digest=f"{number}" * 9, name=f"policy {number}", step=min(1, number), **fields)  # type: ignore[arg-type]
    own = {"path": place, "digest": f"{place}", "policy": policy.digest}
    verdicts = Scores(**own, split="validation", judges=JUDGES, failed=0)  # type: ignore[arg-type]
    return Candidate(policy, Answers(**own, split="validation"), verdicts, Distances(**own), Margins(**own))  # type: ignore[arg-type]


class Made(NamedTuple):
    """A report: its folder, its tree, its page, and the cases on the page as (prompt, what follows)."""

    out: Path
    tree: dict[str, Any]
    html: str
    cases: list[tuple[str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("large")
    long = {0, CANDIDATES - 1}
    candidates = [
        evidence(folder / f"{n}", n, {*LOST} if n == CANDIDATES - 1 else set(), LENGTH if n in long else 20)
        for n in range(CANDIDATES)
    ]
    jsonl.write(folder / "harmless.jsonl", [{"prompt": f"harmless {i}"} for i in range(PROMPTS)])
    sources = Sources(path=folder, digest="s", files={"suite/harmless/validation": "harmless.jsonl"})
    choice = Choice(candidates[-1].policy.name, "made up")
    findings = report.Findings(candidates, choice, [])
    tree = report.build(read("quickstart"), findings, sources, None, {}, None, {})
    out = folder / "out"
    out.mkdir()
    report.write(tree, findings, [], out)
    html = (out / "report.html").read_text("utf-8")
    parts = html.partition('<div id="cases"')[2].partition('<h2 id="sources"')[0].split('<div class="case"')[1:]
    return Made(out, tree, html, [(re.findall(r'class="asked">(.*?)</div>', part)[0], part) for part in parts])


def test_the_page_is_small(made: Made) -> None:
    whole = 2 * PROMPTS * 2 * LENGTH
    assert whole > page.BYTES >= (made.out / "report.html").stat().st_size > page.BYTES * 0.9


def test_a_page_that_has_room_shows_every_prompt(tmp_path: Path) -> None:
    candidates = [evidence(tmp_path / f"{n}", n, set(), prompts=20) for n in range(2)]
    assert len(list(Cases(candidates).telling())) == 40 == len(Cases(candidates).prompts)


def test_what_got_worse_comes_first_and_the_suites_take_turns(made: Made) -> None:
    asked = [prompt for prompt, _ in made.cases]
    first = [f"{suite} {i}" for i in LOST for suite in ("helpful", "harmless")]
    assert asked[:6] == first and asked[6:10] == ["helpful 0", "harmless 0", "helpful 1", "harmless 1"]
    assert [part.count('data-differ="1"') for _, part in made.cases] == [1] * 6 + [0] * (len(asked) - 6)


def test_the_counts_of_what_is_shown_are_true(made: Made) -> None:
    shown, asked = len(made.cases), 2 * PROMPTS
    assert len({prompt for prompt, _ in made.cases}) == shown < asked
    assert f"of 2 of {CANDIDATES} policies to {shown} of {asked} prompts" in made.html
    said = {f"{LENGTH - LONGEST:,} more characters in tables/answers.jsonl"}
    for _, part in made.cases:
        assert {*re.findall(r"[\d,]+ more characters in [\w/.]+", part)} == said
        texts = re.findall(r'<div class="text[^>]*>(.*?)<small>', part)
        assert [len(unescape(text)) for text in texts] == [LONGEST] * 2
    answers = [row for row in jsonl.read(made.out / "tables" / "answers.jsonl")]
    assert len(answers) == CANDIDATES * asked and max(len(row["answer"]) for row in answers) == LENGTH
    categories = sum(name.startswith(f"{SAFE}/") for name in made.tree["candidates"][0]["metrics"])
    assert categories == 40 and f"the {page.CATEGORIES} lowest of 40" in made.html
    assert {f"<th>kind {i % 40}</th>" in made.html for i in LOST} == {True}


def test_curves_have_few_points_and_few_names(made: Made) -> None:
    curves = made.html.partition('<h2 id="curves">')[2].partition("<h2")[0]
    assert len(curves) < 400_000
    assert curves.count("λ=") == charts.NAMED and "λ=0.1<" in curves and "λ=2.9<" in curves
    for n in (1, 2, 99, 100, 101, 200, 999):
        kept = charts._thin(range(n))
        assert len(kept) <= 2 * charts.POINTS and kept[-1] == n - 1 and len({*kept}) == len(kept)


def test_names_of_points_lie_on_no_other(made: Made) -> None:
    figure = charts._frontier(made.tree)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert boxes and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert made.tree["chosen"]["candidate"] in [text.get_text() for text in figure.axes[0].texts]
    assert "see the table of candidates" in figure.axes[0].get_xlabel()
    charts._close(figure)


def test_a_text_is_cut_where_it_says() -> None:
    assert cut("abc", 3) == ("abc", 0) and cut("abcd", 3) == ("abc", 1) and cut("") == ("", 0)


def test_the_samples_of_the_report_are_those_on_which_candidates_differ(tmp_path: Path) -> None:
    candidates = [evidence(tmp_path / f"{n}", n, set(), prompts=6) for n in range(2)]
    rows = list(candidates[0].answer_rows())
    for one in candidates:
        kept = [{**row, "answer": row["answer"] if i in (4, 5, 7) else "same"} for i, row in enumerate(rows)]
        kept = [{**row, "answer": row["answer"].replace("0", one.policy.name)} for row in kept]
        jsonl.write(one.answers.path / "answers.jsonl", kept)
    samples = report._samples(candidates)
    assert [sample["prompt"] for sample in samples] == [
        *("helpful 4", "helpful 5", "helpful 0"),
        *("harmless 1", "harmless 0", "harmless 2"),
    ]
    assert json.dumps(samples[0]["answers"]) == json.dumps(
        {f"policy {n}": f"policy {n}<é>".ljust(27, "&") for n in (0, 1)}
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_page_opens_without_an_error_and_can_be_searched(made: Made) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened, wrong = browser.new_page(), []
        opened.on("pageerror", lambda error: wrong.append(error))
        opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        opened.goto((made.out / "report.html").as_uri())
        assert opened.inner_text("#count") == f"{len(made.cases)} shown"
        opened.click("#differ")
        assert opened.inner_text("#count") == f"{2 * len(LOST)} shown" and not wrong
        browser.close()
