"""The rivals of a challenger: what they are, when a run asks for them anew, and that a killed run ends the same."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Answers, Distances, Margins, Policy, Scores, Sources
from models.files import sealed
from models.gate.gate import Choice, Facts, SafetyCounts, Verdict, decide
from models.gate.promotion_log import Registered
from models.metrics.candidate import Candidate
from models.recipe import Constraint, Gate, Recipe
from models.recipe.toml import read
from tasks import approvals, decisions
from tasks.decisions import Rivals, Served
from tasks.registry import champion as registry
from tasks.run import Run
from tasks.stages import load_policy
from tasks.tracking.connection import client
from tasks.tracking.ledger import Ledger, Standing
from tasks.tracking.tracker import Tracker
from tasks.work import workers

CHOICE = Choice("base", "the only one")
"""The policies of conftest.py have this name."""


def started(runs: Path, *changes: str) -> Run[Recipe]:
    """Start the same run: what it knows, it knows from the runs folder."""
    recipe = read("quickstart", ["compute.processes=0", *changes])
    return Run(runs, recipe, "0123456789abcdef", Tracker(runs, recipe, "0123456789abcdef", {}))


@pytest.fixture
def rival(runs: Path, tmp_path: Path, other_policy: Policy) -> Iterator[Policy]:
    """A policy with the recipe's chat template, as every policy of a run; the process is its own worker meanwhile."""
    run = started(runs, "seed=2")
    with workers.workers(run.recipe.compute, runs):
        base = load_policy(run, str(other_policy.path), "rival")
        folder = shutil.copytree(base.path, tmp_path / "rival")  # a base is links, which MLflow does not register
        yield replace(base, path=folder)


def candidates(policy: Policy) -> list[Candidate]:
    noun: dict[str, Any] = {"path": policy.path, "digest": "", "policy": policy.digest}
    scores = Scores(**noun, split="validation", judges={}, failed=0)
    return [Candidate(policy, Answers(**noun, split="validation"), scores, Distances(**noun), Margins(**noun))]


def rivals_of(run: Run[Recipe], policy: Policy) -> Rivals:
    """Ask for the rivals of a policy."""
    rivals = decisions.rivals.fn(run, CHOICE, candidates(policy))
    assert rivals is not None
    return rivals


def register(run: Run[Recipe], policy: Policy) -> Registered:
    sources = Sources(path=policy.path, digest="data", files={})
    return decisions.register.fn(run, CHOICE, passing(), candidates(policy), sources)


def passing() -> Verdict:
    verdict = decide(SafetyCounts("base", 0.5, 400, 400, 0), Facts(), Constraint(), Gate(margin=0.5))
    assert verdict.passes
    return verdict


def overtake(runs: Path, source: str = "file:///nowhere") -> str:
    """Make a version of a colleague the champion, and return its number."""
    mlflow = client(runs)
    if not mlflow.search_registered_models():
        mlflow.create_registered_model("quickstart")
    version = str(mlflow.create_model_version("quickstart", source).version)
    Ledger(runs).note_standing("quickstart", version, Standing("pass", "", "", "a colleague's", source))
    registry.promote(runs, "quickstart", version, "a colleague's")
    return version


def in_file(run: Run[Recipe]) -> Served | None:
    return sealed.read(run.folder / "rivals.json", Served)


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (Choice("", "none holds"), []),
        (Choice("base", "nobody judged", decided=False), []),
        (CHOICE, ["gate.mode=off"]),
    ],
)
def test_what_is_not_tested_has_no_rivals(runs: Path, policy: Policy, choice: Choice, changes: list[str]) -> None:
    run = started(runs, *changes)
    assert decisions.rivals.fn(run, choice, candidates(policy)) is None and in_file(run) is None
    assert decisions.test.fn(run, choice, candidates(policy), None, None) is None  # type: ignore[arg-type]
    assert decisions.certify.fn(run, None, None) is None


def test_where_nothing_serves_the_base_is_the_only_rival(runs: Path, policy: Policy) -> None:
    run = started(runs)
    rivals = rivals_of(run, policy)
    assert rivals == Rivals(0, {}) and rivals.compared == ["base"]
    assert in_file(run) == Served(seen=0, champion="", anchor="")


def test_the_anchor_of_the_recipe_is_a_rival_but_not_of_itself(runs: Path, policy: Policy, rival: Policy) -> None:
    rivals = rivals_of(started(runs, f"gate.anchor={rival.path}"), policy)
    assert {name: policy.name for name, policy in rivals.policies.items()} == {"anchor": "anchor"}
    assert rivals.policies["anchor"].digest == rival.digest and rivals.compared == ["base", "anchor"]
    assert rivals_of(started(runs, f"gate.anchor={rival.path}"), rival) == Rivals(0, {})


def test_a_run_that_is_started_again_compares_with_the_same(runs: Path, policy: Policy) -> None:
    first = rivals_of(started(runs), policy)
    assert rivals_of(started(runs), policy) == first


def test_a_champion_of_somebody_else_is_the_new_rival(runs: Path, policy: Policy, rival: Policy) -> None:
    """The first version of a model is its anchor as well, and stands under one name only."""
    colleague = started(runs, "seed=2")
    run = started(runs)
    assert rivals_of(run, policy) == Rivals(0, {})
    registered = register(colleague, rival)
    registry.promote(runs, "quickstart", registered.version, "a colleague's")
    rivals = rivals_of(run, policy)
    assert rivals.seen == 1 and list(rivals.policies) == ["champion"] and rivals.compared == ["champion"]
    assert rivals.policies["champion"].digest == rival.digest
    place = f"models:/quickstart/{registered.version}"
    assert in_file(run) == Served(seen=1, champion=place, anchor=place)


def test_a_category_of_any_letters_is_registered(runs: Path, policy: Policy) -> None:
    """MLflow refuses most signs in the name of a tag, and its check is named after its category."""
    run, sources = started(runs), Sources(path=policy.path, digest="data", files={})
    counts = SafetyCounts("drugs & weapons (minor), ümlaut", 0.5, 400, 400, 0)
    facts = Facts(categories=(counts,))
    verdict = decide(replace(counts, name="base"), facts, Constraint(per_category=0.5), Gate(margin=0.5))
    registered = decisions.register.fn(run, CHOICE, verdict, candidates(policy), sources)
    tags = client(runs).get_model_version("quickstart", registered.version).tags
    assert tags["gate.safety rate drugs - weapons -minor- ümlaut"].startswith("safety rate, drugs & weapons (minor),")


def test_its_own_promotion_is_no_reason_to_ask_anew(runs: Path, policy: Policy) -> None:
    """The verdict that let it become the champion would be asked for again, beside itself."""
    run = started(runs)
    rivals = rivals_of(run, policy)
    registered = register(run, policy)
    promoted = decisions.promote.fn(run, registered, passing(), rivals)
    assert promoted == Registered("quickstart", registered.version, "champion")
    again = started(runs)
    assert rivals_of(again, policy) == rivals and in_file(again) == Served(seen=0, champion="", anchor="")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_is_killed_between_two_steps_ends_the_same(steps: int, runs: Path, policy: Policy) -> None:
    """Asked for its rivals; registered; promoted: each of them may have been its last."""
    killed = started(runs)
    rivals = rivals_of(killed, policy)
    if steps > 1:
        registered = register(killed, policy)
    if steps > 2:
        decisions.promote.fn(killed, registered, passing(), rivals)
    killed.tracker.fail("KILLED")

    run = started(runs)
    rivals = rivals_of(run, policy)
    registered = register(run, policy)
    assert not approvals.needs_approval(run, registered, passing())
    promoted = decisions.promote.fn(run, registered, passing(), rivals)
    assert promoted == Registered("quickstart", "1", "champion")
    assert [entry.version_to for entry in registry.log(runs, "quickstart")] == ["1"]
    assert [standing.state for standing in Ledger(runs).standings("quickstart", "1")] == ["pass"]
    assert in_file(run) == Served(seen=0, champion="", anchor="")


def test_a_run_that_is_overtaken_forgets_its_rivals_and_asks_anew(runs: Path, policy: Policy, rival: Policy) -> None:
    run = started(runs)
    rivals = rivals_of(run, policy)
    registered = register(run, policy)
    colleague = register(started(runs, "seed=2"), rival)
    registry.promote(runs, "quickstart", colleague.version, "a colleague's")
    assert approvals.approve(run, registered, passing(), rivals) is None  # nobody is asked about it
    assert decisions.promote.fn(run, registered, passing(), rivals) is None and in_file(run) is None
    rivals = rivals_of(run, policy)
    assert rivals.seen == 1 and list(rivals.policies) == ["champion"]
    promoted = decisions.promote.fn(run, registered, passing(), rivals)
    assert promoted == registered._replace(alias="champion")
    assert [entry.version_to for entry in registry.log(runs, "quickstart")] == [colleague.version, registered.version]


def test_rivals_that_are_forgotten_already_are_no_trouble(runs: Path, policy: Policy) -> None:
    """Another version became the champion, and `rivals.json` was lost as well."""
    run = started(runs)
    rivals = rivals_of(run, policy)
    registered = register(run, policy)
    overtake(runs)
    (run.folder / "rivals.json").unlink()
    assert decisions.promote.fn(run, registered, passing(), rivals) is None
