"""Around a server: what asks for it by another name gets nothing, and nobody frames its pages or stands before them.

A page of another site can take the server's address for its own name (DNS rebinding), and names that name in `Host`.

A service worker that another program left in the browser, while it had our port, would stand between the user and our
pages for ever, and read what is typed there. A browser asks for its script again when a page is opened; here it gets
one that takes itself away.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

GONE = """
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", event => event.waitUntil(
  self.registration.unregister()
    .then(() => self.clients.matchAll({type: "window"}))
    .then(pages => pages.forEach(page => page.navigate(page.url)))));
"""
"""It takes the place of the one before it, gives that place up, and loads the pages again, which are ours then."""


class OwnPages:
    """An ASGI application around a server's.

    Args:
        headers: they stand in every answer.
        hosts: the names by which the server is known; empty: any. By another name it needs a password in its header.
    """

    def __init__(self, app: Callable[..., Any], headers: Mapping[str, str], hosts: Collection[str] = ()) -> None:
        self.app, self.headers, self.hosts = app, headers, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else None
        answer: Any = self.app
        if headers and self.hosts and hostname(headers) not in self.hosts and "authorization" not in headers:
            answer = PlainTextResponse("Refused: this server has another name", 403)
        elif headers and headers.get("service-worker") == "script":
            answer = Response(GONE, media_type="text/javascript")
        await answer(scope, receive, sending)


def hostname(headers: Headers) -> str:
    """Return the name by which a server was asked, without its port; empty for what is no name."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
