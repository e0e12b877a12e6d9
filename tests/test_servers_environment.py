"""A server that a variable names and that is none of ours: one sentence, whatever it answers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from models.errors import BadPlace
from tasks.servers import up
from tasks.servers.environment import request_json

HTML = "<!doctype html>\n<title>a router</title>" + " " * 1000


@contextmanager
def answering(text: str) -> Iterator[dict[str, str]]:
    """Yield the names of a server that answers every question with the same text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {"MLFLOW_TRACKING_URI": address, "PREFECT_API_URL": f"{address}/api"}
        server.shutdown()


@pytest.mark.parametrize(
    "text", ["hello", HTML, "", "null", "{}", "[1]", '["training"]', "[{}]", '[{"id": 1}]', "7", '{"name": "x"}']
)
def test_nonsense_is_a_sentence(text: str) -> None:
    with answering(text) as names:
        for asked in (up._pool, up._reconcile):
            with pytest.raises(BadPlace) as error:
                asked(names)
            assert str(error.value).startswith(f"PREFECT_API_URL = {names['PREFECT_API_URL']} answers ")
            assert str(error.value).endswith(", which is not Prefect") and len(str(error.value)) < 250
        for name, path, whose in (
            ("MLFLOW_TRACKING_URI", "/version", "MLflow"),
            ("PREFECT_API_URL", "/admin/version", "Prefect"),
        ):
            with pytest.raises(BadPlace, match=f"^{name} = .* answers .* to {path}, which is not {whose}$"):
                request_json(name, path, names)


def test_what_is_made_must_be_answered_with_it() -> None:
    with answering("[]") as names, pytest.raises(BadPlace, match="to /work_pools/, which is not Prefect"):
        up._pool(names)


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_password_goes_nowhere_that_an_answer_names(variable: str) -> None:
    """As a server behind single sign-on, which sends everybody to its login."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.headers["Host"])
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/login")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        names = {variable: f"http://{host}", "MLFLOW_TRACKING_USERNAME": "ada", "PREFECT_API_AUTH_STRING": "ada:pw"}
        for body in (None, {}):
            with pytest.raises(BadPlace, match=r"sends us to another address; give the one that answers itself$"):
                request_json(variable, "/version", names, body)
        server.shutdown()
    assert {*got} == {host}


@pytest.mark.parametrize(("text", "version"), [("3.17.0", "3.17.0"), ('"3.8.8+4.gabc"', "3.8.8+4.gabc")])
def test_versions_are_told_as_they_are(text: str, version: str) -> None:
    with answering(text) as names:
        assert request_json("PREFECT_API_URL", "/admin/version", names) == version
