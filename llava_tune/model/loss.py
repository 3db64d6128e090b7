"""Cross entropy over supervised positions only, in chunks, so that logits never exist for all of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_tune.constants import IGNORE_INDEX

CHUNK_ELEMENTS = 32 << 20
"""Logits that exist at once (128 MB in fp32)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T`, with both gradients made chunk by chunk in the forward pass.

    The gradient of the logits is softmax minus one-hot, so nothing of a chunk need be kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n, vocabulary = hidden.shape[0], weight.shape[0]
        rows = max(16, CHUNK_ELEMENTS // vocabulary)
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.amp.autocast(hidden.device.type, enabled=False):
            for start in range(0, n, rows):
                h, t = hidden[start : start + rows], targets[start : start + rows]
                logits = (h @ w.T).float()
                lse = torch.logsumexp(logits, dim=-1)
                total += (lse - logits.gather(1, t[:, None])[:, 0]).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad = torch.exp_(logits.sub_(lse[:, None]))
                grad[torch.arange(len(t), device=t.device), t] -= 1
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = grad @ w
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_output,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(ctx.dtype),
            None,
        )


def supervised_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of next tokens over the supervised positions.

    Args:
        hidden: last hidden states, float [batch, length, dim].
        weight: the output head's weight, float [vocabulary, dim].
        labels: int64 [batch, length]; IGNORE_INDEX is not supervised. Position i predicts label i + 1.

    Returns:
        float32 scalar; zero (with a gradient of zero) if nothing is supervised.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    total: Tensor = _ChunkedCrossEntropy.apply(hidden[:, :-1][mask], weight, targets[mask])
    return total
