"""Every stage, and the version of each: what a run can ask for."""

from collections.abc import Callable

from models.alignment import kto, merge, methods, reference, sft
from models.artifacts import Noun
from models.data import preferences, prompts, sources
from models.judges import judge
from models.metrics import benchmarks, kl, margins
from models.policy import answers, weights
from models.stage import mark_of

STAGES: tuple[Callable[..., Noun], ...] = (
    sources.gather,
    preferences.prepare,
    weights.base,
    sft.train,
    reference.score,
    kto.score,
    *methods.TRAIN.values(),
    merge.interpolate,
    prompts.ask,
    answers.answer,
    judge.judge,
    judge.calibrate,
    kl.measure,
    margins.weigh,
    benchmarks.measure,
)
"""In pipeline order. Another version of one of them makes every run another run."""


def versions() -> dict[str, int]:
    """Return name → version of every stage."""
    return {mark.name: mark.version for mark in map(mark_of, STAGES)}
