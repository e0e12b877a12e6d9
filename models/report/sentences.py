"""What a run decided, in sentences and as a table: the same words in the terminal, the report and the model card."""

import math

from models.metrics.statistics import STEEPEST
from models.report.tree import Acts, CheckEntry, ConstraintEntry, Report, VerdictEntry
from models.words import counted, spent_on

HELDOUT = {"accuracy": "accuracy", "nll": "NLL", "nll_minus_length": "NLL − length-only"}
"""Figure on held-out pairs → how tables call it."""
ENOUGH = 20
"""Answers of each policy from which on it is odd that a judge finds all of all policies safe, or none."""
CHECK_COLUMNS = ("check", "value", "decides", "limit", "holds")


def decision(tree: Report) -> str:
    """Return in a few sentences what was chosen, tested and registered."""
    tested = [(constraint, test) for constraint in tree["constraints"] for test in constraint["tested"]]
    if tree["chosen"] is None and tested:
        return " ".join(
            [*(_tested(constraint, test, test["candidate"]) for constraint, test in tested), *_untested(tree)]
        ) + _unjudged(tree)
    if tree["chosen"] is None:
        why = f"No candidate was chosen: {tree['why_none']}.{_unjudged(tree)}"
        return f"{why} Nothing was tested, nothing was promoted."
    text = f"Chosen: {tree['chosen']['candidate']}, {tree['chosen']['why']}."
    for constraint, test in tested:
        text += f" On the test split{_use(tree, test)}: {_tested(constraint, test)}"
        failing = [check["name"] for check in test["checks"] if not check["holds"]]
        if test["holds"] and failing:
            text += f" The gate does not let it pass: {', '.join(failing)}."
    text += _unjudged(tree)
    registry = tree["registry"]
    if registry:
        alias = f"alias {registry['alias']}" if registry["alias"] else "without an alias"
        if registry["alias"] == "champion":
            alias = "which became champion"  # the sentence is kept, and another may serve when it is read
        text = f"{text} Registered as {registry['name']} version {registry['version']}, {alias}."
    return text if registry and registry["alias"] == "champion" else f"{text} Nothing was promoted."


def fitted_scale(acts: Acts) -> str:
    """Return s with its interval; a fit at its end says only that the pairs were told apart without an error."""
    if abs(acts["s"]) >= STEEPEST:
        return f"beyond ±{STEEPEST:g}"
    return f"{acts['s']:.2f} [{acts['low']:.2f}, {acts['high']:.2f}]"


def _use(tree: Report, test: VerdictEntry) -> str:
    """Say which of the decisions on its harmful prompts this was, by the error spent; empty if the gate did not ask."""
    spent = next((check for check in test["checks"] if check["name"] == spent_on("harmless")), None)
    if spent is None:
        return ""
    # the ledger counts error, not decisions: each decision spends the same part
    if not spent["value"]:
        return ", used for its first decision"
    bound = tree["recipe"]["settings"]["constraint"]
    each = (1 - bound["confidence"]) / bound["decisions"]
    return f", used for its decision {spent['bound'] / each:.0f} of {bound['decisions']}"


def _unjudged(tree: Report) -> str:
    """Say which suites nobody judged, and what to set, or that a judge told nothing apart; empty if all is well."""
    if not tree["suites"]:
        return " No suite of prompts is set: name suites and judges, as docs/evidence.md says."
    judge = {role: "harmless" if role == "must_pass" else role for role in tree["suites"]}
    roles = [role for role, metric in judge.items() if metric not in tree["judges"]]
    keys = " and ".join(dict.fromkeys(f"evaluation.judges.{judge[role]}" for role in roles))
    sentence = f" Answered, and judged by nobody: the {' and '.join(roles)} prompts; set {keys}." if roles else ""
    return sentence + _undiscerning(tree)


def _undiscerning(tree: Report) -> str:
    """Say that a judge found all answers safe, or none, whichever policy gave them; empty if it told some apart."""
    all_figures = [candidate["metrics"].get("harmless/safety_rate") for candidate in tree["candidates"]]
    figures = [figure for figure in all_figures if figure]
    if len(figures) < max(2, len(all_figures)) or min(figure["n"] for figure in figures) < ENOUGH:
        return ""
    # a threshold on the wrong side of all scores looks like a perfect policy
    rates = {figure["value"] for figure in figures}
    if rates not in ({0.0}, {1.0}):
        return ""
    share = "All" if rates == {1.0} else "None"
    return (
        f" {share} of the judged answers to the harmful prompts are safe, whichever policy gave them: if that is "
        "unlikely, look at the judge's threshold, and at the scores in tables/scores.jsonl."
    )


def _tested(constraint: ConstraintEntry, test: VerdictEntry, name: str = "") -> str:
    """Say what the test of the bound, and of the prompts that must pass, found."""
    incidents, must_pass = test["incidents"], test["must_pass"]
    fails = ""
    if incidents:
        fails = f"fails {len(incidents)} of {must_pass} prompts that must pass, first {incidents[0][:80]!r}"
    if must_pass and not test["n"] and not test["failed"]:
        passes = f"passes all {must_pass} prompts that must pass"
        return f"{name} {fails or passes}; no safety rate was tested.".lstrip()
    value = "–" if test["value"] is None else f"{test['value']:.3f}"
    holds = "holds" if test["lower_bound"] >= constraint["at_least"] else "does not hold"
    failed = f" ({failures(test['failed'])}, counted as unsafe)" if test["failed"] else ""
    return (
        f"{f'{name}: ' if name else ''}safety rate {value}, at least {test['lower_bound']:.3f} with confidence "
        f"{constraint['confidence']:g}{failed}; the bound {constraint['at_least']:g} {holds}"
        f"{f', and the policy is refused: it {fails}' if fails else ''}."
    )


def _untested(tree: Report) -> list[str]:
    """Say of policies that are judged as they are which ones were not tested, and why."""
    first, *others = (candidate["name"] for candidate in tree["candidates"])
    tested = [test["candidate"] for constraint in tree["constraints"] for test in constraint["tested"]]
    skipped = ", ".join(name for name in others if name not in tested)
    sentences = [f"{skipped}: not tested (an earlier one did not hold)."] if skipped else []
    return [*sentences, f"{first}: not tested (the others are compared with it)."] if others else sentences


def failures(count: int) -> str:
    """Say how many verdicts failed."""
    return f"{counted(count, 'verdict')} failed"


def gate_table(tree: Report) -> list[list[str]]:
    """Return what the gate asked of the chosen candidate as rows of text, header first; empty if it asked nothing."""
    checks = [check for constraint in tree["constraints"] for test in constraint["tested"] for check in test["checks"]]
    return [list(CHECK_COLUMNS), *map(check_row, checks)] if checks else []


def check_row(check: CheckEntry) -> list[str]:
    """Return one check of the gate as text, in the order of `CHECK_COLUMNS`."""
    return [
        check["name"],
        _figure(check["value"]),
        f"{check['method']} {_figure(check['bound'])}",
        f"{check['limit']:.4g}",
        "yes" if check["holds"] else "NO",
    ]


def _figure(value: float | None) -> str:
    """Return a number as text, or a dash where nobody judged."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def prompts_of(tree: Report) -> str:
    """Return how a report calls the prompts of its figures; where nothing was trained, nothing was split."""
    split = next((suite["split"] for suite in tree["suites"].values()), "")
    return f"{split if trained(tree) else 'all'} prompts" if split else ""


def trained(tree: Report) -> bool:
    """Return whether the policies were trained here, or judged as they are."""
    return "steps" in tree["recipe"]["settings"]
