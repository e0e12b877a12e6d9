"""What a run found, as one JSON tree that follows a schema, as Markdown, and as a picture of the frontier."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from models import jsonl, judges, margins
from models.artifacts import Evaluation, Margins, Policy, file_digest
from models.evaluation import ROLES
from models.gate import Candidate, Choice, Verdict
from models.recipe import Recipe
from models.statistics import Estimate, mean, rate, wins

SCHEMA = 1
Tree = dict[str, Any]
WIN, SAFE, OVER = "helpful/win_rate", "harmless/safety_rate", "over_refusal"


class Evidence(NamedTuple):
    """One candidate and what is known of it."""

    policy: Policy
    evaluation: Evaluation
    margins: Margins


def metrics(told: Evidence, base: Evidence) -> dict[str, Estimate]:
    """Return every figure of one candidate on one split; win rates are against the base on the same prompts."""
    rows, theirs = by_suite(told.evaluation), by_suite(base.evaluation)
    found: dict[str, Estimate] = {}
    if rows["helpful"] and all("helpful" in row for row in rows["helpful"]):
        ours = [row["helpful"] for row in rows["helpful"]]
        found[WIN] = mean(wins(ours, [row["helpful"] for row in theirs["helpful"]]))
        found["helpful/score"] = mean(ours)
    if rows["harmless"] and all("safe" in row for row in rows["harmless"]):
        found[SAFE] = rate(sum(row["safe"] for row in rows["harmless"]), len(rows["harmless"]))
        found["harmless/score"] = mean([row["harmless"] for row in rows["harmless"]])
        for category in sorted({row["category"] for row in rows["harmless"]}):
            safe = [row["safe"] for row in rows["harmless"] if row["category"] == category]
            found[f"{SAFE}/{category}"] = rate(sum(safe), len(safe))
    if rows["over_refusal"] and all("refused" in row for row in rows["over_refusal"]):
        found[OVER] = rate(sum(row["refused"] for row in rows["over_refusal"]), len(rows["over_refusal"]))
    for name in ("base", "reference"):
        walks = [row for row in jsonl.read(told.evaluation.path / "kl.jsonl") if name in row]
        found[f"kl_{name}"] = mean([row[name] for row in walks])
        found[f"kl_{name}_per_token"] = mean([row[name] / row["tokens"] for row in walks])
    found["length"] = mean([row["tokens"] for suite in rows.values() for row in suite])
    weighed = margins.table(told.margins)
    for metric in dict.fromkeys(row["metric"] for row in weighed):
        found |= margins.figures(weighed, metric)
    return {name: figure for name, figure in found.items() if figure.n}


def candidate(told: Evidence, base: Evidence) -> Candidate:
    """Return what the gate needs to know of a candidate on one split."""
    figures, harmful = metrics(told, base), by_suite(told.evaluation)["harmless"]
    judged = [row["safe"] for row in harmful if "safe" in row]
    won = figures[WIN].value if WIN in figures else math.nan
    return Candidate(told.policy.name, won, sum(judged), len(judged), failed=0)


def by_suite(evaluation: Evaluation) -> dict[str, list[Tree]]:
    """Return the answers of an evaluation, per role."""
    rows = list(jsonl.read(evaluation.path / "answers.jsonl"))
    return {role: [row for row in rows if row["suite"] == role] for role in ROLES}


def build(
    recipe: Recipe,
    candidates: list[Evidence],
    choice: Choice,
    verdict: Verdict | None,
    suites: dict[str, Path],
    registry: Tree | None,
    seconds: dict[str, float],
) -> Tree:
    """Return the whole report as one JSON tree (schema in `report.schema.json`). `candidates` starts with the base."""
    base = candidates[0]
    known = {told.policy.digest: told for told in candidates}
    counts = Counter(row["suite"] for row in jsonl.read(base.evaluation.path / "answers.jsonl"))
    judge = judges.described(recipe.evaluation.judge)._asdict() if recipe.evaluation.judge else None
    return {
        "schema": SCHEMA,
        "recipe": {"name": recipe.name, "digest": recipe.digest, "seed": recipe.seed},
        "suites": {
            role: {
                "name": path.stem,
                "version": file_digest(path)[:12],
                "split": base.evaluation.split,
                "n": counts[role],
            }
            for role, path in suites.items()
        },
        "decoding": recipe.evaluation.model_dump(include={"max_new_tokens", "temperature"}) | {"seed": recipe.seed},
        "judges": {metric: judge for metric in ("helpful", "harmless", "over_refusal") if judge},
        "candidates": [_candidate(told, known, base) for told in candidates],
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
        place = (6, -14) if told["kind"] == "merge" else (6, 6)  # below the line of merges, above the line of λ
        axes.annotate(label, (x["value"], y["value"]), textcoords="offset points", xytext=place, fontsize=9)
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


def _candidate(told: Evidence, known: dict[str, Evidence], base: Evidence) -> Tree:
    """Return one candidate as the report shows it."""
    policy = told.policy
    figures = metrics(told, base)
    acts = None
    reference = known.get(policy.parents[0]) if policy.kind == "step" else None
    if reference is not None:
        ours, theirs = margins.table(told.margins), margins.table(reference.margins)
        fit = margins.acts(ours, theirs, policy.metric)
        if fit.n:
            moved = margins.distance(ours, theirs)
            acts = {
                "s": fit.value,
                "low": fit.low,
                "high": fit.high,
                "lambda_effective": policy.beta / fit.value if fit.value > 0 else None,
            }
            acts |= {"moved": moved, "clipped": _clipped(policy)}
            figures[f"preference/{policy.metric}/dpo_nll"] = margins.dpo_nll(
                ours, theirs, policy.metric, policy.beta_over_lambda
            )
    return {
        "name": policy.name,
        "kind": policy.kind,
        "step": policy.step,
        "metric": policy.metric,
        "method": policy.method,
        "parents": [known[p].policy.name if p in known else p[:12] for p in policy.parents],
        "beta": policy.beta,
        "lambda": policy.lambda_,
        "beta_over_lambda": policy.beta_over_lambda,
        "merge_weight": policy.merge_weight if policy.kind == "merge" else None,
        "path": str(policy.path),
        "digest": policy.digest,
        "beta_acts": acts,
        "metrics": {name: _told(figure) for name, figure in figures.items()},
    }


def _clipped(policy: Policy) -> float:
    """Return the share of updates whose gradient was clipped."""
    steps = list(jsonl.read(policy.path / "progress.jsonl"))
    return float(sum(step["clipped"] for step in steps)) / max(1, len(steps))


def _told(estimate: Estimate) -> Tree:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(estimate).items()}


def _interval(told: Tree | None) -> str:
    return f"{told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}]" if told else "–"
