"""Bad recipes, bases and templates: each is one sentence and exit code 2, soon, and nothing is written.

The seed of what is drawn is printed at the head of each run; SACPO_SEED=… draws the same again.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.data import town
from models.errors import BadInput, BadPolicy
from models.files import sealed
from models.policy import examination, headers, probe, weights
from models.recipe import toml
from tasks.run import plan_recipe
from tests import bad_bases, bad_gguf
from tests.bad_data import KINDS
from tests.bad_input import RECIPE, Kind

SEED = int(os.environ["SACPO_SEED"])
ROOT = Path(__file__).parent.parent
ACCEPTED: dict[str, str] = {}
"""Kinds that are accepted though they are bad → why."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if this takes longer, whatever it waits for."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def usable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that passes, with all that it names."""
    folder = tmp_path_factory.mktemp("usable")
    tokenizer = town.tokenizer()
    weights.save(town.untrained(0, tokenizer), tokenizer, folder / "base")
    bad_bases.classifier(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    rows = [{"prompt": f"how do i clean lamp {i} ?", "chosen": "get it .", "rejected": "sorry ."} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"tell me of harm number {i} !"} for i in range(60)]
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


@pytest.fixture
def folder(usable: Path, tmp_path: Path) -> Path:
    """A copy of the usable recipe, to be spoilt."""
    mine = tmp_path / "mine"
    shutil.copytree(usable, mine)
    (mine / "mine.toml").write_text(RECIPE.format(folder=mine))
    return mine


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at bases in this process: the same code without the seconds in which a process imports torch."""

    def found(one: probe.Subject) -> probe.Findings:
        try:
            if one.judge:
                return examination.judge(one.place, one.judge, one.shapes)
            return examination.examine(one.place, one.template, one.shapes)
        except BadPolicy as error:
            raise probe.named_error(" ".join(str(error).split()), one.name) from error

    def asked(wanted: list[probe.Subject]) -> list[probe.Findings]:
        return [found(one) for one in wanted]

    monkeypatch.setattr(probe, "_examined", asked)


def check(recipe: str, changes: list[str]) -> None:
    """Do what `sacpo check` does, and raise what it prints."""
    plan = plan_recipe(toml.read(recipe, changes))
    if plan.errors:
        raise BadInput("\n".join(plan.errors))


def spoil(one: Kind, name: str, folder: Path) -> tuple[str, list[str]]:
    """Return the recipe, and what --set is given."""
    made = one.make(random.Random(f"{SEED} {name}"), folder)
    return (str(made), []) if isinstance(made, Path) else (str(folder / "mine.toml"), made)


def test_the_recipe_that_is_spoilt_is_usable(folder: Path, near: None) -> None:
    check(str(folder / "mine.toml"), [])
    check(str(folder / "mine.toml"), ["steps.0.updates=1", "steps.0.lambda=[0]"])  # λ = 0 trains nothing, and means to


@pytest.mark.parametrize("name", KINDS)
def test_bad_input_is_refused_in_a_sentence(name: str, folder: Path, runs: Path, near: None) -> None:
    one = KINDS[name]
    recipe, changes = spoil(one, name, folder)
    if name in ACCEPTED:
        return
    with within(60), pytest.raises(BadInput) as raised:
        check(recipe, changes)
    text = str(raised.value)
    assert raised.value.exit_code == 2
    assert one.said in text, f"SACPO_SEED={SEED}: {text}"
    assert len(text.splitlines()) == one.lines and max(map(len, text.splitlines())) < 900, f"SACPO_SEED={SEED}: {text}"
    assert not runs.exists() or not list(runs.rglob("*.new"))


def test_a_gguf_and_several_templates_are_usable(folder: Path, near: None) -> None:
    """What is refused must be bad: these are not."""
    bad_gguf.small_gguf(folder / "x.gguf")
    check(str(folder / "mine.toml"), [f"base={folder}/x.gguf"])
    shipped = [toml.read(name).template for name in toml.shipped()]
    for text in [*bad_bases.USABLE.values(), *filter(None, shipped)]:
        check(str(folder / "mine.toml"), [f"template={json.dumps(text)}"])


def test_weights_as_others_store_them_are_usable(folder: Path, near: None) -> None:
    """Tied weights stand in the file once; older versions stored buffers beside the weights."""
    weights = load_file(folder / "base" / bad_bases.WEIGHTS)
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "base" / bad_bases.WEIGHTS, {"format": "pt"})
    bad_bases.config(tie_word_embeddings=True)(random.Random(), folder / "base")
    check(str(folder / "mine.toml"), [])


def test_the_tensors_of_all_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        save_file({f"{i} {j}": torch.zeros(1) for j in range(5)}, tmp_path / f"model-{i}.safetensors")
    monkeypatch.setattr(headers, "TENSORS", 15)
    assert len(headers.tensors(tmp_path)) == 15
    monkeypatch.setattr(headers, "TENSORS", 14)
    with pytest.raises(BadPolicy, match=f"^{tmp_path}: names more than 14 tensors, which no model has"):
        headers.tensors(tmp_path)


def test_another_process_looks_once_and_what_it_found_is_kept(
    folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(folder / "mine.toml")
    with within(200):
        check(recipe, [])
    kept, _ = sorted(runs.rglob("probe-*.json"), key=lambda path: -len(path.read_text()))  # base, judge
    assert sealed.read(kept, probe.Findings) == probe.Findings(town.PARAMETERS, 0.0)
    monkeypatch.setattr(probe, "_examined", lambda *_: pytest.fail("asked again"))
    check(recipe, [])
    whole = kept.read_text()
    kept.write_text("half a f")  # damaged is as good as gone
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        check(recipe, [])
    kept.write_text(whole)
    bad_bases.config(rope_theta=7.0)(random.Random(), folder / "base")  # another base
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        check(recipe, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", bad_bases.SLOW)
def test_a_template_that_never_ends_is_ended(name: str, folder: Path, runs: Path) -> None:
    said, text = bad_bases.SLOW[name]
    with within(300), pytest.raises(BadInput) as raised:
        check(str(folder / "mine.toml"), [f"template={json.dumps(text)}"])
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not list(runs.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a base: BERT", "a base: cut weights", "a template: throws dice", "beta is true"])
def test_check_and_run_say_the_same_and_import_no_torch(name: str, folder: Path, runs: Path) -> None:
    recipe, changes = spoil(KINDS[name], name, folder)
    sets = [part for change in [*changes, "compute.device=cpu"] for part in ("--set", change)]
    for verb in ("check", "run"):
        command = [sys.executable, "-X", "importtime", "-m", "flows", verb, recipe, *sets]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2 and len(lines) == 1 and KINDS[name].said in lines[0]
        assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert not list(runs.rglob("*.json"))


def test_hardly_anything_bad_is_accepted() -> None:
    assert len(KINDS) >= 500 and ACCEPTED.keys() <= KINDS.keys()
    assert len(ACCEPTED) <= 0.02 * len(KINDS)
