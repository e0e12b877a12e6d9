"""How the weights of a step are moved, and what a training aims at: what a recipe's step hands to the loss."""

from enum import StrEnum
from typing import TypeVar, cast

from pydantic import Field, model_validator

from models.recipe.places import Place
from models.recipe.record import Record

T = TypeVar("T", bound=Record)


def part_of(record: Record, kind: type[T]) -> T:
    """Return what a record holds of its base, as a record of that base."""
    # the values were checked when the recipe was read
    return cast(T, kind.model_construct(**{name: getattr(record, name) for name in kind.model_fields}))


class Schedule(StrEnum):
    """How the learning rate moves after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Training(Record):
    """How the weights of one step are moved."""

    learning_rate: float = Field(2e-5, gt=0, le=10, title="Learning rate")
    """Peak learning rate of AdamW, above 0, at most 10. Too high over-optimises the safety step first."""
    schedule: Schedule = Field(Schedule.cosine, title="Schedule")
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(0.03, ge=0, lt=1, title="Warm-up")
    """Share of the updates, from 0 to below 1, in which the learning rate rises; the first of them has a rate of 0."""
    epochs: float = Field(3, gt=0, le=10_000, title="Epochs")
    """Passes over the training pairs, above 0, at most 10,000; not used where `updates` is set."""
    updates: int = Field(0, ge=0, le=10_000_000, title="Updates")
    """Number of optimiser updates, at most 10,000,000; 0 means: as many as `epochs` needs."""
    batch: int = Field(64, ge=1, le=65_536, title="Batch")
    """Rows per optimiser update over all devices, from 1 to 65,536."""
    micro_batch: int = Field(0, ge=0, le=65_536, title="Micro-batch")
    """Rows held in memory at once, a divisor of `batch`; 0 means the whole batch. Smaller costs time, saves memory."""
    similar_lengths: bool = Field(False, title="Batches of similar length")
    """Pads less and so runs faster; batches are less mixed, which hurts where length tells what a row is about."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, title="Clip gradients at")
    """Gradients are scaled down to this norm, above 0, at most 1,000,000,000."""
    weight_decay: float = Field(0.0, ge=0, le=10, title="Weight decay")
    """AdamW's decoupled weight decay, from 0 to 10."""
    save_every: int = Field(50, ge=1, le=10_000_000, title="Checkpoint every")
    """Updates between two checkpoints, from which a killed run goes on; from 1 to 10,000,000."""

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> "Training":
        # gradients are summed over whole micro-batches; a smaller last one would weigh its rows more
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch must divide batch, got {self.micro_batch} and {self.batch}")
        return self

    @property
    def accumulate(self) -> int:
        """Micro-batches per update."""
        return self.batch // self.micro_batch if self.micro_batch else 1


class Sft(Training):
    """Optional supervised fine-tuning before the first step; needed by a base that cannot answer yet."""

    data: Place = Field("", title="Data")
    """File of `prompt` and `completion`, or of `messages`, or the world's own corpus (`town`); empty means: no such
    step."""
    # Declared again for its description: what Training says of the safety step does not hold here.
    learning_rate: float = Field(2e-5, gt=0, le=10, title="Learning rate")
    """Peak learning rate of AdamW, above 0, at most 10."""

    @property
    def training(self) -> Training:
        """How the weights are moved, without the place of the data: what the training is told."""
        return part_of(self, Training)


class PreferenceTraining(Training):
    """How the weights of one step are moved, if they are moved by preferences."""

    adapter_rank: int = Field(0, ge=0, le=4096, title="LoRA rank")
    """Rank of a LoRA adapter on all linear layers, at most 4,096, merged into the weights after the step; 0 trains all
    weights."""
    adapter_alpha: int = Field(0, ge=0, le=65_536, title="LoRA α")
    """Scale of the adapter, at most 65,536; 0 means twice the rank."""


class Objective(Record):
    """What one training aims at. A step of a recipe holds a grid of λ and the place of its data, a training neither."""

    metric: str
    beta: float
    lambda_: float

    @property
    def kl_weight(self) -> float:
        """The KL weight β/λ that the loss is told (SACPO eq. 11)."""
        return kl_weight(self.beta, self.lambda_)


def kl_weight(beta: float, lambda_: float) -> float:
    """Return β/λ, the KL weight of a step (SACPO Theorem 1, eq. 11).

    Raises:
        ValueError: λ is not positive; λ = 0 means β/λ = ∞, that is: skip the step.
    """
    if lambda_ <= 0:
        raise ValueError(f"β/λ needs a positive λ, got {lambda_:g}; λ = 0 skips the step")
    return beta / lambda_
