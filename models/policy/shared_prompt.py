"""Both answers of a comparison in one row, behind the prompt that they share: the prompt is computed once.

    tokens      p₀ p₁ p₂ c₀ c₁ r₀ r₁ r₂
    position     0  1  2  3  4  3  4  5       each answer goes on where the prompt ends
    r₁ attends to p₀ p₁ p₂ r₀ r₁, not to c₀ c₁

Attention with a mask and rotary positions make this exact (Wang et al. 2024, "Accelerating Direct Preference
Optimization with Prefix Sharing", pack whole batches so). For architectures that accept no mask or no positions, each
answer gets a row of its own, with the same results.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
"""Rotary positions and full attention in every layer; tests show for each that nothing changes."""

Group = tuple[list[int], list[list[int]]]
"""(prompt ids, ids of each answer)."""


class States(NamedTuple):
    """The states that predict each answer token; n tokens over all answers, in order of groups, answers and tokens."""

    hidden: "torch.Tensor"
    """Last hidden state at the place before the token, shape (n, hidden size)."""
    targets: "torch.Tensor"
    """The token, shape (n,)."""
    owner: "torch.Tensor"
    """Index of the answer that the token belongs to, counted over all groups, shape (n,)."""


def supports(model: "PreTrainedModel") -> bool:
    """Return whether several answers may stand in one row of this model."""
    config = model.config.get_text_config()
    # A window or a layer without full attention would count the tokens of the other answer as distance, and the flash
    # kernels read no mask of this form: sdpa does
    return (
        config.model_type in ARCHITECTURES
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config._attn_implementation == "sdpa"
    )


def tokens(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Return the length of a row that holds a prompt and its answers."""
    return len(prompt) + sum(map(len, answers))


def states(model: "PreTrainedModel", groups: Sequence[Group], pad: int) -> States:
    """Run the model without its output layer, and return the states that predict each answer token."""
    import torch

    if not supports(model):
        groups = [(prompt, [answer]) for prompt, answers in groups for answer in answers]
    width = max(tokens(*group) for group in groups)
    ids = torch.full((len(groups), width), pad)
    position = torch.zeros_like(ids)
    part = torch.zeros_like(ids)  # 0: prompt, or padding, whose states are not read; a + 1: answer a
    attended = torch.zeros_like(ids)
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for i, (prompt, answers) in enumerate(groups):
        ids[i, : len(prompt)] = torch.tensor(prompt)
        position[i, : len(prompt)] = torch.arange(len(prompt))
        end, earlier_answers = len(prompt), len(owner)
        for a, answer in enumerate(answers):
            here = slice(end, end + len(answer))
            ids[i, here] = torch.tensor(answer)
            position[i, here] = torch.arange(len(prompt), len(prompt) + len(answer))
            part[i, here] = a + 1
            # The first token is predicted at the end of the prompt, each other one at the token before it
            places += [len(prompt) - 1, *range(end, end + len(answer) - 1)][: len(answer)]
            targets += answer
            owner.append(len(answer))
            end += len(answer)
        attended[i, :end] = 1
        rows += [i] * sum(owner[earlier_answers:])
    device = model.device
    if any(len(answers) > 1 for _, answers in groups):
        earlier = torch.ones(width, width, dtype=torch.bool).tril()
        same_part = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        attention = {"attention_mask": (earlier & same_part)[:, None].to(device), "position_ids": position.to(device)}
    else:
        # This is an ordinary batch, padded on the right, so that the positions which a model counts by itself are right
        attention = {"attention_mask": attended.to(device)}
    hidden = model.base_model(input_ids=ids.to(device), use_cache=False, **attention).last_hidden_state
    return States(
        hidden[torch.tensor(rows, device=device), torch.tensor(places, device=device)],
        torch.tensor(targets, device=device),
        torch.arange(len(owner)).repeat_interleave(torch.tensor(owner)).to(device),
    )
