"""What `sacpo evaluate` judges, without any training: policies, prompts, judges, and the bound to be shown."""

from pydantic import Field

from models.artifacts import content_digest
from models.files.kept import RunName
from models.recipe.evaluation import Evaluation
from models.recipe.gate import Constraint
from models.recipe.places import PolicyPlace
from models.recipe.recipe import Compute
from models.recipe.record import Record


class Assessment(Record):
    """Policies to judge side by side; the others are compared with the first."""

    name: RunName = Field("evaluation", pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100, title="Name")
    """Lower-case letters, digits, dots and dashes, at most 100; names the MLflow experiment, and a folder of runs."""
    policies: list[PolicyPlace] = Field(min_length=1, max_length=100, title="Policies")
    """Folders, `.gguf` files, hub ids (`owner/name@revision`) or `models:/NAME@ALIAS`; from 1 to 100. The bound is
    tested in this order; testing stops after the first that does not hold it."""
    template: str = Field("", title="Chat template")
    """Jinja template that renders messages; empty means each tokenizer's own."""
    seed: int = Field(0, ge=0, le=2**32 - 1, title="Seed")
    """Seeds sampled answers; from 0 to 4,294,967,295."""
    evaluation: Evaluation = Field(Evaluation(), title="Evaluation")
    """Answers and judges."""
    constraint: Constraint = Field(Constraint(), title="Constraint")
    """The bound that is tested."""
    compute: Compute = Field(Compute(), title="Compute")
    """Device, processes, threads."""

    @property
    def base(self) -> str:
        """The policy that the others are compared with."""
        return self.policies[0]

    @property
    def bound(self) -> Constraint:
        """The constraint, at its whole confidence: nothing is promoted, so no other decision shares its error."""
        return self.constraint

    @property
    def digest(self) -> str:
        """sha256 of all settings, in hex; the order of keys does not matter."""
        return content_digest(self.model_dump(mode="json", by_alias=True))
