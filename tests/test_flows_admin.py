"""Who serves, from end to end: challengers beside the champion, retraining, promotion, rollback, cleaning."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import deploy
from models.errors import BadInput
from models.recipe import Recipe
from tasks.registry import champion
from tasks.tracking.ledger import Ledger

Running = Callable[..., tuple[int, str]]
PATIENCE = 600
"""Seconds; a busy machine is no fault."""


@pytest.fixture
def more(small: list[str]) -> list[str]:
    """A recipe that trains other policies than the first one."""
    return [*small, "steps.1.lambda=[1]", "steps.1.updates=20", "merge.weights=[]", "gate.margin=0.3"]


@pytest.mark.slow
def test_a_challenger_meets_the_champion(
    run: Running, served: Path, small: list[str], more: list[str], prefect: str
) -> None:
    runs = served
    assert [check["name"] for check in decisions(runs)[0]["checks"]][-1] == "helpful against the base"

    code, out = run("retrain", "quickstart")
    assert code == 0 and "nothing new since" in out and "Registered as quickstart version 1" in out
    silent = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    code, out = run("retrain", "quickstart", **silent)
    assert code == 2 and "http://127.0.0.1:9 does not answer" in out  # a schedule learns of it
    code, out = run("run", "quickstart", **silent)
    assert code == 0 and "MLflow:  http://127.0.0.1:9 (does not answer)" in out  # a finished run needs nobody

    proud = [*more, "gate.margin=0"]  # nobody can be shown to be no worse at all
    code, out = run("run", "quickstart", changes=proud)
    assert code == 4 and "The gate does not let it pass: helpful against the champion" in out
    assert "Registered as quickstart version 2, alias challenger. Nothing was promoted." in " ".join(out.split())
    assert "answers · champion · test" in out
    code, out = run("retrain", "quickstart", changes=proud)
    assert code == 0 and "nothing new" in out  # a rejected challenger is not trained again
    code, out = run("promote", "quickstart", "two", changes=[])
    assert code == 2 and "quickstart version 'two': give the number of a version" in out
    code, out = run("promote", "quickstart", changes=[])
    assert code == 2 and "version 2 did not pass the gate (fail: helpful against the champion" in out

    code, out = run("run", "quickstart", changes=more)  # the same policy, with another margin: a version of its own
    assert code == 0 and serving(runs) == ["1", "3"]
    assert champion.serving(runs, "quickstart").aliases == {"champion": "3", "previous": "1"}

    code, out = run("rollback", "quickstart", "--why", "users complained", changes=[])
    assert code == 0 and "champion 3 → 1" in out
    payload_heard = heard(prefect, "sacpo.champion.changed", lambda payload: payload.get("action") == "rollback")
    assert [payload_heard[key] for key in ("version", "before", "why")] == ["1", "3", "users complained"]
    code, out = run("champion", "quickstart", changes=[])
    assert code == 0 and "# quickstart, version 1" in out and "users complained" in out and "Aliases: champion 1" in out
    assert "| safety rate |" in out and "**Data**, steps.0: town 1" in out

    code, out = run("run", "quickstart", changes=more)
    assert serving(runs) == ["1"]  # a finished run is shown; what was rolled back does not come again by itself
    code, out = run("clean", "--days", "0", "--yes", changes=[])
    assert code == 0 and "freed" in out
    assert run("run", "quickstart")[0] == 0 and serving(runs) == ["1"]  # what the champion stands on was kept


def test_new_data_that_fail_validation_change_nothing_and_fail_loudly(
    run: Running, served: Path, small: list[str], tmp_path: Path, prefect: str
) -> None:
    row = {"prompt": "how do i clean my lamp ?", "chosen": "get the brush .", "rejected": "no"}
    batch = [row | {"prompt": f"how do i clean my lamp {i} ?", "rejected": "no" if i % 3 else ""} for i in range(90)]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in batch))
    before, made = champion.serving(served, "quickstart"), set(served.glob("store/*/manifest.json"))

    code, out = run("retrain", "quickstart", changes=[*small, f"steps.1.data={tmp_path / 'batch.jsonl'}"])

    assert code == 2 and "30 of 90 rows cannot be used" in out and "rejected: is empty" in out
    payload_heard = heard(prefect, "sacpo.run.failed", lambda payload: "30 of 90 rows" in payload.get("why", ""))
    assert payload_heard["state"] == "Failed"
    assert champion.serving(served, "quickstart") == before
    trained = {path.parent.name.partition("-")[0] for path in {*served.glob("store/*/manifest.json")} - made}
    assert trained <= {"gather", "prepare"}  # nothing was trained, and what was made before is there
    assert made <= {*served.glob("store/*/manifest.json")}
    code, out = run("retrain", "quickstart")
    assert code == 0 and "nothing new since" in out  # with the data of before


@pytest.mark.slow
def test_a_dry_run_decides_and_moves_nothing(run: Running, runs: Path, small: list[str]) -> None:
    code, out = run("run", "quickstart", changes=[*small, "gate.mode=dry-run"])
    assert code == 4 and "version 1, alias challenger. Nothing was promoted" in " ".join(out.split())
    assert decisions(runs)[0]["holds"] and champion.log(runs, "quickstart") == []
    kept = [path.parent for path in runs.glob("store/dpo-*/manifest.json")]
    code, out = run("clean", "--days", "0", "--yes", changes=[])
    assert code == 0 and kept and all(path.exists() for path in kept)  # the challenger stands on them
    code, out = run("promote", "quickstart", "--why", "seen", changes=[])  # it passed: a person may
    assert code == 0 and serving(runs) == ["1"]


def test_deployments_are_the_shipped_recipes_whole() -> None:
    entries = {entry["name"]: entry for entry in deploy.deployments()}
    recipes = {"quickstart", "smollm2-135m", "sacpo-alpaca-7b", "nightly"}
    assert recipes | {"evaluate", "promote", "rollback"} < entries.keys()
    for name in ("quickstart", "smollm2-135m", "sacpo-alpaca-7b", "nightly"):
        recipe = entries[name]["parameters"]["recipe"]
        assert Recipe.model_validate(recipe).model_dump(mode="json", by_alias=True) == recipe
    for entry in entries.values():
        assert entry["enforce_parameter_schema"] and entry["description"]
        trains = entry["work_pool"].get("work_queue_name") == "training"  # a queue that takes one at a time
        assert (
            trains == ("concurrency_limit" not in entry) == (entry["entrypoint"].split(":")[1] in ("align", "retrain"))
        )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("deployments:", "deployed:", "has no list `deployments`"),
        ("name: evaluate", "name: [evaluate", "no YAML"),
        (
            "id: preset, name: smollm2-135m",
            "id: preset, name: mine.toml",
            "deployment 'smollm2-135m', .*no recipe \"mine",
        ),
        ("flows.deploy.judged", "flows.deploy.judge", "deployment 'evaluate', .*has no attribute 'judge'"),
    ],
)
def test_a_wrong_prefect_yaml_is_refused_before_anything_starts(
    old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (deploy.CHECKOUT / "prefect.yaml").read_text("utf-8")
    assert text.count(old) == 1
    (tmp_path / "prefect.yaml").write_text(text.replace(old, new), "utf-8")
    monkeypatch.setattr(deploy, "CHECKOUT", tmp_path)
    with pytest.raises(BadInput, match=f"{tmp_path}/prefect.yaml: .*{said}"):
        deploy.deployments()


def test_forms_show_what_decides_first_and_no_field_without_a_name() -> None:
    """The Prefect page draws anyOf as `Field`, and fields in the order of the schema."""
    schema = Recipe.model_json_schema()
    assert "anyOf" not in json.dumps(schema)
    assert list(schema["properties"])[:7] == ["name", "base", "beta", "steps", "merge", "constraint", "gate"]
    assert list(schema["$defs"]["Step"]["properties"])[:4] == ["metric", "method", "lambda", "data"]
    for record in [schema, *(definition for definition in schema["$defs"].values() if "properties" in definition)]:
        for key, definition in record["properties"].items():
            named = definition.get("title") or schema["$defs"][definition["$ref"].rpartition("/")[2]]["title"]
            assert named and definition.get("description"), key


def test_the_schedule_of_retraining_lies_in_prefect_yaml() -> None:
    tree = yaml.safe_load((deploy.CHECKOUT / "prefect.yaml").read_text("utf-8"))
    nightly = next(entry for entry in tree["deployments"] if entry["name"] == "nightly")
    assert nightly["schedules"][0]["cron"] == "0 3 * * *" and nightly["triggers"][0]["expect"] == ["sacpo.data.updated"]


def decisions(runs: Path) -> list[dict[str, Any]]:
    with Ledger(runs)._engine.connect() as connection:
        rows = connection.exec_driver_sql("select verdict from sacpo_verdicts order by at").scalars().all()
    return [json.loads(row) for row in rows]


def heard(prefect: str, event: str, right: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the payload of the right event of this name; others share the server, and it writes events down late."""
    wanted = {"filter": {"event": {"name": [event]}}}
    request = urllib.request.Request(
        f"{prefect}/events/filter", json.dumps(wanted).encode(), {"content-type": "application/json"}
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with urllib.request.urlopen(request, timeout=30) as answer:
            for emitted in json.load(answer)["events"]:
                if right(emitted["payload"]):
                    return dict(emitted["payload"])
        time.sleep(0.5)
    raise AssertionError(f"nobody was told of {event}")


def serving(runs: Path) -> list[str]:
    return champion.line_of_champions(champion.log(runs, "quickstart"))
