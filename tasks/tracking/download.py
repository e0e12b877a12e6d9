"""What a registered version holds, copied from MLflow into the runs folder once: its policy, its report."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from models.artifacts import content_digest, file_digest
from models.errors import BadPolicy, Damaged
from models.files import sealed
from models.files.kept import Kept
from models.policy.weights import intact
from models.words import first_line
from tasks.tracking import tracker
from tasks.tracking.ledger import Ledger
from tasks.tracking.tracker import client, failures, moving, shown
from tasks.work import terminal


def fetch(root: Path, name: str, key: str = "base") -> Path:
    """Return the folder of a registered policy (`models:/NAME/VERSION` or `models:/NAME@ALIAS`), copied here once.

    The ledger says whose weights they must be. A version that it does not know may be another person's; it is used, and
    a sentence says what that rests on.

    Args:
        key: how the sentence about a wrong one calls it.

    Raises:
        BadPolicy: MLflow knows no such version, or it holds no policy, or another one than was registered.
    """
    import mlflow as api

    try:
        model, version = _known(root, name, key)
        place = _place(root, model, version)
        address = f"models:/{model}/{version.version}"
        with moving():
            _once(place, lambda new: api.artifacts.download_artifacts(address, dst_path=str(new)))
    except failures() as error:
        raise BadPolicy(f"{key} {name!r}: cannot be had from MLflow at {shown(root)} ({first_line(error)})") from error
    found = sorted(place.rglob("*.safetensors"))
    if not found:
        raise BadPolicy(f"{key} {name!r}: the version holds no weights in safetensors")
    known = Ledger(root).policy(model, str(version.version), str(version.source))
    digest = known or version.tags.get("sacpo.policy", "")
    try:
        if digest:
            intact(found[0].parent, digest)
    except Damaged as error:
        sealed.remove(place)
        raise BadPolicy(
            f"{key} {name!r}: what MLflow at {shown(root)} holds is not the policy that was registered (digest "
            f"{error.found[:12]}, not {digest[:12]}); if the same command says so again, restore MLflow's database and "
            "artifacts from a backup, or set SACPO_DATABASE to the ledger of this MLflow, if ours is another one's"
        ) from error
    if not known:
        unvouched(key, name, tagged=bool(digest))
    return found[0].parent


@cache
def unvouched(key: str, name: str, tagged: bool) -> None:
    """Say of a version, once, that its weights may be anybody's."""
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
    _known(root, name, key)


def _known(root: Path, name: str, key: str) -> tuple[str, Any]:
    if not tracker.SERVER and not (root / Kept.mlflow).exists():  # asking would make one
        raise BadPolicy(f"{key} {name!r}: nothing is registered in {root}; set MLFLOW_TRACKING_URI, or name a folder")
    try:
        return _version(client(root), name)
    except failures() as error:
        raise BadPolicy(f"{key} {name!r}: MLflow at {shown(root)} has no such version ({first_line(error)})") from error


def fetch_report(root: Path, name: str) -> tuple[Path, str]:
    """Return the folder of the report that came with a registered version, fetched, and the digest of its policy.

    Raises:
        BadPolicy: MLflow knows no such version, or it names no run and no policy of ours, or its run has no report.
    """
    mlflow = client(root)
    try:
        model, version = _version(mlflow, name)
        known = Ledger(root).policy(model, str(version.version), str(version.source))
        digest = known or str(version.tags.get("sacpo.policy", ""))
        if not digest or "sacpo.run_id" not in version.tags:
            raise BadPolicy(f"{name!r}: was not registered by sacpo, and has no report")
        run = version.tags["sacpo.run_id"]
        with tempfile.TemporaryDirectory() as fetched:  # a run whose judges were asked again has another report
            report = Path(mlflow.download_artifacts(run, "report.json", fetched))
            place = _place(root, model, version, f"-report-{file_digest(report)[:8]}")

            def download(new: Path) -> None:
                shutil.copy(report, new)
                mlflow.download_artifacts(run, "tables", str(new))

            _once(place, download)
        return place, digest
    except failures() as error:
        raise BadPolicy(f"{name!r}: MLflow at {shown(root)} has no report of it ({first_line(error)})") from error


def _place(root: Path, model: str, version: Any, held: str = "") -> Path:
    """Return where a version is copied to: another registry may have a version of the same name and number."""
    origin = content_digest([version.source, version.run_id, version.creation_timestamp])[:8]
    return root / Kept.registered / f"{model}-{version.version}-{origin}{held}"


def _version(mlflow: Any, name: str) -> tuple[str, Any]:
    """Return the registered model and the version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names."""
    model, _, alias = name.removeprefix("models:/").partition("@")
    model, _, number = model.partition("/")
    return model, mlflow.get_model_version_by_alias(model, alias) if alias else mlflow.get_model_version(model, number)


def _once(place: Path, download: Callable[[Path], Any]) -> None:
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
