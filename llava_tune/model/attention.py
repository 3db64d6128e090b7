"""Causal attention within each sample of a row, at the cost of the samples alone.

transformers isolates packed samples by a mask over the whole row, which costs as if the row were one sample. Here each sample is a
call of its own, without a mask, so that PyTorch takes its fast causal kernel; what is computed is the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_SAMPLE = "per_sample"
"""The name of this attention in a model's config."""


def sample_bounds(position_ids: Tensor) -> Tensor:
    """Where each sample of each row begins and ends, in the place of an attention mask.

    transformers hands a 4-D mask on as it is; this one is told apart by its type.

    Args:
        position_ids: int64 [batch, length], starting anew at 0 with each sample. Padding, all 0, is one sample.

    Returns:
        int32 [batch, 1, 1, most samples + 1], on the CPU: 0, the ends of the samples, then the length again and again. Where each row
        is one sample, with little padding behind it, [1, 1, 1, 2] for all rows at once: causal attention looks at nothing behind.
    """
    length = position_ids.shape[1]
    begins = position_ids == 0
    begins[:, 1:] &= position_ids[:, :-1] != 0
    begins[:, 0] = True
    rows = [row.nonzero().flatten().tolist() for row in begins.cpu()]
    if all(
        len(starts) == 1 or (len(starts) == 2 and not ids[starts[1] :].any())
        for starts, ids in zip(rows, position_ids, strict=True)
    ):
        alone = sum((starts[1] if len(starts) == 2 else length) ** 2 for starts in rows)
        if 2 * alone >= len(rows) * length**2:
            return torch.tensor([[[[0, length]]]], dtype=torch.int32)
    most = max(map(len, rows))
    bounds = torch.full((len(rows), 1, 1, most + 1), length, dtype=torch.int32)
    for bound, starts in zip(bounds, rows, strict=True):
        bound[0, 0, : len(starts)] = torch.tensor(starts)
    return bounds


def per_sample_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: see its AttentionInterface. With any other mask (in generation) it is sdpa's.

    Args:
        query: [batch, heads, length, head_dim]; key and value with the heads that there are of them.
        attention_mask: of `sample_bounds`.

    Returns:
        [batch, length, heads, head_dim]
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    grouped = query.shape[1] != key.shape[1]
    if len(attention_mask) < len(query):  # one sample a row
        whole = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
        )
        return whole.transpose(1, 2).contiguous(), None
    rows = []
    for row, bounds in enumerate(attention_mask[:, 0, 0].tolist()):
        parts = []
        for begin, end in itertools.pairwise(bounds):
            if begin < end:
                q, k, v = (x[row : row + 1, :, begin:end] for x in (query, key, value))
                parts.append(
                    nn.functional.scaled_dot_product_attention(
                        q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
                    )
                )
        rows.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
    return torch.cat(rows).transpose(1, 2).contiguous(), None


AttentionInterface.register(PER_SAMPLE, per_sample_attention)
AttentionMaskInterface.register(PER_SAMPLE, sdpa_mask)


def supports_per_sample(llm: Any) -> bool:
    """Whether a causal LM attends through transformers' interface, to all that came before, without a soft cap."""
    config = llm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return bool(llm._supports_attention_backend) and kinds == {"full_attention"} and window is None and not capped
