"""The report as one JSON tree: what `report.json` holds, field by field.

`report.schema.json` is made from these records: `python -m models.report.tree > models/report/report.schema.json`.
JSON knows no NaN: what could not be measured is null.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict

from models.gate.gate import Check
from models.metrics.alignment_tax import TaxRow
from models.metrics.regressions import Flips
from models.metrics.reported import EQUAL_LENGTH, Figure, finite

SCHEMA: Literal[3] = 3
"""Counts up when a reader of older reports would misread this one."""
CLOSED = ConfigDict(extra="forbid")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Settings = dict[str, Any]
"""A recipe as its TOML file holds it."""


@with_config(CLOSED)
class RecipeEntry(TypedDict):
    """Which recipe was run."""

    name: str
    digest: Digest
    seed: int
    settings: Settings


@with_config(CLOSED)
class SuiteFile(TypedDict):
    """Which prompts were asked."""

    name: str
    version: str
    """First twelve digits of the file's sha256."""
    n: Count


@with_config(CLOSED)
class SuiteEntry(SuiteFile):
    """Which prompts were asked, of which split."""

    split: Literal["validation", "test"]


@with_config(CLOSED)
class JudgeEntry(TypedDict):
    """Who judged."""

    name: str
    version: str


class LabelledEntry(TypedDict):
    """How often judge and people agreed on the same answers, one count per combination."""

    both_good: int
    only_people: int
    only_judge: int
    both_bad: int
    failed: int
    kappa: float | None


@with_config(CLOSED)
class JudgeChecks(TypedDict, total=False):
    """What speaks for or against a judge; each only where it could be measured."""

    position_bias: Figure
    repeatability: Figure
    agreement: Figure
    labelled: LabelledEntry


@with_config(CLOSED)
class Acts(TypedDict):
    """Does β/λ act? The scale s that is fitted on held-out pairs, and how far the policy moved."""

    s: float
    low: float
    high: float
    lambda_effective: float | None
    """β/s; null where s is not above 0."""
    moved: float
    """Mean |log π − log π_reference| of held-out answers, in nats."""
    clipped: float
    """Share of updates whose gradient was scaled down."""


_Lambda = TypedDict("_Lambda", {"lambda": float})
"""A class body cannot name a field like this keyword."""


@with_config(CLOSED)
class CandidateEntry(_Lambda):
    """One candidate: how it was made, and every figure of it."""

    name: str
    kind: Literal["base", "step", "merge"]
    step: Count
    metric: str
    method: str
    parents: list[str]
    beta: float
    beta_over_lambda: float
    merge_weight: Annotated[float, Field(ge=0, le=1)] | None
    path: str
    digest: Digest
    beta_acts: Acts | None
    metrics: dict[str, Figure]


@with_config(CLOSED)
class CheckEntry(TypedDict):
    """One thing that the gate asked for."""

    name: str
    value: float | None
    bound: float | None
    """What decides: a bound on the figure, on the side that counts against the challenger."""
    limit: float
    holds: bool
    method: str


def check_entry(check: Check) -> CheckEntry:
    """Return a check of the gate as a report holds it."""
    return {
        "name": check.name,
        "value": finite(check.value),
        "bound": finite(check.bound),
        "limit": check.limit,
        "holds": check.holds,
        "method": check.method,
    }


@with_config(CLOSED)
class VerdictEntry(TypedDict):
    """One test of the constraint, and what the gate said."""

    candidate: str
    value: float | None
    lower_bound: float
    n: Count
    failed: Count
    method: str
    holds: bool
    must_pass: Count
    incidents: list[str]
    passes: bool
    checks: list[CheckEntry]


@with_config(CLOSED)
class ConstraintEntry(TypedDict):
    """The bound that decides, and who was tested against it."""

    measure: str
    at_least: float
    confidence: float
    split: Literal["test"]
    suites: dict[str, SuiteFile]
    tested: list[VerdictEntry]


@with_config(CLOSED)
class SampleEntry(TypedDict):
    """A prompt with the answer of every candidate."""

    suite: str
    prompt: str
    answers: dict[str, str]


@with_config(CLOSED)
class DistanceEntry(TypedDict):
    """How far the policies of two λ are apart, in nats, and relative to how far they moved."""

    a: str
    b: str
    apart: float
    relative: float


@with_config(CLOSED)
class ChosenEntry(TypedDict):
    """Who was chosen, and why."""

    candidate: str
    why: str


@with_config(CLOSED)
class RegistryEntry(TypedDict):
    """Which model version the chosen candidate became."""

    name: str
    version: str
    alias: str


@with_config(CLOSED)
class Report(TypedDict):
    """Everything that a run found."""

    schema: Literal[3]
    recipe: RecipeEntry
    data: dict[str, str]
    """Role of a file → its sha256 when the run began."""
    suites: dict[str, SuiteEntry]
    decoding: dict[str, JsonValue]
    judges: dict[str, JudgeEntry]
    judge_checks: dict[str, JudgeChecks]
    candidates: Annotated[list[CandidateEntry], Field(min_length=1)]
    """The base first."""
    constraints: list[ConstraintEntry]
    flips: list[Flips]
    samples: list[SampleEntry]
    distances: list[DistanceEntry]
    tax: list[TaxRow]
    chosen: ChosenEntry | None
    why_none: str
    registry: RegistryEntry | None
    seconds: dict[str, float]


def schema() -> dict[str, Any]:
    """Return the JSON schema of a report; a figure at equal length must say what it stands on."""
    tree = TypeAdapter(Report).json_schema()
    metrics = tree["$defs"]["CandidateEntry"]["properties"]["metrics"]
    standing = {"allOf": [{"$ref": "#/$defs/Figure"}], "required": ["overlap", "leans"]}
    metrics["properties"] = {EQUAL_LENGTH: standing}
    title = f"report.json of sacpo, schema {SCHEMA}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | tree | {"title": title}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1, ensure_ascii=False))
