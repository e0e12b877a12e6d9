"""The promotion log, the ledger of decisions, and the aliases that follow, on a real MLflow registry in sqlite."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import admin
from models.artifacts import Policy
from models.errors import BadInput, BadPlace, Stale
from models.files import sealed
from models.gate.gate import Choice, Facts, SafetyCounts, decide
from models.gate.promotion_log import Entry, Registered, line_of_champions, rolled_back
from models.recipe import Constraint, Gate
from tasks import approvals, decisions
from tasks.decisions import Rivals
from tasks.registry import champion as registry
from tasks.tracking.connection import client
from tasks.tracking.ledger import Ledger, Standing
from tests.conftest import untracked


def entries(*moves: tuple[str, str]) -> list[Entry]:
    return [Entry(i, action, "", version, "me", "now", "") for i, (action, version) in enumerate(moves, start=1)]


UP = [("promote", "1"), ("promote", "2"), ("promote", "3")]


@pytest.mark.parametrize(
    ("moves", "line"),
    [
        ([], []),
        (UP, ["1", "2", "3"]),
        ([*UP, ("rollback", "2")], ["1", "2"]),
        ([*UP, ("rollback", "2"), ("rollback", "1")], ["1"]),
        ([*UP, ("rollback", "2"), ("promote", "4")], ["1", "2", "4"]),
        ([("adopt", "7"), ("promote", "8")], ["7", "8"]),
    ],
)
def test_the_log_says_who_serves(moves: list[tuple[str, str]], line: list[str]) -> None:
    assert line_of_champions(entries(*moves)) == line


def test_after_three_promotions_a_rollback_goes_back_one_by_one() -> None:
    log = UP
    assert rolled_back(entries(*log)) == ("3", "2")
    assert rolled_back(entries(*log, ("rollback", "2"))) == ("2", "1")
    with pytest.raises(BadInput, match="version 1 is the first champion, so there is nothing to roll back to"):
        rolled_back(entries(*log, ("rollback", "2"), ("rollback", "1")))
    with pytest.raises(BadInput, match="nothing serves"):
        rolled_back([])


@pytest.fixture
def versions(runs: Path) -> Path:
    """Four versions in a registry; the third did not pass the gate. Their tags say that all did."""
    mlflow = client(runs)
    mlflow.create_registered_model("m")
    for number in range(1, 5):
        mlflow.create_model_version("m", f"file:///nowhere/{number}", tags={"gate": "pass"})
        state, why = ("fail", "helpful against the champion") if number == 3 else ("pass", "")
        noted(runs, str(number), state, why=why)
    return runs


def noted(runs: Path, version: str, state: str, who: str = "", why: str = "") -> None:
    source = f"file:///nowhere/{version}"
    Ledger(runs).note_standing("m", version, Standing(state, who, why, "verdict", source))


def aliases(runs: Path) -> dict[str, str]:
    return {alias: str(version) for alias, version in client(runs).get_registered_model("m").aliases.items()}


def test_aliases_follow_promotions_and_rollbacks(versions: Path) -> None:
    client(versions).set_registered_model_alias("m", "challenger", "2")
    registry.promote(versions, "m", "1", "first")
    assert aliases(versions) == {"champion": "1", "challenger": "2"}
    assert registry.promote(versions, "m", "", "the challenger").version_to == "2"
    assert aliases(versions) == {"champion": "2", "previous": "1"}  # it challenges no more
    registry.promote(versions, "m", "4", "third")
    assert aliases(versions) == {"champion": "4", "previous": "2"}
    assert registry.rollback(versions, "m", "bad answers").version_to == "2"
    assert aliases(versions) == {"champion": "2", "previous": "1"}
    registry.rollback(versions, "m", "worse")
    assert aliases(versions) == {"champion": "1"}
    with pytest.raises(BadInput, match="m: version 1 is the first champion"):
        registry.rollback(versions, "m", "")
    log = registry.log(versions, "m")
    assert [(e.number, e.action, e.version_from, e.version_to) for e in log] == [
        (1, "promote", "", "1"),
        (2, "promote", "1", "2"),
        (3, "promote", "2", "4"),
        (4, "rollback", "4", "2"),
        (5, "rollback", "2", "1"),
    ]
    assert log[3].why == "bad answers" and "@" in log[3].who
    assert registry.serving(versions, "m").version == "1"


def test_an_alias_moved_by_hand_is_pointed_out_and_put_back(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_here", lambda prefect=True: versions)
    registry.promote(versions, "m", "1", "first")

    def says(*arguments: str) -> str:
        return CliRunner().invoke(admin.app, arguments).output

    assert "Aliases: champion 1\n" in says("champion", "m") and "not where" not in says("champion", "m")
    client(versions).set_registered_model_alias("m", "champion", "2")
    assert "They are not where the promotion log says" in says("champion", "m")
    assert "m: champion 2 → 1" in says("reconcile")
    assert "not where" not in says("champion", "m")


def test_what_may_not_be_promoted(versions: Path) -> None:
    with pytest.raises(BadInput, match=r"version 3 did not pass the gate \(fail: helpful against the champion\)"):
        registry.promote(versions, "m", "3", "")
    assert registry.promote(versions, "m", "3", "I know better", force=True).why == "I know better (forced)"
    with pytest.raises(BadInput, match="version 3 is the champion already"):
        registry.promote(versions, "m", "3", "")
    with pytest.raises(BadInput, match=r"version 9: MLflow at .* does not know it"):
        registry.promote(versions, "m", "9", "")
    with pytest.raises(BadInput, match="has no challenger"):
        registry.promote(versions, "m", "", "")
    with pytest.raises(BadInput, match="nobody has no champion"):
        registry.serving(versions, "nobody")


def test_a_tag_of_the_registry_lets_nothing_pass(versions: Path) -> None:
    """Who refused it stands in the ledger; the tags say `pass`, or that nobody has answered yet."""
    for tag in ("pass", "waits for approval"):
        client(versions).set_model_version_tag("m", "3", "gate", tag)
        with pytest.raises(BadInput, match=r"version 3 did not pass the gate \(fail: helpful against the champion\)"):
            registry.promote(versions, "m", "3", "")
    noted(versions, "2", "waits for approval")
    noted(versions, "2", "refused", "Ada", "read the card")
    with pytest.raises(BadInput, match=r"version 2 did not pass the gate \(refused by Ada: read the card\).*--force"):
        registry.promote(versions, "m", "2", "")
    noted(versions, "4", "waits for approval")
    assert registry.promote(versions, "m", "4", "by hand").version_to == "4"
    assert registry.promote(versions, "m", "2", "", force=True).version_to == "2"


def test_a_version_that_the_ledger_does_not_know_is_not_promoted(versions: Path) -> None:
    """Registered by hand, or a number that was given once more after its model was deleted."""
    client(versions).create_model_version("m", "file:///nowhere/5", tags={"gate": "pass"})
    client(versions).create_model_version("m", "file:///elsewhere/6", tags={"gate": "pass"})
    noted(versions, "6", "pass")
    for version in ("5", "6"):
        with pytest.raises(BadInput, match=f"version {version} is not known to our ledger: .*SACPO_DATABASE.*--force"):
            registry.promote(versions, "m", version, "")
    assert registry.promote(versions, "m", "5", "mine", force=True).why == "mine (forced)"


def test_of_two_words_on_a_version_the_later_one_counts(runs: Path) -> None:
    threads = [threading.Thread(target=noted, args=(runs, "1", "agreed", f"{n}")) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    noted(runs, "1", "refused", "Ada")
    standings = Ledger(runs).standings("m", "1")
    assert (
        len(standings) == 7
        and {one.who for one in standings[:6]} == set("012345")
        and str(standings[-1]).startswith("refused by Ada")
    )


def test_who_decides_on_what_is_no_longer_true_is_refused(versions: Path) -> None:
    registry.promote(versions, "m", "1", "", seen=0)
    with pytest.raises(Stale, match=r"entry 1 of the promotion log is taken"):
        registry.promote(versions, "m", "2", "", seen=0)
    assert aliases(versions) == {"champion": "1"}
    registry.promote(versions, "m", "2", "", seen=1)
    assert aliases(versions) == {"champion": "2", "previous": "1"}


def test_runs_of_a_folder_decide_about_a_model_one_after_the_other(runs: Path) -> None:
    """Else all but the first would have spent error on a comparison with a champion of the past."""
    runs.mkdir()
    first, second = untracked(runs, "seed=1"), untracked(runs, "seed=2")
    other, unguarded = untracked(runs, "registry.name=another"), untracked(runs, "gate.mode=off")
    decided: list[str] = []
    chosen = Choice("safe", "the safest")

    def decide_second() -> None:
        with decisions.turn(second, chosen):
            decided.append("second")

    thread = threading.Thread(target=decide_second)
    with decisions.turn(first, chosen), decisions.turn(other, chosen):
        with decisions.turn(second, Choice("", "none holds")), decisions.turn(unguarded, chosen):
            decided.append("those that promote nothing wait for nobody")
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        decided.append("first")
    thread.join(600)
    assert decided == ["those that promote nothing wait for nobody", "first", "second"]


def test_a_backup_of_the_log_leaves_no_run_and_no_person_stuck(versions: Path) -> None:
    """One was put back while a run waited: lines that it knows are gone, and a number may be missing in between."""
    run = untracked(versions, "registry.name=m")
    passes = decide(SafetyCounts("safe", 0.5, 400, 400, 0), Facts(), Constraint(), Gate(margin=0.5))
    assert passes.passes
    for number, version in ((1, "1"), (3, "2")):
        Ledger(versions).promote("m", Entry(number, "promote", "", version, "me", "now", ""))
    run.folder.mkdir(parents=True)
    place = run.folder / "rivals.json"
    for seen in (0, 3):  # overtaken, or of a future that is gone: it decides again
        sealed.write(place, decisions.Served(seen=seen, champion="models:/m/2", anchor=""))
        rivals = Rivals(seen, {})
        assert approvals.approve(run, Registered("m", "4", "challenger"), passes, rivals) is None
        assert decisions.promote.fn(run, Registered("m", "4", ""), passes, rivals) is None
        assert not place.exists()
        sealed.write(place, decisions.Served(seen=seen, champion="models:/m/2", anchor=""))
        decisions._forget_former_champion(run, Policy(path=versions, digest="another", name="p", kind="step"))
        assert not place.exists()
    with pytest.raises(Stale, match="a backup was put back"):
        registry.promote(versions, "m", "4", "", seen=3)
    rivals = Rivals(2, {})
    assert decisions.promote.fn(run, Registered("m", "4", ""), passes, rivals) == Registered("m", "4", "champion")
    assert registry.rollback(versions, "m", "").version_to == "2"
    assert [entry.number for entry in registry.log(versions, "m")] == [1, 3, 4, 5]


def test_nobody_is_asked_about_a_comparison_of_the_past(versions: Path) -> None:
    run = untracked(versions, "registry.name=m")
    rivals = Rivals(0, {})
    registry.promote(versions, "m", "1", "by hand, while the report was made")
    assert approvals.approve(run, Registered("m", "2", "challenger"), None, rivals) is None
    assert [standing.state for standing in Ledger(versions).standings("m", "2")] == ["pass"]


def test_a_half_moved_alias_is_repaired(versions: Path) -> None:
    """Killed between the log and the aliases, or after one of two; or somebody moved them by hand."""
    Ledger(versions).promote("m", Entry(1, "promote", "", "1", "me", "now", ""))
    assert registry.reconcile(versions) == ["m: champion nowhere → 1"]
    Ledger(versions).promote("m", Entry(2, "promote", "1", "2", "me", "now", ""))
    client(versions).set_registered_model_alias("m", "previous", "1")
    assert registry.reconcile(versions) == ["m: champion 1 → 2"]
    client(versions).set_registered_model_alias("m", "champion", "4")
    assert registry.reconcile(versions) == ["m: champion 4 → 2"]
    assert registry.reconcile(versions) == [] and aliases(versions) == {"champion": "2", "previous": "1"}


def test_aliases_that_are_older_than_the_log_become_its_first_lines(versions: Path) -> None:
    client(versions).set_registered_model_alias("m", "champion", "2")
    client(versions).set_registered_model_alias("m", "previous", "1")
    registry.promote(versions, "m", "4", "")
    assert [(e.action, e.version_to) for e in registry.log(versions, "m")] == [
        ("adopt", "1"),
        ("adopt", "2"),
        ("promote", "4"),
    ]
    assert aliases(versions) == {"champion": "4", "previous": "2"}


def test_of_two_who_adopt_the_aliases_at_once_neither_loses_a_line(versions: Path) -> None:
    """Once a reader between the two lines took the earlier champion for the one that serves."""
    client(versions).set_registered_model_alias("m", "champion", "2")
    client(versions).set_registered_model_alias("m", "previous", "1")
    seen: list[list[str]] = []

    def look() -> None:
        seen.append([entry.version_to for entry in registry.log(versions, "m")])

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["1", "2"]] * 8


def test_entries_are_appended_together_or_not_at_all(runs: Path) -> None:
    ledger = Ledger(runs)
    ledger.promote("m", *entries(("adopt", "1"))[:1])
    with pytest.raises(Stale, match="entry 2"):
        two = entries(("adopt", "1"), ("adopt", "2"))
        ledger.promote("m", replace(two[1], number=2), replace(two[0], number=1))
    assert [entry.number for entry in ledger.promotions("m")] == [1]


def test_a_version_is_known_by_its_own_number(versions: Path) -> None:
    registry.promote(versions, "m", "02", "", force=True)  # MLflow finds 2
    assert registry.log(versions, "m")[0].version_to == "2" and aliases(versions) == {"champion": "2"}
    with pytest.raises(BadInput, match="is the champion already"):
        registry.promote(versions, "m", "２", "", force=True)


def test_who_promotes_may_have_a_long_name(versions: Path) -> None:
    assert len(registry.promote(versions, "m", "1", "", who="x" * 300).who) <= 200


def test_of_many_who_promote_at_once_one_wins_each_number(versions: Path) -> None:
    """The first setting of an alias races in MLflow; the log does not."""
    outcomes: list[Any] = []

    def go(version: str) -> None:
        try:
            outcomes.append(registry.promote(versions, "m", version, "", seen=0).version_to)
        except Stale:
            outcomes.append(None)

    threads = [threading.Thread(target=go, args=(version,)) for version in ("1", "2", "4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [version for version in outcomes if version]
    assert len(outcomes) == 3 and aliases(versions) == {"champion": winner}


def test_a_decision_is_taken_once_and_the_next_one_finds_the_error_spent(runs: Path) -> None:
    ledger, chosen = Ledger(runs), SafetyCounts("a", 0.7, 990, 1000, 0)
    constraint, gate = Constraint(at_least=0.9, decisions=2), Gate()
    for number in range(3):
        charges = ledger.charges(["p", "q"])
        verdict = decide(chosen, Facts(spent={"harmless": charges["p"].error}), constraint, gate)
        assert ledger.verdict(f"question {number}") is None
        assert ledger.decide("m", f"question {number}", charges, constraint.error, verdict)
        assert ledger.verdict(f"question {number}") == verdict
        assert verdict.passes is (number < 2)
    assert ledger.charges(["p", "fresh"]) == {"p": (3, pytest.approx(0.075)), "fresh": (0, 0)}
    assert not ledger.decide("m", "too late", charges, constraint.error, verdict)  # another one came since we looked


def test_an_attempt_is_remembered_with_its_end(runs: Path) -> None:
    ledger = Ledger(runs)
    assert ledger.last_decision("m", "x") is None
    ledger.note_attempt("m", "x", "rejected")
    ledger.note_attempt("m", "x", "again")
    assert ledger.last_decision("m", "x")["outcome"] == "rejected" and ledger.last_decision("m", "y") is None  # type: ignore[index]


@pytest.mark.parametrize("place", ["54x", "99999999", "nobody listens"])
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    place: str, runs: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(port) if place == "nobody listens" else place
    monkeypatch.setenv("SACPO_DATABASE", f"postgresql+psycopg://me:secret@127.0.0.1:{place}/sacpo")
    with pytest.raises(BadPlace, match=f"SACPO_DATABASE at 127.0.0.1:{place}/sacpo cannot be used") as raised:
        Ledger(runs)
    assert "secret" not in str(raised.value)


def test_another_ledger_moves_nothing(versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague without the team's SACPO_DATABASE would roll the team back at the end of every run."""
    registry.promote(versions, "m", "1", "first")
    registry.promote(versions, "m", "2", "second")
    monkeypatch.setenv("SACPO_DATABASE", f"sqlite:///{tmp_path / 'private.db'}")
    for act in (
        lambda: registry.promote(versions, "m", "4", "mine"),
        lambda: registry.rollback(versions, "m", "mine"),
        lambda: registry.move_aliases(versions, "m"),
        lambda: registry.claim_aliases(versions, "m"),
    ):
        with pytest.raises(BadPlace, match="another database than ours; set SACPO_DATABASE"):
            act()
    assert aliases(versions) == {"champion": "2", "previous": "1"}
    monkeypatch.delenv("SACPO_DATABASE")
    assert registry.rollback(versions, "m", "ours").version_to == "1"


def test_a_ledger_that_nobody_chose_is_refused_beside_models_that_follow_others(
    versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a new name too, the colleague would get a fresh budget of error on the team's prompts."""
    monkeypatch.setenv("SACPO_DATABASE", f"sqlite:///{tmp_path / 'team.db'}")
    registry.claim_aliases(versions, "m")
    registry.claim_aliases(versions, "new")  # the team's own ledger
    monkeypatch.setenv("SACPO_DATABASE", f"sqlite:///{tmp_path / 'chosen.db'}")
    registry.claim_aliases(versions, "new")
    monkeypatch.delenv("SACPO_DATABASE")
    with pytest.raises(BadPlace, match=r"^new: MLflow at .* has models \(as m\) whose decisions are .* SACPO_DATABASE"):
        registry.claim_aliases(versions, "new")


def test_who_served_challenges_no_more(versions: Path) -> None:
    registry.promote(versions, "m", "1", "first")
    registry.challenge(versions, "m", "2")
    assert aliases(versions) == {"champion": "1", "challenger": "2"}
    registry.challenge(versions, "m", "1")  # its run was started again
    assert aliases(versions)["challenger"] == "2"


def test_one_model_that_cannot_be_repaired_keeps_no_other_from_it(versions: Path) -> None:
    registry.promote(versions, "m", "1", "first")
    Ledger(versions).promote("lost", registry._entry(1, "promote", "", "9", "of a registry that is gone"))
    client(versions).delete_registered_model_alias("m", "champion")
    lost, repaired = sorted(registry.reconcile(versions), reverse=True)
    assert repaired == "m: champion nowhere → 1" and lost.startswith("not repaired: lost: its aliases cannot follow")
