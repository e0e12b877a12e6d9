"""Project only the answer's positions onto the vocabulary.

TRL's fused head does so on GPUs; on other devices it projects every position, twice, prompt and padding included
(trl 1.16, `add_fused_lm_head`). With a vocabulary of 49,152 that is a third of a small model's training time.
"""

import functools
import types
from typing import TYPE_CHECKING, Any

from models.policy import project

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
        kwargs["use_cache"] = False
        scale = kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        figures = per_token(project(self, hidden[mask]), targets[mask])
        log_probs, entropy, mean_logits, is_top1 = (
            value.new_zeros(mask.shape).masked_scatter(mask, value) for value in figures
        )
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if scale is None else scale)
        return FusedCausalLMOutput(loss, log_probs, entropy, None, mean_logits, is_top1, mask)

    model.forward = types.MethodType(forward, model)


def per_token(logits: "torch.Tensor", targets: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """Return log-prob of each target, entropy, mean logit and whether the target is the most likely; shape (n,) each.

    Only the log-probs carry a gradient. `logits` has shape (n, vocabulary).
    """
    import torch

    log_probs = torch.nn.functional.cross_entropy(logits, targets, reduction="none").neg()
    with torch.no_grad():
        normal = logits.logsumexp(-1)
        entropy = normal - (logits * (logits - normal[:, None]).exp()).sum(-1)
        return log_probs, entropy, logits.mean(-1), logits.argmax(-1) == targets
