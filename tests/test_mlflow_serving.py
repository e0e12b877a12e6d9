"""The registered policy as MLflow serves it: two shapes of request, and what is refused, and why."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from models.artifacts import Policy
from models.policy import generate
from models.policy.weights import load_tokenizer

FILE = Path(__file__).parent.parent / "mlflow" / "chat_policy.py"
ASKED = {"role": "user", "content": "how do i clean my lamp ?"}
SAID = {"role": "assistant", "content": "get the brush ."}
SYSTEM = {"role": "system", "content": "my lamp"}
Predict = Callable[[Any], Any]


def loaded() -> Any:
    """The module as MLflow loads it: by its path."""
    spec = importlib.util.spec_from_file_location("chat_policy", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def predict(policy: Policy) -> Predict:
    """`predict(request)`, as MLflow calls it after it has read the JSON: greedy, answers of 8 tokens."""
    decoding = {"max_new_tokens": 8, "temperature": 0.0, "stop": [" zzz"]}
    context = SimpleNamespace(artifacts={"policy": str(policy.path)}, model_config={"decoding": decoding})
    served = loaded().ChatPolicy()
    served.load_context(context)
    return lambda request: served.predict(context, request)


def test_both_shapes_get_the_same_answer(predict: Predict) -> None:
    rows = [{"messages": [ASKED]}, {"messages": [ASKED, SAID, ASKED]}, {"messages": [SYSTEM, ASKED]}]
    answers = predict(rows)
    assert len(answers) == 3 and all(isinstance(answer, str) and answer for answer in answers)
    completion = predict({"messages": [ASKED], "model": "mine", "temperature": 0, "max_tokens": 8, "stream": False})
    assert completion["object"] == "chat.completion" and completion["model"] == "mine"
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": answers[0]}
    usage = completion["usage"]
    assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == 8 else "stop")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["prompt_tokens"] > 6


def test_a_served_answer_ends_where_the_certified_one_did(policy: Policy) -> None:
    """Wherever config, template or a stop string end it."""
    chat_policy = loaded()
    tokenizer = load_tokenizer(policy)
    own_template = str(tokenizer.chat_template)
    thinking = (
        "{% for m in messages %}{{ m['content'] }}<unk> {% endfor %}{% if add_generation_prompt %}how {% endif %}"
    )
    for template in (
        own_template,
        own_template.replace("}} ", "}}<unk> "),
        thinking,
        "Hindi or Highlights ? " + thinking,
    ):
        tokenizer.chat_template = template
        for own in (None, 1, [1, 5]):
            for stop in ([], ["the"], ["<unk>"]):
                assert chat_policy._ends(tokenizer, own, stop) == generate.ends(tokenizer, own, stop)


def turns(count: int) -> list[dict[str, str]]:
    return [ASKED, SAID] * count + [ASKED]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([], "0 rows of messages; a request holds 1 to 64"),
        ([{"messages": [ASKED]}] * 65, "65 rows of messages; a request holds 1 to 64"),
        ([{"messages": [ASKED]}, {"prompt": "x"}], "row 2: has no messages"),
        (["hello"], "row 1: has no messages"),
        ("hello", "send {"),
        ([{"messages": []}], "row 1: its messages are of nobody; send a system message first"),
        ([{"messages": [SAID]}], "row 1: its messages are of assistant; send"),
        ([{"messages": [ASKED, SAID]}], "row 1: its messages are of user, assistant; send"),
        ([{"messages": [ASKED, ASKED]}], "of user, user; send"),
        ([{"messages": [ASKED, SYSTEM, ASKED]}], "of user, system, user; send"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "of tool; send"),
        (
            [{"messages": [{"role": "user", "content": ["x"]}]}],
            "message 1: needs a role, and a content that is text",
        ),
        ([{"messages": ["x"]}], "row 1: message 1: needs a role"),
        ([{"messages": 5}], "row 1: "),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], "row 1: message 1: holds half a character"),
        (
            [{"messages": [ASKED | {"content": "x" * 1_000_001}]}],
            "more than 1,000,000 characters; shorten",
        ),
        ({"messages": [ASKED], "temperature": 0.7}, "temperature: this policy was certified with 0.0; leave it out"),
        ({"messages": [ASKED], "stream": True}, "stream: this policy was certified with False; leave it out"),
        ({"messages": [ASKED], "tools": []}, "tools: is not known here; leave it out"),
        ({"messages": [SAID]}, "row 1: its messages are of assistant"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(request_: Any, said: str, predict: Predict) -> None:
    with pytest.raises(MlflowException) as refused:
        predict(request_)
    assert said in refused.value.message and "\n" not in refused.value.message
    assert refused.value.get_http_status_code() == 400


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_with_both_numbers(predict: Predict) -> None:
    """Beyond its context window a policy answers garbage; a window of 64 less 8 tokens of an answer are left."""
    word, used = {"role": "user", "content": "lamp"}, predict({"messages": [ASKED]})["usage"]["prompt_tokens"]
    spare = used - len(ASKED["content"].split())  # what the template adds
    fits = word | {"content": " ".join(["lamp"] * (56 - spare))}
    assert predict({"messages": [fits]})["usage"]["prompt_tokens"] == 56
    longer = fits | {"content": fits["content"] + " lamp"}
    with pytest.raises(MlflowException, match="row 2: 57 tokens, and an answer of up to 8, exceed the 64 tokens"):
        predict([{"messages": [ASKED]}, {"messages": [longer]}])
