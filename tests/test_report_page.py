"""What others wrote stays text on every page: Markdown of Prefect and MLflow, the report in a browser, the terminal."""

import json
import re
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows.promote import log_page
from models.artifacts import Answers, Distances, Margins, Policy, Preferences, Scores, Sources
from models.files import jsonl
from models.gate.gate import Check, Choice, Verdict
from models.gate.promotion_log import Entry, Registered
from models.markdown import JOINER, markdown_table, plain, readable
from models.metrics.candidate import Candidate
from models.recipe.toml import read
from models.report import report
from models.report.model_card import card
from tasks.registry.approval import question
from tasks.work import terminal

CHROMIUM = shutil.which("chromium")
AWAY = "http://192.0.2.1"  # an address for documentation: nobody is there
HOSTILE = [
    f"![see]({AWAY}/a.png)",
    f"![see][ref] [ref]: {AWAY}/a.png",
    "[click](javascript:alert(1)) [x]: javascript:alert(1)",
    f"<{AWAY}/auto> <mailto:a@example.org>",
    f"look at {AWAY}/bare, https://example.org?a=1, ftp://example.org, www.example.org/x and a@example.org",
    f'<img src="{AWAY}/b.png" onerror="window.hit=1">',
    "<script>window.hit=1</script>",
    "</div></td></table></span><script>window.hit=1</script>",
    "'\"> <svg onload=window.hit=1>",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "\\![a](b) \\<b> \\`c\\` \\\\[d](e)",
    "`code` ``a ` b`` *em* **strong** _em_ __strong__ ~~gone~~ a_b_c __init__ 2*3*4 $x$",
    "# heading",
    "## heading\n===",
    "---",
    "- - -",
    "1. one\n2) two",
    "+ item\n- item\n> quote",
    "    indented\n\tcode\n```sh\nrm\n```",
    "a | b\n--|--\nc | d",
    ":octocat: :smile: @someone #1 GH-1",
    "[^1] [^1]: note",
    "- [ ] task",
    "\u2028# line\x0b# tab\x1c# file\x85# next",
    "[/red] [bold]x[/] [link=http://192.0.2.1]y[/link]",
    "(frontier.png)",
    "[0.1, 0.2](http://x) [0.1, 0.2] (http://x) [0.1, 0.2][a] [0.1, 0.2] [a] ![0.1, 0.2](b)",
    "[0.1, 0.2]: http://x",
    "{{ 7 * 7 }} {% raw %} ${x}",
]


class Links:
    """What GitHub's Markdown links by itself, beside `<…>`, in the text that is left when all else is read."""

    found = re.compile(r"(?:https?|ftp)://[^\s<]+|www\.[^\s<]+|[\w.+-]+@[\w-]+\.[\w.-]+", re.IGNORECASE)

    def pretest(self, text: str) -> bool:
        return self.found.search(text) is not None

    test = pretest

    def match_at_start(self, text: str) -> None:
        """Leave it to the pass over the whole text."""

    def match(self, text: str) -> list[Any]:
        return [
            SimpleNamespace(schema="", index=m.start(), last_index=m.end(), text=m[0], url=m[0], raw=m[0])
            for m in self.found.finditer(text)
        ]


class Page(HTMLParser):
    """The tags, the addresses and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Page:
    """Render as GitHub's dialect does: tables, bare links, raw HTML."""
    renderer = MarkdownIt("gfm-like", {"html": True, "linkify": True})
    renderer.linkify = Links()  # type: ignore[assignment]
    return Page(renderer.render(markdown))


def shown(text: str) -> str:
    return " ".join(text.replace(JOINER, "").split())


def test_the_renderer_of_these_tests_reads_what_a_page_would() -> None:
    """Else nothing here could fail."""
    page = rendered("\n\n".join(HOSTILE))
    assert {"img", "a", "script", "h1", "hr", "li", "code", "em", "strong", "s", "table"} <= {*page.tags}
    assert {f"{AWAY}/a.png", f"{AWAY}/bare,", "www.example.org/x", f"{AWAY}/auto"} <= {*page.addresses}


FRAMES = {
    "{}": ["p"],
    "- name: {}": ["ul", "li"],
    "- {}": ["ul", "li"],
    "above\n\n{}\n\nbelow": ["p", "p", "p"],
    "**{}**": ["p", "strong"],
    "[{}](http://ours)": ["p", "a"],
}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_foreign_text_is_shown_and_never_read(text: str) -> None:
    for frame, tags in FRAMES.items():
        page = rendered(frame.format(plain(text)))
        assert page.tags == tags and page.addresses == ["http://ours"] * tags.count("a"), frame
        assert shown(text) in shown(page.text)
    page = rendered("\n".join(markdown_table([["a", text], [text, "b"]])))
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert shown(page.text).count(shown(text)) == 2
    assert readable(plain(text)) == " ".join(text.split())


def test_nor_is_any_mixture_of_what_is_active() -> None:
    draw = Random(0)
    pieces = [
        *"\\`*_[]()<>&|~!#+-=:@$^\"' \n\t1.a",
        "http://x.y",
        "www.",
        "://",
        "&lt;",
        "![",
        "](",
        "[0.1, 0.2]",
        "```",
        "\\\\",
    ]
    for _ in range(400):
        text = "a" + "".join(draw.choices(pieces, k=draw.randint(1, 14))) + "z"
        text = text if draw.random() < 0.5 else text[1:-1] + "z"
        page = rendered(f"- {plain(text)}\n\n**{plain(text)}**")
        assert page.tags == ["ul", "li", "p", "strong"] and shown(page.text).count(shown(text)) == 2, text


def test_what_a_person_reads_in_the_file_stays_readable() -> None:
    for text in (
        "Chosen: harmless λ=0.2, the safest. Its over_refusal is 0.100.",
        "-0.050",
        "+0.100",
        "0.900 to 0.950",
        "0.900 [0.850, -0.950]",
        "a - b",
    ):
        assert plain(text) == text


# Pages of a run whose prompts, answers, categories, names and reasons are hostile


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a report, and its tree; every text of a table and every name is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    recipe = read("quickstart", ["evaluation.stop=['![s](http://192.0.2.1)']"])
    suite = folder / "![suite](x).jsonl"
    jsonl.write(suite, [{"prompt": text} for text in HOSTILE])
    sources = Sources(path=folder, digest="s", files={"suite/harmless/validation": str(suite)})
    judges = {"harmless": {"name": HOSTILE[0], "version": HOSTILE[6]}}

    def evidence(name: str, kind: str, parents: tuple[str, ...]) -> Candidate:
        place = folder / kind
        place.mkdir()
        rows = [
            {"suite": suite_, "prompt": text, "category": HOSTILE[-1 - i], "reference": text, "sample": 0}
            for suite_ in ("helpful", "harmless")
            for i, text in enumerate(HOSTILE)
        ]
        jsonl.write(place / "answers.jsonl", [{**r, "answer": f"{kind} {r['prompt']}", "tokens": 3} for r in rows])
        score = {"metric": "harmless", "status": "ok", "score": 1.0, "label": "", "why": ""}
        jsonl.write(
            place / "scores.jsonl",
            [
                {**r, **score, "good": kind == "base", "score": float(kind == "base")}
                for r in rows
                if r["suite"] == "harmless"
            ],
        )
        win = {"metric": "helpful", "against": "base", "status": "ok", "win": 0.5, "calls": [], "why": ""}
        jsonl.write(place / "comparisons.jsonl", [{**r, **win} for r in rows if r["suite"] == "helpful"])
        jsonl.write(
            place / "kl.jsonl", [{"suite": r["suite"], "prompt": r["prompt"], "tokens": 3, "base": 0.1} for r in rows]
        )
        jsonl.write(place / "margins.jsonl", [])
        jsonl.write(place / "progress.jsonl", [])
        policy = Policy(
            path=place, digest=kind * 8, name=name, kind=kind, parents=parents, metric=HOSTILE[3], method="dpo",
            step=int(kind == "step"), beta=0.1, lambda_=1.0, beta_over_lambda=0.1,
        )  # fmt: skip
        own = {"path": place, "digest": kind, "policy": policy.digest}
        verdicts = Scores(**own, split="validation", judges=judges, failed=0)
        return Candidate(policy, Answers(**own, split="validation"), verdicts, Distances(**own), Margins(**own))

    candidates = [evidence(HOSTILE[5], "base", ()), evidence(HOSTILE[2], "step", ("base" * 8,))]
    checks = (Check(f"safety rate, {HOSTILE[4]}", 0.5, 0.4, 0.3, True, HOSTILE[9]),)
    verdict = Verdict(HOSTILE[2], 0.5, 0.4, 0.3, False, (HOSTILE[0], HOSTILE[6]), checks, n=9, must_pass=2)
    card_json = {"rows": 2, "quarantined": {HOSTILE[5]: 1, HOSTILE[0]: 2}, HOSTILE[7]: HOSTILE[8]}
    (folder / "card.json").write_text(json.dumps(card_json))
    pairs = Preferences(path=folder, digest="p", metric=HOSTILE[6], counts={})
    registry = {"name": HOSTILE[5], "version": "1", "alias": HOSTILE[1]}
    choice = Choice(HOSTILE[2], HOSTILE[5])
    findings = report.Findings(candidates, choice, [verdict])
    tree = report.build(recipe, findings, sources, None, {}, registry, {})
    out = folder / "report"
    out.mkdir()
    report.write(tree, findings, [pairs], out)
    return out, tree


OWN = {"h1", "h2", "p", "ul", "li", "strong", "code", "table", "thead", "tbody", "tr", "th", "td"}


def test_the_report_and_the_model_card_hold_nothing_but_our_own_markup(made: tuple[Path, dict[str, Any]]) -> None:
    out, tree = made
    page = rendered((out / "report.md").read_text("utf-8"))
    assert {*page.tags} <= {*OWN, "img"} and page.addresses == ["frontier.png"] and page.tags.count("h1") == 1
    for text in HOSTILE[:3]:
        assert shown(f"step {text}") in shown(page.text)
    page = rendered(card(tree, tree["registry"]))
    assert {*page.tags} <= OWN and not page.addresses and page.tags.count("h1") == 1
    assert shown(HOSTILE[0]) in shown(page.text)
    assert HOSTILE[5] in readable(card(tree, tree["registry"]))


def test_so_do_the_question_of_an_approval_and_the_promotion_log() -> None:
    checks = tuple(Check(f"safety rate, {text}", 0.5, 0.4, 0.3, True, text) for text in HOSTILE)
    verdict = Verdict(HOSTILE[0], 0.5, 0.4, 0.3, True, (), checks)
    page = rendered(question(Registered(HOSTILE[5], "1", ""), verdict, [("http://ours", HOSTILE[0])]))
    assert page.tags == ["p", "ul", *["li"] * len(HOSTILE), "p", "a"] and page.addresses == ["http://ours"]
    entries = [Entry(1, "promote", "", "1", text, "now", text) for text in HOSTILE]
    page = rendered(log_page(entries))
    assert {*page.tags} == {"table", "thead", "tbody", "tr", "th", "td"} and not page.addresses
    assert shown(page.text).count(shown(HOSTILE[0])) == 2 and page.tags.count("tr") == 1 + len(HOSTILE)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_report_page_asks_for_nothing_and_runs_nothing_but_its_own_script(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    out, _ = made
    html = (out / "report.html").read_text("utf-8")
    page = Page(html)
    assert page.tags.count("script") == 1 and all(place.startswith("#") for place in page.addresses)
    with playwright.sync_playwright() as driver, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        forgotten = f"<img src='{place}/i' onerror='window.hit=2'><script>window.hit=3</script><base href='{place}'>"
        smuggled = tmp_path / "smuggled.html"  # as if an escape had been forgotten
        smuggled.write_text(html.replace("<body>", f"<body>{forgotten}<link rel=stylesheet href='{place}/s'>"), "utf-8")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for path in (out / "report.html", smuggled):
            opened, asked, wrong = browser.new_page(), [], []
            opened.on("request", lambda request, asked=asked: asked.append(request.url))
            opened.on("pageerror", lambda error, wrong=wrong: wrong.append(error))
            opened.goto(path.as_uri())
            assert opened.evaluate("window.hit") is None and not wrong
            assert opened.inner_text("#count") == f"{2 * len(HOSTILE)} shown"
            opened.fill("#find", "octocat")
            assert opened.inner_text("#count") == "4 shown"  # two as prompt, two as category
            assert opened.locator(".text img, .text a, .text script, .asked img, .asked a").count() == 0
            assert asked == [path.as_uri()] or path == smuggled  # there the browser tells of what it has blocked, too
        with pytest.raises(BlockingIOError):
            server.accept()
        browser.close()


def test_the_terminal_shows_foreign_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE:
        if "\n" not in text and text.isprintable():
            terminal.say(text)
            terminal.finish_bar(text, 1.0, fresh=True)
            out = "".join(capsys.readouterr().out.split())
            assert out == "".join(f"{text}✓{text}1.0s".split())
