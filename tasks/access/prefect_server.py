"""Prefect's server as we start it: on a socket that was ours before any password was sent, and for its own pages only.

Prefect asks for passwords and closes itself to pages of other sites, but lets a page of another port of the same host
show it in a frame, logged in, where a click on that page becomes a click on Prefect's; answers to any name; and its own
page asks servers of others. Here no page frames it, it asks nobody but itself, and answers to its own names.

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
"""Of every answer; Prefect's page is built of scripts and styles that stand in it."""


def names(origins: str) -> set[str]:
    """Return the names of this server: those of this machine, and of the pages that may ask it; none if all may."""
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
    if options.temporary:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    app = create_app(ephemeral=options.temporary, final=True)
    app.add_middleware(OwnPages, headers=HEADERS, hosts=names(settings.api.cors_allowed_origins))
    level = "error" if options.temporary else settings.logging_level.lower()
    keep = settings.api.keepalive_timeout
    config = uvicorn.Config(app, host=options.host, port=options.port, log_level=level, timeout_keep_alive=keep)
    uvicorn.Server(config).run(None if options.fd is None else [socket.socket(fileno=options.fd)])


if __name__ == "__main__":
    serve()
