"""Batched answers. The answer to a prompt does not depend on which prompts share its batch.

Sampling adds Gumbel noise to the logits and takes the largest (argmax of logits/T + noise is an exact draw from the
softmax). The noise follows from the seed and the prompt alone, so every candidate answers with the same luck: common
random numbers make the differences between candidates visible with far fewer prompts.
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from models.policy import frozen
from models.recipe import Evaluation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    ids: list[int]
    """Token ids, EOS included where the policy ended by itself."""


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    config: Evaluation,
    seed: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index of the prompt, answer), batch by batch, prompts of similar length together.

    `prompts` are rendered texts (see `tokens.prompt_texts`). Left-padded; answers end at EOS or at `max_new_tokens`,
    and are never cut at a blank line. Temperature 0 is greedy.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Gumbel(LogitsProcessor):  # type: ignore[misc]
        """logits/T + noise, one generator per prompt."""

        def __init__(self, block: list[str]) -> None:
            self.generators = [torch.Generator().manual_seed(noise_seed(seed, prompt)) for prompt in block]

        def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
            waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
            return scores / config.temperature - waits.log().to(scores.device)  # −log of Exp(1) is Gumbel

    if not prompts:
        return
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    own, model.generation_config = model.generation_config, GenerationConfig()  # nothing that the base came with
    with frozen(model):
        for start in range(0, len(order), config.batch):
            block = order[start : start + config.batch]
            width = len(ids[block[-1]])
            padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in block], device=model.device)
            attended = torch.tensor(
                [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in block], device=model.device
            )
            processors = [Gumbel([prompts[i] for i in block])] if config.temperature > 0 else []
            written = model.generate(
                input_ids=padded,
                attention_mask=attended,
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList(processors),
                pad_token_id=pad,
                eos_token_id=eos,
            )[:, width:].tolist()
            for i, row in zip(block, written, strict=True):
                end = row.index(eos) + 1 if eos in row else len(row)
                kept = row[:end]
                yield i, Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), kept)
    model.generation_config = own


def noise_seed(seed: int, prompt: str) -> int:
    """Return the seed of a prompt's noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:7])
