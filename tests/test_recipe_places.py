"""Paths in a recipe are seen from the recipe's folder, wherever the command starts, and are no part of a digest."""

import json
import shutil
from pathlib import Path

import pytest

from models.artifacts import Policy, Preferences, content_digest
from models.errors import BadPolicy, BadRecipe
from models.recipe import Recipe
from models.recipe.places import by_content, placed
from models.recipe.toml import assessment, read
from tasks import run
from tasks.work.store import content_of

RECIPE = """
name = "mine"
base = "my-sft"
gate.anchor = "my-sft"
[[steps]]
metric = "helpful"
data = "data/helpful.jsonl"
[[steps]]
metric = "harmless"
data = "owner/name@v1"
[sft]
data = "data/sft.jsonl"
[evaluation]
tasks = ["hellaswag", "tasks/mine.yaml"]
[evaluation.suites]
harmless = "../red-team.json"
[evaluation.judges]
helpful = { kind = "llm", model = "my-judge", base_url = "http://127.0.0.1:1/v1", rubric = "rubric.txt" }
harmless = { kind = "model", model = "guard", label = "unsafe", threshold = 0.5, labels = "~/labels.jsonl" }
"""


@pytest.fixture
def folder(tmp_path: Path, policy: Policy) -> Path:
    """A recipe's folder with everything that the recipe names, except what lies on a hub."""
    folder = tmp_path / "one"
    shutil.copytree(policy.path, folder / "my-sft")
    shutil.copytree(policy.path, folder / "guard")
    pairs = [{"prompt": f"how do i clean {i} ?", "chosen": "sure .", "rejected": "no ."} for i in range(3)]
    for name, rows in {
        "data/helpful.jsonl": pairs,
        "data/sft.jsonl": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "red-team.json": [],
        "tasks/rows.jsonl": [{"prompt": "a", "choices": ["b"], "gold": 0}],
        "labels.jsonl": [],
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "tasks" / "mine.yaml").write_text("task: mine\ndataset_kwargs: {data_files: rows.jsonl}\n")
    (folder / "rubric.txt").write_text("$prompt $first $second $fence")
    text = RECIPE.replace("../red-team.json", "red-team.json").replace("~/labels.jsonl", "labels.jsonl")
    text = text.replace("owner/name@v1", "data/helpful.jsonl").replace('"hellaswag", ', "")
    (folder / "mine.toml").write_text(text)
    return folder


def test_relative_paths_are_seen_from_the_recipe_and_typed_ones_from_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shell = tmp_path / "recipes", tmp_path / "shell"
    folder.mkdir()
    shell.mkdir()
    (folder / "mine.toml").write_text(RECIPE)
    monkeypatch.chdir(shell)
    recipe = read("../recipes/mine.toml", ["sft.data=here.jsonl", "evaluation.judges.helpful.rubric=mine.txt"])
    seen: dict[str, str] = {}
    placed(Recipe, recipe.model_dump(by_alias=True), lambda key, place: seen.setdefault(key, place))
    here = str(shell / ".." / "recipes")
    assert {key: place for key, place in seen.items() if place} == {
        "base": f"{here}/my-sft",
        "gate.anchor": f"{here}/my-sft",
        "steps.0.data": f"{here}/data/helpful.jsonl",
        "steps.1.data": "owner/name@v1",
        "sft.data": "here.jsonl",
        "evaluation.tasks.1": f"{here}/tasks/mine.yaml",
        "evaluation.suites.harmless": f"{here}/../red-team.json",
        "evaluation.judges.helpful.rubric": "mine.txt",
        "evaluation.judges.harmless.model": f"{here}/guard",
        "evaluation.judges.harmless.labels": str(Path.home() / "labels.jsonl"),
    }
    assert recipe.evaluation.judges.helpful.model == "my-judge" and recipe.evaluation.tasks[0] == "hellaswag"
    like = assessment(["mine"], "../recipes/mine.toml", [], ["harmless=typed.json"])
    assert like.evaluation.suites.harmless == "typed.json" and like.policies == ["mine"]
    assert like.evaluation.judges.harmless.model == f"{here}/guard"


def test_a_folder_of_the_shell_that_looks_like_a_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").write_text(RECIPE.replace("my-sft", "models/my-sft", 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRecipe, match=r"^base 'models/my-sft': \S*/recipes holds no models/, and paths in a recipe"):
        read("recipes/mine.toml")
    assert read("recipes/mine.toml", ["base=models/my-sft"]).base == "models/my-sft"


def test_a_moved_folder_is_the_same_run_and_its_stages_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "two")
    one, two = (read(str(place / "mine.toml")) for place in (folder, moved))
    assert one != two and run.digest(one) == run.digest(two)

    pairs = Preferences(path=folder, digest="pairs", metric="helpful", counts={})
    for record in (Recipe, "sft", "evaluation"):
        both = [recipe if record is Recipe else getattr(recipe, str(record)) for recipe in (one, two)]
        keys = {content_digest(content_of({"config": config, "pairs": pairs})) for config in both}
        assert len(keys) == 1, record
    assert by_content(one)["evaluation"]["judges"]["helpful"]["model"] == "my-judge"


@pytest.mark.parametrize(
    "changed", ["data/helpful.jsonl", "data/sft.jsonl", "red-team.json", "labels.jsonl", "rubric.txt", "guard/x",
                "tasks/mine.yaml", "tasks/rows.jsonl"],
)  # fmt: skip
def test_whatever_a_path_leads_to_is_part_of_the_digest(folder: Path, changed: str) -> None:
    recipe = read(str(folder / "mine.toml"))
    before = run.digest(recipe)
    with (folder / changed).open("a") as file:
        file.write("\n# changed\n")
    assert run.digest(recipe) != before


def test_an_anchor_that_is_not_there_is_said_with_its_key(folder: Path, policy: Policy, other_policy: Policy) -> None:
    recipe = read(str(folder / "mine.toml"))
    before = run.digest(recipe)
    another = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"anchor": str(other_policy.path)})})
    assert run.digest(another) != before
    nowhere = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"anchor": "/nowhere"})})
    with pytest.raises(BadPolicy, match=r"^gate\.anchor '/nowhere': no such folder"):
        run.digest(nowhere)
