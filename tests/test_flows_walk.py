"""A day with sacpo, in a browser: open the form, change λ, submit, watch, read, follow the links, retrain, roll back.

`sacpo up` runs as a user would start it; headless Chromium sees what a person would see. The recipe is the quickstart,
made small, else everything is as it ships.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from httpx import HTTPStatusError, get
from websockets import Subprotocol
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from tasks.servers.options import DATABASES

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Day(NamedTuple):
    """A running `sacpo up`."""

    prefect: str
    mlflow: str
    runs: Path
    environment: dict[str, str]
    """What a person exports to work with it from a terminal."""
    login: str
    """User and password, as the page of Prefect takes them."""
    ask: Callable[..., Any]
    """Asks Prefect's API: path, body, method."""

    def deployment(self, name: str) -> Any:
        """Return a deployment by name."""
        return next(record for record in self.ask("/deployments/filter", {}) if record["name"] == name)

    def runs_of(self, name: str) -> list[Any]:
        """Return the flow runs of a deployment."""
        return self.ask("/flow_runs/filter", {"deployments": {"name": {"any_": [name]}}})

    def wait(self, name: str, state: str, seconds: float = 1200) -> Any:
        """Wait until a run of a deployment has ended in a state of this name."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            flow_runs = self.runs_of(name)
            for one in flow_runs:
                if one["state"]["name"] == state:
                    return one
            wrong = [one for one in flow_runs if one["state"]["type"] in ("FAILED", "CRASHED")]
            assert not wrong, wrong[0]["state"]
            time.sleep(1)
        raise AssertionError([(one["state"]["name"], one["state"]["message"]) for one in flow_runs])


@pytest.fixture(scope="module", params=["person", pytest.param("team", marks=pytest.mark.slow)])
def day(request: pytest.FixtureRequest, up: Callable[..., Any], small: list[str], tmp_path_factory: Any) -> Any:
    """The servers as they come, with a small recipe in the deployments; ended by Ctrl-C, which leaves nothing."""
    options, environment = team(request) if request.param == "team" else ([], {})
    here = up(tmp_path_factory.mktemp("day") / "runs", *options, **environment)
    (export,) = re.findall(r"export (.*)", here.said)
    exported = dict(variable.split("=", 1) for variable in export.split())
    day = Day(here.prefect, here.mlflow, here.runs, exported, here.login, here.ask)
    few = [*small, "merge.weights=[]"]
    for name, changes in {"quickstart": ["gate.approval=true"], "nightly": ["steps.1.lambda=[1]"]}.items():
        deployment = day.deployment(name)
        for change in [*few, *changes]:
            put(deployment["parameters"]["recipe"], change)
        day.ask(f"/deployments/{deployment['id']}", {"parameters": deployment["parameters"]}, "PATCH")
    yield day
    assert here.end() == 0


def team(request: pytest.FixtureRequest) -> tuple[list[str], dict[str, str]]:
    """Return how `sacpo up` is told of a team's PostgreSQL, with the three databases made, and of its store."""
    postgres, store = request.getfixturevalue("postgres"), request.getfixturevalue("store")
    for name in DATABASES:
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")
    return ["--postgres", postgres, "--artifacts", "s3://team"], store.environment


def put(recipe: Any, change: str) -> None:
    """Apply `steps.1.lambda=[1]` to a parameter."""
    key, _, value = change.partition("=")
    *path, last = key.split(".")
    for part in path:
        recipe = recipe[int(part)] if isinstance(recipe, list) else recipe[part]
    recipe[last] = json.loads(value)


@pytest.fixture(scope="module")
def page(day: Day) -> Iterator[Any]:
    """A page of headless Chromium."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-software-rasterizer",
                "--host-resolver-rules=MAP evil.example 127.0.0.1",
            ],
        )
        user, _, password = day.login.partition(":")
        here = {"username": user, "password": password, "origin": day.mlflow}  # what the browser asks a person for
        opened = browser.new_page(viewport={"width": 1300, "height": 1000}, http_credentials=here)
        opened.set_default_timeout(240_000)
        opened.goto(day.prefect)
        opened.get_by_placeholder("admin:pass").fill(day.login)
        opened.get_by_role("button", name="Login").click()
        opened.get_by_text("Dashboard").first.wait_for()  # and it is not asked for again
        yield opened
        browser.close()


def form(page: Any, day: Day, name: str) -> None:
    """Open the form of a deployment, as a person finds it."""
    page.goto(f"{day.prefect}/v2/deployments")
    page.locator(f"a[href*='/deployment/{day.deployment(name)['id']}']", has_text=name).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_text("Parameters", exact=True).first.wait_for()


def submit(page: Any) -> None:
    """Submit a form."""
    press(page.get_by_role("button", name="Submit"), page.get_by_text("scheduled to start now"), "visible")


def press(button: Any, then: Any, state: str) -> None:
    """Press until something happens: the page takes a while to check what was typed, and does nothing before."""
    for _ in range(12):
        button.page.wait_for_timeout(2000)
        button.click()
        with suppress(playwright.TimeoutError):
            then.wait_for(state=state, timeout=20_000)
            return
    raise AssertionError(button.page.inner_text("body"))


def approve(page: Any) -> None:
    """Answer what a waiting run asks."""
    page.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Resume").click()
    asked = page.get_by_role("dialog")
    asked.get_by_text("Shall quickstart version 1 become the champion?").wait_for()
    assert "safety rate: " in asked.inner_text()
    asked.get_by_role("switch").click()
    asked.locator("textarea").first.fill("Ada")
    asked.locator("textarea").last.fill("read the card")
    press(asked.get_by_role("button", name="Resume"), asked, "hidden")


@pytest.fixture(scope="module")
def hostile() -> Iterator[int]:
    """The port of another program of this machine, whose pages are hostile."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(Path(__file__).parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_of_another_origin_reads_and_starts_nothing(page: Any, day: Day, hostile: int, host: str) -> None:
    """In the browser of somebody who is logged in at both servers; the ports of one host are one site to a browser."""
    page.goto(day.mlflow)  # so that the browser knows the password, and would send it along
    page.goto(f"http://{host}:{hostile}/hostile_page.html")
    before, planted = written(day), day.runs.parent / f"planted-{host}"
    attack = [day.prefect, day.mlflow, day.deployment("reconcile")["id"], f"touch {planted}"]
    assert page.evaluate("ours => attack(...ours)", attack) == []
    assert written(day) == before and not planted.exists()


def test_a_page_that_took_the_address_of_a_server_reads_and_starts_nothing(page: Any, day: Day) -> None:
    """DNS rebinding: a hostile name leads to 127.0.0.1, and the browser takes the servers for the page's own."""
    before, script = written(day), (Path(__file__).parent / "hostile_page.html").read_text("utf-8")
    attack = re.findall(r"(async function attack.*)</script>", script, re.DOTALL)[0]
    prefect, mlflow = (place.replace("127.0.0.1", "evil.example") for place in (day.prefect, day.mlflow))
    for place in (f"{prefect}/ui-settings", f"{mlflow}/health"):
        page.goto(place)
        ours = json.dumps([prefect, mlflow, day.deployment("reconcile")["id"], "true"])
        assert page.evaluate(f"(() => {{ {attack}; return attack(...{ours}) }})()") == []
    assert written(day) == before


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
@pytest.mark.parametrize("login", ["", "admin:admin", "admin:", ":"])
def test_a_program_of_another_user_gets_nothing(day: Day, host: str, login: str) -> None:
    """Over plain sockets: no browser keeps any rule here. What needs no password holds nothing of anybody."""
    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
    headers |= {"Content-Type": "application/json", "Prefect-Csrf-Client": "x", "Prefect-Csrf-Token": "x"}
    reconcile = day.deployment("reconcile")["id"]
    for place, path, body in (
        (day.prefect, "/api/admin/settings", None),
        (day.prefect, "/api/admin/version", None),
        (day.prefect, "/api/csrf-token?client=x", None),
        (day.prefect, "/api/docs", None),
        (day.prefect, "/api/flow_runs/filter", "{}"),
        (day.prefect, "/api/logs/filter", "{}"),
        (day.prefect, f"/api/deployments/{reconcile}/create_flow_run", "{}"),
        (day.prefect, "//api/flow_runs/filter", "{}"),
        (day.prefect, "/api/health/../flow_runs/filter", "{}"),
        (day.mlflow, "/", None),
        (day.mlflow, "/version", None),
        (day.mlflow, "/signup", None),
        (day.mlflow, "/metrics", None),
        (day.mlflow, "/api/2.0/mlflow/experiments/get?experiment_id=0", None),
        (day.mlflow, "/api/2.0/mlflow/experiments/create", '{"name": "planted"}'),
        (day.mlflow, "/api/2.0/mlflow/users/update-password", '{"username": "admin", "password": "x"}'),
        (day.mlflow, "/graphql", "{}"),
        (day.mlflow, "/health/../version", None),
    ):
        connection = HTTPConnection(*place.removeprefix("http://").split(":"), timeout=30)
        port = place.rpartition(":")[2]
        connection.request("GET" if body is None else "POST", path, body, headers | {"Host": f"{host}:{port}"})
        assert connection.getresponse().status in (401, 403, 404, 405), (place, path)
    for path in ("/api/events/in", "/api/events/out", "/api/logs/out"):
        for protocols in (None, [Subprotocol("prefect")]):
            with suppress(WebSocketException):
                address = day.prefect.replace("http", "ws") + path
                with connect(
                    address, subprotocols=protocols, additional_headers={"Origin": f"http://{host}"}
                ) as socket:
                    socket.send(json.dumps({"type": "auth", "token": login}))
                    pytest.fail(f"{path}: {socket.recv(10)!r}")


def written(day: Day) -> Any:
    """Return what a page could have written: flows, runs, pools, events of ours, experiments."""
    flows, pools = ([one["name"] for one in day.ask(f"/{kind}/filter", {})] for kind in ("flows", "work_pools"))
    planted = day.ask("/flow_runs/filter", {"flow_runs": {"name": {"any_": ["planted"]}}})
    named = {"filter": {"event": {"name": ["sacpo.data.updated"]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}}
    headers = {"Authorization": "Basic " + base64.b64encode(day.login.encode()).decode()}
    experiments = get(f"{day.mlflow}/api/2.0/mlflow/experiments/search?max_results=99", headers=headers).json()
    names = sorted(one["name"] for one in experiments["experiments"])
    return sorted(flows), sorted(pools), planted, day.ask("/events/filter", named)["total"], names


def test_a_run_from_the_form(page: Any, day: Day) -> None:
    form(page, day, "quickstart")
    page.get_by_text("b per category").wait_for()
    text = page.inner_text("body")
    assert "One policy is trained per value, with KL weight β/λ" in text
    assert not re.search(r"^Field$", text, re.MULTILINE)  # how the page calls what it cannot name
    boxes = page.locator("input")
    (place,) = [i for i in range(boxes.count()) if boxes.nth(i).input_value() == "0.2"]  # λ of the safety step
    boxes.nth(place).fill("0.4")
    submit(page)
    page.get_by_role("button", name="View run").click()

    page.get_by_text("Paused", exact=True).first.wait_for(timeout=1_200_000)  # the page follows by itself
    read = {artifact_record["key"] for artifact_record in day.ask("/artifacts/filter", {})}
    assert {"gate", "candidates", "frontier"} <= read  # there is something to read before one answers
    approve(page)
    page.get_by_text("Promoted", exact=True).first.wait_for()
    (run,) = day.runs_of("quickstart")
    assert run["parameters"]["recipe"]["steps"][1]["lambda"] == [0.4, 1]
    assert "version 1, which became champion" in run["state"]["message"]
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("harmless · dpo · λ=0.4 (β/λ=0.25)").first.wait_for()


def test_the_pages_of_a_run_lead_to_the_version_that_serves(page: Any, day: Day) -> None:
    (run,) = day.runs_of("quickstart")
    artifacts = f"{day.prefect}/v2/runs/flow-run/{run['id']}?tab=Artifacts"
    for artifact, shown in (
        ("gate", page.get_by_text("safety rate").first),
        ("candidates", page.get_by_text("helpful win rate").first),
        ("frontier", page.locator("img[src^='data:image/png']")),
    ):
        page.goto(artifacts)
        page.locator(f"a[href$='/artifacts/key/{artifact}']").first.click()
        page.wait_for_url(f"**/artifacts/key/{artifact}*")
        page.get_by_role("tab", name="Artifacts").wait_for(state="detached")  # the page before has such links too
        page.locator("a[href*='/artifacts/artifact/']").first.click()
        with suppress(playwright.TimeoutError):
            shown.wait_for(timeout=60_000)
            continue
        page.reload()  # on a busy machine the page gives up on what it asked for, and says nothing
        shown.wait_for()

    page.goto(artifacts)
    page.get_by_text("quickstart version 1 in MLflow").click()
    link = page.locator(f"a[href^='{day.mlflow}']").first.get_attribute("href")
    assert link and link.endswith("/models/quickstart/versions/1")
    page.goto(link)
    page.get_by_text("Version 1", exact=True).first.wait_for()
    page.get_by_text("What it had to show, on prompts that were not used to choose it").wait_for()
    assert "@\u00a0champion" in page.inner_text("body")


def test_a_value_that_cannot_be_is_refused_with_its_path(day: Day) -> None:
    deployment = day.deployment("quickstart")
    for change, said in (('steps.1.method="ppo"', "recipe.steps[1].method"), ("beta=-1", "recipe.beta")):
        wrong = json.loads(json.dumps(deployment["parameters"]))
        put(wrong["recipe"], change)
        with pytest.raises(HTTPStatusError) as refused:
            day.ask(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": wrong})
        assert refused.value.response.status_code == 409 and said in refused.value.response.text


def test_a_schedule_retrains_once_and_then_finds_nothing_new(day: Day) -> None:
    """With SQLAlchemy 2.1 Prefect's scheduler creates no runs, and nobody is told."""
    deployment = day.deployment("nightly")
    put(deployment["parameters"]["recipe"], "steps.1.updates=16")
    put(deployment["parameters"]["recipe"], "gate.margin=0.3")
    day.ask(f"/deployments/{deployment['id']}", {"parameters": deployment["parameters"]}, "PATCH")
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()  # and then seldom: on a busy machine each would give
    every = [{"schedule": {"interval": 60.0, "anchor_date": soon}, "active": True}]  # way to the next one for ever
    (schedule,) = day.ask(f"/deployments/{deployment['id']}/schedules", every)
    try:
        day.wait("nightly", "Promoted")
        nothing = day.wait("nightly", "NothingNew")
    finally:
        day.ask(f"/deployments/{deployment['id']}/schedules/{schedule['id']}", method="DELETE")
    assert (
        "nothing new since" in nothing["state"]["message"]
        and "version 2, which became champion" in nothing["state"]["message"]
    )
    trained = [one for one in day.runs_of("nightly") if one["state"]["name"] == "Promoted"]
    assert len(trained) == 1 and trained[0]["auto_scheduled"]


def test_data_that_arrive_start_a_retraining_and_the_late_one_gives_way(day: Day) -> None:
    """Two batches while the worker rests: the first finds the second due already, and leaves it to that."""
    before = {one["id"] for one in day.runs_of("nightly")}

    def automatic() -> list[Any]:
        news = (one for one in day.runs_of("nightly") if one["id"] not in before)
        return [one for one in news if (one["created_by"] or {}).get("type") == "AUTOMATION"]

    queue = f"/work_pools/{day.deployment('nightly')['work_pool_name']}/queues/training"
    day.ask(queue, {"is_paused": True}, "PATCH")
    emit = ["event", "emit", "sacpo.data.updated", "--resource-id", "sacpo.data.support-team"]
    begun: list[Any] = []
    end = time.monotonic() + 1200
    while time.monotonic() < end:  # Prefect's sqlite loses an event now and then
        command = [str(Path(sys.executable).parent / "prefect"), *emit]
        auth = {"PREFECT_API_AUTH_STRING": day.login}  # as docs/retraining.md has it
        subprocess.run(command, env=os.environ | day.environment | auth, check=True, capture_output=True)
        time.sleep(3)
        begun = automatic()
        if len(begun) >= 2:
            break
    assert len(begun) >= 2, "no event started a run"
    day.ask(queue, {"is_paused": False}, "PATCH")
    while [one for one in begun if one["state"]["type"] not in ENDED] and time.monotonic() < end + 600:
        time.sleep(1)
        begun = automatic()
    first, *_, last = sorted(begun, key=lambda one: one["expected_start_time"])
    assert last["state"]["name"] == "NothingNew"
    assert first["state"]["name"] == "Superseded" and "superseded by" in first["state"]["message"]


def test_rolling_back_from_the_page(page: Any, day: Day) -> None:
    """After the retraining above version 2 serves."""
    form(page, day, "rollback")
    page.get_by_text("your name; goes to the promotion log").wait_for()
    page.locator("textarea").nth(1).fill("Ada")
    page.locator("textarea").last.fill("users complained")
    submit(page)
    day.wait("rollback", "Completed")
    page.goto(f"{day.mlflow}/#/models/quickstart/versions/1")
    page.get_by_text("@\u00a0champion").first.wait_for()
    process = subprocess.run(
        [sys.executable, "-m", "flows", "champion", "quickstart"],
        env=os.environ | {"SACPO_RUNS": str(day.runs)} | day.environment,
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for said in ("agreed by Ada: read the card", "2 → 1", "Ada (", "users complained", "Aliases: champion 1"):
        assert said in process.stdout
