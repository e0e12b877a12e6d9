"""Every choice of an experiment, and its way in from a file."""

from models.recipe.assessment import Assessment
from models.recipe.evaluation import Answering, Better, Decoding, Engine, Evaluation, Judge, JudgeKind, Judges, Suites
from models.recipe.gate import Constraint, Gate, GateMode, Registry
from models.recipe.recipe import (
    Columns,
    Compute,
    Contaminated,
    Data,
    Device,
    Method,
    Recipe,
    Selection,
    Step,
)
from models.recipe.training import Objective, PreferenceTraining, Schedule, Sft, Training, kl_weight

__all__ = [
    "Answering",
    "Assessment",
    "Better",
    "Columns",
    "Compute",
    "Constraint",
    "Contaminated",
    "Data",
    "Decoding",
    "Device",
    "Engine",
    "Evaluation",
    "Gate",
    "GateMode",
    "Judge",
    "JudgeKind",
    "Judges",
    "Method",
    "Objective",
    "PreferenceTraining",
    "Recipe",
    "Registry",
    "Schedule",
    "Selection",
    "Sft",
    "Step",
    "Suites",
    "Training",
    "kl_weight",
]
