"""KTO as science.md check 22 asks: unpaired, shuffled, weighted once, mismatched by us."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from models.alignment import kto
from models.alignment.batching import mismatched, stratified
from models.artifacts import Policy, Reference, Sources
from models.data import preferences
from models.errors import BadData
from models.files import jsonl
from models.recipe import Compute, Data, Selection, Step


def step(**changes: object) -> Step:
    return Step(**{"metric": "harmless", "method": "kto", "data": "-", "batch": 8, "updates": 6, **changes})


def pku(folder: Path, safe: float, count: int = 60) -> Sources:
    """Write rows whose answers are safe with this probability."""
    draw, words = Random(0), ["lamp", "bike", "desk", "tent", "boat", "chair"]
    rows = [
        {
            "prompt": f"how do i clean my {words[i % 6]} {i} ?",
            "response_0": f"get the brush {i} .",
            "response_1": f"sorry , i can not help {i} .",
            "better_response_id": 0,
            "safer_response_id": 1,
            "is_response_0_safe": draw.random() < safe,
            "is_response_1_safe": draw.random() < safe,
        }
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Sources(path=folder, digest="", files={"steps.0": "rows.jsonl"})


def scored(policy: Policy, compute: Compute, folder: Path, config: Step, safe: float = 0.8) -> Reference:
    """Return the rows of a KTO training with the policy's log-probs."""
    for name in ("pairs", "scored"):
        (folder / name).mkdir()
    data = Data(near_duplicates=1, validation=0, test=0.1)
    made = preferences.prepare(
        folder / "pairs", pku(folder, safe), "steps.0", Selection(metric="harmless", paired=False), data
    )
    return kto.score(folder / "scored", policy, made, config.training, 0, data.max_tokens, compute)


def test_harmless_rows_of_pku_become_answers_by_their_own_safety_label(tmp_path: Path) -> None:
    sources = pku(tmp_path, 0.5)
    (tmp_path / "out").mkdir()
    data = Data(near_duplicates=1, validation=0, test=0)
    preferences.prepare(tmp_path / "out", sources, "steps.0", Selection(metric="harmless", paired=False), data)
    kept = {
        (row.prompt[0]["content"], row.answer): row.desirable
        for row in preferences.answers_of(tmp_path / "out/train.jsonl")
    }
    for row in jsonl.read(tmp_path / "rows.jsonl"):
        for i in (0, 1):
            assert kept[row["prompt"], row[f"response_{i}"]] == row[f"is_response_{i}_safe"]
    assert len(kept) == 120


def test_every_batch_has_both_labels_and_every_row_comes_once_before_twice() -> None:
    labels = [i % 7 == 0 for i in range(70)]
    places = stratified(labels, step(batch=14, updates=10), seed=3)
    assert len(places) == 140 and Counter(places[:70]) == Counter(range(70)) == Counter(places[70:])
    for start in range(0, 140, 14):
        assert len({labels[i] for i in places[start : start + 14]}) == 2
    assert places != sorted(places) and places[:70] != places[70:]
    assert places == stratified(labels, step(batch=14, updates=10), seed=3)


def test_mismatched_answers_belong_to_other_prompts_of_the_same_batch() -> None:
    prompts = [[1], [1], [2], [3], [4], [4], [5], [6]] * 2
    other = mismatched(prompts, 8)
    for start in (0, 8):
        assert sorted(other[start : start + 8]) == list(range(start, start + 8))  # the same set of answers
    assert all(prompts[i] != prompts[j] for i, j in enumerate(other))


@pytest.mark.parametrize("safe", [0.8, 0.2])
def test_a_kto_step_starts_at_half_its_weights_and_trains(
    safe: float, policy: Policy, compute: Compute, tmp_path: Path
) -> None:
    """Whichever kind of answer is the rarer one."""
    config = step(learning_rate=1e-3)
    rows = scored(policy, compute, tmp_path, config, safe)
    scored_rows = list(jsonl.read(rows.path / "train.jsonl"))
    assert len(scored_rows) == 48 and all(row["KL_completion_ids"] for row in scored_rows)
    (tmp_path / "out").mkdir()
    made = kto.train(tmp_path / "out", policy, rows, config.objective(0.1, 2), config.training, 0, compute)
    assert made.beta_over_lambda == 0.05 and made.method == "kto" and made.parents == (policy.digest,)
    curve = list(jsonl.read(made.path / "progress.jsonl"))
    desirable = sum(row["label"] for row in scored_rows)
    undesirable = len(scored_rows) - desirable
    assert (desirable > undesirable) is (safe > 0.5)
    heavy = max(desirable, undesirable) / min(desirable, undesirable)
    weights = [heavy if row["label"] == (desirable < undesirable) else 1.0 for row in scored_rows[:8]]
    # check 22: ν = 0 at the start, so each answer costs half its weight
    assert curve[0]["loss"] == pytest.approx(sum(weights) / 16, rel=1e-4)
    assert desirable * (heavy if desirable < undesirable else 1) == pytest.approx(
        undesirable * (heavy if undesirable < desirable else 1)
    )
    assert made.digest != policy.digest


def test_kto_trains_with_the_weight_that_it_records(policy: Policy, compute: Compute, tmp_path: Path) -> None:
    """β/λ is all that a training knows of β and λ: the same ratio gives the same weights, another one other weights."""
    config = step(learning_rate=1e-2)
    rows = scored(policy, compute, tmp_path, config)
    made = {}
    for lambda_, beta in ((2, 0.1), (1, 0.05), (1, 0.1)):
        out = tmp_path / f"{lambda_} {beta}"
        out.mkdir()
        made[lambda_, beta] = kto.train(out, policy, rows, config.objective(beta, lambda_), config.training, 0, compute)
    assert made[2, 0.1].beta_over_lambda == made[1, 0.05].beta_over_lambda == 0.05
    assert made[2, 0.1].digest == made[1, 0.05].digest != made[1, 0.1].digest


def test_a_kto_training_that_would_move_nothing_is_refused(policy: Policy, compute: Compute, tmp_path: Path) -> None:
    rows = scored(policy, compute, tmp_path, step(updates=1))
    with pytest.raises(BadData, match=r"^harmless step: its only update is the first of the warm-up"):
        kto.train(tmp_path, policy, rows, step().objective(0.1, 1), step(updates=1).training, 0, compute)


def test_answers_of_one_kind_are_no_kto_data(policy: Policy, compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"all 1\d\d rows are desirable; KTO needs answers of both kinds"):
        scored(policy, compute, tmp_path, step(), safe=1.1)


def test_answers_of_one_kind_are_refused_before_anything_is_trained(
    run: Callable[..., tuple[int, str]], runs: Path, tmp_path: Path
) -> None:
    pku(tmp_path, 1.1)
    kto = ["steps.1.method=kto", f"steps.1.data={tmp_path / 'rows.jsonl'}", "steps.1.batch=8"]
    code, out = run("run", "quickstart", changes=[*kto, "compute.processes=1"])
    assert code == 2 and re.search(r"sacpo: harmless: all \d+ rows are desirable; KTO needs answers of both kinds", out)
    assert not list(runs.glob("store/sft-*"))


def test_answers_of_one_kind_that_are_short_enough_are_no_kto_data(
    policy: Policy, compute: Compute, tmp_path: Path
) -> None:
    for name in ("pairs", "scored"):
        (tmp_path / name).mkdir()
    data = Data(near_duplicates=1, validation=0, test=0, max_tokens=64)
    sources = pku(tmp_path, 0.5)
    made = preferences.prepare(tmp_path / "pairs", sources, "steps.0", Selection(metric="harmless", paired=False), data)
    rows = [row._asdict() for row in preferences.answers_of(tmp_path / "pairs/train.jsonl")]
    for row in rows:
        row["answer"] += "" if row["desirable"] else " get the brush" * 64
    jsonl.write(tmp_path / "pairs/train.jsonl", rows)
    with pytest.raises(BadData, match=r"all \d\d rows are desirable; KTO needs answers of both kinds"):
        kto.score(tmp_path / "scored", policy, made, step().training, 0, data.max_tokens, compute)


def test_a_batch_below_eight_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least 8"):
        step(batch=4)
    with pytest.raises(ValidationError, match="at least 8"):
        step(batch=16, micro_batch=4)
