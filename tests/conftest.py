"""What all tests share: one thread, no network, a runs folder of their own, and a tiny real policy."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true", PREFECT_SERVER_ANALYTICS_ENABLED="false",
)  # fmt: skip

os.environ.pop("MLFLOW_TRACKING_URI", None)  # asked once, when tasks.tracking is imported

import pytest

from models import policy as policies
from models import preferences, reference, town
from models.artifacts import Policy, Preferences, Reference, content_digest
from models.recipe import Compute, Data

Dialogue = tuple[str, str, str]
"""Prompt, chosen, rejected."""


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own runs folder, which does not exist yet."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SACPO_RUNS", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compute() -> Compute:
    return Compute(device="cpu", processes=1)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A tiny Llama with random weights, saved as every policy is."""
    return make_policy(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The same architecture and tokenizer, other weights."""
    return make_policy(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    """Comparisons of many lengths, made of words that the town's tokenizer knows."""
    return make_dialogues(40, seed=0)


@pytest.fixture(scope="session")
def scored(
    policy: Policy, dialogues: list[Dialogue], compute: Compute, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """The comparisons, tokenised, with the log-probs of `policy`."""
    return make_reference(policy, dialogues, compute, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def reference_of(compute: Compute) -> Callable[[Policy, list[Dialogue], Path], Reference]:
    """`reference_of(policy, dialogues, folder)`: the same, of another policy or other comparisons."""
    return lambda policy, dialogues, folder: make_reference(policy, dialogues, compute, folder)


def make_policy(folder: Path, seed: int) -> Policy:
    tokenizer = town.tokenizer()
    policies.save(town.untrained(seed, tokenizer), tokenizer, folder)
    return policies.describe(folder, Policy(path=folder, digest="", name="base", kind="base"))


def make_dialogues(count: int, seed: int) -> list[Dialogue]:
    words = sorted(set(town.tokenizer().get_vocab()) - set(town.SPECIAL))
    draw = Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return [(text(3, 12), text(1, 6), text(7, 12)) for _ in range(count)]


def make_reference(policy: Policy, dialogues: list[Dialogue], compute: Compute, folder: Path) -> Reference:
    """Score with the production code; identical comparisons stay, each as often as it is given."""
    given, out = folder / "pairs", folder / "scored"
    given.mkdir(parents=True)
    out.mkdir()
    with (given / "train.jsonl").open("w", encoding="utf-8") as file:
        for prompt, chosen, rejected in dialogues:
            pair = preferences.Pair([{"role": "user", "content": prompt}], chosen, rejected)
            preferences._write(file, pair._asdict())
    pairs = Preferences(
        path=given, digest=content_digest(dialogues), metric="harmless", counts={"train": len(dialogues)}
    )
    return reference.score(policy, pairs, ["train"], Data(), compute, out)
