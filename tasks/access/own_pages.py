"""A layer around a server: it answers to the server's own names only, and keeps other pages and programs off its pages.

With DNS rebinding a page of another site lets its own name lead to our server's address; the browser then takes our
answers for that site's. Such a request has the site's name in `Host`, and is refused.

Another program that had our port before may have left a service worker in the browser. It would stay between the user
and our pages, and read what is typed there. A browser asks the server for the worker's script again when a page is
opened; our answer is a script that removes the worker.
"""

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REMOVAL_SCRIPT = """
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", event => event.waitUntil(
  self.registration.unregister()
    .then(() => self.clients.matchAll({type: "window"}))
    .then(pages => pages.forEach(page => page.navigate(page.url)))));
"""
"""A service worker that takes the place of the one before it, unregisters itself, and loads the open pages again."""


class OwnPages:
    """An ASGI application around a server's.

    Args:
        app: the server's application.
        headers: added to every answer.
        hosts: the server's names; empty: every name will do. A request by another name needs an `Authorization`
            header, which a rebound page cannot send: it does not have the password.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], hosts: Collection[str] = ()) -> None:
        self.app, self.headers, self.hosts = app, headers, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: 403 to one by another name, the removal script for a service worker, else the server."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        # the third type of scope, `lifespan`, is the start and end of the server, and has no headers
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else None
        answer: ASGIApp = self.app
        if headers and self.hosts and hostname(headers) not in self.hosts and "authorization" not in headers:
            answer = PlainTextResponse("Refused: this server has another name", 403)
        elif headers and headers.get("service-worker") == "script":
            answer = Response(REMOVAL_SCRIPT, media_type="text/javascript")
        await answer(scope, receive, send_with_headers)


def hostname(headers: Headers) -> str:
    """Return the name by which a server was asked (`Host`), without the port; empty where the header is no name."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
