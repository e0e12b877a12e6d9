"""How a policy weighs held-out pairs, relative to the base."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from models.artifacts import Policy, Reference
from models.data.preferences import HELDOUT
from models.files import jsonl
from models.metrics import margins
from models.policy import logprobs
from models.policy import weights as policies
from models.recipe import Compute


@pytest.fixture(scope="module")
def heldout(scored: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The scored comparisons, as if they were both held-out splits."""
    folder = tmp_path_factory.mktemp("heldout")
    for split in HELDOUT:
        shutil.copyfile(scored.path / "train.jsonl", folder / f"{split}.jsonl")
    return replace(scored, path=folder)


def test_the_base_has_no_margin_and_need_not_be_loaded(
    policy: Policy, heldout: Reference, compute: Compute, tmp_path: Path
) -> None:
    table = margins.table(
        margins.weigh(tmp_path, replace(policy, path=tmp_path / "gone"), {"harmless": heldout}, compute)
    )
    assert len(table) == 2 * heldout.counts["train"] and {row["split"] for row in table} == set(HELDOUT)
    assert all(row["chosen"] == row["rejected"] == 0 for row in table)


def test_a_margin_is_the_log_ratio_to_the_base(
    other_policy: Policy, heldout: Reference, compute: Compute, tmp_path: Path
) -> None:
    table = margins.table(margins.weigh(tmp_path, other_policy, {"harmless": heldout}, compute))
    rows = list(jsonl.read(heldout.path / "test.jsonl"))
    model, tokenizer = policies.load(other_policy, compute)
    ours = logprobs.pair_logps(model, rows, tokenizer.pad_token_id)
    for row, (chosen, rejected), weighed in zip(rows, ours, margins.of(table, "harmless", "test"), strict=True):
        assert weighed["chosen"] == pytest.approx(chosen - row["ref_chosen_logps"], abs=1e-4)
        assert weighed["rejected"] == pytest.approx(rejected - row["ref_rejected_logps"], abs=1e-4)
        assert weighed["tokens"] == [len(row["chosen_ids"]), len(row["rejected_ids"])]


def test_figures_need_a_scale_and_beat_length_where_length_says_nothing() -> None:
    """Margins of the right sign on pairs of equal length: the policy predicts the labels, length cannot."""
    draw: Callable[[int], float] = lambda i: 1.0 + i % 5 if i % 4 else -0.5  # noqa: E731
    rows = [
        {"metric": "m", "split": split, "prompt": str(i), "tokens": [9, 9], "chosen": draw(i), "rejected": 0.0}
        for split in HELDOUT
        for i in range(200)
    ]
    found = margins.figures(rows, "m")
    assert found["preference/m/accuracy"].value == 0.75 and found["preference/m/accuracy_length"].value == 0.5
    assert found["preference/m/nll_length"].value == pytest.approx(0.6931, abs=1e-3)
    assert found["preference/m/nll_minus_length"].high < 0
    assert margins.figures(rows, "other") == {}


def test_a_length_that_tells_few_pairs_apart_is_no_baseline() -> None:
    """Eight validation pairs, the longer answer chosen in each: the fit has no end, and the test pairs differ."""
    rows = [
        {"metric": "m", "split": split, "prompt": str(i), "tokens": [9 + turned * i, 9], "chosen": 1.0, "rejected": 0.5}
        for split, turned in (("validation", 1), ("test", -1))
        for i in range(1, 9)
    ]
    found = margins.figures(rows, "m")
    assert not {"preference/m/nll_length", "preference/m/nll_minus_length"} & found.keys()
    assert found["preference/m/accuracy_length"].value == 0.0 and found["preference/m/nll"].value < 0.7


def test_margins_that_say_nothing_on_the_validation_pairs_say_nothing_on_the_test_pairs() -> None:
    """No scale is better than another: then every pair is a coin, and none is off by thousands of nats."""
    rows = [
        {"metric": "m", "split": split, "prompt": str(i), "tokens": [9, 9], "chosen": value, "rejected": 0.0}
        for split, value in (("validation", 0.0), ("test", -1.0))
        for i in range(8)
    ]
    assert margins.figures(rows, "m")["preference/m/nll"].value == pytest.approx(0.6931, abs=1e-4)
