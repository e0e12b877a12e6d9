"""MLflow's server as we start it (`mlflow server --app-name sacpo`): with users, and closed to other pages.

MLflow lets the pages of every port of localhost in, and a browser sends the password that it knows along: a page that
another user of the machine serves there could then read and write everything. Here a page may only ask the server that
it came from.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from mlflow.server import auth
from mlflow.server.auth import auth_config
from mlflow.server.security_utils import get_allowed_origins_from_env
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from tasks.access.own_pages import OwnPages


def create_app() -> Any:
    """Return MLflow's application with its users, whose admin has the password that is valid now.

    MLflow reads the admin's password only when it makes the admin. One that was changed, or lost and made anew, would
    shut us out.
    """
    app: Any = auth.create_app()
    name, password = auth_config.admin_username, auth_config.admin_password
    if name and password and not auth.store.authenticate_user(name, password, use_primary=True):
        auth.store.update_user(name, password=password, is_admin=True)
    app.add_middleware(SameOrigin)
    app.add_middleware(OwnPages, headers={})  # MLflow sends its own: no page of another origin may frame it
    return app


class SameOrigin:
    """Refuses what another page asks for; one that MLFLOW_SERVER_CORS_ALLOWED_ORIGINS names may ask."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or answer 403; 401 where the password comes in a way that MLflow cannot read."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else Headers()
        if not allowed(headers):
            await PlainTextResponse("Refused: another page asks", 403)(scope, receive, send)
        elif not headers.get("authorization", "basic").lower().startswith("basic"):
            asks = {"WWW-Authenticate": 'Basic realm="mlflow"'}
            await PlainTextResponse("Needs name and password (Basic)", 401, asks)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def allowed(headers: Headers) -> bool:
    """Whether a request comes from no page, or from a page of the server that it asks.

    A browser names the page in `Origin` where a page's script writes or reads across origins, and how far away it is
    in `Sec-Fetch-Site`. What a person opens, by a link or a bookmark, is a navigation.
    """
    origin = headers.get("origin", "")
    if origin:
        return urlsplit(origin).netloc == headers.get("host") or origin in (get_allowed_origins_from_env() or ())
    opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    return opened or headers.get("sec-fetch-site", "none") in ("none", "same-origin")
