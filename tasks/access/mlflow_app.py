"""MLflow's server as we start it (`mlflow server --app-name sacpo`): with users, and closed to other pages.

MLflow answers to the pages of every port of localhost, and a browser adds the password that it has stored. So a page
that another user of the machine serves on another port could read and write everything. Here a page may only ask the
server that it came from.
"""

from urllib.parse import urlsplit

from mlflow.server import auth
from mlflow.server.auth import auth_config
from mlflow.server.security_utils import get_allowed_origins_from_env
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tasks.access.own_pages import OwnPages


def create_app() -> Starlette:
    """Return MLflow's application with its users, whose admin has the password that is valid now."""
    app: Starlette = auth.create_app()  # a Starlette application under uvicorn, which `mlflow server` runs by default
    name, password = auth_config.admin_username, auth_config.admin_password
    # MLflow reads the admin's password only when it makes the admin. After a change, or with a new password in the
    # place of a lost one, we could not get in.
    if name and password and not auth.store.authenticate_user(name, password, use_primary=True):
        auth.store.update_user(name, password=password, is_admin=True)
    app.add_middleware(SameOrigin)
    # no headers of ours: MLflow itself forbids other origins to frame its pages
    app.add_middleware(OwnPages, headers={})
    return app


class SameOrigin:
    """An ASGI application around MLflow's that refuses requests from other pages.

    Pages of the origins in MLFLOW_SERVER_CORS_ALLOWED_ORIGINS may ask.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; answer 403 to another page, and 401 to a password in a form that MLflow cannot read."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else Headers()
        if not allowed(headers):
            await PlainTextResponse("Refused: another page asks", 403)(scope, receive, send)
        # MLflow reads a password of basic authentication only
        elif not headers.get("authorization", "basic").lower().startswith("basic"):
            challenge = {"WWW-Authenticate": 'Basic realm="mlflow"'}
            await PlainTextResponse("Needs name and password (Basic)", 401, challenge)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def allowed(headers: Headers) -> bool:
    """Return whether a request comes from no page, or from a page of the server that it asks.

    A browser names the page's origin in `Origin` when a script of the page writes, or reads across origins. In
    `Sec-Fetch-Site` it says whether the page is of the same origin or site. When a person opens a link or a bookmark,
    the request is a navigation.
    """
    origin = headers.get("origin", "")
    if origin:
        return urlsplit(origin).netloc == headers.get("host") or origin in (get_allowed_origins_from_env() or ())
    mode, destination = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest", "document")
    # a frame is a navigation too, but its destination is `iframe`
    is_opened_by_person = mode == "navigate" and destination == "document"
    # programs that are no browser send none of these headers
    return is_opened_by_person or headers.get("sec-fetch-site", "none") in ("none", "same-origin")
