"""The password of the servers that we start: one for each runs folder, for Prefect and MLflow.

Whoever reaches Prefect's API runs commands as the user of its worker, and every page in a browser reaches loopback. So
every server that we start asks for a password, the temporary one of `sacpo run` too. The password lies in the runs
folder, readable by its owner alone. It is sent only to servers of this folder that are up now: a server that the user
names gets what the user set for it.
"""

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from models.errors import BadPlace
from models.files import sealed
from models.files.kept import Kept
from tasks.work.processes import started as started_at

USER = "admin"
USABLE = re.compile(r"[!-9;-~]{12,72}")
"""No space, no colon; MLflow takes no shorter ones, and its hash reads no longer ones."""
SET_BY_USER = {
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"),
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
}
"""Variables with which a user lets us into a server that an address names."""
CHOSEN = {
    "PREFECT_API_URL": ("PREFECT_SERVER_API_AUTH_STRING",),
    "MLFLOW_TRACKING_URI": ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"),
}
"""Variables with which a user chooses the password of a server that we start."""


class Process(TypedDict):
    """A process of this or another host; `started` tells it from others that have its number."""

    host: str
    pid: int
    started: str


Noted = TypedDict(
    "Noted",
    {
        "addresses": dict[str, str],
        "password opens": dict[str, str],
        "MLflow's user": str,
        "process": Process,
    },
)
"""What `sacpo up` notes while it runs."""


class Login(NamedTuple):
    """What a server of ours asks for."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r}, …)"  # no secret in a traceback


def password(root: Path) -> str:
    """Return the password of a runs folder; it is made where there is none.

    Raises:
        BadPlace: the file holds nothing that can be a password, or cannot be read.
    """
    place = root / Kept.password
    if not place.exists():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(prefix=f".{Kept.password}-", dir=root)  # readable by its owner alone
        with open(handle, "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
        with suppress(FileExistsError):  # of several who make one, the first one's is used
            os.link(new, place)
        os.unlink(new)
    try:
        kept = place.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        kept = ""
    if not USABLE.fullmatch(kept):
        raise BadPlace(
            f"{place}: holds no password (12 to 72 letters, digits or signs, no colon); delete the file, and the next "
            "start makes a new one"
        )
    return kept


def prefect(root: Path, environment: Mapping[str, str]) -> str:
    """Return what our Prefect asks for, as `user:password`; what the user set for it wins."""
    return environment.get("PREFECT_SERVER_API_AUTH_STRING") or f"{USER}:{password(root)}"


def mlflow(root: Path, environment: Mapping[str, str]) -> Login:
    """Return what our MLflow asks for; what the user set for it wins."""
    user = environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER
    return Login(user, environment.get("MLFLOW_AUTH_ADMIN_PASSWORD") or password(root))


def by_user(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the servers, by the variables that name them, whose password the user chose; ours does not open them."""
    return tuple(name for name, variables in CHOSEN.items() if any(map(environment.get, variables)))


def note(root: Path, addresses: Mapping[str, str], started: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write down where the servers of this `sacpo up` are, and which of them the file's password opens."""
    ours = {name: address for name, address in addresses.items() if name in started}
    opened = {name: address for name, address in ours.items() if name not in by_user(environment)}
    process = {"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}
    user = environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER
    noted = {"addresses": dict(addresses), "password opens": opened, "MLflow's user": user, "process": process}
    sealed.write(root / Kept.servers, noted)


def noted(root: Path) -> dict[str, Any]:
    """Return what the `sacpo up` that runs now has noted, or nothing: what a dead one noted is no server of ours."""
    tree = sealed.read(root / Kept.servers, Noted)
    if tree is None:
        return {}
    process = tree["process"]
    alive = process["host"] == socket.gethostname() and process["started"] == started_at(process["pid"])
    return dict(tree) if alive else {}


def numbered(root: Path, name: str, address: str) -> str:
    """Return the address of a server of this folder that is up now by its number, another one as it is.

    `localhost` may lead to another user's program on IPv6, while our servers listen on 127.0.0.1.
    """
    ours = noted(root).get("addresses", {}).get(name, "")
    return ours if address.rstrip("/").replace("//localhost:", "//127.0.0.1:") == ours else address


def credentials(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let us into the servers which the environment names, as far as they are ours.

    The address of such a server is among them, with its number.
    """
    tree = noted(root)
    found: dict[str, str] = {}
    for name, ours in tree.get("password opens", {}).items():
        named = numbered(root, name, environment.get(name, "").rstrip("/"))
        if named != ours or any(map(environment.get, SET_BY_USER[name])):
            continue
        found[name] = ours
        if name == "PREFECT_API_URL":
            found["PREFECT_API_AUTH_STRING"] = f"{USER}:{password(root)}"
        else:
            found["MLFLOW_TRACKING_USERNAME"] = tree["MLflow's user"]
            found["MLFLOW_TRACKING_PASSWORD"] = password(root)
    return found


def temporary(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables under which Prefect starts its temporary server closed, and its client gets in.

    Its database is that of `sacpo up`: what a page could plant there a worker would run later. No browser knows this
    password, so no token against forged requests is needed beside it.
    """
    auth = prefect(root, environment)
    return {
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",
    }


def to_type(root: Path, environment: Mapping[str, str]) -> list[str]:
    """Return a line for each page: what to type there; of a password that the user chose, where it was set."""
    tree = noted(root)
    opened = tree["password opens"] if tree else SET_BY_USER.keys() - {*by_user(environment)}
    user = tree.get("MLflow's user") or environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER
    lines = {
        "PREFECT_API_URL": f"Prefect: {USER}:{password(root)}",
        "MLFLOW_TRACKING_URI": f"MLflow:  user {user}, password {password(root)}",
    }
    yours = "what you set for it where `sacpo up` was started, in"
    return [
        line if name in opened else f"{line.partition(':')[0]}: {yours} {' or '.join(CHOSEN[name])}"
        for name, line in lines.items()
    ]
