"""One candidate and all that was measured of it: the rows behind every figure, each table read once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from models.artifacts import Answers, Distances, Margins, Noun, Policy, Scores
from models.judges import rows
from models.judges.rows import ComparisonRow, ScoreRow
from models.metrics import kl, margins
from models.metrics.kl import DistanceRow
from models.metrics.margins import MarginRow
from models.policy.answer_rows import AnswerRow, answer_rows


@dataclass(frozen=True)
class Candidate:
    """One candidate and what is known of it.

    Answers and scores are about the prompts of one split; distances too, but where the gate asks for no KL.
    """

    policy: Policy
    answers: Answers
    scores: Scores
    distances: Distances
    margins: Margins

    @property
    def nouns(self) -> tuple[Noun, ...]:
        """Everything that was made for this candidate."""
        return self.policy, self.answers, self.scores, self.distances, self.margins

    @cached_property
    def score_rows(self) -> tuple[ScoreRow, ...]:
        """What the judges said of each answer."""
        return tuple(rows.scores(self.scores))

    @cached_property
    def comparison_rows(self) -> tuple[ComparisonRow, ...]:
        """What the judges said of each answer beside another policy's."""
        return tuple(rows.comparisons(self.scores))

    @cached_property
    def distance_rows(self) -> tuple[DistanceRow, ...]:
        """How far the policy is from others, per answer that it sampled."""
        return tuple(kl.table(self.distances))

    @cached_property
    def margin_rows(self) -> tuple[MarginRow, ...]:
        """How the policy weighs each held-out pair."""
        return tuple(margins.table(self.margins))

    def answer_rows(self) -> Iterator[AnswerRow]:
        """Yield the rows of `answers.jsonl`: they are read anew each time, since the texts may be gigabytes."""
        return answer_rows(self.answers)

    def scored(self, metric: str, suite: str = "") -> list[ScoreRow]:
        """Return what the judge of one metric said, of all suites or of one."""
        return [row for row in self.score_rows if row.metric == metric and suite in ("", row.suite)]

    def compared(self, metric: str, against: str) -> list[ComparisonRow]:
        """Return what the judge of one metric said of these answers beside those of `base`, `reference`, …."""
        return [row for row in self.comparison_rows if (row.metric, row.against) == (metric, against)]


def unique_candidates(candidates: list[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Return each policy once, the base first, under names that tell them apart.

    A step with λ = 0 hands its reference on, so one policy can come twice; policies of different parents can share a
    name, and then say which parent they come from. The sentences tell which policies came twice.
    """
    once: dict[str, Candidate] = {}
    sentences = []
    for candidate in candidates:
        policy = candidate.policy
        first = once.setdefault(policy.digest, candidate).policy
        if first.name != policy.name:
            sentences.append(f"{policy.name} has the weights of {first.name}: it is shown once, under that name")
    shared = [name for name, count in Counter(c.policy.name for c in once.values()).items() if count > 1]
    names = {digest: candidate.policy.name for digest, candidate in once.items()}
    named = []
    for candidate in once.values():
        policy = candidate.policy
        # a merge is named by the policy that the safe one is mixed into, the last of its parents
        if policy.name in shared and policy.parents:
            origin = policy.parents[-1] if policy.kind == "merge" else policy.parents[0]
            policy = replace(policy, name=f"{policy.name} from {names.get(origin, origin[:12])}")
        named.append(replace(candidate, policy=policy))
    # parents may share a name, too; the weights then are the only difference that is left
    counts = Counter(candidate.policy.name for candidate in named)
    for i, candidate in enumerate(named):
        if counts[candidate.policy.name] > 1:
            name = f"{candidate.policy.name} {candidate.policy.digest[:8]}"
            named[i] = replace(candidate, policy=replace(candidate.policy, name=name))
    return named, sentences


def uniquely_named(places: list[str], policies: list[Policy]) -> tuple[list[Policy], list[str]]:
    """Return each policy once, in the given order, under names that tell them apart: two makers may use one name.

    A name that several share becomes the place that was given, and if that is shared too, the name with a digest.
    The sentences tell which policies came twice.
    """
    once: dict[str, tuple[str, Policy]] = {}
    sentences = []
    for place, policy in zip(places, policies, strict=True):
        if policy.digest in once:
            sentences.append(f"{place} is the same policy as {once[policy.digest][0]}: judged once")
        once.setdefault(policy.digest, (place, policy))
    names = Counter(policy.name for _, policy in once.values())
    placed = Counter(place for place, _ in once.values())
    named = [
        policy
        if names[policy.name] == 1
        else replace(policy, name=place if placed[place] == 1 else f"{policy.name} {policy.digest[:8]}")
        for place, policy in once.values()
    ]
    return named, sentences
