"""`sacpo init`: a first recipe for what somebody has, which passes `sacpo check`."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.__main__ import app
from models.artifacts import Policy
from models.errors import BadInput, BadPlace, SacpoError
from models.files.hub import is_name
from models.recipe import Better, Judges
from models.recipe.toml import read


def sacpo(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def own(tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, pairs of two formats, and unpaired answers; commands start here."""
    folder = tmp_path / "own"
    shutil.copytree(policy.path, folder / "models" / "my-sft")
    (folder / "data").mkdir()
    turns = "\n\nHuman: how do i open locker {} ?\n\nAssistant: "
    files = {
        "helpful": [{"prompt": f"how do i clean {i} ?", "chosen": "sure .", "rejected": "no ."} for i in range(60)],
        "harmless": [{"chosen": f"{turns.format(i)}no .", "rejected": f"{turns.format(i)}sure ."} for i in range(60)],
        "alone": [{"prompt": f"how do i clean {i} ?", "completion": "no .", "label": i % 2 == 0} for i in range(60)],
    }
    for name, rows in files.items():
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.chdir(folder)
    return folder


def given(harmless: str = "data/harmless.jsonl") -> list[str]:
    return ["--base", "models/my-sft", "--helpful", "data/helpful.jsonl", "--harmless", harmless]


@pytest.mark.parametrize(("harmless", "method"), [("harmless", "dpo"), ("alone", "kto")])
def test_what_init_writes_passes_check(own: Path, harmless: str, method: str) -> None:
    done = sacpo("init", "mine.toml", *given(f"data/{harmless}.jsonl"))
    assert done.exit_code == 0, done.output
    assert "helpful: data/helpful.jsonl: TRL preference; DPO" in done.output
    assert done.output.endswith("mine.toml: written. Next: sacpo check mine.toml\n")
    recipe = read("mine.toml")
    assert [step.method.value for step in recipe.steps] == ["dpo", method] and recipe.base == str(own / "models/my-sft")
    text = Path("mine.toml").read_text("utf-8")
    assert 'base = "models/my-sft"' in text and f'data = "data/{harmless}.jsonl"' in text
    checked = sacpo("check", "mine.toml")
    assert checked.exit_code == 0, checked.output
    assert "no judge of harmlessness: the run ends undecided" in checked.output
    assert "set evaluation.judges.harmless, for instance to one of the open models in docs/evidence.md" in " ".join(
        checked.output.split()
    )


def test_data_elsewhere_keep_their_whole_path_and_the_comments_are_a_recipe_too(own: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    assert sacpo("init", "../recipes/Mine 1.toml", "--harmless", "data/harmless.jsonl").exit_code == 0
    path = tmp_path / "recipes" / "Mine 1.toml"
    recipe = read(str(path))
    assert recipe.name == "mine-1" and [step.data for step in recipe.steps] == [str(own / "data" / "harmless.jsonl")]
    lines = path.read_text("utf-8").splitlines()
    start = lines.index("# [evaluation.suites]")
    path.write_text("\n".join([*lines[:start], *(line.removeprefix("# ") for line in lines[start:])]))
    assert read(str(path)).evaluation.judges.harmless.label == "unsafe"


def test_init_alone_says_what_to_fill_in(own: Path) -> None:
    assert sacpo("init").exit_code == 0
    text = Path("recipe.toml").read_text("utf-8")
    assert text.count("←") == 3 and len(read("recipe.toml").steps) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["there.toml", *given()], BadPlace, "there.toml: is there already and stays as it is; give another name"),
        (["x.yaml"], BadInput, "x.yaml: a recipe is a TOML file; give a name that ends in .toml"),
        (["x.toml", "--base", "nowhere"], BadInput, "base 'nowhere': no such folder or GGUF file"),
        (["x.toml", "--helpful", "nowhere.jsonl"], BadInput, "nowhere.jsonl: no such data file"),
        (["x.toml", "--helpful", "odd.jsonl"], BadInput, "odd.jsonl: no known format has the columns a"),
        (["no/x.toml"], BadPlace, "no/x.toml: cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_written(
    own: Path, arguments: list[str], kind: type[SacpoError], said: str
) -> None:
    Path("there.toml").write_text("mine")
    Path("odd.jsonl").write_text('{"a": 1}\n')
    before = sorted(own.rglob("*"))
    done = sacpo("init", *arguments)
    assert isinstance(done.exception, kind) and said in str(done.exception)
    assert sorted(own.rglob("*")) == before and Path("there.toml").read_text() == "mine"


def test_help_alone_is_enough(own: Path) -> None:
    help_text = " ".join(sacpo("init", "--help").output.replace("│", " ").split())
    for part in ("--base", "--helpful", "--harmless", "hub id", "sacpo check FILE", "Example: sacpo init mine.toml"):
        assert part in help_text


def test_the_open_models_in_the_docs_are_settings_that_a_recipe_takes() -> None:
    text = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text("utf-8")
    blocks = text.partition("### Which open models can judge\n")[2].partition("\n## ")[0].split("```toml\n")[1:]
    settings = [tomllib.loads(block.partition("```")[0])["evaluation"]["judges"] for block in blocks]
    first, second = map(Judges.model_validate, settings)
    assert first.harmless.better is second.harmless.better is Better.low
    assert first.helpful.label == "" and is_name(first.helpful.model) and "not run here" in " ".join(text.split())
