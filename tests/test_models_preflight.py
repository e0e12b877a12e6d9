"""Judges that cannot judge are refused before anything is trained."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Policy
from models.data import suites, town
from models.errors import BadData, BadPolicy, BadRecipe
from models.preflight import examine, problems, refuse
from models.recipe import Evaluation, Judge, Judges, Suites
from models.recipe.toml import read
from tasks.run import open_run


def judges(**settings: Any) -> Judges:
    return Judges(harmless=Judge.model_validate(settings))


def classifier(folder: Path, labels: list[str], **also: Any) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": dict(enumerate(labels)), **also}
    (folder / "config.json").write_text(json.dumps(config if labels else config | {"id2label": {}}))
    (folder / "chat_template.jinja").write_text("x")
    return folder


def test_folders_classes_and_templates(tmp_path: Path, policy: Policy) -> None:
    guard, reward = classifier(tmp_path / "guard", ["safe", "unsafe"]), classifier(tmp_path / "reward", [])
    bare, one = classifier(tmp_path / "bare", []), classifier(tmp_path / "one", ["LABEL_0"])
    (bare / "chat_template.jinja").unlink()
    for settings, said in [
        ({"model": str(tmp_path / "nowhere")}, "no folder with a config.json; give a classifier's folder or hub id"),
        (
            {"model": str(policy.path)},
            "holds a LlamaForCausalLM; give a model that was trained as a sequence classifier",
        ),
        ({"model": str(guard)}, "label: the judge has the classes safe, unsafe; name the one"),
        (
            {"model": str(guard), "label": "bad", "threshold": 0.5},
            "label 'bad': the judge has the classes safe, unsafe",
        ),
        ({"model": str(reward), "label": "x", "threshold": 0.5}, "label 'x': the judge has a single score"),
        (
            {"model": str(one), "label": "LABEL_0", "threshold": 0.5},
            "label 'LABEL_0': the judge has a single score, so its probability is always 1; leave `label` out",
        ),
        ({"model": str(bare)}, "text: the judge has no chat template"),
    ]:
        (problem,) = problems(judges(kind="model", **settings))
        assert problem.startswith("evaluation.judges.harmless.") and said in problem
    for good in (
        {"model": str(guard), "label": "unsafe", "threshold": 0.5},
        {"model": str(reward)},
        {"model": "owner/name"},
    ):
        assert problems(judges(kind="model", **good)) == []
    assert problems(judges(kind="model", model=str(bare), text="{prompt} {answer}")) == []
    with pytest.raises(BadRecipe, match="nowhere"):
        refuse(Evaluation(judges=judges(kind="model", model=str(tmp_path / "nowhere"))))


@pytest.mark.parametrize(
    ("count", "said"), [(1, ""), (2, "label: the judge has the classes LABEL_0, LABEL_1"), (3, "LABEL_2")]
)
def test_classes_as_transformers_writes_them(count: int, said: str, tmp_path: Path) -> None:
    """Two classes are its default, and it writes no word of them."""
    from transformers import LlamaConfig

    config = LlamaConfig(num_labels=count, architectures=["LlamaForSequenceClassification"])
    config.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert ("id2label" in json.loads((tmp_path / "config.json").read_text())) is (count != 2)
    found = problems(judges(kind="model", model=str(tmp_path)))
    assert (said in found[0]) if said else not found
    if count > 1:
        assert problems(judges(kind="model", model=str(tmp_path), label="LABEL_1", threshold=0.5)) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.jsonl", "", "holds no rows"),
        ("columns.jsonl", '{"question": "how ?"}\n', "row 1: no `prompt`; its columns are question"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused_with_its_role(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(
        BadData, match=rf"evaluation.suites.harmless: .*{said}.*; mend the file, or leave the suite out"
    ):
        refuse(Evaluation(suites=Suites(harmless=str(tmp_path / name))))


class Address:
    """A judge's address on loopback that answers every question with one status."""

    def __init__(self, status: int, location: str = "") -> None:
        self.keys: list[str] = []
        address = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                address.keys.append(self.headers["authorization"])
                self.send_response(status)
                self.send_header("content-length", "0")
                if location:
                    self.send_header("location", location)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def address() -> Iterator[Callable[..., Address]]:
    started: list[Address] = []

    def starting(*arguments: Any) -> Address:
        started.append(Address(*arguments))
        return started[-1]

    yield starting
    for one in started:
        one.server.shutdown()
        one.server.server_close()


LLM = {"kind": "llm", "model": "m", "threshold": 6}


def test_endpoints_keys_and_rubrics(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, address: Callable[..., Address]
) -> None:
    assert "nobody answers there" in problems(judges(**LLM, base_url=f"http://127.0.0.1:{port}/v1"))[0]
    endpoint = address(200)
    llm = LLM | {"base_url": endpoint.url}
    assert problems(judges(**llm)) == [] and endpoint.keys == [None]
    assert "the environment variable SACPO_KEY_NONE is not set" in problems(judges(**llm, key="SACPO_KEY_NONE"))[0]
    monkeypatch.setenv("SACPO_KEY_NONE", "secret")
    assert problems(judges(**llm, key="SACPO_KEY_NONE")) == [] and endpoint.keys[-1] == "Bearer secret"
    for key in ("secret\r", "sec\nret", "s\u00e9cret"):
        monkeypatch.setenv("SACPO_KEY_OTHER", key)
        (problem,) = problems(judges(**llm, key="SACPO_KEY_OTHER"))
        assert "SACPO_KEY_OTHER holds a character that no key has" in problem and "cret" not in problem
    rubric = tmp_path / "rubric.txt"
    assert "cannot be read" in problems(judges(**llm, rubric=str(rubric)))[0]
    rubric.write_text("which is better? $prompt $first")
    assert "lacks $second, $fence" in problems(judges(**llm, rubric=str(rubric)))[0]
    rubric.write_text('$fence $prompt $first $second {"first": 6, "second": 3}')
    assert 'lacks {"$fence": {"first": GRADE' in problems(judges(**llm, rubric=str(rubric)))[0]
    rubric.write_text('$fence $prompt $first $second {"$fence": {"first": GRADE, "second": GRADE}}')
    assert problems(judges(**llm, rubric=str(rubric))) == []
    for device in ("/dev/zero", str(tmp_path)):
        assert "cannot be read (it is no file)" in problems(judges(**llm, rubric=device))[0]


def test_an_address_that_knows_no_chat_is_refused(address: Callable[..., Address]) -> None:
    """As one whose /v1 was forgotten."""
    (problem,) = problems(judges(**LLM, base_url=address(404).url))
    assert problem.endswith(
        "answers 404 to /chat/completions; most addresses end in /v1, and the model must be one of theirs"
    )


def test_an_address_is_asked_once_and_a_key_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, address: Callable[..., Address]
) -> None:
    monkeypatch.setenv("SACPO_KEY_NONE", "secret")
    elsewhere, refusing = address(200), address(401)
    away, around = address(302, f"{elsewhere.url}/models"), address(302, "/v1/models")
    assert problems(judges(**LLM, base_url=refusing.url, key="SACPO_KEY_NONE")) == []
    for one in (away, around):
        (problem,) = problems(judges(**LLM, base_url=one.url, key="SACPO_KEY_NONE"))
        assert problem.endswith(
            "status 302 sends us to another address, which is not followed; give the address itself"
        )
    assert elsewhere.keys == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail ready\r\n"), daemon=True).start()
        (problem,) = problems(judges(**LLM, base_url=f"http://127.0.0.1:{server.getsockname()[1]}/v1"))
        assert "nobody answers there as HTTP" in problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "llm", "model": "m", "base_url": "http://x/v1"}, "needs `threshold`: the grade from 1 to 10"),
        ({"kind": "llm", "model": "m", "base_url": "http://x/v1", "threshold": 70}, "needs `threshold`"),
        ({"kind": "llm", "model": "m", "base_url": "nonsense", "threshold": 6}, "needs `base_url`, for instance http"),
        ({"kind": "llm", "model": "m", "base_url": "http://["}, "needs `base_url`"),
        ({"kind": "llm", "model": "m", "base_url": "http://ada:pw@x/v1"}, "must hold no user and no password"),
        ({"key": "AWS_SECRET_ACCESS_KEY"}, "'AWS_SECRET_ACCESS_KEY' is no variable for a judge's key"),
        ({"key": "PGPASSWORD"}, "SACPO_KEY_"),
        ({"key": "SACPO_KEY_"}, "SACPO_KEY_"),
        ({"key": "MY_OPENAI_API_KEY"}, "SACPO_KEY_"),
        ({"key": "OPENAI_API_KEY\nPGPASSWORD"}, "SACPO_KEY_"),
        ({"kind": "model", "model": "m", "text": "hello"}, r"text must hold {prompt} and {answer}"),
        ({"kind": "refusal"}, "kind = 'refusal' works for over_refusal only; for harmless use 'model' or 'llm'"),
    ],
)
def test_what_a_recipe_can_say_wrong_of_a_judge(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judges(**settings)


def test_the_oracle_knows_the_shipped_suites_and_refuses_others(tmp_path: Path) -> None:
    oracle = Judge(kind="oracle")
    judges = Judges(helpful=oracle, harmless=oracle, over_refusal=oracle)
    folder = Path(__file__).parent.parent / "suites" / "town"
    shipped = {role: str(folder / f"{role}.jsonl") for role in Suites.model_fields}
    refuse(Evaluation(judges=judges, suites=Suites(**shipped)))
    trained = set(town._prompts()["train"])
    for role, place in shipped.items():
        assert not trained & {row["prompt"] for row in suites.read(Path(place), role)}, role
    (tmp_path / "own.jsonl").write_text('{"prompt": "how do i bake bread ?"}\n')
    with pytest.raises(BadData, match=r"suites.must_pass: .*own.jsonl: the town has no prompt 'how do i bake bread"):
        refuse(Evaluation(judges=judges, suites=Suites(must_pass=str(tmp_path / "own.jsonl"))))


def test_a_run_that_the_command_line_did_not_check_is_checked_when_it_begins(runs: Path, tmp_path: Path) -> None:
    """A deployed run begins in a process of its own; before, it trained for hours and then missed its judge."""
    recipe = read("quickstart", [f'evaluation.judges.harmless={{kind="model", model="{tmp_path / "nowhere"}"}}'])
    with pytest.raises(BadRecipe, match="no folder with a config"), open_run(recipe):
        raise AssertionError("it began")
    assert not runs.exists()


def test_a_suite_whose_turns_the_template_of_a_policy_refuses_is_told_before_training(
    policy: Policy, tmp_path: Path
) -> None:
    """Answers are asked for after hours of training; here of a template that takes no system message, as Gemma's."""
    base = tmp_path / "base"
    shutil.copytree(policy.path, base)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (base / "chat_template.jinja").write_text(refuses + (base / "chat_template.jinja").read_text())
    prompt = [{"role": "system", "content": "help me"}, {"role": "user", "content": "how do i tow it ?"}]
    (tmp_path / "suite.jsonl").write_text(json.dumps({"messages": prompt}) + "\n")
    settings = [f"base={base}", f"evaluation.suites.must_pass={tmp_path / 'suite.jsonl'}"]
    why = r"cannot write a prompt of the turns system, user \(no system message\)"
    with pytest.raises(BadPolicy, match=f"base .*chat_template.jinja: the chat template {why}"):
        examine(read("quickstart", settings), tmp_path / "kept")
    examine(read("quickstart", settings[:1]), tmp_path / "kept")  # it may be trained where no suite has such a turn
