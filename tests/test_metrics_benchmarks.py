"""Tasks of lm-evaluation-harness: the same figures as by hand, named by content, shown before against after."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Policy
from models.errors import BadData, BadRecipe
from models.files import jsonl
from models.metrics import alignment_tax, benchmarks
from models.metrics.benchmarks import TaskSet
from models.policy import weights as policies
from models.preflight import refuse
from models.recipe import Compute, Evaluation

Command = Callable[..., tuple[int, str]]
CHOICES = ["get the brush .", "hold the base .", "ask its owner ."]
"""Of equal length, so that a policy without training does not always choose the shortest."""
SHOWN = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text("utf-8")
(TASK,) = re.findall(r"```yaml\n(.*?)```", SHOWN, re.DOTALL)
"""The task file that docs/evidence.md shows."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # read when a worker starts
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def town_task(tmp_path: Path) -> Path:
    prompts = [f"how do i {v} my {t} ?" for v in ("clean", "open", "sell", "tow") for t in ("lamp", "boat", "bike")]
    rows = [{"prompt": prompt, "choices": CHOICES, "gold": 1 if i > 6 else 2} for i, prompt in enumerate(prompts)]
    jsonl.write(tmp_path / "town.jsonl", rows)
    task = tmp_path / "town.yaml"
    named = TASK.replace("tasks/returns.jsonl", str(tmp_path / "town.jsonl")).replace(
        "task: returns", "task: town_choice"
    )
    task.write_text(named)
    return task


def task_set(names: list[str], sha256: dict[str, str], limit: int = 0) -> TaskSet:
    return TaskSet(names=names, sha256=sha256, limit=limit, version="0.4.13")


def measured(policy: Policy, task: Path, compute: Compute, out: Path, limit: int = 0) -> list[dict[str, Any]]:
    out.mkdir()
    tasks = [str(task)]
    made = benchmarks.measure(out, policy, task_set(tasks, benchmarks.files(tasks), limit), 4, 0, compute)
    assert (made.policy, made.harness) == (policy.digest, "0.4.13")
    return list(jsonl.read(out / "tasks.jsonl"))


def by_hand(policy: Policy, task: Path, compute: Compute) -> list[bool]:
    """Whether the right choice has the largest Σ log π(token | …), item by item."""
    import torch

    model, tokenizer = policies.load(policy, compute)
    right = []
    for row in jsonl.read(task.with_name("town.jsonl")):
        sums = []
        for choice in row["choices"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            token_logps = logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(token_logps[len(prompt) - 1 :].sum()))
        right.append(sums.index(max(sums)) == row["gold"])
    return right


def test_the_accuracy_is_the_one_computed_by_hand(
    policy: Policy, other_policy: Policy, town_task: Path, compute: Compute, tmp_path: Path
) -> None:
    shares = []
    for one in (policy, other_policy):
        right = by_hand(one, town_task, compute)
        (row,) = measured(one, town_task, compute, tmp_path / one.digest)
        p = sum(right) / len(right)
        assert row == {
            "task": "town_choice", "version": "1", "metric": "acc", "better": "high", "n": 12, "value": p,
            "stderr": pytest.approx((p * (1 - p) / 11) ** 0.5),
        }  # fmt: skip
        (first,) = measured(one, town_task, compute, tmp_path / f"{one.digest}-5", limit=5)
        assert (first["n"], first["value"]) == (5, sum(right[:5]) / 5)
        shares.append(p)
    assert shares[0] != shares[1]


def test_a_task_is_named_by_all_that_it_names(town_task: Path) -> None:
    (town_task.parent / "own.py").write_text("def score(): ...")
    outer = town_task.with_name("outer.yaml")
    outer.write_text("include: town.yaml\nprocess_results: !function own.score\n")
    named = [benchmarks.files([str(outer)])]
    for name, more in [("town.jsonl", "\n"), ("own.py", "\n"), ("town.yaml", "\n"), ("outer.yaml", "\n")]:
        path = town_task.with_name(name)
        path.write_text(path.read_text() + more)
        named.append(benchmarks.files([str(outer)]))
    assert len({digests["tasks.0"] for digests in named}) == 5
    assert benchmarks.files(["hellaswag", str(outer)]) == {"tasks.1": named[-1]["tasks.0"]}


@pytest.mark.parametrize("included", ["town.yaml", "between.yaml"], ids=["itself", "one that includes it"])
def test_a_task_that_includes_itself_is_a_sentence(included: str, town_task: Path) -> None:
    town_task.write_text(f"{town_task.read_text()}include: {included}\n")
    town_task.with_name("between.yaml").write_text("include: town.yaml\n")
    with pytest.raises(BadData, match="includes itself, or a file that includes it; take that out"):
        benchmarks.files([str(town_task)])


def test_a_task_that_changes_or_cannot_be_run_is_told(
    policy: Policy, town_task: Path, compute: Compute, tmp_path: Path
) -> None:
    tasks = [str(town_task)]
    with pytest.raises(BadData, match="a file changed while the run was starting"):
        benchmarks.measure(tmp_path, policy, task_set(tasks, {"tasks.0": "0" * 64}), 4, 0, compute)
    town_task.write_text(town_task.read_text().replace("output_type: multiple_choice", "output_type: guessing"))
    with pytest.raises(BadRecipe, match=r"evaluation.tasks: the harness cannot run them: "):
        benchmarks.measure(tmp_path, policy, task_set(tasks, benchmarks.files(tasks)), 4, 0, compute)


def test_what_is_missing_is_refused(town_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(Evaluation(tasks=[str(town_task)]))
    for tasks, said in [
        ([str(town_task.with_name("no.yaml"))], r"^evaluation.tasks: '.*no.yaml': No such file or directory; give a"),
        ([str(town_task.with_name("town.jsonl")), "gsm8k"], r"town.jsonl': no task of lm-evaluation-harness; `lm-eval"),
    ]:
        with pytest.raises(BadRecipe, match=said):
            refuse(Evaluation(tasks=tasks))
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(
        BadRecipe, match=r"^evaluation.tasks: .* is not installed; install it with pip install 'lm-eval"
    ):
        refuse(Evaluation(tasks=["gsm8k"]))


def test_a_group_stands_for_its_tasks_where_it_has_figures() -> None:
    """As `simple_evaluate` returns them: groups within groups, filters, figures without an error, no figure at all."""
    output = {
        "group_subtasks": {"whole": ["half", "c"], "half": ["a", "b"], "bare": ["d"]},
        "results": {
            "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "half": {"alias": "half", "acc,none": 0.25, "acc_stderr,none": 0.2},
            **{name: {"alias": name, "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4} for name in "abc"},
            "bare": {"alias": "bare"},
            "d": {"exact,strict": 0.5, "exact_stderr,strict": "N/A", "ppl,none": float("inf"), "ppl_stderr,none": 1.0},
        },
        "n-samples": {name: {"original": 9, "effective": 4} for name in "abcd"},
        "versions": {"whole": 2, "d": "1.0"},
        "higher_is_better": {"whole": {"acc": True}, "d": {"exact": None, "ppl": False}},
    }
    rows = [tuple(row) for row in benchmarks._rows(output)]
    assert rows == [
        ("whole", "2", "acc", "high", 12, 0.5, 0.1),
        ("d", "1.0", "exact (strict)", "", 4, 0.5, None),
        ("d", "1.0", "ppl", "low", 4, None, 1.0),
    ]


# As a user goes it


@pytest.mark.slow
def test_policies_are_measured_side_by_side(
    policy: Policy, other_policy: Policy, town_task: Path, compute: Compute, runs: Path, run: Command, tmp_path: Path
) -> None:
    options = ["--set", f'evaluation.tasks=["{town_task}"]', "--set", "evaluation.kl_prompts=0"]
    code, out = run("evaluate", str(policy.path), str(other_policy.path), *options, changes=[])
    assert code == 0 and "MLflow did not take" not in out, out
    (folder,) = runs.glob("evaluation/*/")
    report = json.loads((folder / "report.json").read_text())
    before, after = (sum(right) / 12 for right in (by_hand(p, town_task, compute) for p in (policy, other_policy)))
    (row,) = report["tax"]
    assert (row["task"], row["n"], row["version"]) == ("town_choice", 12, "1")
    assert (row["before"]["value"], row["after"]["value"]) == (before, after)
    assert row["difference"] == after - before
    for candidate, value in zip(report["candidates"], (before, after), strict=True):
        assert candidate["metrics"]["task/town_choice/acc"]["value"] == value
    assert benchmarks.files([str(town_task)]).items() <= report["data"].items()
    import jsonschema

    jsonschema.validate(
        report, json.loads((Path(__file__).parent.parent / "models/report/report.schema.json").read_text())
    )
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert (
        f"| {other_policy.path.name} | town_choice | acc ↑ | 12 | {before:.3f} ± " in text
        and alignment_tax.SAME in text
    )
    assert 'id="tax"' in page and alignment_tax.SAME in page and f"<td>{after - before:+.3f}</td>" in page
    assert not re.search(r"(src|href)=.http", page)
    again, said = run("evaluate", str(policy.path), str(other_policy.path), *options, changes=[])
    assert again == 0 and "starting Prefect" not in said  # nothing was left to do


@pytest.mark.slow
def test_a_run_that_trains_measures_base_and_chosen_and_trains_nothing_again(
    undisturbed: Path, runs: Path, run: Command, small: list[str], town_task: Path
) -> None:
    """The stages of the run without tasks are found: tasks have no part in what names them."""
    shutil.copytree(undisturbed, runs)
    before = {path.name for path in (runs / "store").iterdir() if path.is_dir()}
    code, out = run("run", "quickstart", changes=[*small, f'evaluation.tasks=["{town_task}"]'])
    assert code == 0, out
    made = {path.name for path in (runs / "store").iterdir() if path.is_dir()} - before
    assert sorted(name.partition("-")[0] for name in made) == ["base", "measure", "measure"]  # base: the champion
    assert "MLflow did not take" not in out
    (old,) = undisturbed.glob("quickstart/*/")
    (new,) = (folder for folder in runs.glob("quickstart/*/") if folder.name != old.name)
    report, was = (json.loads((folder / "report.json").read_text()) for folder in (new, old))
    chosen = report["chosen"]["candidate"]
    assert [row["candidate"] for row in report["tax"]] == [chosen] == [was["chosen"]["candidate"]]
    assert was["tax"] == [] and 'id="tax"' not in (old / "report.html").read_text()
