"""Whoever loads a model of others, to talk with it or to judge it, has it looked at first, where limits hold."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import chat
from models.artifacts import Policy
from models.errors import BadPolicy
from models.policy import probe, weights
from models.recipe.toml import assessment
from tasks.run import refuse_unusable

WHY = "chat_template.jinja: the chat template does not end within 5 s"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
Looked = Callable[[], list[str]]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Looked:
    """The process that looks at models refuses them all; return the places that it was asked about."""
    asked: list[str] = []

    def refuses(wanted: list[probe.Subject]) -> Any:
        asked.extend(one.place for one in wanted)
        raise probe.named_error(WHY, wanted[0].name)

    monkeypatch.setattr(probe, "_examined", refuses)
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(chat, "load", lambda *_: pytest.fail("loaded"))
    return lambda: asked


def test_chat_looks_at_a_folder_of_others_before_it_loads_it(policy: Policy, runs: Path, refusing: Looked) -> None:
    with pytest.raises(BadPolicy) as raised:
        chat.talk(str(policy.path), 0, 8, runs / "store")
    assert str(raised.value) == f"policy {str(policy.path)!r}: {WHY}" and refusing() == [str(policy.path)]


def test_evaluate_looks_at_its_policies_before_anything_is_loaded(
    policy: Policy, runs: Path, tmp_path: Path, refusing: Looked
) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy.path, other)
    (other / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(BadPolicy) as raised:
        refuse_unusable(assessment([str(policy.path), str(other)], "", []))
    assert str(raised.value) == f"policy {str(policy.path)!r}: {WHY}"
    assert refusing() == [str(policy.path), str(other)]


def test_what_was_made_here_is_not_looked_at(
    policy: Policy, runs: Path, refusing: Looked, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(policy.path, runs / "store" / "made")
    monkeypatch.setattr(chat, "load", lambda *_: (None, None))
    monkeypatch.setattr(sys.modules["builtins"], "input", lambda _: "")
    chat.talk(str(runs / "store" / "made"), 0, 8, runs / "store")
    assert refusing() == []


@pytest.mark.slow
def test_a_template_that_never_ends_does_not_hold_chat(policy: Policy, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(policy.path, tmp_path / "loops")
    (tmp_path / "loops" / "chat_template.jinja").write_text(LOOP + "{{ messages[-1].content }}")
    started = time.monotonic()
    with pytest.raises(BadPolicy, match=r"policy '.*/loops': .*chat_template.jinja: the chat template does not end"):
        chat.talk(str(tmp_path / "loops"), 0, 8, runs / "store")
    assert time.monotonic() - started < 120
