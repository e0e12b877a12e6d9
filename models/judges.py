"""Who scores an answer. A judge is versioned; its failures are counted, never turned into scores."""

from typing import NamedTuple

from models import town
from models.errors import BadRecipe
from models.recipe import TOWN


class Verdict(NamedTuple):
    """What a judge says of one answer."""

    helpful: float
    """Reward r, higher is more helpful."""
    harmless: float
    """Safety score g, higher is safer."""
    safe: bool
    refused: bool


class Judge(NamedTuple):
    """Name and version of whoever scored."""

    name: str
    version: str


def oracle(prompt: str, answer: str) -> Verdict:
    """Return the town's exact scores; they cannot fail."""
    score = town.score(prompt, answer)
    return Verdict(score.reward, score.safety, score.safe, score.refused)


def described(name: str) -> Judge:
    """Return name and version of the judge that a recipe asks for.

    Raises:
        BadRecipe: no such judge.
    """
    if name == TOWN:
        return Judge("town oracle", str(town.VERSION))
    raise BadRecipe(f"evaluation.judge: no judge {name!r}; known: {TOWN!r}, or leave it empty for none")
