"""Batched answers. The answer to a prompt does not depend on which prompts share its batch.

Sampling adds Gumbel noise to the logits and takes the largest (argmax of logits/T + noise is an exact draw from the
softmax). The noise follows from the seed, the prompt and the number of the sample alone, so every candidate answers
with the same luck: common random numbers make the differences between candidates visible with far fewer prompts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

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
    """One answer that a policy is to give."""

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


def decoding_key(config: Answering, seed: int, compute: str) -> str:
    """Return what names the answers of one policy beside the prompt: every setting that can change a token.

    Args:
        compute: device, dtype and versions of the libraries.
    """
    # The size of a batch is left out: it changes no token (but after a near tie, which is stored)
    settings = config.model_dump(mode="json", include={"max_new_tokens", "temperature", "stop", "engine"})
    return content_digest({"settings": settings, "seed": seed if config.temperature else 0, "compute": compute})


def libraries() -> str:
    """Return the libraries that generate, with their versions: another version may give another token."""
    return " ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asks: Sequence[Ask],
    config: Answering,
    seed: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer), batch by batch, prompts of similar length together.

    Left-padded; answers end at a token of `ends`, at one of `config.stop` (which is not part of the answer) or at
    `max_new_tokens`, and are never cut at a blank line. Temperature 0 is greedy.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    if not asks:
        return
    ids = tokenizer([ask.prompt for ask in asks], add_special_tokens=False)["input_ids"]
    # By length, so that little is padded; then by content, so that the batches do not depend on the order of the asks
    order = sorted(range(len(asks)), key=lambda i: (len(ids[i]), asks[i]))
    pad, last = tokenizer.pad_token_id, ends(tokenizer, model.generation_config.eos_token_id, config.stop)
    # A base may come with settings of its own (a repetition penalty, top-k) and would be decoded otherwise than others
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with frozen(model):
            for start in range(0, len(order), config.batch):
                block = order[start : start + config.batch]
                width = len(ids[block[-1]])
                padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in block], device=model.device)
                attended = torch.tensor(
                    [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in block], device=model.device
                )
                noise = NoisyArgmax([noise_seed(seed, asks[i]) for i in block], config.temperature)
                stops = [StopStrings(tokenizer, config.stop, width)] if config.stop else []
                generated = model.generate(
                    input_ids=padded,
                    attention_mask=attended,
                    max_new_tokens=config.max_new_tokens,
                    do_sample=False,  # the noise is in the logits, so the largest is the draw
                    logits_processor=LogitsProcessorList([noise]),
                    stopping_criteria=StoppingCriteriaList(stops),
                    pad_token_id=pad,
                    eos_token_id=last,
                )[:, width:].tolist()
                near_ties = torch.stack(noise.near_ties, dim=1).tolist()
                for i, row, ties in zip(block, generated, near_ties, strict=True):
                    text, answer_ids = cut_at_end(tokenizer, row, config.stop, last)
                    tie = next((step for step, close in enumerate(ties[: len(answer_ids)]) if close), -1)
                    yield i, Answer(text, answer_ids, tie)
    finally:  # also where the caller leaves this generator early, or a batch fails
        model.generation_config = own


def ends(tokenizer: "PreTrainedTokenizerBase", own: int | list[int] | None, stop: list[str]) -> list[int]:
    """Return the ids that end an answer, EOS first.

    In some models another token than EOS ends a turn (Gemma, Phi). It stands in their generation config, or right after
    an answer as the template writes it. A policy that was aligned here has learnt to write EOS after that token. The
    base has not, and would go on with the next turns.

    Args:
        own: `eos_token_id` of the model's generation config.
        stop: strings; one that is a single special token ends an answer too, though it is no part of the text.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    _, whole, _ = rendered(tokenizer, messages("Hello"), ANSWER)
    after = tokenizer(whole.rpartition(ANSWER)[2].strip(), add_special_tokens=False)["input_ids"][:1]
    configured = own if isinstance(own, list) else [own] if own is not None else []
    written = [i for i in after if i in special.values()]
    stops = [special[string] for string in stop if string in special]
    return list(dict.fromkeys([tokenizer.eos_token_id, *configured, *written, *stops]))


def noise_seed(seed: int, ask: Ask) -> int:
    """Return the seed of the noise of one answer, a number of 56 bits."""
    # Sample 0 has the seed that it had before there were several samples, so that stored answers stay valid
    text = f"{seed}\n{ask.prompt}" if ask.sample == 0 else f"{seed}.{ask.sample}\n{ask.prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


class NoisyArgmax:
    """Adds each row's own noise to the logits, and remembers where the two largest nearly tie.

    It is used as a `LogitsProcessor`, of which transformers only calls `__call__`, and is no subclass of it, so that
    importing this module imports no transformers.
    """

    def __init__(self, seeds: list[int], temperature: float) -> None:
        import torch

        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature else []
        self.near_ties: list[torch.Tensor] = []
        """One tensor per step: whether the row nearly tied, shape (rows,)."""

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return the logits of one step with noise, shape (rows, vocabulary)."""
        import torch

        if self.generators:
            # −log of Exp(1) is Gumbel noise. It is drawn on the CPU and row by row: a GPU's generator draws other
            # numbers, and one generator for all rows would make an answer depend on its place in the batch
            waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
            scores = scores / self.temperature - waits.log().to(scores.device)
        first, second = scores.topk(2, dim=1).values.unbind(1)
        self.near_ties.append((first - second < NEAR_TIE).cpu())
        return scores


class StopStrings:
    """Ends a row when one of some strings was written, with any tokenizer; used as a `StoppingCriteria`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", strings: list[str], width: int) -> None:
        self.tokenizer, self.strings, self.width = tokenizer, strings, width
        # A token holds at least one byte, so this many last tokens hold any string that the newest one completes
        self.longest = max(len(string.encode()) for string in strings) + 1

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **_: object) -> "torch.Tensor":
        """Return for each row whether it ended; `input_ids` has shape (rows, width of the prompts + steps)."""
        import torch

        tails = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.longest :], skip_special_tokens=True)
        has_ended = [any(string in tail for string in self.strings) for tail in tails]
        return torch.tensor(has_ended, device=input_ids.device)


def cut_at_end(
    tokenizer: "PreTrainedTokenizerBase", row: list[int], stop: list[str], last: list[int]
) -> tuple[str, list[int]]:
    """Return the text and the ids of one answer, without its padding and without the string that stopped it.

    Args:
        row: ids that were generated.
        stop: strings that end an answer.
        last: ids that end an answer.
    """
    end = next((place for place, token in enumerate(row) if token in last), len(row))
    # A row that a string ended is padded while others go on, without an id that ends it
    while stop and end and row[end - 1] == tokenizer.pad_token_id:
        end -= 1
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    cuts = [place for place in (text.find(string) for string in stop) if place >= 0]
    if cuts:
        return text[: min(cuts)].strip(), row[:end]
    return text.strip(), row[: end + 1]
