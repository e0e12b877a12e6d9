"""Prefect's server as we start it: on a socket that was ours before any password was sent, for its own pages only.

Prefect itself asks for passwords and refuses pages of other sites. Three gaps are left, which are closed here. A page
on another port of the same host may show Prefect's page in a frame, logged in, and turn clicks on itself into clicks on
Prefect's. The server answers to any name. And Prefect's own page sends requests to servers of its makers.

    python -m tasks.access.prefect_server [--fd N | --host HOST --port PORT] [--temporary]
"""

import argparse
import os
import socket
import threading
from urllib.parse import urlsplit

from tasks.access.own_pages import OwnPages
from tasks.access.proxies import LOOPBACK
from tasks.work.processes import end_with

HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
}
"""Added to every answer. Prefect's page holds scripts and styles itself, which need the two `unsafe-` words."""


def names(origins: str) -> set[str]:
    """Return the names to which this server answers; an empty set where it answers to every name.

    Args:
        origins: those whose pages may ask, divided by commas, or `*`. The server is known by their names too.
    """
    pages = [origin.strip() for origin in origins.split(",")]
    return set() if "*" in pages else {*LOOPBACK, *(urlsplit(page).hostname or "" for page in pages)}


def serve() -> None:
    """Serve until SIGTERM, or, as a temporary server, until the command that started it is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, help="a socket that listens")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--temporary", action="store_true", help="no pages, and gone with the command that started it")
    options = parser.parse_args()
    # the thread starts before the imports, which take seconds: the command may be gone by then
    if options.temporary:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    app = create_app(ephemeral=options.temporary, final=True)
    app.add_middleware(OwnPages, headers=HEADERS, hosts=names(settings.api.cors_allowed_origins))
    level = "error" if options.temporary else settings.logging_level.lower()
    keep_alive = settings.api.keepalive_timeout
    config = uvicorn.Config(app, host=options.host, port=options.port, log_level=level, timeout_keep_alive=keep_alive)
    uvicorn.Server(config).run(None if options.fd is None else [socket.socket(fileno=options.fd)])


if __name__ == "__main__":
    serve()
