"""A folder or a file of a hub's repository, out of the hub's own cache."""

from pathlib import Path

import pytest

from models.data import readers
from models.errors import BadInput
from models.files import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill a cache with a repository of two sets, as Anthropic/hh-rlhf has them."""
    cache = tmp_path / "datasets--someone--pairs"
    found = cache / "snapshots" / COMMIT
    for name in ("harmless-base", "helpful-base"):
        (found / name).mkdir(parents=True)
        (found / name / "train.jsonl").write_text(ROW.replace('"q"', f'"{name}"'))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return found


@pytest.mark.parametrize("place", ["someone/pairs", f"someone/pairs@{COMMIT}"])
@pytest.mark.parametrize("part", ["harmless-base", "harmless-base/train.jsonl"])
def test_one_of_several_sets_is_read(snapshot: Path, place: str, part: str) -> None:
    assert hub.is_name(f"{place}:{part}")
    path = hub.local(f"{place}:{part}", "dataset")
    assert path == snapshot / part
    assert [row["prompt"] for _, row in readers.usable_rows(path)] == ["harmless-base"]


def test_what_the_repository_lacks_is_told(snapshot: Path) -> None:
    with pytest.raises(BadInput, match=r"dataset 'someone/pairs:harmful': the repository holds no harmful"):
        hub.local("someone/pairs:harmful", "dataset")


@pytest.mark.parametrize("part", ["../x", "/etc", "a/../../x", "", ".git", "a//b"])
def test_no_name_leads_out_of_a_repository(snapshot: Path, part: str) -> None:
    assert not hub.is_name(f"someone/pairs:{part}")
