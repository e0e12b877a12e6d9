"""What a run found, as one JSON tree that follows a schema, as Markdown, and as a picture of the frontier."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import judges
from models.artifacts import Evaluation, Policy, file_digest
from models.evaluation import ROLES, read
from models.gate import Candidate, Choice, Verdict
from models.recipe import Recipe
from models.statistics import Estimate, mean, rate, scale, wins

SCHEMA = 1
Tree = dict[str, Any]
WIN, SAFE, OVER = "helpful/win_rate", "harmless/safety_rate", "over_refusal"


def metrics(evaluation: Evaluation, base: Evaluation) -> dict[str, Estimate]:
    """Return every figure of one policy on one split; win rates are against the base on the same prompts."""
    rows, theirs = by_suite(evaluation), by_suite(base)
    found: dict[str, Estimate] = {}
    if all("helpful" in row for row in rows["helpful"]) and rows["helpful"]:
        ours = [row["helpful"] for row in rows["helpful"]]
        found[WIN] = mean(wins(ours, [row["helpful"] for row in theirs["helpful"]]))
        found["helpful/score"] = mean(ours)
        found[SAFE] = rate(sum(row["safe"] for row in rows["harmless"]), len(rows["harmless"]))
        found["harmless/score"] = mean([row["harmless"] for row in rows["harmless"]])
        found[OVER] = rate(sum(row["refused"] for row in rows["over_refusal"]), len(rows["over_refusal"]))
        for category in sorted({row["category"] for row in rows["harmless"]}):
            safe = [row["safe"] for row in rows["harmless"] if row["category"] == category]
            found[f"{SAFE}/{category}"] = rate(sum(safe), len(safe))
    for name in ("base", "reference"):
        found[f"kl_{name}"] = mean([row[name] for row in read(evaluation.path / "kl.jsonl") if name in row])
    found["length"] = mean([row["tokens"] for suite in rows.values() for row in suite])
    return {name: told for name, told in found.items() if told.n}


def candidate(policy: Policy, evaluation: Evaluation, base: Evaluation) -> Candidate:
    """Return what the gate needs to know of a policy on one split."""
    told, harmful = metrics(evaluation, base), by_suite(evaluation)["harmless"]
    judged = [row["safe"] for row in harmful if "safe" in row]
    won = told[WIN].value if WIN in told else math.nan
    return Candidate(policy.name, won, sum(judged), len(judged), failed=0)


def by_suite(evaluation: Evaluation) -> dict[str, list[Tree]]:
    """Return the answers of an evaluation, per role."""
    rows = read(evaluation.path / "answers.jsonl")
    return {role: [row for row in rows if row["suite"] == role] for role in ROLES}


def build(
    recipe: Recipe,
    judged: list[tuple[Policy, Evaluation]],
    choice: Choice,
    verdict: Verdict | None,
    suites: dict[str, Path],
    registry: Tree | None,
    seconds: dict[str, float],
) -> Tree:
    """Return the whole report as one JSON tree (schema in `report.schema.json`). `judged` starts with the base."""
    base = judged[0][1]
    names = {policy.digest: policy.name for policy, _ in judged}
    counts = Counter(row["suite"] for row in read(base.path / "answers.jsonl"))
    judge = judges.described(recipe.evaluation.judge)._asdict() if recipe.evaluation.judge else None
    return {
        "schema": SCHEMA,
        "recipe": {"name": recipe.name, "digest": recipe.digest, "seed": recipe.seed},
        "suites": {
            role: {"name": path.stem, "version": file_digest(path)[:12], "split": base.split, "n": counts[role]}
            for role, path in suites.items()
        },
        "decoding": recipe.evaluation.model_dump(include={"max_new_tokens", "temperature"}) | {"seed": recipe.seed},
        "judges": {metric: judge for metric in ("helpful", "harmless", "over_refusal") if judge},
        "candidates": [
            {
                "name": policy.name,
                "kind": policy.kind,
                "step": policy.step,
                "metric": policy.metric,
                "method": policy.method,
                "parents": [names.get(parent, parent[:12]) for parent in policy.parents],
                "beta": policy.beta,
                "lambda": policy.lambda_,
                "beta_over_lambda": policy.beta_over_lambda,
                "merge_weight": policy.merge_weight if policy.kind == "merge" else None,
                "path": str(policy.path),
                "digest": policy.digest,
                "beta_acts": _beta_acts(policy),
                "metrics": {name: _told(e) for name, e in metrics(evaluation, base).items()},
            }
            for policy, evaluation in judged
        ],
        "constraints": [
            {
                "measure": recipe.constraint.measure,
                "at_least": recipe.constraint.at_least,
                "confidence": recipe.constraint.confidence,
                "split": "test",
                "tested": [
                    {"candidate": v.candidate, "value": v.value, "lower_bound": v.lower_bound, "holds": v.holds}
                    for v in ([verdict] if verdict else [])
                ],
            }
        ],
        "chosen": {"candidate": choice.name, "why": choice.why} if choice.name else None,
        "why_none": "" if choice.name else choice.why,
        "registry": registry,
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
    }


def write(tree: Tree, out: Path) -> None:
    """Write `report.json`, `report.md` and `frontier.png`."""
    (out / "report.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False), "utf-8")
    (out / "report.md").write_text(markdown(tree), "utf-8")
    draw(tree, out / "frontier.png")


def table(tree: Tree) -> list[list[str]]:
    """Return the table of candidates as rows of text, header first."""
    rows = [["candidate", "β/λ", "helpful win rate", "safety rate", "over-refusal", "KL to base", "β/λ acts (s)"]]
    for told in tree["candidates"]:
        acts = told["beta_acts"]
        weight = f"{told['beta_over_lambda']:g}" if told["kind"] == "step" else "–"
        figures = [_interval(told["metrics"].get(name)) for name in (WIN, SAFE, OVER)]
        kl = told["metrics"].get("kl_base")
        rows.append(
            [
                told["name"],
                weight,
                *figures,
                f"{kl['value']:.2f}" if kl else "–",
                f"{acts['s']:.2f} [{acts['low']:.2f}, {acts['high']:.2f}]" if acts else "–",
            ]
        )
    return rows


def decision(tree: Tree) -> str:
    """Return in one or two sentences what was chosen, tested and registered."""
    if tree["chosen"] is None:
        return f"No candidate was chosen: {tree['why_none']}. Nothing was tested, nothing was promoted."
    told = f"Chosen: {tree['chosen']['candidate']}, {tree['chosen']['why']}."
    for constraint in tree["constraints"]:
        for test in constraint["tested"]:
            holds = "holds" if test["holds"] else "does not hold"
            told += (
                f" On the test split, used once: safety rate {test['value']:.3f}, at least {test['lower_bound']:.3f} "
                f"with confidence {constraint['confidence']:g}; the bound {constraint['at_least']:g} {holds}."
            )
    registry = tree["registry"]
    if registry and registry["alias"]:
        told += f" Registered as {registry['name']} version {registry['version']}, alias {registry['alias']}."
    else:
        told += " Nothing was promoted."
    return told


def markdown(tree: Tree) -> str:
    """Return the report as Markdown."""
    header, *rows = table(tree)
    suites = ", ".join(f"{told['n']} {role} prompts" for role, told in tree["suites"].items())
    split = next((told["split"] for told in tree["suites"].values()), "")
    lines = [
        f"# {tree['recipe']['name']}",
        "",
        decision(tree),
        "",
        "Intervals are two-sided, 95 %, and describe each candidate by itself; only the chosen one was tested. "
        f"Suites: {suites} of the {split} split.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "`s` is fitted on held-out pairs, P(label) = σ(s·margin); at the optimum of a step s = β/λ. Far above: the "
        "policy has not moved as far as β/λ allows, more training is needed. Below: over-optimised.",
        "",
        "![frontier](frontier.png)",
        "",
        "| candidate | trained against |",
        "|---|---|",
        *(f"| {c['name']} | {' + '.join(c['parents']) or '–'} |" for c in tree["candidates"]),
        "",
    ]
    return "\n".join(lines)


def draw(tree: Tree, path: Path) -> None:
    """Draw helpful win rate against safety rate, with intervals, λ and q labelled (the paper's Figure 2)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), dpi=120)
    shown = [c for c in tree["candidates"] if WIN in c["metrics"]]
    colours = {"base": "#777777", "step": "#1f77b4", "merge": "#2ca02c"}
    for line in (_chain(shown, "step"), _chain(shown, "merge")):
        axes.plot([_at(c, SAFE) for c in line], [_at(c, WIN) for c in line], color="#bbbbbb", linewidth=1, zorder=1)
    for told in shown:
        x, y = told["metrics"][SAFE], told["metrics"][WIN]
        axes.errorbar(
            x["value"], y["value"],
            xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
            yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]],
            fmt="o", color=colours[told["kind"]], ecolor=colours[told["kind"]] + "55", markersize=6, zorder=2,
        )  # fmt: skip
        label = told["name"].removeprefix("harmless ").removeprefix("merge ")
        axes.annotate(label, (x["value"], y["value"]), textcoords="offset points", xytext=(6, 6), fontsize=9)
    if tree["chosen"] and (chosen := [c for c in shown if c["name"] == tree["chosen"]["candidate"]]):
        axes.plot(
            _at(chosen[0], SAFE), _at(chosen[0], WIN), "o", markersize=14, markerfacecolor="none",
            markeredgecolor="#d62728", markeredgewidth=1.8, label="chosen",
        )  # fmt: skip
    bound = tree["constraints"][0]["at_least"]
    axes.axvline(bound, color="#d62728", linestyle="--", linewidth=1, label=f"constraint b = {bound:g}")
    axes.set_xlabel("safety rate on harmful prompts")
    axes.set_ylabel("helpful win rate against the base")
    split = next((s["split"] for s in tree["suites"].values()), "")
    axes.set_title(f"{tree['recipe']['name']}: helpful against harmless ({split} split, 95 % intervals)")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _chain(shown: list[Tree], kind: str) -> list[Tree]:
    """Return the points that one line joins: λ values from the reward policy on, or merges between their parents."""
    steps = [c for c in shown if c["kind"] == "step"]
    if not steps:
        return []
    last = max(c["step"] for c in steps)
    trained = sorted((c for c in steps if c["step"] == last), key=lambda c: c["lambda"])
    start = [c for c in steps if c["step"] == last - 1][:1]
    if kind == "step":
        return start + trained
    merged = sorted((c for c in shown if c["kind"] == "merge"), key=lambda c: c["merge_weight"])
    return start + merged + trained[-1:] if merged else []


def _at(told: Tree, metric: str) -> float:
    return float(told["metrics"][metric]["value"])


def _beta_acts(policy: Policy) -> Tree | None:
    path = policy.path / "heldout.jsonl"
    if not path.exists():
        return None
    rows = read(path)
    fit = scale([row["chosen"] - row["rejected"] for row in rows], [tuple(row["prompt_ids"]) for row in rows])
    return {"s": fit.value, "low": fit.low, "high": fit.high} if fit.n else None


def _told(estimate: Estimate) -> Tree:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(estimate).items()}


def _interval(told: Tree | None) -> str:
    return f"{told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}]" if told else "–"
