"""What a registered version holds, copied from MLflow into the runs folder once: its policy, its report."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from models.artifacts import content_digest, file_digest
from models.errors import BadPolicy, Damaged
from models.files import sealed
from models.files.kept import RunsFolderEntry
from models.policy.weights import intact
from models.words import first_line
from tasks.tracking import connection
from tasks.tracking.connection import failures, long_timeout, shown_uri
from tasks.tracking.ledger import Ledger
from tasks.work import terminal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def fetch(root: Path, name: str, key: str = "base") -> Path:
    """Return the folder of a registered policy (`models:/NAME/VERSION` or `models:/NAME@ALIAS`), copied here once.

    The ledger says whose weights they must be. A version that it does not know may be another person's; it is used, and
    a sentence says what that rests on.

    Args:
        key: how the sentence about a wrong one calls it.

    Raises:
        BadPolicy: MLflow knows no such version, or it holds no policy, or another one than was registered.
    """
    import mlflow

    try:
        model, version = _existing(root, name, key)
        place = _place(root, model, version)
        address = f"models:/{model}/{version.version}"
        with long_timeout():
            _once(place, lambda folder: mlflow.artifacts.download_artifacts(address, dst_path=str(folder)))
    except failures() as error:
        why = f"cannot be had from MLflow at {shown_uri(root)} ({first_line(error)})"
        raise BadPolicy(f"{key} {name!r}: {why}") from error
    weights = sorted(place.rglob("*.safetensors"))
    if not weights:
        raise BadPolicy(f"{key} {name!r}: the version holds no weights in safetensors")
    vouched = Ledger(root).policy(model, str(version.version), str(version.source))
    digest = vouched or version.tags.get("sacpo.policy", "")
    try:
        if digest:
            intact(weights[0].parent, digest)
    except Damaged as error:
        sealed.remove(place)  # so that the same command fetches it again
        raise BadPolicy(
            f"{key} {name!r}: what MLflow at {shown_uri(root)} holds is not the policy that was registered (digest "
            f"{error.actual[:12]}, not {digest[:12]}); if the same command says so again, restore MLflow's database "
            "and artifacts from a backup, or set SACPO_DATABASE to the ledger of this MLflow, if ours is another one's"
        ) from error
    if not vouched:
        say_unvouched(key, name, tagged=bool(digest))
    return weights[0].parent


@cache
def say_unvouched(key: str, name: str, tagged: bool) -> None:
    """Say of a version that its weights may be another person's; once per process, however often it is fetched."""
    except_tag = " but its tag in MLflow, which everybody can edit," if tagged else ""
    terminal.say(
        f"{key} {name!r}: our ledger does not know whose weights this version holds (registered by hand, under another "
        f"SACPO_DATABASE, or by an older sacpo): nobody{except_tag} vouches for them"
    )


def check(root: Path, name: str, key: str) -> None:
    """Ask whether there is such a version, without fetching it.

    Raises:
        BadPolicy: MLflow knows none.
    """
    _existing(root, name, key)


def _existing(root: Path, name: str, key: str) -> tuple[str, "ModelVersion"]:
    """Return the registered model and the version that `name` stands for.

    Raises:
        BadPolicy: MLflow knows no such version.
    """
    if not connection.SERVER and not (root / RunsFolderEntry.mlflow).exists():  # a client would create the database
        raise BadPolicy(f"{key} {name!r}: nothing is registered in {root}; set MLFLOW_TRACKING_URI, or name a folder")
    try:
        return _version(connection.client(root), name)
    except failures() as error:
        why = f"MLflow at {shown_uri(root)} has no such version ({first_line(error)})"
        raise BadPolicy(f"{key} {name!r}: {why}") from error


def fetch_report(root: Path, name: str) -> tuple[Path, str]:
    """Return the folder of the report that came with a registered version, fetched, and the digest of its policy.

    Raises:
        BadPolicy: MLflow knows no such version, or it names no run and no policy of ours, or its run has no report.
    """
    client = connection.client(root)
    try:
        model, version = _version(client, name)
        vouched = Ledger(root).policy(model, str(version.version), str(version.source))
        digest = vouched or str(version.tags.get("sacpo.policy", ""))
        if not digest or "sacpo.run_id" not in version.tags:
            raise BadPolicy(f"{name!r}: was not registered by sacpo, and has no report")
        run = version.tags["sacpo.run_id"]
        with tempfile.TemporaryDirectory() as temporary:
            # fetched every time, since its digest names the copy: a run whose judges were asked again has another one
            report = Path(client.download_artifacts(run, "report.json", temporary))
            place = _place(root, model, version, f"-report-{file_digest(report)[:8]}")

            def download(folder: Path) -> None:
                shutil.copy(report, folder)
                client.download_artifacts(run, "tables", str(folder))

            _once(place, download)
        return place, digest
    except failures() as error:
        raise BadPolicy(f"{name!r}: MLflow at {shown_uri(root)} has no report of it ({first_line(error)})") from error


def _place(root: Path, model: str, version: "ModelVersion", suffix: str = "") -> Path:
    """Return where a version is copied to: another registry may have a version of the same name and number."""
    origin = content_digest([version.source, version.run_id, version.creation_timestamp])[:8]
    return root / RunsFolderEntry.registered / f"{model}-{version.version}-{origin}{suffix}"


def _version(client: "MlflowClient", name: str) -> tuple[str, "ModelVersion"]:
    """Return the registered model and the version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names."""
    model, _, alias = name.removeprefix("models:/").partition("@")
    model, _, number = model.partition("/")
    return model, client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, number)


def _once(place: Path, download: Callable[[Path], object]) -> None:
    """Download into a folder beside `place` and rename it; a killed download leaves nothing that looks whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if place.exists():
            return
        new = place.with_name(place.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        download(new)
        new.rename(place)
