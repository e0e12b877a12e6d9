"""`sacpo up` for one person: healthy together, ended together, found again, and closed to a wrong password."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.errors import BadPlace
from tasks.access import passwords
from tasks.servers import up as servers
from tasks.servers.environment import VERSION_PATHS
from tasks.servers.options import ServerOptions, environment_of, listening
from tasks.tracking import connection
from tasks.work import processes

ROOT = Path(__file__).parent.parent
SECRETS = {"PREFECT_SERVER_API_AUTH_STRING": "team:correct-horse", "MLFLOW_AUTH_ADMIN_PASSWORD": "battery-staple"}


def read(address: str, user: str = "") -> Any:
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
        text = response.read().decode()
    return json.loads(text) if text[:1] in "[{" else text


def code(address: str, user: str) -> int:
    try:
        read(address, user)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def sacpo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    unnamed = {name: value for name, value in os.environ.items() if name not in VERSION_PATHS}  # mlflow sets one itself
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        env=unnamed | environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def finished(up: Any, run: dict[str, Any], login: str = "") -> dict[str, Any]:
    """Return a flow run when it has ended."""
    end = time.monotonic() + 600  # a busy machine
    while (run := up.ask(f"/flow_runs/{run['id']}", login=login))["state"]["type"] in (
        "SCHEDULED", "PENDING", "RUNNING",
    ):  # fmt: skip
        assert time.monotonic() < end, run["state"]
        time.sleep(0.5)
    return dict(run)


def deployed(up: Any, name: str, login: str = "") -> str:
    """Return the id of a deployment."""
    return str(next(one["id"] for one in up.ask("/deployments/filter", {}, login=login) if one["name"] == name))


def block(title: str, number: int, mark: str = "<<'END'\n(.*?)\nEND\n") -> str:
    """Return code of a section of docs/operations.md, as it stands between the marks."""
    section = (ROOT / "docs" / "operations.md").read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(mark, section, re.S)[number]


@contextmanager
def recorder() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of somebody else's server, and the names of all headers that it was sent."""
    headers: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.extend(self.headers.keys())
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", headers
        server.shutdown()


def test_one_person_from_up_to_a_restored_backup(
    up: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long test, since every start takes seconds: what is up is used, killed, started again with passwords."""
    runs = tmp_path / "home" / "runs"
    first = up(runs, **dict.fromkeys(SECRETS, ""))  # a variable that is set and empty chooses no password
    assert read(f"{first.mlflow}/health") == "OK"
    assert read(f"{first.prefect}/ui-settings")["api_url"] == "/api"  # through a tunnel too
    assert [pool["type"] for pool in first.ask("/work_pools/filter", {}) if pool["name"] == "sacpo"] == ["process"]
    post = block("Start a run from a program", 0, "```sh\n(.*?)```")
    post = post.replace("http://127.0.0.1:4200", first.prefect).replace("runs/password", str(runs / "password"))
    posted = subprocess.run(["bash", "-c", post], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished(first, json.loads(posted.stdout))["state"]["type"] == "COMPLETED"

    beside = sacpo("up", SACPO_RUNS=str(runs))
    assert beside.returncode == 0 and first.mlflow in beside.stdout and first.prefect in beside.stdout
    user, _, password = first.login.partition(":")
    typed = sacpo("up", "--show-password", SACPO_RUNS=str(runs)).stdout
    assert typed == f"Prefect: {user}:{password}\nMLflow:  user {user}, password {password}\n"
    assert password not in first.said + "".join(log.read_text() for log in runs.glob("logs/*"))
    assert not [path for path in (runs, *runs.rglob("*")) if path.stat().st_mode & 0o077]
    elsewhere = {"SACPO_RUNS": str(tmp_path / "other")}
    stranger = sacpo("reconcile", **first.addresses, **elsewhere)  # another folder's password is another one
    assert stranger.returncode == 2 and "refuses us; set " in stranger.stderr
    with recorder() as (address, headers):
        asked = {"PREFECT_API_URL": f"{address}/api", "MLFLOW_TRACKING_URI": first.mlflow, "SACPO_RUNS": str(runs)}
        assert sacpo("reconcile", **asked).returncode == 2
        assert sacpo("reconcile", **asked | {"PREFECT_API_URL": "", "MLFLOW_TRACKING_URI": address}).returncode == 2
    assert headers and not [name for name in headers if name.lower() == "authorization"]
    taken = sacpo("up", "--mlflow-port", str(first.ports["mlflow"]), **elsewhere)
    assert taken.returncode == 2 and re.fullmatch(r"sacpo: port \d+ is taken .* --mlflow-port\n", taken.stderr)

    monkeypatch.setattr(connection, "SERVER", first.mlflow)
    client = connection.client(runs)
    experiment = client.create_experiment("through the server")
    run_id = client.create_run(experiment).info.run_id
    client.log_text(run_id, "kept", "note.txt")
    client.create_registered_model("policy")

    first.end(signal.SIGKILL)
    left = processes.processes_of_kind(runs, "server") + processes.processes_of_kind(runs, "worker")
    assert len(left) > 3
    proxied = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # a proxy is not asked for this machine
    second = up(runs, "--no-worker", **SECRETS, **proxied)  # another password than MLflow has stored for its admin
    ended = re.search(r"ended (\d+) processes", second.said)
    assert ended and int(ended[1]) >= len(left)  # a server that was still starting had begun another since
    assert not any(process.is_running() for process in left)
    typed = sacpo("up", "--show-password", SACPO_RUNS=str(runs)).stdout
    assert password not in typed and "what you set" in typed

    team = "team:correct-horse"
    for address, user in (
        (f"{second.prefect}/api/admin/version", team),
        (f"{second.mlflow}/version", "admin:battery-staple"),
    ):
        assert [code(address, login) for login in (user, user + "?", "")] == [200, 401, 401]
    foreign = urllib.request.Request(f"{second.mlflow}/version", headers={"Authorization": "Bearer x"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(foreign, timeout=30)
    for name, address in second.addresses.items():
        refused = sacpo("run", "quickstart", **{name: address, "PREFECT_API_AUTH_STRING": "team:wrong"}, **elsewhere)
        assert refused.returncode == 2 and re.match(
            rf"sacpo: {name} = .* refuses us; set [A-Z_a-z ]+\n", refused.stderr
        )
    states = [one["state"]["type"] for one in second.ask("/flow_runs/filter", {}, login=team)]
    assert "COMPLETED" in states  # the history of the first
    automations = [one["name"] for one in second.ask("/automations/filter", {}, login=team)]
    assert automations.count(str(servers.ZOMBIES["name"])) == 1

    nobody = sacpo("serve", **elsewhere)
    assert nobody.returncode == 2 and nobody.stderr.startswith("sacpo: sacpo serve needs a Prefect server")
    known = {"PREFECT_API_AUTH_STRING": "team:correct-horse", "MLFLOW_TRACKING_USERNAME": "admin"}
    known |= {"MLFLOW_TRACKING_PASSWORD": "battery-staple", "SACPO_RUNS": str(runs), **second.addresses}
    serving = subprocess.Popen([sys.executable, "-m", "flows", "serve"], env=os.environ | known, cwd=ROOT)
    scheduled = {"state": {"type": "SCHEDULED"}}
    run = second.ask(f"/deployments/{deployed(second, 'reconcile', team)}/create_flow_run", scheduled, login=team)
    assert finished(second, run, team)["state"]["type"] == "COMPLETED"  # up had no worker
    serving.terminate()
    serving.wait(600)

    backup = tmp_path / "elsewhere" / "runs"
    for name in ("align-1.partial", "align-2.gone", "align-3"):
        (runs / "store" / name).mkdir(parents=True)  # a training at work: what it holds may move while it is copied
    subprocess.run([sys.executable, "-c", block("Back up", 0), str(runs), str(backup)], check=True)
    assert second.end() == 0 and second.said.endswith("stopping\n")
    assert (
        not processes.processes_of_kind(runs, "server")
        + processes.processes_of_kind(runs, "worker")
        + processes.processes_of_kind(runs, "run")
    )

    monkeypatch.setattr(connection, "SERVER", "")
    note = connection.client(runs).download_artifacts(run_id, "note.txt")  # without a server
    assert Path(note).read_text() == "kept"
    shutil.rmtree(runs)
    subprocess.run([sys.executable, "-c", block("Back up", 1), str(runs), str(backup)], check=True)
    assert [path.name for path in (backup / "store").glob("align-*")] == ["align-3"]
    assert (backup / "password").stat().st_mode & 0o777 == 0o600
    assert (backup / "password").read_text().strip() == password
    restored = connection.client(backup)
    assert [model.name for model in restored.search_registered_models()] == ["policy"]
    assert Path(restored.download_artifacts(run_id, "note.txt")).read_text() == "kept"


@pytest.mark.slow
def test_a_lost_and_a_restored_password_open_both_servers(up: Callable[..., Any], tmp_path: Path) -> None:
    """MLflow keeps its admin's in a database, from the first start on; Prefect is told each time."""
    runs = tmp_path / "runs"
    kept: list[str] = []
    for spoil in (lambda: None, (runs / "password").unlink, lambda: (runs / "password").write_text(kept[0])):
        spoil()
        here = up(runs, "--no-worker")
        kept.append((runs / "password").read_text())
        right, wrong = here.login, {f"admin:{password.strip()}" for password in kept} - {here.login}
        for address in (f"{here.prefect}/api/admin/version", f"{here.mlflow}/version"):
            assert code(address, right) == 200 and {code(address, other) for other in wrong} <= {401}
        assert here.end() == 0
    assert kept[0] == kept[2] != kept[1]


def test_the_temporary_server_of_a_run_is_closed_too(runs: Path) -> None:
    """Its database is that of `sacpo up`, whose worker would run what a page plants there."""
    script = (
        "from tasks.servers.environment import configure_clients; configure_clients()\n"
        "from prefect.client.orchestration import get_client\n"
        "client = get_client(sync_client=True)\n"
        "print(client.api_url, client.hello().status_code, flush=True); input()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VERSION_PATHS}
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    address, status = child.stdout.readline().split()
    assert status == "200"  # we get in
    api = address.rstrip("/")
    assert [code(f"{api}{path}", user) for path in ("/admin/settings", "/docs") for user in ("", "admin:admin")] == [
        401
    ] * 4
    for kind in ("application/json", "text/plain"):
        for path, body in (("/flows/", b'{"name": "planted"}'), ("/flow_runs/filter", b"{}")):
            request = urllib.request.Request(f"{api}{path}", body, {"Content-Type": kind, "Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)
    ask = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{api}/flows/", headers=ask, method="OPTIONS"), timeout=30)
    child.communicate("\n", timeout=600)
    assert (runs / "password").stat().st_mode & 0o777 == 0o600


def test_a_program_that_took_the_port_of_a_server_is_not_taken_for_it(tmp_path: Path) -> None:
    """It answers as the server would, and waits for the password."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        opens = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
        opens += "; time.sleep(600)"
        opens = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {opens!r}])"  # as MLflow does
        child = processes.start(tmp_path, "server", "mlflow", [sys.executable, "-c", opens], os.environ, tmp_path)
        try:
            while not (written := child.log.read_text()).endswith("\n"):
                time.sleep(0.1)
            assert processes.listens(child, int(written)) and not processes.listens(child, port)
        finally:
            os.killpg(child.process.pid, 9)
        with pytest.raises(BadPlace, match=f"port {port} is taken already; choose another with --x"):
            listening(port, "--x")


def test_a_port_that_is_taken_while_the_server_starts_is_named(tmp_path: Path) -> None:
    child = processes.start(tmp_path, "server", "mlflow", ["sh", "-c", "echo bye; exit 1"], os.environ, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(BadPlace, match=f"^port {port} is taken already; choose another with --mlflow-port"):
            servers._answering(child, ServerOptions(mlflow_port=port))
    with pytest.raises(BadPlace, match=r"^mlflow did not start, exit code 1: bye"):
        servers._answering(child, ServerOptions(mlflow_port=port))


def test_one_password_for_a_folder_whoever_asks_first(runs: Path) -> None:
    with ThreadPoolExecutor(8) as several:
        (made,) = {*several.map(passwords.password, [runs] * 32)}
    assert passwords.USABLE.fullmatch(made) and runs.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in runs.iterdir()] == ["password"]
    (runs / "password").unlink()
    assert passwords.password(runs) != made  # lost, and made anew
    (runs / "password").write_text("chosen by hand\n")
    with pytest.raises(BadPlace, match=r"password: holds no password .* delete the file"):
        passwords.password(runs)
    (runs / "password").write_bytes(b"\xff\xfe")
    with pytest.raises(BadPlace, match=r"password: holds no password .* delete the file"):
        passwords.password(runs)


def test_a_password_is_for_servers_that_are_up(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    secret = passwords.password(runs)
    passwords.write_running(runs, ours, ["PREFECT_API_URL"], {})
    assert passwords.credentials(runs, ours) == {
        "PREFECT_API_URL": ours["PREFECT_API_URL"],
        "PREFECT_API_AUTH_STRING": f"admin:{secret}",
    }
    by_name = {"PREFECT_API_URL": "http://localhost:4200/api/"}
    assert passwords.credentials(runs, by_name)["PREFECT_API_URL"] == ours["PREFECT_API_URL"]  # never [::1]
    for other in ("http://127.0.0.1:4201/api", "http://127.0.0.1:4200@evil.example/api", "https://127.0.0.1:4200/api"):
        assert passwords.credentials(runs, {"PREFECT_API_URL": other}) == {}
    assert passwords.credentials(runs, {**ours, "PREFECT_API_AUTH_STRING": "mine"}) == {}
    monkeypatch.setattr(passwords, "identity_of", lambda pid: "another process has its number now")
    assert passwords.credentials(runs, ours) == {}


def test_nothing_is_started_beside_a_named_server_that_does_not_answer(runs: Path, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    done = sacpo("up", "--mlflow-port", str(port), PREFECT_API_URL=nobody)
    assert done.returncode == 2 and f"PREFECT_API_URL = {nobody} does not answer" in done.stderr
    assert not (runs / "mlflow.db").exists() and not (runs / "servers.json").exists()
    done = sacpo("up", "--mlflow-port", str(port), "--prefect-port", str(port))
    assert done.returncode == 2 and f"are both {port}; each server needs its own" in done.stderr
    done = sacpo("up", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    assert done.returncode == 2 and "is no server; unset it" in done.stderr


def test_a_child_that_dies_is_told_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such table'); print('---'); raise SystemExit(1)"]
    child = processes.start(tmp_path, "server", "prefect", command, os.environ, tmp_path)
    outcome = rf"exit code 1: no such table \(see {tmp_path}/logs/prefect.log\)"
    with pytest.raises(BadPlace, match=f"prefect did not start, {outcome}"):
        processes.wait_until_ready(child, lambda: False)
    with pytest.raises(BadPlace, match=f"prefect failed, {outcome}"):
        processes.wait_for_exit(child)
    with pytest.raises(BadPlace, match=f"prefect ended, {outcome}"):
        processes.watch([child])


def test_a_child_that_was_killed_is_told_with_the_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('all is well', flush=True); import time; time.sleep(99)"]
    child = processes.start(tmp_path, "server", "mlflow", command, os.environ, tmp_path)
    child.process.kill()
    with pytest.raises(BadPlace, match=r"mlflow ended, killed by SIGKILL \(see .*mlflow.log\); everything is stopped"):
        processes.watch([child])


def test_grandchildren_die_too_even_those_that_ignore_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect gives flow runs a session of their own: no process group reaches them."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
    child = processes.start(tmp_path, "worker", "worker", [sys.executable, "-c", parent], os.environ, tmp_path)
    processes.wait_for_exit(child)
    while "on" not in child.log.read_text():
        time.sleep(0.05)
    monkeypatch.setattr(processes, "GRACE", 0.5)
    assert not processes.processes_of_kind(tmp_path / "another", "worker")
    assert processes.end(tmp_path) == 1
    assert not processes.processes_of_kind(tmp_path, "worker")


def test_passwords_stand_in_no_address() -> None:
    wanted = ServerOptions(postgres="postgresql://ada:p%40ss@127.0.0.1:5433")
    assert wanted.database("sacpo", "psycopg") == "postgresql+psycopg://ada@127.0.0.1:5433/sacpo"
    assert "p%40ss" not in repr(wanted)
    assert environment_of(Path("/runs"), wanted)["PGPASSWORD"] == "p@ss"
    for address in ("mysql://ada@127.0.0.1", "postgresql://ada:secret@127.0.0.1/mlflow", "ada"):
        with pytest.raises(BadPlace, match=r"^--postgres must be") as refused:
            ServerOptions(postgres=address).database("sacpo", "psycopg")
        assert "secret" not in str(refused.value)


def test_compose_publishes_on_loopback_and_holds_no_secret() -> None:
    text = (ROOT / "mlflow" / "compose.yaml").read_text("utf-8")
    compose = yaml.safe_load(text)
    assert "NOT RUN" in text
    assert set(compose["services"]) == {"postgres", "store", "mlflow", "prefect", "worker"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["healthcheck"]["test"], name
        assert set(service.get("depends_on", {})) <= set(compose["services"]), name
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|AUTH_STRING", key):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?set it\}", value), key
            assert not re.search(r"//[^/@]*:[^/@]*@", value), key
    assert not re.search(r"password|//[^/@\s]*:[^/@\s]*@", json.dumps(compose["configs"]))
