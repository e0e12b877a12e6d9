"""The password of the servers that we start: one per runs folder, the same for Prefect and MLflow.

A program that reaches Prefect's API can run commands as the user of its worker, and every page in a browser reaches
loopback. So every server that we start asks for a password, also the temporary one of `sacpo run`. The password lies in
the runs folder, readable by its owner alone. It is sent only to servers of this folder that run now; for another server
the user sets the password in the environment.
"""

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from models.errors import BadPlace
from models.files import sealed
from models.files.kept import RunsFolderEntry
from tasks.work.processes import identity_of

USER = "admin"
USABLE = re.compile(r"[!-9;-~]{12,72}")
"""A password: no space, no colon. MLflow accepts none below 12 characters, and its hash reads 72 at most."""
SET_BY_USER = {
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"),
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
}
"""Variable that names a server → variables in which a user gives us a password or key for it."""
CHOSEN = {
    "PREFECT_API_URL": ("PREFECT_SERVER_API_AUTH_STRING",),
    "MLFLOW_TRACKING_URI": ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"),
}
"""Variable that names a server → variables in which a user chooses the password of the one that we start."""


class Process(TypedDict):
    """A process of this or another host."""

    host: str
    pid: int
    started: str
    """When it was started, as `processes.identity_of` returns it: a later process may get the same number."""


RunningServers = TypedDict(  # the functional form, since two keys of the file are no names of Python
    "RunningServers",
    {
        "addresses": dict[str, str],
        "password opens": dict[str, str],
        "MLflow's user": str,
        "process": Process,
    },
)
"""What `servers.json` holds while `sacpo up` runs; addresses by the variables that name the servers."""


class Login(NamedTuple):
    """User and password of MLflow's admin."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r}, …)"  # a traceback must not show the password


def password(root: Path) -> str:
    """Return the password of a runs folder; make one where there is none.

    Raises:
        BadPlace: the file holds nothing that can be a password, or cannot be read.
    """
    file_path = root / RunsFolderEntry.password
    if not file_path.exists():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp makes a file that its owner alone can read
        handle, new_path = tempfile.mkstemp(prefix=f".{RunsFolderEntry.password}-", dir=root)
        with open(handle, "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
        # A link, unlike a rename, never replaces a file: of several processes that make a password at the same time
        # all use the first one's.
        with suppress(FileExistsError):
            os.link(new_path, file_path)
        os.unlink(new_path)
    try:
        text = file_path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not USABLE.fullmatch(text):
        raise BadPlace(
            f"{file_path}: holds no password (12 to 72 letters, digits or signs, no colon); delete the file, and the "
            "next start makes a new one"
        )
    return text


def prefect(root: Path, environment: Mapping[str, str]) -> str:
    """Return user and password of the Prefect server that we start, as `user:password`; the user's own choice wins."""
    return environment.get("PREFECT_SERVER_API_AUTH_STRING") or f"{USER}:{password(root)}"


def mlflow(root: Path, environment: Mapping[str, str]) -> Login:
    """Return user and password of the MLflow server that we start; the user's own choice wins."""
    user = environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER
    return Login(user, environment.get("MLFLOW_AUTH_ADMIN_PASSWORD") or password(root))


def by_user(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the variables of the servers whose password the user chose: the password file does not open them."""
    return tuple(name for name, variables in CHOSEN.items() if any(map(environment.get, variables)))


def write_running(
    root: Path, addresses: Mapping[str, str], started: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Write down where the servers of this `sacpo up` are, and which of them the file's password opens.

    Args:
        addresses: variable → address, of all that other terminals need.
        started: the variables of the servers that this `sacpo up` started.
    """
    own_addresses = {name: address for name, address in addresses.items() if name in started}
    chosen_by_user = by_user(environment)
    record: RunningServers = {
        "addresses": dict(addresses),
        "password opens": {name: address for name, address in own_addresses.items() if name not in chosen_by_user},
        "MLflow's user": environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER,
        "process": {"host": socket.gethostname(), "pid": os.getpid(), "started": identity_of(os.getpid())},
    }
    sealed.write(root / RunsFolderEntry.servers, record)


def read_running(root: Path) -> RunningServers | None:
    """Return what the `sacpo up` that runs now on this folder has noted; None where none runs."""
    record = sealed.read(root / RunsFolderEntry.servers, RunningServers)
    if record is None:
        return None
    # A killed `sacpo up` leaves its file behind. Another program may have its ports now, and must not get the password.
    process = record["process"]
    is_alive = process["host"] == socket.gethostname() and process["started"] == identity_of(process["pid"])
    return record if is_alive else None


def with_numeric_host(root: Path, name: str, address: str) -> str:
    """Return the address of a server, with 127.0.0.1 for `localhost` where it is one of this folder that runs now.

    `localhost` may lead to another user's program on IPv6, while our servers listen on 127.0.0.1.

    Args:
        name: the variable that names the server.
    """
    running = read_running(root)
    own_address = running["addresses"].get(name, "") if running else ""
    return own_address if address.rstrip("/").replace("//localhost:", "//127.0.0.1:") == own_address else address


def credentials(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let us into the servers which the environment names, as far as they are ours.

    The address of such a server is among them, by its number.
    """
    running = read_running(root)
    variables: dict[str, str] = {}
    if running is None:
        return variables
    for name, own_address in running["password opens"].items():
        address = with_numeric_host(root, name, environment.get(name, "").rstrip("/"))
        # where the user has set a password, ours is not sent, even to this address
        if address != own_address or any(map(environment.get, SET_BY_USER[name])):
            continue
        variables[name] = own_address
        if name == "PREFECT_API_URL":
            variables["PREFECT_API_AUTH_STRING"] = f"{USER}:{password(root)}"
        else:
            variables["MLFLOW_TRACKING_USERNAME"] = running["MLflow's user"]
            variables["MLFLOW_TRACKING_PASSWORD"] = password(root)
    return variables


def temporary(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables under which Prefect's temporary server asks for a password, and its client sends it.

    The server's database is that of `sacpo up`: what a page could plant there a worker would run later. No browser
    stores this password, so no token against forged requests is needed beside it.
    """
    login = prefect(root, environment)
    return {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_API_AUTH_STRING": login,
        # Prefect's default is `*`: the pages of every site may ask
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",
    }


def login_lines(root: Path, environment: Mapping[str, str]) -> list[str]:
    """Return a line for each server's page: the password to type there, or in which variable the user chose it."""
    running = read_running(root)
    opened = running["password opens"].keys() if running else SET_BY_USER.keys() - {*by_user(environment)}
    user = (running and running["MLflow's user"]) or environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER
    lines = {
        "PREFECT_API_URL": f"Prefect: {USER}:{password(root)}",
        "MLFLOW_TRACKING_URI": f"MLflow:  user {user}, password {password(root)}",
    }
    where_chosen = "what you set for it where `sacpo up` was started, in"
    return [
        line if name in opened else f"{line.partition(':')[0]}: {where_chosen} {' or '.join(CHOSEN[name])}"
        for name, line in lines.items()
    ]
