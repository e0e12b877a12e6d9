"""Batched answers. The answer to a prompt does not depend on which prompts share its batch.

Sampling adds Gumbel noise to the logits and takes the largest (argmax of logits/T + noise is an exact draw from the
softmax). The noise follows from the seed, the prompt and the number of the sample alone, so every candidate answers
with the same luck: common random numbers make the differences between candidates visible with far fewer prompts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from models.artifacts import content_digest
from models.data.dialogue import messages, rendered
from models.policy.weights import frozen
from models.recipe import Answering

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEAR_TIE = 1e-4
"""Where the two largest logits are nearer than this, rounding decides, and another batch may decide otherwise."""
ANSWER = "Hi"
"""Stands for any answer where only what the template writes after it matters."""


class Ask(NamedTuple):
    """One answer that is wanted."""

    prompt: str
    """Rendered text (see `dialogue.prompt_texts`)."""
    sample: int = 0
    """Which of the answers to this prompt; each has noise of its own."""


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    ids: list[int]
    """Token ids, that of the end included where the policy ended by itself."""
    tie: int
    """First token at which the two largest logits nearly tied; −1 if none."""


def decoding(config: Answering, seed: int, compute: Any) -> str:
    """Return what names the answers of one policy beside the prompt: every setting that can change a token.

    Args:
        compute: what computes: device, dtype, versions of the libraries.
    """
    settings = config.model_dump(mode="json", include={"max_new_tokens", "temperature", "stop", "engine"})
    return content_digest({"settings": settings, "seed": seed if config.temperature else 0, "compute": compute})


def libraries() -> str:
    """Return what generates: a library of another version may say another token."""
    return " ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[Ask],
    config: Answering,
    seed: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer), batch by batch, prompts of similar length together.

    Left-padded; answers end at a token of `ends`, at one of `config.stop` (which is not part of the answer) or at
    `max_new_tokens`, and are never cut at a blank line. Temperature 0 is greedy.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    if not asked:
        return
    ids = tokenizer([ask.prompt for ask in asked], add_special_tokens=False)["input_ids"]
    order = sorted(range(len(asked)), key=lambda i: (len(ids[i]), asked[i]))
    pad, last = tokenizer.pad_token_id, ends(tokenizer, model.generation_config.eos_token_id, config.stop)
    own, model.generation_config = model.generation_config, GenerationConfig()  # nothing that the base came with
    try:
        with frozen(model):
            for start in range(0, len(order), config.batch):
                block = order[start : start + config.batch]
                width = len(ids[block[-1]])
                padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in block], device=model.device)
                attended = torch.tensor(
                    [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in block], device=model.device
                )
                pick = _pick([noise_seed(seed, asked[i]) for i in block], config.temperature)
                written = model.generate(
                    input_ids=padded,
                    attention_mask=attended,
                    max_new_tokens=config.max_new_tokens,
                    do_sample=False,
                    logits_processor=LogitsProcessorList([pick]),
                    stopping_criteria=StoppingCriteriaList(
                        [_stops(tokenizer, config.stop, width)] if config.stop else []
                    ),
                    pad_token_id=pad,
                    eos_token_id=last,
                )[:, width:].tolist()
                near = torch.stack(pick.near, dim=1).tolist()
                for i, row, ties in zip(block, written, near, strict=True):
                    text, kept = ended(tokenizer, row, config.stop, last)
                    yield i, Answer(text, kept, next((t for t, close in enumerate(ties[: len(kept)]) if close), -1))
    finally:  # also where the caller stops asking, or a batch fails
        model.generation_config = own


def ends(tokenizer: "PreTrainedTokenizerBase", own: int | list[int] | None, stop: list[str]) -> list[int]:
    """Return the ids that end an answer, EOS first.

    Of some models another token than EOS ends a turn (Gemma, Phi). It stands in their generation config, or right after
    an answer as the template writes it. An aligned policy learnt to write EOS after it; the base and others did not,
    and would go on with the next turns.

    Args:
        own: `eos_token_id` of the model's generation config.
        stop: strings; one that is a single special token ends an answer too, though it is no part of the text.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    _, whole, _ = rendered(tokenizer, messages("Hello"), ANSWER)
    after = tokenizer(whole.rpartition(ANSWER)[2].strip(), add_special_tokens=False)["input_ids"][:1]
    configured = own if isinstance(own, list) else [own] if own is not None else []
    written = [i for i in after if i in special.values()]
    stops = [special[one] for one in stop if one in special]
    return list(dict.fromkeys([tokenizer.eos_token_id, *configured, *written, *stops]))


def noise_seed(seed: int, ask: Ask) -> int:
    """Return the seed of the noise of one answer."""
    text = f"{seed}\n{ask.prompt}" if ask.sample == 0 else f"{seed}.{ask.sample}\n{ask.prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _pick(seeds: list[int], temperature: float) -> Any:
    """Return a processor of logits that adds each row's own noise, and remembers where the largest two nearly tie."""
    import torch
    from transformers import LogitsProcessor

    class Pick(LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.near: list[torch.Tensor] = []
            self.generators = [torch.Generator().manual_seed(number) for number in seeds] if temperature else []

        def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
            if self.generators:
                waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
                scores = scores / temperature - waits.log().to(scores.device)  # −log of Exp(1) is Gumbel
            first, second = scores.topk(2, dim=1).values.unbind(1)
            self.near.append((first - second < NEAR_TIE).cpu())
            return scores

    return Pick()


def _stops(tokenizer: "PreTrainedTokenizerBase", stop: list[str], width: int) -> Any:
    """Return a criterion that ends a row when a stop string was written; works with every tokenizer."""
    import torch
    from transformers import StoppingCriteria

    longest = max(len(string.encode()) for string in stop) + 1  # a token holds at least one byte

    class Stops(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **_: Any) -> "torch.Tensor":
            tails = tokenizer.batch_decode(input_ids[:, width:][:, -longest:], skip_special_tokens=True)
            ended = [any(string in tail for string in stop) for tail in tails]
            return torch.tensor(ended, device=input_ids.device)

    return Stops()


def ended(
    tokenizer: "PreTrainedTokenizerBase", row: list[int], stop: list[str], last: list[int]
) -> tuple[str, list[int]]:
    """Return the text and the ids of one answer, without what padded it and without the string that stopped it.

    Args:
        last: the ids that end an answer.
    """
    end = next((place for place, token in enumerate(row) if token in last), len(row))
    while stop and end and row[end - 1] == tokenizer.pad_token_id:
        end -= 1
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    cuts = [place for place in (text.find(string) for string in stop) if place >= 0]
    if cuts:
        return text[: min(cuts)].strip(), row[:end]
    return text.strip(), row[: end + 1]
