"""Around both servers: nobody frames Prefect's pages, and nothing that another program left stands before ours."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import sync_playwright
from starlette.responses import HTMLResponse

from tasks.access.own_pages import OwnPages
from tasks.access.prefect_server import HEADERS, names
from tasks.access.proxies import LOOPBACK
from tests.conftest import PATIENCE, free_port

LEFT = """
self.addEventListener('install', () => self.skipWaiting());
self.addEventListener('activate', event => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', event => event.respondWith(
  new Response('<h1>type your password</h1>', {headers: {'Content-Type': 'text/html'}})));
"""
REGISTERS = "<script>navigator.serviceWorker.register('/left.js')</script>"
PATH = shutil.which("chromium")
CHROMIUM: Any = {"executable_path": PATH, "args": ["--no-sandbox", "--disable-gpu"]}
pytestmark = pytest.mark.skipif(PATH is None, reason="needs Debian's chromium")


class Another(BaseHTTPRequestHandler):
    """A program that takes our port, and leaves a service worker."""

    def do_GET(self) -> None:
        script = self.path == "/left.js"
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if script else "text/html")
        self.end_headers()
        self.wfile.write((LEFT if script else REGISTERS).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def another(port: int) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", port), Another)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def ours(port: int) -> Iterator[None]:
    app = OwnPages(HTMLResponse("<h1>ours</h1>"), HEADERS, LOOPBACK)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.02)
    yield
    server.should_exit = True
    thread.join()


def test_a_service_worker_that_another_program_left_is_taken_away() -> None:
    port = free_port()
    with sync_playwright() as player:
        browser = player.chromium.launch(**CHROMIUM)
        page = browser.new_page()
        with another(port):
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("navigator.serviceWorker.controller", timeout=PATIENCE * 1000)
        with ours(port):
            page.goto(f"http://127.0.0.1:{port}/")  # the other's word, once: the browser asks for the script meanwhile
            page.wait_for_function("document.querySelector('h1')?.innerText == 'ours'", timeout=PATIENCE * 1000)
            page.goto(f"http://127.0.0.1:{port}/")
            assert page.inner_text("h1") == "ours"
        browser.close()


def test_a_page_of_another_port_of_this_host_frames_nothing() -> None:
    """Where Prefect is logged in, a click on its menu would start a run."""
    port, framing = free_port(), free_port()
    with sync_playwright() as player, ours(port), another(framing):
        browser = player.chromium.launch(**CHROMIUM)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{framing}/left.js")
        with page.expect_console_message(lambda message: "frame-ancestors" in message.text, timeout=PATIENCE * 1000):
            page.evaluate(f"document.body.innerHTML = '<iframe src=\"http://127.0.0.1:{port}/\"></iframe>'")
        browser.close()


def test_what_asks_by_another_name_needs_a_password() -> None:
    answers = {}
    with ours(port := free_port()):
        for host in ("127.0.0.1", "localhost:9", "[::1]:9", "evil.example", "127.0.0.1.evil.example", "", "[", "@"):
            for password in ({}, {"Authorization": "Basic x"}):
                connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                connection.putrequest("GET", "/", skip_host=True)
                for name, value in {"Host": host, **password}.items():
                    connection.putheader(name, value)
                connection.endheaders()
                answers[host, bool(password)] = connection.getresponse().status
    refused = {host for (host, password), status in answers.items() if status == 403 and not password}
    assert refused == {"evil.example", "127.0.0.1.evil.example", "", "[", "@"}
    assert {status for (_, password), status in answers.items() if password} == {200}


def test_the_names_of_a_server_are_those_of_this_machine_and_of_its_pages() -> None:
    assert names("http://127.0.0.1:4200, https://prefect.example") == {*LOOPBACK, "prefect.example"}
    assert names("*") == set()  # whoever says so wants it open
