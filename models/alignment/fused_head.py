"""Project only the answers' positions onto the vocabulary, and compute the prompt of a comparison once.

TRL's fused head does the first on GPUs; on other devices it projects every position, twice, prompt and padding included
(trl 1.16, `add_fused_lm_head`). With a vocabulary of 49,152 that is a third of a small model's training time.
"""

import functools
import types
from typing import TYPE_CHECKING, Any

from models.policy import shared_prompt
from models.policy.weights import project

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add(model: "PreTrainedModel") -> None:
    """Make `model(…, labels=…, fused_lm_head=True)` return TRL's per-token outputs, from the answer's logits only."""
    from trl.trainer.utils import FusedCausalLMOutput

    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        scale = kwargs.pop("num_items_in_batch", None)
        targets = labels[:, 1:]
        mask = targets != -100
        pairs = comparisons(labels, **kwargs) if shared_prompt.supports(self) else []
        if pairs:
            predicting = shared_prompt.states(self, pairs, 0)
            figures = per_token(project(self, predicting.hidden), predicting.targets)
            # Here the answers come pair by pair; TRL's rows are all chosen answers, then all rejected ones
            row = predicting.owner // 2 + predicting.owner % 2 * len(pairs)
            figures = tuple(value[row.argsort(stable=True)] for value in figures)
        else:
            hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
            figures = per_token(project(self, hidden[mask]), targets[mask])
        log_probs, entropy, mean_logits, is_top1 = (
            value.new_zeros(mask.shape).masked_scatter(mask, value) for value in figures
        )
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if scale is None else scale)
        return FusedCausalLMOutput(loss, log_probs, entropy, None, mean_logits, is_top1, mask)

    model.forward = types.MethodType(forward, model)


def comparisons(
    labels: "torch.Tensor", input_ids: "torch.Tensor", attention_mask: "torch.Tensor | None" = None, **_: Any
) -> list[shared_prompt.Group]:
    """Return the pairs of a batch whose row i + n answers the prompt of row i, as TRL's DPO lays them out; else none.

    All have shape (2n, tokens); `labels` is -100 outside of the answers.
    """
    import torch

    rows = []
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for ids, attended, label in zip(input_ids, mask.bool(), labels, strict=True):
        tokens, answered = ids[attended], (label != -100)[attended]
        start = len(tokens) - int(answered.sum())
        if not start or not answered[start:].all():
            return []  # no prompt, or a label inside of it: the answer is not what stands at the end
        rows.append((tokens[:start].tolist(), tokens[start:].tolist()))
    upper, lower = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if [prompt for prompt, _ in upper] != [prompt for prompt, _ in lower]:
        return []
    return [(prompt, [chosen, rejected]) for (prompt, chosen), (_, rejected) in zip(upper, lower, strict=True)]


def per_token(logits: "torch.Tensor", targets: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """Return log-prob of each target, entropy, mean logit and whether the target is the most likely; shape (n,) each.

    Only the log-probs carry a gradient. `logits` has shape (n, vocabulary).
    """
    import torch

    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -torch.einsum("nv,nv->n", all_log_probs.exp(), all_log_probs)
        return log_probs, entropy, logits.mean(-1), logits.argmax(-1) == targets
