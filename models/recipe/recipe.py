"""Every choice of an experiment, as strict, frozen records.

One schema for the file, the command line, the Prefect form and the MLflow params. It holds no Optional and
no Union (the Prefect form draws them badly): an empty list or an empty string means "not set".
"""

from enum import StrEnum
from typing import Any

from pydantic import Field, field_validator, model_validator

from models.artifacts import content_digest
from models.files.kept import RunName
from models.recipe.evaluation import Evaluation, JudgeKind
from models.recipe.gate import Constraint, Gate, Registry
from models.recipe.places import TOWN, Place, PolicyPlace
from models.recipe.record import Record, first
from models.recipe.training import Objective, PreferenceTraining, Sft, part_of


class Method(StrEnum):
    """The preference loss of a step (SACPO section 5.1: any DPO-type loss applies)."""

    dpo = "dpo"
    kto = "kto"

    @property
    def paired(self) -> bool:
        """Whether it compares two answers to one prompt; else it learns from single answers, good or bad."""
        return self is not Method.kto


class Device(StrEnum):
    """Where the tensors live; `auto` takes the first accelerator, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Columns(Record):
    """What the columns of a file are called that is in no known format; empty means: as here."""

    prompt: str = Field("", title="Prompt")
    """What is asked: text, or messages."""
    system: str = Field("", title="System")
    """The system message."""
    chosen: str = Field("", title="Chosen")
    """The preferred answer."""
    rejected: str = Field("", title="Rejected")
    """The other answer."""
    completion: str = Field("", title="Completion")
    """The only answer of a row, for KTO."""
    label: str = Field("", title="Good or bad")
    """Whether the only answer of a row is desirable: true or false, 1 or 0."""

    @property
    def named(self) -> dict[str, str]:
        """Our name of a column → the file's name, where one is set."""
        return {name: column for name, column in self if column}


class Selection(Record):
    """Which rows of a file become the pairs of a step."""

    metric: str
    paired: bool
    """Whether the loss compares two answers; else it learns from single ones."""
    label: str = ""
    """Column with the index of the preferred answer, empty for the one that the metric names."""
    limit: int = 0
    """Most rows to train on; 0 means all."""


class Step(PreferenceTraining):
    """One constraint or objective: its data, its loss, and its KL weight β/λ."""

    model_config = first("metric", "method", "lambda", "data")  # forms show these before how the weights are moved

    metric: str = Field(pattern="^[a-z][a-z0-9_]*$", max_length=50, title="Metric")
    """What the step aligns for: `helpful`, `harmless`, or a name of your own (small letters, digits, _; at most
    50); each once."""
    method: Method = Field(Method.dpo, title="Method")
    """The preference loss."""
    data: Place = Field(min_length=1, title="Data")
    """File of comparisons, or the embedded world's own (`town`)."""
    pairs: int = Field(0, ge=0, le=10**9, title="Pairs")
    """Train on at most this many pairs, picked by a hash of their content; 0 means all, 1,000,000,000 is the most."""
    label: str = Field("", title="Label")
    """Column that holds the index (0 or 1) of the preferred answer; empty means by metric: `better_response_id` for
    helpful, `safer_response_id` for harmless, `NAME_response_id` for others. Formats with `chosen` and `rejected` need
    none."""
    columns: Columns = Field(Columns(), title="Columns")
    """Names of the file's columns, for a file in no known format; empty means those of `data.columns`."""
    lambda_: list[float] = Field([1.0], alias="lambda", title="λ")
    """One policy is trained per value, with KL weight β/λ; each from 0.000001 to 1,000,000, or 0: skip the step."""

    @property
    def selection(self) -> Selection:
        """Which rows of the step's file become its pairs."""
        return Selection(metric=self.metric, paired=self.method.paired, label=self.label, limit=self.pairs)

    def objective(self, beta: float, lambda_: float) -> Objective:
        """Return what the training with one λ of the grid aims at."""
        return Objective(metric=self.metric, beta=beta, lambda_=lambda_)

    @property
    def training(self) -> PreferenceTraining:
        """How the weights are moved, without what is aimed at and without the data: what a training is told."""
        return part_of(self, PreferenceTraining)

    @model_validator(mode="after")
    def _kto_needs_a_batch(self) -> "Step":
        if self.method is Method.kto and (self.micro_batch or self.batch) < 8:
            raise ValueError(
                "kto estimates its KL from the answers of one batch: batch and micro_batch must be at least 8"
            )
        if self.method is Method.kto and self.similar_lengths:
            raise ValueError("kto mixes short and long answers in every batch; leave similar_lengths out")
        return self

    @field_validator("lambda_", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (int, float)) else value

    @field_validator("lambda_")
    @classmethod
    def _not_negative(cls, values: list[float]) -> list[float]:
        if not values:
            raise ValueError("lambda needs at least one value; leave it out for 1")
        if min(values) < 0:
            raise ValueError(f"lambda must be at least 0, got {min(values):g}")
        outside = next((value for value in values if value and not 1e-6 <= value <= 1e6), 0.0)
        if outside:
            raise ValueError(f"lambda must lie between 0.000001 and 1,000,000, or be 0, got {outside:g}")
        if len(set(values)) < len(values):
            raise ValueError("lambda holds a value twice")
        return values


class Merge(Record):
    """P-SACPO (paper section 5.2): average the weights before and after the last step."""

    weights: list[float] = Field([], title="q")
    """Each q from 0 to 1 gives θ = q·θ_safe + (1−q)·θ_reward, from the largest λ; empty means no merge."""

    @field_validator("weights")
    @classmethod
    def _within_one(cls, values: list[float]) -> list[float]:
        if any(not 0 <= q <= 1 for q in values):
            raise ValueError("every merge weight must lie in [0, 1]; outside is extrapolation, not P-SACPO")
        if len(set(values)) < len(values):
            raise ValueError("weights holds a value twice; each q gives one policy")
        return values


class Contaminated(StrEnum):
    """What to do with training prompts that stand in an evaluation suite."""

    fail = "fail"
    drop = "drop"


class Data(Record):
    """How raw comparisons become pairs."""

    validation: float = Field(0.1, ge=0, lt=1, title="Validation share")
    """Share of the prompts kept for choosing, from 0 to below 1."""
    test: float = Field(0.1, ge=0, lt=1, title="Test share")
    """Share of the prompts kept for reporting, from 0 to below 1."""
    salt: str = Field("sacpo", title="Salt")
    """Splits follow a hash of the prompt with this salt: new data never move a test prompt into training."""
    near_duplicates: float = Field(0.8, gt=0, le=1, title="Near-duplicates")
    """A training prompt is dropped if its word triples overlap this much (Jaccard) with a held-out prompt's; above 0,
    and 1 compares the exact words only."""
    contaminated: Contaminated = Field(Contaminated.fail, title="Training prompts in a suite")
    """What to do if a training prompt, or nearly it, stands in a suite: `fail` before training, or `drop` the row."""
    bad_rows: float = Field(0.02, ge=0, lt=1, title="Bad rows allowed")
    """Share of rows that may be quarantined, from 0 to below 1; more stops the run before training."""
    heldout: int = Field(0, ge=0, le=10**9, title="Held-out pairs")
    """Keep at most this many pairs per held-out split, picked by a hash of their content; 0 means all, 1,000,000,000 is
    the most."""
    max_tokens: int = Field(512, ge=8, le=1_048_576, title="Longest row in tokens")
    """A pair whose longer side exceeds this is dropped and counted in the data card; from 8 to 1,048,576."""
    columns: Columns = Field(Columns(), title="Columns")
    """Names of the files' columns, for files in no known format (docs/data.md); a step may have its own."""

    @model_validator(mode="after")
    def _leave_some(self) -> "Data":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test leave nothing to train on; their sum must stay below 1")
        return self


class Compute(Record):
    """What the run may use."""

    device: Device = Field(Device.auto, title="Device")
    """`auto` takes an accelerator if there is one."""
    processes: int = Field(2, ge=0, le=256, title="Processes")
    """Policies trained or judged side by side, each in a process of its own, at most 256; 0 works in this process, one
    by one, and a stage that was begun cannot be interrupted."""
    threads: int = Field(1, ge=1, le=1024, title="Threads per process")
    """CPU threads of each process, from 1 to 1,024; best no more than there are idle cores for them."""


class Recipe(Record):
    """One experiment: a base policy, the steps that align it, the bound it must hold, and where it goes."""

    name: RunName = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100, title="Name")
    """Lower-case letters, digits, dots and dashes, at most 100; names the MLflow experiment, and a folder of runs."""
    base: PolicyPlace = Field(min_length=1, title="Base policy")
    """Folder of weights and tokenizer, `.gguf` file, hub id (`owner/name@revision`), `models:/NAME@ALIAS` or `town`."""
    beta: float = Field(0.1, ge=1e-6, le=1e6, title="β")
    """KL weight of a step with λ = 1, as the first one usually has (SACPO eq. 9), from 0.000001 to 1,000,000."""
    steps: list[Step] = Field(min_length=1, max_length=50, title="Steps")
    """In order, at most 50. The first step's reference is the base, each later one's the policy of the step before."""
    merge: Merge = Field(Merge(), title="Merge")
    """Weight averages between the last two policies."""
    constraint: Constraint = Field(Constraint(), title="Constraint")
    """The bound that decides."""
    gate: Gate = Field(Gate(), title="Gate")
    """What a challenger must show beside the bound before it serves."""
    evaluation: Evaluation = Field(Evaluation(), title="Evaluation")
    """Answers and judges."""
    data: Data = Field(Data(), title="Data")
    """Splits and limits."""
    sft: Sft = Field(Sft(), title="Supervised fine-tuning")
    """Optional step before the others."""
    seed: int = Field(0, ge=0, le=2**32 - 1, title="Seed")
    """Seeds data order, initial weights and sampled answers; from 0 to 4,294,967,295."""
    template: str = Field("", title="Chat template")
    """Jinja template that renders messages; empty means the tokenizer's own."""
    registry: Registry = Field(Registry(), title="Registry")
    """The model name."""
    compute: Compute = Field(Compute(), title="Compute")
    """Device, processes, threads."""

    @model_validator(mode="after")
    def _never_from_the_champion(self) -> "Recipe":
        if self.base.startswith((f"models:/{self.registered_name}@", f"models:/{self.registered_name}/")):
            raise ValueError(
                f"base {self.base!r} is a version of what this recipe registers: aligned again and again, it drifts "
                "from the base without a bound; name the policy that the first run started from"
            )
        return self

    @model_validator(mode="after")
    def _metrics_differ(self) -> "Recipe":
        # a metric names the columns of a report, the tables of margins and the policies of its step
        names = [step.metric for step in self.steps]
        twice = next((name for name in names if names.count(name) > 1), "")
        if twice:
            raise ValueError(
                f"two steps have the metric {twice!r}; give the second a name of its own, for instance '{twice}_2', "
                "and if its data need one, a label"
            )
        return self

    @model_validator(mode="after")
    def _oracle_knows_the_prompts(self) -> "Recipe":
        # the oracle computes its scores from the words of the town; of any other text it knows nothing
        data = [self.sft.data, *(step.data for step in self.steps)]
        oracle = any(judge.kind is JudgeKind.oracle for _, judge in self.evaluation.judges)
        suites = [place for _, place in self.evaluation.suites]
        if oracle and TOWN not in data:
            raise ValueError("the oracle knows the town's prompts only; it needs data = 'town'")
        if TOWN in suites:
            raise ValueError("the town's suites come with data = 'town'; leave evaluation.suites out")
        return self

    def data_of(self, step: Step) -> Data:
        """Return how the comparisons of a step become pairs: `data`, with the step's own columns if it names any."""
        return self.data.model_copy(update={"columns": step.columns}) if step.columns.named else self.data

    @property
    def digest(self) -> str:
        """sha256 of all settings, in hex; the order of keys in the file does not matter."""
        return content_digest(self.model_dump(mode="json", by_alias=True))

    @property
    def bound(self) -> Constraint:
        """The constraint at the confidence of each decision on its suite."""
        return self.constraint.shared

    @property
    def headline(self) -> str:
        """Name and method in a line: `quickstart · helpful λ=1 → harmless λ=0.2, 1`."""
        steps = (f"{step.metric} λ={', '.join(f'{value:g}' for value in step.lambda_)}" for step in self.steps)
        return f"{self.name} · {' → '.join(steps)}"

    @property
    def registered_name(self) -> str:
        """The name in the model registry."""
        return self.registry.name or self.name
