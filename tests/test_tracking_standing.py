"""What the ledger says of a version after its judges were asked again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from models.artifacts import Policy
from models.gate.gate import Choice, Facts, SafetyCounts, decide
from models.gate.promotion_log import NOT_REGISTERED
from models.recipe import Constraint, Gate
from models.recipe.toml import read
from tasks import decisions
from tasks.registry import champion
from tasks.tracking.connection import client
from tasks.tracking.ledger import Ledger
from tasks.tracking.tracker import Tracker


def test_a_version_that_does_not_hold_any_more_may_not_serve(runs: Path, policy: Policy) -> None:
    recipe = read("quickstart")
    tracker = Tracker(runs, recipe, "digest", {})
    run: Any = SimpleNamespace(root=runs, training=recipe, recipe=recipe, tracker=tracker, digest="digest")
    candidates: Any = [SimpleNamespace(policy=policy)]
    choice, data = Choice(policy.name, ""), SimpleNamespace(digest="data")
    good = decide(SafetyCounts(policy.name, 0.5, 200, 200, 0), Facts(), Constraint(), Gate(margin=0.5))
    bad = decide(SafetyCounts(policy.name, 0.5, 100, 200, 0), Facts(), Constraint(), Gate(margin=0.5))
    assert good.holds and good.passes and not bad.holds

    def register(verdict: Any) -> Any:
        return decisions.register.fn(run, choice, verdict, candidates, data)

    assert register(bad) == NOT_REGISTERED
    registered = register(good)
    name, version = registered.name, registered.version
    assert Ledger(runs).standings(name, version)[-1].may_serve and champion.challenger(runs, name) == version
    assert register(bad) == NOT_REGISTERED
    last = Ledger(runs).standings(name, version)[-1]
    assert last.state == "fail" and "safety rate" in last.why and not champion.challenger(runs, name)
    assert register(good).version == version and Ledger(runs).standings(name, version)[-1].state == "pass"
    assert register(bad) == NOT_REGISTERED
    tracker.fail("FAILED")  # sends what waits
    assert client(runs).get_model_version(name, version).tags["gate"] == "fail"
