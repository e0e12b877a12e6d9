"""A policy as MLflow serves it: messages in, one answer out, with the decoding settings that were certified.

MLflow opens this file by path (`mlflow models serve -m models:/NAME@champion --env-manager local`). `/invocations`
takes MLflow's shape, and OpenAI's, which is answered in OpenAI's shape too:
    {"inputs": [{"messages": [{"role": "user", "content": "how do i clean my lamp ?"}]}]}
    {"messages": [{"role": "user", "content": "how do i clean my lamp ?"}]}
"""

import hashlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

ROWS = 64
"""Rows of messages in one request."""
LONGEST = 1_000_000
"""Characters of one row's messages: what is surely too long is not tokenised."""
ANY = object()


class Answer(NamedTuple):
    """One answer, and what it took."""

    text: str
    prompt_tokens: int
    tokens: int
    whole: bool
    """The policy ended it by itself, or at a stop string."""


class ChatPolicy(PythonModel):
    """Applies the policy's own chat template, then answers batched, at the certified temperature."""

    # the hint of `predict` makes the signature; MLflow would hold it against each request, and refuse all but lists
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer in float32, after checking that they are the ones that were registered."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        folder = context.artifacts["policy"]
        for name, expected in context.model_config.get("sha256", {}).items():
            with (Path(folder) / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ValueError(f"{folder}/{name}: not the file that was registered; restore MLflow's artifacts")
        self.decoding = context.model_config["decoding"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ends = _ends(self.tokenizer, self.model.generation_config.eos_token_id, self.decoding["stop"])
        self.model.generation_config = GenerationConfig()  # the certified settings, not what the base came with
        self.window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def predict(
        self, context: Any, model_input: list[dict[str, list[dict[str, str]]]], params: Any = None
    ) -> list[str]:  # a signature cannot say that OpenAI's shape gets an object
        """Return one answer per row of messages; or OpenAI's `chat.completion` for one request as OpenAI has it.

        Raises:
            MlflowException: the request cannot be answered; names the row, and the server replies with status 400.
        """
        if isinstance(model_input, dict):
            self._refuse_settings(model_input)
            (answer,) = self._answers([model_input])
            return _completion(answer, str(model_input.get("model", "")))
        if not isinstance(model_input, list):
            raise _bad('send {"messages": […]}, or {"inputs": [{"messages": […]}, …]}')
        return [answer.text for answer in self._answers(model_input)]

    def _refuse_settings(self, request: dict[str, Any]) -> None:
        """Refuse what asks for another decoding than the one that was certified."""
        certified = {
            **{"messages": ANY, "model": ANY, "user": ANY, "stream": False, "n": 1},
            **{"temperature": self.decoding["temperature"], "stop": self.decoding["stop"]},
            **dict.fromkeys(("max_tokens", "max_completion_tokens"), self.decoding["max_new_tokens"]),
        }
        for name, value in request.items():
            if name not in certified:
                raise _bad(f"{name}: is not known here; leave it out")
            if certified[name] is not ANY and value != certified[name]:
                raise _bad(f"{name}: this policy was certified with {certified[name]!r}; leave it out")

    def _answers(self, rows: Sequence[Any]) -> list[Answer]:
        """Answer all rows in one batch."""
        import torch

        texts = self._texts(rows)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        longest = self.decoding["max_new_tokens"]
        for number, length in enumerate(lengths, start=1):
            if self.window and length + longest > self.window:
                raise _bad(
                    f"row {number}: {length:,} tokens, and an answer of up to {longest:,}, exceed the {self.window:,} "
                    "tokens that the policy reads; shorten the messages"
                )
        temperature = self.decoding["temperature"]
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=longest,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.ends,
                **sampling,
            )[:, batch["input_ids"].shape[1] :].tolist()
        return [self._answer(length, row) for length, row in zip(lengths, written, strict=True)]

    def _texts(self, rows: Sequence[Any]) -> list[str]:
        """Return the rows as the policy's template renders them."""
        if not 0 < len(rows) <= ROWS:
            raise _bad(f"{len(rows)} rows of messages; a request holds 1 to {ROWS}")
        texts = []
        for number, row in enumerate(rows, start=1):
            try:
                turns = _turns(row)
                texts.append(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # a template may raise what it likes, for instance where it knows no system turn
                said = str(error).splitlines() or [type(error).__name__]
                raise _bad(f"row {number}: {said[0]}") from error
        return texts

    def _answer(self, prompt_tokens: int, row: list[int]) -> Answer:
        """Return what was written, up to the end of the turn or the first stop string."""
        end = next((place for place, token in enumerate(row) if token in self.ends), -1)
        tokens = end + 1 if end >= 0 else len(row)
        text = whole = self.tokenizer.decode(row[:tokens], skip_special_tokens=True)
        for string in self.decoding["stop"]:
            text = text.partition(string)[0]
        return Answer(text.strip(), prompt_tokens, tokens, end >= 0 or text != whole)


def _ends(tokenizer: Any, own: Any, stop: list[str]) -> list[int]:
    """Return the ids that end an answer, as where it was certified.

    EOS, what the model's generation config names, what the template writes right after an answer, and stop strings that
    are one special token.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    asks = [{"role": "user", "content": "Hello"}]
    whole = tokenizer.apply_chat_template([*asks, {"role": "assistant", "content": "Hi"}], tokenize=False)
    after = whole.rpartition("Hi")[2].partition(tokenizer.eos_token)[0].strip()
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    configured = own if isinstance(own, list) else [own] if own is not None else []
    written = [i for i in first if i in special.values()]
    stops = [special[one] for one in stop if one in special]
    return list(dict.fromkeys([tokenizer.eos_token_id, *configured, *written, *stops]))


def _turns(row: Any) -> list[dict[str, str]]:
    """Return the messages of a row, looked at: at most one of the system, then user and assistant in turn."""
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('has no messages; write {"messages": [{"role": "user", "content": "…"}]}')
    turns = list(row["messages"])
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise ValueError(f"message {number}: needs a role, and a content that is text")
        if any("\ud800" <= letter <= "\udfff" for letter in turn["content"]):
            raise ValueError(f"message {number}: holds half a character (a lone surrogate)")
    if sum(len(turn["content"]) for turn in turns) > LONGEST:
        raise ValueError(f"its messages have more than {LONGEST:,} characters; shorten them")
    roles = [str(turn.get("role")) for turn in turns]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if len(asked) % 2 == 0 or asked != (["user", "assistant"] * len(asked))[: len(asked)]:
        named = ", ".join(roles[:6]) + (" …" if len(roles) > 6 else "")
        wanted = "send a system message first, if any, then user and assistant in turn, the user last"
        raise ValueError(f"its messages are of {named or 'nobody'}; {wanted}")
    return [{"role": role, "content": turn["content"]} for role, turn in zip(roles, turns, strict=True)]


def _completion(answer: Answer, model: str) -> dict[str, Any]:
    """Return an answer as OpenAI's chat API does."""
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop" if answer.whole else "length"}],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens,
        },
    }


def _bad(why: str) -> MlflowException:
    """Return what MLflow's server answers with status 400."""
    return MlflowException.invalid_parameter_value(why)


ChatPolicy.predict._is_pyfunc = True  # MLflow would advise the validation that is left out
mlflow.models.set_model(ChatPolicy())
