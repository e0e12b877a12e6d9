"""The house keeps its rules: who may import whom, what lies where, and that no room grows too large."""

import ast
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import house
from flows import deploy
from models import catalogue
from models.policy import probe
from models.recipe import recipe, toml
from models.stage import mark_of
from tasks.work import processes

ROOT = Path(__file__).parent.parent
STOREYS = ("flows", "tasks", "models")
FORBIDDEN = {
    "models": {"prefect", "mlflow", "tasks", "flows"},
    "tasks": {"flows"},
    "flows": {"torch", "trl", "transformers", "peft", "datasets", "mlflow"},
}
GROUND = {"models.errors", "models.artifacts", "models.stage", "models.words", "models.markdown"}
FLOORS = (
    "", "models.files", "models.recipe", "models.data", "models.policy", "models.alignment", "models.judges",
    "models.metrics", "models.gate", "models.report", "models",
    "tasks.work", "tasks.access", "tasks.tracking", "tasks.registry", "tasks.servers", "tasks", "flows",
)  # fmt: skip
"""From the ground to the roof; files that stand in no room are the roof of their storey."""
LIGHT = ("models/recipe/recipe.py", "models/artifacts.py", "models/errors.py")
"""Imported by everything, so they import no tensors."""
HEAVY = {"torch", "transformers", "trl", "peft", "datasets"}


def modules(storey: str) -> list[Path]:
    return sorted((ROOT / storey).rglob("*.py"))


def imported(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Yield the dotted names that a file imports, by import statement or by name; `everywhere`: in functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the storey"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield ast.literal_eval(node.args[0])


def tops(path: Path, *, everywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imported(path, everywhere=everywhere)}


@pytest.mark.parametrize("storey", STOREYS)
def test_a_storey_imports_only_from_below(storey: str) -> None:
    assert len(modules(storey)) > 2
    for path in modules(storey):
        assert not tops(path) & FORBIDDEN[storey], path


def floor(module: str) -> int:
    """Return on which floor a module of ours stands: 0 is the ground."""
    if module in GROUND:
        return 0
    room = module.rpartition(".")[0] if module.count(".") > 1 else module
    return FLOORS.index(room if room in FLOORS else module.split(".")[0])


def ours() -> dict[str, set[str]]:
    """Return each module of ours and the others that it imports, in functions too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for s in STOREYS for path in modules(s)}
    known = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {name: (set(imported(path)) & known.keys()) - {name} for name, path in known.items()}


def test_a_room_imports_only_from_the_rooms_below() -> None:
    """The door of models.recipe stands for all of its room; alignment and judges do not know each other."""
    climbs = [(name, other) for name, others in ours().items() for other in others if floor(other) > floor(name)]
    assert not climbs
    assert not [(n, o) for n, others in ours().items() if n.startswith("models.judges") for o in others
                if o.startswith("models.alignment")]  # fmt: skip


def test_no_two_files_import_each_other() -> None:
    doors = {"models.recipe", *STOREYS}  # a package stands for what it holds
    TopologicalSorter({name: others - doors for name, others in ours().items() if name not in doors}).prepare()


def test_no_room_holds_more_than_14_files() -> None:
    rooms = Counter(path.parent for storey in STOREYS for path in modules(storey) if path.stem != "__init__")
    assert len(rooms) > 15 and {str(room): n for room, n in rooms.items() if n > 14} == {}


def test_only_tracking_speaks_to_mlflow() -> None:
    speaks = {str(path.relative_to(ROOT)) for storey in STOREYS for path in modules(storey) if "mlflow" in tops(path)}
    server = "tasks/access/mlflow_app.py"  # imported by MLflow's own server, and by nothing of ours
    tracking = ("connection", "download", "log", "mlflow_run", "registration")
    assert speaks == {*(f"tasks/tracking/{name}.py" for name in tracking), server}


def test_only_flows_and_tasks_know_prefect() -> None:
    knows = {
        path.relative_to(ROOT).parts[0] for storey in STOREYS for path in modules(storey) if "prefect" in tops(path)
    }
    assert knows == {"flows", "tasks"}


@pytest.mark.parametrize("name", LIGHT)
def test_what_everything_imports_is_light(name: str) -> None:
    assert not tops(ROOT / name) & HEAVY


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("models.recipe, models.artifacts, models.errors", {*HEAVY, "prefect", "mlflow", "scipy"}),
        ("models.catalogue", {*HEAVY, "prefect", "mlflow", "scipy"}),
        ("tasks.run", {*HEAVY, "prefect", "scipy"}),
        ("flows.__main__", {*HEAVY, "prefect", "mlflow"}),
        ("tasks.work.store", {*HEAVY, "prefect", "mlflow"}),
        ("tasks.work.workers", {*HEAVY, "prefect", "mlflow"}),
        ("flows.admin, tasks.servers.environment, tasks.registry.champion", {*HEAVY, "prefect", "mlflow", "scipy"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(json.loads(process.stdout))


def test_the_flow_needs_no_tensors() -> None:
    code = "import sys, json, flows.align; print(json.dumps(sorted(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "trl", "transformers"} & set(json.loads(process.stdout.splitlines()[-1]))


def test_what_lies_in_the_runs_folder_is_listed_once() -> None:
    """A recipe may take none of these names, so whoever makes something there takes its name from the list."""
    made = {"root", "where", "runs", "self.root", "run.root", "root()"}
    for path in modules("tasks"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and ast.unparse(node.left) in made:
                assert not isinstance(node.right, ast.Constant), f"{path}:{node.lineno}: take RunsFolderEntry's"


def test_the_yard_is_no_package_and_shadows_nothing() -> None:
    """With `mlflow/__init__.py`, `import mlflow` from the root finds the yard, and `mlflow server` dies."""
    yard = [path for path in (ROOT / "mlflow").rglob("*") if "__pycache__" not in path.parts]
    assert yard
    for path in yard:
        assert path.name not in ("__init__.py", "conftest.py") and not path.name.startswith("test_"), path
        if path.suffix == ".py" or path.is_dir():
            assert path.stem not in sys.stdlib_module_names, path
    code = "import mlflow; print(mlflow.__file__, mlflow.__version__)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in process.stdout


def test_processes_of_ours_start_in_the_checkout() -> None:
    """`python -m models.…` finds this checkout there, whatever another one has installed."""
    assert probe.CHECKOUT == processes.CHECKOUT == deploy.CHECKOUT == ROOT


def test_tests_are_flat_and_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent != ROOT / "tests"]


TOPICS = {
    "test_house", "test_examples_frontier", "test_examples_sacpo_loop", "test_benchmarks_gpu", "test_mlflow_serving",
    "test_models_chat", "test_models_plan", "test_models_preflight", "test_models_starter",
}  # fmt: skip
"""Tests of what stands in no room."""


def test_the_name_of_a_test_file_begins_with_the_room_that_it_tests() -> None:
    """`test_ROOM_FILE.py`, or `test_ROOM_TOPIC.py` where it tests more than one file."""
    rooms = {path.parent.name for storey in STOREYS for path in modules(storey)} - {"models"}
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.stem in TOPICS or path.stem.split("_")[1] in rooms, path.name


def test_packages_are_listed_by_hand() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    rooms = {str(path.parent.relative_to(ROOT)).replace("/", ".") for storey in STOREYS for path in modules(storey)}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(rooms)
    assert "--import-mode=importlib" in project["tool"]["pytest"]["ini_options"]["addopts"]
    assert "mlflow" in project["tool"]["ruff"]["lint"]["isort"]["known-third-party"]
    assert "INP001" not in project["tool"]["ruff"]["lint"]["select"]
    for room in rooms:
        assert (ROOT / room.replace(".", "/") / "__init__.py").is_file()


def test_no_file_of_tests_and_benchmarks_is_longer_than_400_lines() -> None:
    rooms = [path for room in ("tests", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py")]
    assert {str(p.relative_to(ROOT)): n for p in rooms if (n := len(p.read_text("utf-8").splitlines())) > 400} == {}


LIMITS = {
    "loose dicts": 90,
    "type: ignore": 5,
    "above 7 parameters": 0,
    "broad except": 8,
    "suppress(Exception)": 0,
    "files above 350 lines": 0,
    "functions above 80 lines": 0,
}
"""Figure of benchmarks/house.py → how many places it may count in flows, tasks and models."""


def test_the_house_keeps_its_limits() -> None:
    files = house.from_tree()
    places = house.places(files)
    lines = sum(len(text.splitlines()) for text in files.values())
    assert {figure: places[figure] for figure, most in LIMITS.items() if len(places[figure]) > most} == {}
    assert 100 * len(places["Any"]) / lines <= 0.8
    assert 100 * len(places["comments"]) / lines >= 3
    assert len(places["told"]) + len(places["given"]) <= 20, "name a value by what it is: rows, response, candidate"


@pytest.mark.parametrize(
    "text", ["def f(a, b, c, d, e, g, h, i): ...", "try: f()\nexcept Exception: pass", "x: dict[str, Any]"]
)
def test_a_limit_counts_what_it_should(text: str) -> None:
    found = house.places({"models/x.py": text + "\n"})
    assert sum(len(found[figure]) for figure in LIMITS) == 1


def test_five_files_lead_from_the_flow_to_the_line_that_calls_trl() -> None:
    """A reader who follows definitions from the method's page to the loss needs no search."""
    way = {
        "flows/align.py": "stages.align",
        "tasks/stages.py": "methods.TRAIN",
        "models/alignment/methods.py": "dpo.train",
        "models/alignment/dpo.py": "with_stored_logps(DPOTrainer)(",
        "models/alignment/trainer.py": "trainer.train(",
    }
    assert len(way) == 5
    for path, step in way.items():
        assert step in (ROOT / path).read_text("utf-8"), path


# The recipe, as a file and as a form


def test_the_form_of_a_recipe_has_no_union() -> None:
    """Prefect draws Optional and Union badly."""
    text = json.dumps(recipe.Recipe.model_json_schema())
    assert '"properties"' in text
    for word in ("anyOf", "oneOf", '"null"'):
        assert word not in text


UNBOUNDED = ("lambda", "weights", "threshold")
"""The first two have a validator of their own; scores of a judge may be of any size."""


def test_every_number_of_a_recipe_has_bounds_and_its_sentence_tells_them() -> None:
    """The Prefect form takes bounds into account only when it is sent, and shows none; nor does `sacpo keys`."""
    schema = recipe.Recipe.model_json_schema()
    for record in [schema, *(definition for definition in schema["$defs"].values() if "properties" in definition)]:
        for name, definition in record["properties"].items():
            if definition.get("type") in ("number", "integer") and name not in UNBOUNDED:
                assert {"minimum", "exclusiveMinimum"} & definition.keys(), f"{record['title']}.{name}"
                most = definition.get("maximum", definition.get("exclusiveMaximum"))
                written = {f"{most:,.0f}", f"{most:g}", f"10^{len(str(int(most))) - 1}", "divisor"}
                assert any(text in definition["description"] for text in written), f"{record['title']}.{name}: {most}"


def test_every_field_of_a_recipe_has_a_title_and_a_sentence() -> None:
    schema = recipe.Recipe.model_json_schema()
    records = [schema, *(record for record in schema["$defs"].values() if "properties" in record)]
    assert len(records) > 8
    for record in records:
        for name, field in record["properties"].items():
            assert field.get("description"), f"{record['title']}.{name}"


@pytest.mark.parametrize("name", toml.shipped())
def test_a_shipped_recipe_is_valid_and_named_as_its_file(name: str) -> None:
    read = toml.read(name)
    assert read.name == name
    assert recipe.Recipe.model_validate_json(read.model_dump_json(by_alias=True)) == read


def test_recipes_are_shipped() -> None:
    assert "quickstart" in toml.shipped()
    package = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    assert package == {
        "flows": ["recipes/*.toml"], "models.judges": ["rubrics/*.txt"], "models.report": ["*.json", "*.j2"]
    }  # fmt: skip
    assert all(path.parent.name == "recipes" for path in toml.shipped().values())


def test_every_stage_stands_in_the_catalogue_and_takes_its_folder_first() -> None:
    marked = {}
    for path in modules("models"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            calls = [d for d in getattr(node, "decorator_list", []) if ast.unparse(d).startswith("stage(")]
            if calls:
                marked[ast.literal_eval(calls[0].args[0])] = node.name
                assert ast.unparse(node.args.args[0]) == "out: Path", f"{path}: {node.name}"
    assert {mark_of(does).name: does.__name__ for does in catalogue.STAGES} == marked
    assert len(marked) == len(catalogue.STAGES) == len(catalogue.versions()) > 14


def test_no_call_names_a_stage_by_a_string() -> None:
    for path in [*modules("flows"), *modules("tasks")]:
        said = {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}
        assert not said & catalogue.versions().keys(), path


ASKED = """
from models.alignment import merge
from models.artifacts import Margins, Policy
from models.recipe import Recipe
from tasks.run import Run


def asks(run: Run[Recipe], policy: Policy) -> Policy:
    return run.make(merge.interpolate, "merge", safe=policy, reward=policy, q=0.5)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("", "", "Success"),
        ("reward=policy", "rewrd=policy", 'Unexpected keyword argument "rewrd"'),
        ("q=0.5", 'q="half"', 'Argument "q" to "make" of "Run" has incompatible type "str"; expected "float"'),
        ("-> Policy:", "-> Margins:", 'Incompatible return value type (got "Policy", expected "Margins")'),
    ],
)
def test_mypy_finds_a_wrong_call_of_a_stage(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(ASKED.replace(right, wrong))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "asks.py")]
    assert said in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("torch", "said", "index"),
    [
        ("", "6.3 GB with CUDA (make TORCH=cpu takes the CPU build)", ""),
        ("cpu", "the CPU build from PyTorch's", "/cpu"),
    ],
)
def test_make_says_which_torch_it_installs_and_how_large_it_is(torch: str, said: str, index: str) -> None:
    asked = ["make", "-n", "-B", f"TORCH={torch}", "run"]
    output = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'echo "Installing torch: {"" if not torch else said}' in output and said in output
    installs = next(line for line in output.splitlines() if "pip install" in line)
    assert installs.partition(" .venv/bin/pip")[0].strip().endswith(f'{index}"' if index else "")
    assert ("PIP_EXTRA_INDEX_URL" in installs) == bool(index)
