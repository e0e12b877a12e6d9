"""What one run writes to MLflow's model registry: versions of its policy, their tags, their cards.

Aliases are moved elsewhere: registry/champion.py.
"""

from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from models.artifacts import Policy
from models.errors import Damaged
from models.gate.promotion_log import Registered
from models.policy.weights import content, intact
from models.recipe import Recipe
from tasks.tracking import connection
from tasks.tracking.ledger import Ledger
from tasks.tracking.log import where
from tasks.tracking.mlflow_run import MlflowRun
from tasks.work import store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAT_POLICY = Path(__file__).parents[2] / "mlflow" / "chat_policy.py"
"""The code with which MLflow serves a version."""


class Registration:
    """The model versions of one run.

    Every method raises what `connection.failures` names where MLflow does not answer.
    """

    def __init__(self, run: MlflowRun) -> None:
        self._run = run

    def register(self, policy: Policy, tags: dict[str, str]) -> str:
        """Return the number of a version of the policy: one that this run registered before, or a new one.

        Either carries `tags`, and no older ones of the gate.

        Raises:
            Damaged: the policy's files are not what its digest names.
        """
        client, parent, name = self._run.client(), self._run.open(), self._name()
        try:
            client.create_registered_model(name)
        except connection.failures() as error:
            if connection.error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self.versions(policy)
        if versions:  # it was registered before this run was killed, or was compared with another champion
            version = str(versions[0].version)
            for key in {key for key in versions[0].tags if key.startswith("gate.")} - tags.keys():
                client.delete_model_version_tag(name, version, key)
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, value)
            return version
        address = self.log_weights(name, policy)
        model_id = address.rpartition("/")[2]  # a server refuses the address `models:/ID` without it
        created = client.create_model_version(
            name, address, parent, tags=self._own_tags(policy) | tags, model_id=model_id
        )
        return str(created.version)

    def versions(self, policy: Policy) -> list["ModelVersion"]:
        """Return this run's versions of a policy.

        Everyone can edit the tags by which they are found, so only those count whose weights the ledger knows.
        """
        name = self._name()
        digests = Ledger(self._run.root).logged_weights(name)
        versions = self._run.client().search_model_versions(where({"name": name, **self._own_tags(policy)}))
        return [version for version in versions if digests.get(str(version.source)) == policy.digest]

    def describe(self, registered: Registered, card: str, out: Path) -> None:
        """Send the model card: as description of the version, and the file in `out` as artifact of the run."""
        self._run.client().update_model_version(registered.name, registered.version, card)
        self._run.client().log_artifact(self._run.open(), str(out / "model_card.md"))

    def tag(self, model: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        self._run.client().set_model_version_tag(model, version, key, value)

    def log_weights(self, name: str, policy: Policy) -> str:
        """Log the weights of a version-to-be of `name` with the code that serves them; return their address.

        Weights that a killed attempt has logged are found again.

        Raises:
            Damaged: the policy's files are not what its digest names; the same command then makes them again.
        """
        import mlflow

        root, client, parent = self._run.root, self._run.client(), self._run.open()
        digests = Ledger(root).logged_weights(name)
        experiment = client.get_run(parent).info.experiment_id
        for model in client.search_logged_models([experiment], where({"source_run_id": parent})):
            if digests.get(str(model.model_uri)) == policy.digest and model.status == "READY":
                return str(model.model_uri)
        try:
            intact(policy.path, policy.digest)
        except Damaged:
            store.invalidate(policy.path)
            raise
        decoding = self._run.recipe.evaluation.model_dump(include={"max_new_tokens", "temperature", "stop"})
        # the local part of a version (`2.9.0+cpu`) is cut off: PyPI has no such version to install
        libraries = ("torch", "transformers")
        requirements = [f"{library}=={installed(library).partition('+')[0]}" for library in libraries]
        with connection.long_timeout(), mlflow.start_run(run_id=parent):
            logged = mlflow.pyfunc.log_model(
                name="policy",
                python_model=str(CHAT_POLICY),
                artifacts={"policy": str(policy.path)},
                model_config={"decoding": decoding, "sha256": content(policy.path)},
                pip_requirements=requirements,
                tags={"sacpo.weights": policy.digest},
            )
        Ledger(root).note_logged(name, str(logged.model_uri), policy.digest)
        return str(logged.model_uri)

    def _name(self) -> str:
        """Return the name of the registered model."""
        assert isinstance(self._run.recipe, Recipe)  # `sacpo evaluate` trains nothing, and registers nothing
        return self._run.recipe.registered_name

    def _own_tags(self, policy: Policy) -> dict[str, str]:
        """Return the tags by which a version of this run is found."""
        return {"sacpo.policy": policy.digest, "sacpo.run_id": self._run.open()}
