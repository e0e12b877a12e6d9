"""What a run found: one JSON tree (report/tree.py), and the files that people read."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import cast

from models.artifacts import Benchmarks, Calibration, Policy, Preferences, Sources, file_digest
from models.files import jsonl, sealed
from models.gate.gate import AS_THEY_ARE, Choice, Verdict
from models.judges.rows import ComparisonRow
from models.metrics import alignment_tax, margins
from models.metrics.candidate import Candidate
from models.metrics.figures import OVER, SAFE, last_turn, metrics
from models.metrics.judge_agreement import Labelled, corrected, labelled, position_bias, repeatability
from models.metrics.ratings import matches, ratings
from models.metrics.regressions import Flips, flips
from models.metrics.reported import Figure, finite, reported
from models.metrics.statistics import Estimate
from models.recipe import Assessment, Recipe
from models.report import page, summary, tables
from models.report.charts import draw
from models.report.tree import (
    SCHEMA,
    Acts,
    CandidateEntry,
    DistanceEntry,
    JudgeChecks,
    JudgeEntry,
    LabelledEntry,
    RegistryEntry,
    Report,
    SampleEntry,
    SuiteEntry,
    SuiteFile,
    VerdictEntry,
    check_entry,
)


@dataclass(frozen=True)
class Findings:
    """What a run has found."""

    candidates: list[Candidate]
    """The base first."""
    choice: Choice
    verdicts: list[Verdict]
    tested: Candidate | None = None
    """The chosen one on the test prompts, if it was tested."""


def build(
    recipe: Recipe | Assessment,
    findings: Findings,
    sources: Sources,
    calibration: Calibration | None,
    measured: dict[str, Benchmarks],
    registry: RegistryEntry | None,
    seconds: dict[str, float],
) -> Report:
    """Return the whole report as one JSON tree.

    Args:
        measured: digest of a policy → its figures on tasks.
        seconds: stage → how long it took.
    """
    candidates, choice = findings.candidates, findings.choice
    base = candidates[0]
    split = base.answers.split
    samples = {}
    if calibration:
        samples = {metric: labelled(calibration.path / f"{metric}.jsonl") for metric in calibration.metrics}
    return {
        "schema": SCHEMA,
        "recipe": {
            "name": recipe.name,
            "digest": recipe.digest,
            "seed": recipe.seed,
            "settings": recipe.model_dump(mode="json", by_alias=True),
        },
        "data": sources.sha256,
        # all prompts of a split were asked of every candidate, so the base's split is everybody's
        "suites": {role: cast(SuiteEntry, {**suite, "split": split}) for role, suite in _suites(sources, split)},
        "decoding": recipe.evaluation.decoding(recipe.seed).model_dump(exclude={"batch"}),
        "judges": {metric: cast(JudgeEntry, judge) for metric, judge in base.scores.judges.items()},
        "judge_checks": _checks(candidates, samples),
        "candidates": _candidates(candidates, samples, measured),
        "constraints": [
            {
                "measure": recipe.constraint.measure,
                "at_least": recipe.bound.at_least,
                "confidence": recipe.bound.confidence,
                "split": "test",
                # prompts that nobody was tested on are not named: a reader would take them for used
                "suites": dict(_suites(sources, "test")) if findings.verdicts else {},
                "tested": [_verdict(verdict) for verdict in findings.verdicts],
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


def write(tree: Report, findings: Findings, pairs: list[Preferences], out: Path) -> None:
    """Write `report.json`, `report.md`, `report.html`, `frontier.png`, and the tables behind them under `tables/`."""
    tables.write(findings.candidates, findings.tested, out / "tables")
    sealed.write_text(out / "report.json", json.dumps(tree, indent=1, ensure_ascii=False))
    sealed.write_text(out / "report.md", summary.markdown(tree))
    # a report that is written again may have no picture any more, and must not keep the old one
    (out / "frontier.png").unlink(missing_ok=True)
    draw(tree, out / "frontier.png")
    sealed.write_text(out / "report.html", page.html(tree, findings.candidates, pairs))


def _candidates(
    candidates: list[Candidate], samples: dict[str, Labelled], measured: dict[str, Benchmarks]
) -> list[CandidateEntry]:
    """Return the candidates as the report shows them."""
    base = candidates[0]
    by_digest = {candidate.policy.digest: candidate for candidate in candidates}
    rated = ratings(matches(candidates, "helpful"), base.policy.name)
    entries = []
    for candidate in candidates:
        policy = candidate.policy
        figures = metrics(candidate, base)
        if policy.name in rated:
            figures["helpful/rating"] = rated[policy.name]
        figures |= alignment_tax.figures(measured.get(policy.digest))
        figures |= _corrected(figures, samples)
        # a reference that is not shown (two policies with the same weights are shown once) has no margins here
        reference = by_digest.get(policy.parents[0]) if policy.kind == "step" else None
        acts = _acts(candidate, reference) if reference else None
        if reference and acts:
            rows, weight = (candidate.margin_rows, reference.margin_rows), policy.beta_over_lambda
            figures[f"preference/{policy.metric}/dpo_nll"] = margins.dpo_nll(*rows, policy.metric, weight)
        parents = [by_digest[p].policy.name if p in by_digest else p[:12] for p in policy.parents]
        entries.append(_entry(policy, parents, acts, {name: reported(figure) for name, figure in figures.items()}))
    return entries


def _entry(policy: Policy, parents: list[str], acts: Acts | None, figures: dict[str, Figure]) -> CandidateEntry:
    entry = {
        "name": policy.name,
        "kind": policy.kind,
        "step": policy.step,
        "metric": policy.metric,
        "method": policy.method,
        "parents": parents,
        "beta": policy.beta,
        "lambda": policy.lambda_,
        "beta_over_lambda": policy.beta_over_lambda,
        "merge_weight": policy.merge_weight if policy.kind == "merge" else None,
        "path": str(policy.path),
        "digest": policy.digest,
        "beta_acts": acts,
        "metrics": figures,
    }
    return cast(CandidateEntry, entry)


def _corrected(figures: dict[str, Estimate], samples: dict[str, Labelled]) -> dict[str, Estimate]:
    """Return the rates that people would have found, where a labelled sample says how the judge errs."""
    estimates = {}
    for metric, name in (("harmless", SAFE), ("over_refusal", OVER)):
        if metric in samples and name in figures:
            rate, good = figures[name], metric == "harmless"
            # the correction is about "good" verdicts, and over-refusal counts the others
            judged_good = round((rate.value if good else 1 - rate.value) * rate.n)
            share = corrected(judged_good, rate.n, samples[metric])
            refused = replace(share, value=1 - share.value, low=1 - share.high, high=1 - share.low)
            estimates[f"{name}_corrected"] = share if good else refused
    return estimates


def _acts(candidate: Candidate, reference: Candidate) -> Acts | None:
    """Return what the held-out pairs of a step say of its β/λ; none without such pairs."""
    policy = candidate.policy
    fit = margins.acts(candidate.margin_rows, reference.margin_rows, policy.metric)
    if not fit.n:
        return None
    return {
        "s": fit.value,
        "low": fit.low,
        "high": fit.high,
        "lambda_effective": policy.beta / fit.value if fit.value > 0 else None,
        "moved": margins.distance(candidate.margin_rows, reference.margin_rows),
        "clipped": _clipped(policy),
    }


def _suites(sources: Sources, split: str) -> Iterator[tuple[str, SuiteFile]]:
    """Yield the role and the file of each suite."""
    for role, path in sources.suites(split).items():
        prompts = sum(1 for _ in jsonl.read(path))  # counted, not loaded: a suite may have 200,000 prompts
        yield role, {"name": path.stem, "version": file_digest(path)[:12], "n": prompts}


def _verdict(verdict: Verdict) -> VerdictEntry:
    """Return what was tested, found and decided."""
    entry = {key: finite(value) for key, value in asdict(verdict).items() if key != "at_least"}
    checks = [check_entry(check) for check in verdict.checks]
    entry |= {"incidents": list(verdict.incidents), "checks": checks, "passes": verdict.passes}
    return cast(VerdictEntry, entry)


def _checks(candidates: list[Candidate], samples: dict[str, Labelled]) -> dict[str, JudgeChecks]:
    """Return for each judge what speaks for or against it."""
    compared: dict[str, list[ComparisonRow]] = {}
    for candidate in candidates:
        for row in candidate.comparison_rows:
            if row.against == "base" and row.calls:  # two candidates' answers to one prompt are two prompts here
                own = row._replace(key=f"{candidate.policy.digest} {row.key}")
                compared.setdefault(row.metric, []).append(own)
    checks: dict[str, JudgeChecks] = {}
    for metric in candidates[0].scores.judges:
        rows, sample = compared.get(metric, []), samples.get(metric)
        checks[metric] = {}
        if (bias := position_bias(rows)).n:
            checks[metric]["position_bias"] = reported(bias)
        if (repeats := repeatability(rows)).n:
            checks[metric]["repeatability"] = reported(repeats)
        if sample:
            checks[metric]["agreement"] = reported(sample.agreement)
            counts = sample._asdict() | {"kappa": finite(sample.kappa)}
            checks[metric]["labelled"] = cast(LabelledEntry, counts)
    return checks


def _samples(candidates: list[Candidate], each: int = 3) -> list[SampleEntry]:
    """Return a few prompts of every suite with the answer of every candidate, those first on which they differ."""
    best: dict[str, list[tuple[bool, SampleEntry]]] = {}
    names = [candidate.policy.name for candidate in candidates]
    for rows in zip(*(candidate.answer_rows() for candidate in candidates), strict=True):
        suite, answers = rows[0]["suite"], [row["answer"] for row in rows]
        alike, prompt = len({*answers}) == 1, last_turn(rows[0]["prompt"])
        entry: SampleEntry = {"suite": suite, "prompt": prompt, "answers": dict(zip(names, answers, strict=True))}
        own = best.setdefault(suite, [])
        # only the best few are kept at any time: the texts of all candidates together do not fit into memory
        own.append((alike, entry))
        own.sort(key=itemgetter(0))
        del own[each:]
    return [entry for own in best.values() for _, entry in own]


def _flips(candidates: list[Candidate], choice: Choice) -> list[Flips]:
    """Return what changed in safety from the base to the chosen candidate (or the last), step by step.

    Untrained policies have no lineage: each is compared with the first.
    """
    if choice == AS_THEY_ARE:
        pairs = [(candidates[0], candidate) for candidate in candidates[1:]]
    else:
        by_digest = {candidate.policy.digest: candidate for candidate in candidates}
        end = next((c for c in candidates if c.policy.name == choice.name), candidates[-1])
        lineage = [end]
        while parents := [by_digest[p] for p in lineage[0].policy.parents[-1:] if p in by_digest]:
            lineage = parents + lineage
        # with two policies the way as a whole is its only step
        whole = [(lineage[0], end)] if len(lineage) > 2 else []
        pairs = [*pairwise(lineage), *whole]
    return [flips(before, after) for before, after in pairs]


def _distances(candidates: list[Candidate]) -> list[DistanceEntry]:
    """Return for neighbouring λ of one reference how far their policies are apart, relative to how far they moved."""
    families: dict[str, list[Candidate]] = {}
    by_digest = {candidate.policy.digest: candidate for candidate in candidates}
    for candidate in candidates:
        if candidate.policy.kind == "step":
            families.setdefault(candidate.policy.parents[0], []).append(candidate)
    distances: list[DistanceEntry] = []
    for parent, members in families.items():
        members.sort(key=lambda candidate: candidate.policy.lambda_)
        for a, b in pairwise(members if parent in by_digest else []):
            start = by_digest[parent].margin_rows
            moved = max(margins.distance(c.margin_rows, start) for c in (a, b))
            apart = margins.distance(a.margin_rows, b.margin_rows)
            if moved > 0:  # at 0 neither policy left its reference, and the relative distance would be 0/0
                relative = apart / moved
                distances.append({"a": a.policy.name, "b": b.policy.name, "apart": apart, "relative": relative})
    return distances


def _clipped(policy: Policy) -> float:
    """Return the share of updates whose gradient was clipped."""
    updates = list(jsonl.read(policy.path / "progress.jsonl"))
    return float(sum(update["clipped"] for update in updates)) / max(1, len(updates))
