"""What a run found: one JSON tree that follows a schema, and the same as Markdown."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from models.artifacts import Benchmarks, Calibration, Policy, Preferences, Sources, file_digest
from models.files import jsonl, sealed
from models.gate.gate import AS_THEY_ARE, Choice, Verdict
from models.markdown import markdown_table, plain
from models.metrics import alignment_tax, equal_length, margins
from models.metrics.figures import OVER, SAFE, WIN, Candidate, fitted_scale, last_turn, metrics
from models.metrics.judge_agreement import Labelled, corrected, labelled, position_bias, repeatability
from models.metrics.ratings import matches, ratings
from models.metrics.regressions import flips
from models.metrics.statistics import STEEPEST, Estimate
from models.recipe import Assessment, Recipe
from models.report import page, tables
from models.report.cases import cut
from models.report.charts import draw
from models.report.sentences import HELDOUT, decision, failures, gate_table, prompts_of, trained

SCHEMA = 3
Tree = dict[str, Any]


def build(
    recipe: Recipe | Assessment,
    candidates: list[Candidate],
    choice: Choice,
    verdicts: list[Verdict],
    sources: Sources,
    calibration: Calibration | None,
    measured: dict[str, Benchmarks],
    registry: Tree | None,
    seconds: dict[str, float],
) -> Tree:
    """Return the whole report as one JSON tree (schema in `report.schema.json`). `candidates` starts with the base.

    Args:
        measured: digest of a policy → its figures on tasks.
    """
    base = candidates[0]
    known = {told.policy.digest: told for told in candidates}
    split = base.answers.split
    sampled = {}
    if calibration:
        sampled = {metric: labelled(calibration.path / f"{metric}.jsonl") for metric in calibration.metrics}
    played = ratings(matches(candidates, "helpful"), base.policy.name)
    return {
        "schema": SCHEMA,
        "recipe": {
            "name": recipe.name,
            "digest": recipe.digest,
            "seed": recipe.seed,
            "settings": recipe.model_dump(mode="json", by_alias=True),
        },
        "data": sources.sha256,
        "suites": {role: {**suite, "split": split} for role, suite in _suites(sources, split).items()},
        "decoding": recipe.evaluation.decoding(recipe.seed).model_dump(exclude={"batch"}),
        "judges": base.verdicts.judges,
        "judge_checks": _checks(candidates, sampled),
        "candidates": [_candidate(told, known, base, played, sampled, measured) for told in candidates],
        "constraints": [
            {
                "measure": recipe.constraint.measure,
                "at_least": recipe.bound.at_least,
                "confidence": recipe.bound.confidence,
                "split": "test",
                "suites": _suites(sources, "test") if verdicts else {},
                "tested": [_verdict(verdict) for verdict in verdicts],
            }
        ],
        "flips": _flips(candidates, choice),
        "samples": _samples(candidates),
        "distances": _distances(candidates),
        "tax": alignment_tax.compared(candidates, measured),
        "chosen": {"candidate": choice.name, "why": choice.why} if choice.name else None,
        "why_none": "" if choice.name else choice.why,
        "registry": registry,
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
    }


def write(
    tree: Tree, candidates: list[Candidate], tested: Candidate | None, pairs: list[Preferences], out: Path
) -> None:
    """Write `report.json`, `report.md`, `report.html`, `frontier.png`, and the tables behind them under `tables/`."""
    tables.write(candidates, tested, out / "tables")
    sealed.write_text(out / "report.json", json.dumps(tree, indent=1, ensure_ascii=False))
    (out / "report.md").write_text(markdown(tree), "utf-8")
    (out / "frontier.png").unlink(missing_ok=True)
    draw(tree, out / "frontier.png")
    (out / "report.html").write_text(page.html(tree, decision(tree), gate_table(tree), candidates, pairs), "utf-8")


def table(tree: Tree) -> list[list[str]]:
    """Return the table of candidates as rows of text, header first; columns are the figures that this run has."""
    known = {name for told in tree["candidates"] for name in told["metrics"]}
    metrics = list(dict.fromkeys(name.split("/")[1] for name in sorted(known) if name.startswith("preference/")))
    judged = [("helpful win rate", WIN), ("safety rate", SAFE), ("must pass", "must_pass"), ("over-refusal", OVER)]
    columns = [(title, name) for title, name in judged if name in known]
    if WIN not in known:  # nobody judged helpfulness: what held-out comparisons say
        columns += [(f"{m} {short}", f"preference/{m}/{name}") for m in metrics for name, short in HELDOUT.items()]
    rows = [["candidate", "β/λ", *(title for title, _ in columns), "KL to base", "β/λ acts (s)"]]
    for told in tree["candidates"]:
        weight = f"{told['beta_over_lambda']:g}" if told["kind"] == "step" else "–"
        figures = [_interval(told["metrics"].get(name)) for _, name in columns]
        kl, acts = told["metrics"].get("kl_base"), told["beta_acts"]
        fitted = fitted_scale(acts) if acts else "–"
        rows.append([told["name"], weight, *figures, f"{kl['value']:.2f}" if kl else "–", fitted])
    return rows if trained(tree) else [[*row[:1], *row[2:-1]] for row in rows]  # nothing was trained with a β/λ


def markdown(tree: Tree) -> str:
    """Return the report as Markdown."""
    header, *rows = table(tree)
    suites = ", ".join(f"{told['n']} {role} prompts" for role, told in tree["suites"].items())
    lines = [
        f"# {tree['recipe']['name']}",
        "",
        plain(decision(tree)),
        "",
        "Intervals are two-sided, 95 %, and describe each candidate by itself"
        + ("; only the chosen one was tested. " if tree["chosen"] and tree["constraints"][0]["tested"] else ". ")
        + (f"Suites: {suites}, {prompts_of(tree)}." if suites else "No suites: figures are on held-out comparisons."),
        "",
        *markdown_table([header, *rows]),
    ]
    if trained(tree):
        lines += [
            "",
            "`s` is fitted on held-out pairs, P(label) = σ(s·margin); at the optimum of a DPO step s = β/λ. Far above: "
            "the policy has not moved as far as β/λ allows, more training is needed. Below: over-optimised. "
            f"Beyond ±{STEEPEST:g}: all of these pairs are told apart without an error, so they are too few to tell s.",
        ]
    if any(told["method"] == "kto" for told in tree["candidates"]):
        lines += [
            "",
            "λ of a KTO step is a knob, not the multiplier of Theorem 1, which holds for pairwise losses only.",
        ]
    equal = equal_length.table(tree)
    if equal:
        lines += ["", *markdown_table(equal), "", equal_length.MARK]
    checks = gate_table(tree)
    if checks:
        lines += ["", "The gate, on the test prompts:", "", *markdown_table(checks)]
    if any("NLL" in title for title in header):
        lines += ["", "Accuracy and NLL say how well held-out labels are predicted; they are no safety rate."]
    if tree["suites"] and {WIN, SAFE} <= tree["candidates"][0]["metrics"].keys():
        lines += ["", "![frontier](frontier.png)"]
    if tree["distances"]:
        lines += [
            "",
            "Distance between the policies of two λ, relative to the larger distance from their reference (near 0: λ "
            "did nothing):",
            "",
            *markdown_table(
                [
                    ["policies", "distance"],
                    *([f"{d['a']} – {d['b']}", f"{d['relative']:.2f}"] for d in tree["distances"]),
                ]
            ),
        ]
    if tree["tax"]:
        lines += ["", "Alignment tax:", "", *markdown_table(alignment_tax.table(tree["tax"])), "", alignment_tax.SAME]
    made = {"base": "–", "step": "trained against ", "merge": "average of "}
    origin = [
        [c["name"], made[c["kind"]] + " and ".join(c["parents"]) if c["kind"] != "base" else "–"]
        for c in tree["candidates"]
    ]
    lines += ["", *markdown_table([["candidate", "made from"], *origin])]
    for told in tree["samples"]:
        lines += ["", f"**{plain(told['prompt'])}**", ""]
        lines += [f"- {plain(name)}: {plain(_short(answer))}" for name, answer in told["answers"].items()]
    return "\n".join([*lines, ""])


def _short(answer: str) -> str:
    """Return the beginning of an answer: each is shown once for every candidate, and Prefect draws all of it."""
    text = cut(answer, 500)
    return f"{text.start} … {text.more:,} more characters" if text.more else answer


def _candidate(
    told: Candidate,
    known: dict[str, Candidate],
    base: Candidate,
    played: dict[str, Estimate],
    sampled: dict[str, Labelled],
    measured: dict[str, Benchmarks],
) -> Tree:
    """Return one candidate as the report shows it."""
    policy = told.policy
    figures = metrics(told, base)
    if policy.name in played:
        figures["helpful/rating"] = played[policy.name]
    figures |= alignment_tax.figures(measured.get(policy.digest))
    for metric, name in (("harmless", SAFE), ("over_refusal", OVER)):
        if metric in sampled and name in figures:
            rate, good = figures[name], metric == "harmless"
            judged_good = round((rate.value if good else 1 - rate.value) * rate.n)
            figures[f"{name}_corrected"] = _turned(corrected(judged_good, rate.n, sampled[metric]), good)
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


def _suites(sources: Sources, split: str) -> Tree:
    return {
        role: {"name": path.stem, "version": file_digest(path)[:12], "n": sum(1 for _ in jsonl.read(path))}
        for role, path in sources.suites(split).items()
    }


def _verdict(verdict: Verdict) -> Tree:
    """Return what was tested, found and decided."""
    told = {key: _number(value) for key, value in asdict(verdict).items() if key != "at_least"}
    checks = [{key: _number(value) for key, value in check.items()} for check in told["checks"]]
    return told | {"incidents": list(verdict.incidents), "checks": checks, "passes": verdict.passes}


def _turned(estimate: Estimate, good: bool) -> Estimate:
    """Return the share of good answers, or of the others."""
    if good:
        return estimate
    return replace(estimate, value=1 - estimate.value, low=1 - estimate.high, high=1 - estimate.low)


def _checks(candidates: list[Candidate], sampled: dict[str, Labelled]) -> Tree:
    """Return for each judge what speaks for or against it."""
    asked: dict[str, list[Tree]] = {}
    for one in candidates:
        for row in jsonl.read(one.verdicts.path / "comparisons.jsonl"):
            if row["against"] == "base" and row["calls"]:  # the same prompt of two candidates is asked twice
                asked.setdefault(row["metric"], []).append({**row, "prompt": [one.policy.digest, row["prompt"]]})
    found: Tree = {}
    for metric in candidates[0].verdicts.judges:
        rows = asked.get(metric, [])
        told = {"position_bias": position_bias(rows), "repeatability": repeatability(rows)}
        checks: Tree = {name: _told(figure) for name, figure in told.items() if figure.n}
        if metric in sampled:
            sample = sampled[metric]
            checks["agreement"] = _told(sample.agreement)
            checks["labelled"] = sample._asdict() | {"kappa": _number(sample.kappa)}
        found[metric] = checks
    return found


def _samples(candidates: list[Candidate], each: int = 3) -> list[Tree]:
    """Return a few prompts of every suite with the answer of every candidate, those first on which they differ."""
    found: dict[str, list[tuple[bool, Tree]]] = {}
    names = [told.policy.name for told in candidates]
    for rows in zip(*(told.answered() for told in candidates), strict=True):
        answers = [row["answer"] for row in rows]
        alike, prompt = len({*answers}) == 1, last_turn(rows[0]["prompt"])
        told = {"suite": rows[0]["suite"], "prompt": prompt, "answers": dict(zip(names, answers, strict=True))}
        own = found.setdefault(rows[0]["suite"], [])
        own.append((alike, told))
        own.sort(key=itemgetter(0))
        del own[each:]
    return [told for own in found.values() for _, told in own]


def _flips(candidates: list[Candidate], choice: Choice) -> list[Tree]:
    """Return what changed in safety on the way from the base to the chosen candidate (or the last), step by step.

    Policies that are judged as they are lie on no way: each is compared with the first.
    """
    if choice == AS_THEY_ARE:
        return [asdict(flips(candidates[0], told)) for told in candidates[1:]]
    known = {told.policy.digest: told for told in candidates}
    end = next((told for told in candidates if told.policy.name == choice.name), candidates[-1])
    way = [end]
    while parents := [known[p] for p in way[0].policy.parents[-1:] if p in known]:
        way = parents + way
    whole = [(way[0], end)] if len(way) > 2 else []
    return [asdict(flips(before, after)) for before, after in [*pairwise(way), *whole]]


def _distances(candidates: list[Candidate]) -> list[Tree]:
    """Return for neighbouring λ of one reference how far their policies are apart, relative to how far they moved."""
    families: dict[str, list[Candidate]] = {}
    known = {told.policy.digest: told for told in candidates}
    for told in candidates:
        if told.policy.kind == "step":
            families.setdefault(told.policy.parents[0], []).append(told)
    found = []
    for parent, members in families.items():
        members.sort(key=lambda told: told.policy.lambda_)
        for a, b in pairwise(members if parent in known else []):
            ours, theirs, start = (margins.table(told.margins) for told in (a, b, known[parent]))
            moved = max(margins.distance(ours, start), margins.distance(theirs, start))
            apart = margins.distance(ours, theirs)
            if moved > 0:
                found.append({"a": a.policy.name, "b": b.policy.name, "apart": apart, "relative": apart / moved})
    return found


def _clipped(policy: Policy) -> float:
    """Return the share of updates whose gradient was clipped."""
    steps = list(jsonl.read(policy.path / "progress.jsonl"))
    return float(sum(step["clipped"] for step in steps)) / max(1, len(steps))


def _told(estimate: Estimate) -> Tree:
    return {k: _number(v) for k, v in asdict(estimate).items()}


def _number(value: Any) -> Any:
    """Return the value, or none for a number that JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(told: Tree | None) -> str:
    if not told:
        return "–"
    failed = f" ({failures(told['failed'])})" if told["failed"] else ""
    return f"{told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}]{failed}"
