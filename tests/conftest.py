"""What all tests share: one thread, no network, a runs folder of their own, and a tiny real policy."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true", PREFECT_SERVER_ANALYTICS_ENABLED="false",
)  # fmt: skip

os.environ.setdefault("SACPO_SEED", str(SystemRandom().randrange(2**32)))  # what test_flows_bad_input.py draws with
os.environ.pop("MLFLOW_TRACKING_URI", None)  # read once, when tasks.tracking.connection is imported

import pytest
from filelock import FileLock
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from models.alignment import reference
from models.artifacts import Policy, Preferences, Reference, content_digest, file_digest
from models.data import preferences, town
from models.files import jsonl
from models.files import sealed as small_files
from models.policy import weights as policies
from models.recipe import Compute
from models.recipe.toml import read
from tasks.run import Run
from tasks.servers.environment import VERSION_PATHS
from tasks.tracking import log as records
from tasks.work import processes as children
from tests.store import store  # noqa: F401  # a fixture

SMALL = [
    "sft.updates=60", "sft.save_every=10", "steps.0.updates=12", "steps.0.save_every=5", "steps.1.updates=12",
    "steps.1.save_every=5", "steps.1.lambda=[0.2,1]", "merge.weights=[0.5]", "constraint.at_least=0.05",
    "data.heldout=40", "evaluation.kl_prompts=16", "compute.processes=1",
]  # fmt: skip
Dialogue = tuple[str, str, str]
"""Prompt, chosen, rejected."""
PASSWORD = "only for the tests"
PATIENCE = 600
"""Seconds to wait for what must happen; a busy machine is no fault."""
BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: float(path.parent.name))
LOGINS = ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
LONGEST = (
    "flows_walk", "flows_align", "servers_up", "tasks_death", "flows_evaluate", "tasks_approvals", "flows_admin",
    "access_temporary_server",
)  # fmt: skip
"""Files that take a minute or more; of the first, one makes what those after them need."""


def pytest_report_header() -> str:
    """Tell how to draw the same bad input again."""
    return f"bad input: SACPO_SEED={os.environ['SACPO_SEED']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that the processes that share the files end at about the same time."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: in a file nothing moves


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own runs folder, which does not exist yet."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SACPO_RUNS", str(folder))
    for name in ("MLFLOW_TRACKING_URI", *LOGINS):  # commands set these for themselves; a test leaves none behind
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def one_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the tests of a process copy one empty database of MLflow: its migrations take two seconds each time."""
    make, made = records.database, tmp_path_factory.mktemp("mlflow") / "mlflow.db"

    def copied(path: Path) -> None:
        make(made)
        with FileLock(f"{path}.lock"):  # a tracker's thread asks for it beside the test
            if not path.exists():
                shutil.copy(made, f"{path}.new")
                os.rename(f"{path}.new", path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "database", copied)
        yield


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    return free_port()


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Changes that make the quickstart a matter of seconds."""
    return list(SMALL)


def untracked(runs: Path, *changes: str) -> Run[Any]:
    """A run of the quickstart that records nothing in MLflow."""
    return Run(runs, read("quickstart", list(changes)), "0123456789abcdef", None)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all runs of the session."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = os.environ | {"PREFECT_HOME": str(home)}
    command = [str(Path(sys.executable).parent / "prefect"), "server", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}/api"
    try:
        answering(f"{address}/health", home / "log")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(PATIENCE)


def answering(address: str, log: Path) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def command(*arguments: str, changes: list[str] | None = None) -> list[str]:
    """Return the command line, with the small settings unless others are given."""
    sets = [part for change in (SMALL if changes is None else changes) for part in ("--set", change)]
    return [sys.executable, "-m", "flows", *arguments, *sets]


@pytest.fixture
def start(prefect: str, runs: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the command in the runs folder of the test; whatever is left is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def starting(*arguments: str, changes: list[str] | None = None, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command(*arguments, changes=changes), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=unnamed() | {"PREFECT_API_URL": prefect, "SACPO_RUNS": str(runs)} | environment,
            cwd=Path(__file__).parent.parent, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield starting
    for process in started:
        process.kill()


@pytest.fixture
def run(start: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., tuple[int, str]]:
    """Run the command to its end; return exit code and output."""

    def running(*arguments: str, **settings: Any) -> tuple[int, str]:
        process = start(*arguments, **settings)
        out, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, out

    return running


def unnamed() -> dict[str, str]:
    """The environment without the servers that mlflow itself names there."""
    return {name: value for name, value in os.environ.items() if name not in VERSION_PATHS}


class Up:
    """A `sacpo up` of its own, in a process group of its own, waited for until it says where everything is."""

    def __init__(self, runs: Path, *options: str, **environment: str) -> None:
        self.runs, self.ports = runs, {"mlflow": free_port(), "prefect": free_port()}
        ports = [part for name, port in self.ports.items() for part in (f"--{name}-port", str(port))]
        self.mlflow, self.prefect = (f"http://127.0.0.1:{port}" for port in self.ports.values())
        self.log = runs.with_name(f"{runs.name}-{self.ports['mlflow']}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "flows", "up", *ports, *options], stdout=log, stderr=log,
                env=unnamed() | {"SACPO_RUNS": str(runs)} | environment, cwd=Path(__file__).parent.parent,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while "Ctrl-C" not in self.said and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert "Ctrl-C" in self.said and self.process.poll() is None, self.said

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8")

    @property
    def addresses(self) -> dict[str, str]:
        """What a command of ours needs in its environment: the password it finds itself."""
        return {"MLFLOW_TRACKING_URI": self.mlflow, "PREFECT_API_URL": f"{self.prefect}/api"}

    @property
    def login(self) -> str:
        """User and password of both servers."""
        return f"admin:{(self.runs / 'password').read_text('utf-8').strip()}"

    def ask(self, path: str, body: Any = None, method: str = "", login: str = "") -> Any:
        """Ask Prefect's API as its own client does; a database that is locked for a moment is asked again."""
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(f"{self.prefect}/api", auth_string=login or self.login) as client:
            response = client._client.request(method or ("GET" if body is None else "POST"), path, json=body)
        return response.json() if response.content else None

    def end(self, how: int = signal.SIGINT) -> int:
        """End it, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def up() -> Iterator[Callable[..., Up]]:
    """`up(runs, *options, **environment)` starts the servers; what is left of them ends with the module."""
    started: list[Up] = []

    def starting(runs: Path, *options: str, **environment: str) -> Up:
        started.append(Up(runs, *options, **environment))
        return started[-1]

    yield starting
    for one in started:
        one.end()
        children.end(one.runs)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A fresh cluster without databases, its password in PGPASSWORD; PostgreSQL refuses to run as root."""
    if BIN is None or (os.getuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}):
        pytest.skip("no PostgreSQL here: apt-get install postgresql (and its user, for root)")
    folder = Path(tempfile.mkdtemp(prefix="sacpo-postgres-"))
    folder.chmod(0o755)
    (folder / "password").write_text(PASSWORD)
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    port = free_port()

    def does(name: str, *arguments: str) -> None:
        subprocess.run([*user, f"{BIN}/{name}", "-D", f"{folder}/data", *arguments], cwd=folder, check=True, stdout=-3)

    does("initdb", "-U", "sacpo", f"--pwfile={folder}/password", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    does("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", PASSWORD)
        yield f"postgresql://sacpo@127.0.0.1:{port}"
    does("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def client(prefect: str) -> Iterator[SyncPrefectClient]:
    """A client of the session's server, which is also the server of this process."""
    with temporary_settings({PREFECT_API_URL: prefect}), SyncPrefectClient(prefect) as one:
        yield one


@pytest.fixture(scope="session")
def undisturbed(prefect: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one undisturbed run, which the processes that share the tests share too."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    environment = unnamed() | {"PREFECT_API_URL": prefect, "SACPO_RUNS": str(folder)}
    wanted, cwd = command("run", "quickstart", changes=[*SMALL, "compute.processes=2"]), Path(__file__).parent.parent
    with FileLock(f"{folder}.lock"):  # who comes second is shown what the first has made
        done = subprocess.run(wanted, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def served(undisturbed: Path, runs: Path) -> Path:
    """The runs folder of the test, in which version 1 serves: a copy of the undisturbed one."""
    shutil.copytree(undisturbed, runs)
    for report in runs.glob("quickstart/*/report.json"):
        report.write_text(report.read_text("utf-8").replace(str(undisturbed), str(runs)), "utf-8")
        place = report.with_name("outcome.json")
        outcome = json.loads(place.read_text("utf-8").replace(str(undisturbed), str(runs)))
        held = {name: file_digest(report.parent / name) for name in outcome["files"]}
        small_files.write(place, {**outcome, "files": held})
    return runs


@pytest.fixture(scope="session")
def compute() -> Compute:
    return Compute(device="cpu", processes=1)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A tiny Llama with random weights, saved as every policy is."""
    return make_policy(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The same architecture and tokenizer, other weights."""
    return make_policy(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    """Comparisons of many lengths, made of words that the town's tokenizer knows."""
    return make_dialogues(40, seed=0)


@pytest.fixture(scope="session")
def scored(
    policy: Policy, dialogues: list[Dialogue], compute: Compute, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """The comparisons, tokenised, with the log-probs of `policy`."""
    return make_reference(policy, dialogues, compute, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def reference_of(compute: Compute) -> Callable[[Policy, list[Dialogue], Path], Reference]:
    """`reference_of(policy, dialogues, folder)`: the same, of another policy or other comparisons."""
    return lambda policy, dialogues, folder: make_reference(policy, dialogues, compute, folder)


def make_policy(folder: Path, seed: int) -> Policy:
    tokenizer = town.tokenizer()
    policies.save(town.untrained(seed, tokenizer), tokenizer, folder)
    return policies.describe(folder, Policy(path=folder, digest="", name="base", kind="base"))


def make_dialogues(count: int, seed: int) -> list[Dialogue]:
    words = sorted(set(town.tokenizer().get_vocab()) - set(town.SPECIAL))
    draw = Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return [(text(3, 12), text(1, 6), text(7, 12)) for _ in range(count)]


def make_reference(policy: Policy, dialogues: list[Dialogue], compute: Compute, folder: Path) -> Reference:
    """Score with the production code; identical comparisons stay, each as often as it is given."""
    pairs_folder, out = folder / "pairs", folder / "scored"
    pairs_folder.mkdir(parents=True)
    out.mkdir()
    comparisons = [preferences.Pair([{"role": "user", "content": prompt}], *answers) for prompt, *answers in dialogues]
    jsonl.write(pairs_folder / "train.jsonl", (pair._asdict() for pair in comparisons))
    pairs = Preferences(
        path=pairs_folder, digest=content_digest(dialogues), metric="harmless", counts={"train": len(dialogues)}
    )
    return reference.score(out, policy, pairs, ["train"], 512, compute)
