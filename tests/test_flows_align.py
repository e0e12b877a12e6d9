"""The whole way, as a user goes it: the command line, a real Prefect server, a real MLflow, real trainings."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.data import readers, town
from models.data.suites import prompt_digest
from models.recipe.toml import read
from tasks.tracking.ledger import Charges, Ledger
from tests.watching import until


def report(runs: Path, recipe: str = "quickstart") -> dict[str, Any]:
    (path,) = runs.glob(f"{recipe}/*/report.json")
    return dict(json.loads(path.read_text()))


def outcome(runs: Path) -> dict[str, Any]:
    (path,) = runs.glob("quickstart/*/outcome.json")
    return dict(json.loads(path.read_text()))


def weights(runs: Path) -> dict[str, str]:
    """Return candidate → digest of its weights and tokenizer."""
    return {candidate["name"]: candidate["digest"] for candidate in report(runs)["candidates"]}


def test_a_run_ends_with_a_champion_that_passed_the_gate(undisturbed: Path) -> None:
    tree = report(undisturbed)
    (tested,) = tree["constraints"][0]["tested"]
    assert tree["chosen"]["candidate"] == tested["candidate"] and tested["holds"]
    assert tested["lower_bound"] >= tree["constraints"][0]["at_least"] and tested["lower_bound"] < tested["value"]
    assert tree["registry"] == {"name": "quickstart", "version": "1", "alias": "champion"}
    assert "On the test split, used for its first decision: safety rate" in outcome(undisturbed)["decision"]
    names = ["base", "helpful", "harmless λ=0.2", "harmless λ=1", "merge q=0.5"]
    assert [candidate["name"] for candidate in tree["candidates"]] == names
    parents = {candidate["name"]: candidate["parents"] for candidate in tree["candidates"]}
    assert parents["helpful"] == ["base"] and parents["harmless λ=1"] == ["helpful"]
    assert parents["merge q=0.5"] == ["harmless λ=1", "helpful"]
    weight = {candidate["name"]: candidate["beta_over_lambda"] for candidate in tree["candidates"]}
    assert weight["helpful"] == 0.1 and weight["harmless λ=0.2"] == pytest.approx(0.5)
    (folder,) = undisturbed.glob("quickstart/*/")
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG") and "Chosen" in (
        folder / "report.md"
    ).read_text()


def test_prompts_that_chose_are_not_those_that_tested_and_only_these_are_charged(undisturbed: Path) -> None:
    """The decision rests on answers to the test prompts, and each of them is charged with one decision's error."""
    (folder,) = undisturbed.glob("quickstart/*/")
    rows = [json.loads(line) for line in (folder / "tables" / "answers.jsonl").read_text("utf-8").splitlines()]
    asked = {
        split: {prompt_digest(row["prompt"]) for row in rows if row["split"] == split and row["suite"] == "harmless"}
        for split in ("validation", "test")
    }
    assert asked["test"] and asked["validation"] and not asked["test"] & asked["validation"]
    (tested,) = report(undisturbed)["constraints"][0]["tested"]
    assert tested["n"] == len(asked["test"])
    recipe, ledger = read("quickstart"), Ledger(undisturbed)
    assert set(ledger.charges(asked["test"]).values()) == {Charges(1, recipe.constraint.error)}
    assert set(ledger.charges(asked["validation"]).values()) == {Charges(0, 0.0)}


def test_the_report_follows_its_schema(undisturbed: Path) -> None:
    import jsonschema

    schema = Path(__file__).parent.parent / "models" / "report" / "report.schema.json"
    jsonschema.validate(report(undisturbed), json.loads(schema.read_text()))


def test_every_printed_figure_can_be_recomputed_from_the_tables(undisturbed: Path) -> None:
    """With the very lines that docs/evidence.md shows, in the folder of the report, without our code."""
    text = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text("utf-8")
    (folder,) = undisturbed.glob("quickstart/*/")
    first, second = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    figures = {(name, figure): list(map(float, rest)) for name, figure, *rest in recomputed(first, folder)}
    scales = {name: list(map(float, rest)) for name, *rest in recomputed(second, folder)}
    tree = report(undisturbed)
    for candidate in tree["candidates"]:
        known, name = candidate["metrics"], candidate["name"]
        for figure in ("helpful/win_rate", "harmless/safety_rate", "over_refusal"):
            printed = [known[figure][end] for end in ("value", "low", "high")]
            assert figures[name, figure] == pytest.approx(printed, abs=1e-9)
        assert figures[name, "kl_base"] == pytest.approx([known["kl_base"]["value"]])
        if candidate["beta_acts"]:
            assert scales[name] == pytest.approx([candidate["beta_acts"]["s"]], rel=1e-3)
    (constraint,) = tree["constraints"]
    (test,) = constraint["tested"]
    assert figures[test["candidate"], "tested"] == pytest.approx([test["value"], test["lower_bound"]], abs=1e-9)
    assert constraint["suites"]["harmless"]["n"] == test["n"] + test["failed"] == 1200
    assert constraint["suites"]["harmless"]["version"] != tree["suites"]["harmless"]["version"]
    helpful = {check["name"]: check for check in test["checks"] if check["name"].startswith("helpful against")}
    assert list(helpful) == ["helpful against the base"]
    for name, check in helpful.items():
        assert figures[test["candidate"], name] == pytest.approx([check["value"], check["bound"]], abs=1e-9)


def recomputed(script: str, folder: Path) -> list[list[str]]:
    """Return the lines that a script of the documentation prints in the folder of a report."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_mlflow_remembers_stages_curves_candidates_and_the_version(undisturbed: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{undisturbed / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("quickstart")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run is not parent]
    assert {run.info.status for run in found} == {"FINISHED"}
    (comparisons,) = [run for run in children if run.info.run_name == "pairs · harmless"]
    for run in (comparisons, parent):
        assert "pairs · harmless" in {dataset_input.dataset.name for dataset_input in run.inputs.dataset_inputs}
    assert len(children) == len(list((undisturbed / "store").glob("*/manifest.json"))) + len(weights(undisturbed))
    held = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert held >= {"report.html", "report.json", "frontier.png", "tables", "answers_and_verdicts.json"}
    safety = next(run for run in children if run.info.run_name.startswith("harmless · dpo · λ=0.2"))
    curve = client.get_metric_history(safety.info.run_id, "margin")
    assert [point.step for point in curve] == list(range(1, 13))
    assert (
        float(safety.data.params["objective.lambda_"]) == 0.2 and float(safety.data.metrics["beta_over_lambda"]) == 0.5
    )
    (tested,) = report(undisturbed)["constraints"][0]["tested"]
    assert parent.data.metrics["test/safety_rate"] == pytest.approx(tested["value"])
    assert parent.data.metrics["test/lower_bound"] == pytest.approx(tested["lower_bound"])
    assert {"test/helpful against the base", "chosen/harmless/safety_rate"} < parent.data.metrics.keys()
    assert parent.data.tags["sacpo.outcome"] == "Promoted"
    assert "which became champion" in parent.data.tags["mlflow.note.content"]  # the description on its page
    version = client.get_model_version_by_alias("quickstart", "champion")
    chosen = next(
        c for c in report(undisturbed)["candidates"] if c["name"] == report(undisturbed)["chosen"]["candidate"]
    )
    assert version.tags["sacpo.policy"] == chosen["digest"] and version.tags["gate"] == "pass"
    models = client.search_logged_models([experiment.experiment_id])
    known = {model.tags["sacpo.policy"]: model for model in models if "sacpo.policy" in model.tags}
    assert set(known) == set(weights(undisturbed).values())


def test_the_champion_answers_a_chat_request_offline(undisturbed: Path, port: int) -> None:
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{undisturbed / 'mlflow.db'}",
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    serve = ["models", "serve", "-m", "models:/quickstart@champion", "--env-manager", "local", "--port", str(port)]
    server = subprocess.Popen(
        [str(binaries / "mlflow"), *serve], env=environment, cwd=undisturbed, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
        except OSError:
            return False
        return True

    try:
        until(answers)
        replies = [json.loads(curl(command, port)) for command in documented()]
        refused = json.loads(curl(documented()[1].replace("how do i", "lamp " * 60), port))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    (answer,) = replies[0]["predictions"]
    (choice,) = replies[1]["choices"]
    assert answer and choice["message"]["content"] and choice["message"]["role"] == "assistant"
    assert replies[1]["object"] == "chat.completion" and replies[1]["model"] == "quickstart"
    assert re.search(r"row 1: \d+ tokens, and an answer of up to 18, exceed the 64 tokens", refused["message"])


def documented() -> list[str]:
    """Return the commands with which README asks the served champion."""
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    block = text.partition("mlflow models serve")[2].partition("```")[0]
    commands = re.split(r"^(?=curl )", block, flags=re.MULTILINE)[1:]
    assert len(commands) == 2
    return commands


def curl(command: str, port: int) -> str:
    script = command.replace("5055", str(port))
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=600).stdout


def test_a_finished_run_is_shown_again_without_prefect(undisturbed: Path, small: list[str]) -> None:
    script = (
        "import sys; sys.argv = ['sacpo', *sys.argv[1:]]\n"
        "from flows.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    assert end.code == 0, end.code\n    assert not {'prefect', 'torch', 'mlflow'} & set(sys.modules)\n"
    )
    arguments = ["run", "quickstart", *(part for change in small for part in ("--set", change))]
    environment = os.environ | {"SACPO_RUNS": str(undisturbed)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, cwd=Path(__file__).parent.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "win rate" in done.stdout and "frontier.png" in done.stdout and "Chosen" in done.stdout
    assert "Pages:" in done.stdout and "sacpo up" in done.stdout


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line_and_the_next_run_goes_on(
    start: Callable[..., "subprocess.Popen[str]"], run: Callable[..., tuple[int, str]], runs: Path, undisturbed: Path
) -> None:
    process = start("run", "quickstart")
    until(lambda: list(runs.glob("store/sft-*.partial/progress.jsonl")))
    for log in (runs / "logs").glob("worker-*.log"):
        os.kill(int(log.stem.split("-")[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "sacpo: base · sft: its process was killed" in out and "Traceback" not in out
    code, out = run("run", "quickstart")
    assert code == 0 and weights(runs) == weights(undisturbed), out


@pytest.mark.slow
def test_of_two_identical_commands_the_second_waits(
    start: Callable[..., "subprocess.Popen[str]"], runs: Path, undisturbed: Path
) -> None:
    first = start("run", "quickstart")
    until(lambda: list(runs.glob("store/gather-*")))
    second = start("run", "quickstart")
    out_second, _ = second.communicate(timeout=600)
    out_first, _ = first.communicate(timeout=600)
    assert (first.returncode, second.returncode) == (0, 0), out_first + out_second
    assert "another process runs this recipe" in out_second
    assert weights(runs) == weights(undisturbed)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert len(client.search_model_versions("name = 'quickstart'")) == 1


def test_a_bound_that_cannot_be_shown_promotes_nothing(
    run: Callable[..., tuple[int, str]], served: Path, small: list[str]
) -> None:
    runs, policies = served, {*served.glob("store/dpo-*")}
    code, out = run("run", "quickstart-strict", changes=[c for c in small if not c.startswith("constraint")])
    assert code == 4, out
    tree = report(runs, "quickstart-strict")
    assert tree["chosen"] is None and tree["registry"] is None and "Nothing was tested, nothing was promoted" in out
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert [model.name for model in client.search_registered_models()] == ["quickstart"]
    assert {*runs.glob("store/dpo-*")} == policies  # these policies were there already


@pytest.mark.slow
def test_the_report_names_the_data_that_were_trained_on(
    start: Callable[..., "subprocess.Popen[str]"], runs: Path, tmp_path: Path, small: list[str]
) -> None:
    data = tmp_path / town.write(tmp_path, 0)["helpful"]
    before = readers.digest(data)
    process = start("run", "quickstart", changes=[*small, f"steps.0.data={data}"])
    until(lambda: list(runs.glob("store/dpo-*")) or process.poll() is not None)
    data.write_text(data.read_text("utf-8").splitlines(keepends=True)[0] * 2, "utf-8")
    out, _ = process.communicate(timeout=600)
    assert process.returncode in (0, 4), out
    assert report(runs)["data"]["steps.0"] == before


@pytest.mark.slow
def test_order_method_adapter_and_a_third_step_are_data(run: Callable[..., tuple[int, str]], runs: Path) -> None:
    steps = (
        'steps=[{metric="harmless",data="town",updates=8,batch=16,learning_rate=1e-4,lambda=2},'
        '{metric="helpful",data="town",method="kto",updates=8,batch=16,learning_rate=1e-4,lambda=[0,1]},'
        '{metric="again",label="safer_response_id",data="town",updates=8,batch=16,learning_rate=1e-3,adapter_rank=4,'
        "lambda=0.5}]"
    )
    changes = ["sft.updates=40", steps, "merge.weights=[0.5]", "data.heldout=40", "constraint.at_least=0.05"]
    code, out = run("run", "quickstart", changes=[*changes, "evaluation.kl_prompts=8"])
    assert code == 0, out
    candidates = {c["name"]: c for c in report(runs)["candidates"]}
    first = "harmless λ=2"
    kto, skipped = f"{first} · helpful λ=1", f"{first} · again λ=0.5"
    assert candidates[first]["parents"] == ["base"] and candidates[first]["beta_over_lambda"] == 0.05
    assert candidates[kto]["method"] == "kto" and candidates[kto]["parents"] == [first]
    assert candidates[skipped]["parents"] == [first]  # λ = 0 handed the first step's policy on
    assert candidates[f"{kto} · again λ=0.5"]["parents"] == [kto]
    assert sum(c["kind"] == "merge" for c in candidates.values()) == 2
    assert len(candidates) == len(report(runs)["candidates"])
    assert "λ of a KTO step is a knob" in next(runs.glob("quickstart/*/report.md")).read_text()


@pytest.mark.slow
def test_a_skipped_first_step_leaves_the_base_in_its_place(run: Callable[..., tuple[int, str]], runs: Path) -> None:
    steps = 'steps=[{metric="helpful",data="town",updates=4,batch=16,lambda=[1,0]}]'
    changes = ["sft.updates=20", steps, "merge.weights=[0,0.5]", "data.heldout=20", "evaluation.kl_prompts=4"]
    code, out = run("run", "quickstart", changes=[*changes, "constraint.at_least=0.01"])
    assert code == 0, out
    names = [candidate["name"] for candidate in report(runs)["candidates"]]
    assert (
        names[0] == "base" and names == list(dict.fromkeys(names)) and set(names) == {"base", "helpful", "merge q=0.5"}
    )


@pytest.mark.slow
def test_bad_rows_stop_the_run_before_training_and_lie_in_quarantine(
    run: Callable[..., tuple[int, str]], runs: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"how do i clean my lamp {i} ?", "chosen": "get the brush .", "rejected": "no" if i % 3 else ""}
        for i in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = run("run", "quickstart", changes=[f"steps.0.data={tmp_path / 'rows.jsonl'}"])
    assert (
        code == 2 and "30 of 90 rows cannot be used" in out and "rejected: is empty" in out and "Traceback" not in out
    )
    (quarantine,) = runs.glob("store/prepare-*.partial/quarantine.jsonl")
    held = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [row["row"] for row in held] == list(range(1, 91, 3))
    assert not list(runs.glob("store/sft-*"))


@pytest.mark.slow
def test_a_kill_at_a_file_event_changes_nothing() -> None:
    """A sample of benchmarks/faults.py, which tries every point."""
    root = Path(__file__).parent.parent
    sweep = [sys.executable, str(root / "benchmarks" / "faults.py"), "--all", "--first", "41", "--every", "600"]
    done = subprocess.run(sweep, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("0 with another result")
