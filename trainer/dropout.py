"""Dropout on a CPU, four activations to a random number.

torch draws a number of its own for each activation, one after the other: with MiniLM's dropout that is an eighth of a
training step. Here 16 bits decide about each, so a share is rounded to 1/65536.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from architectures.heads import backbone_of

ATTENTION = "lateforge_dropout"
LEVELS = 2**16


def drop(values: Tensor, share: float) -> Tensor:
    """Put 0 in place of a share of the values, and scale the others up so that the mean stays."""
    dropped = round(share * LEVELS)
    if dropped == LEVELS:
        return torch.zeros_like(values)
    words = torch.empty((values.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: values.numel()] >= dropped - LEVELS // 2
    return values * kept.view(values.shape).to(values.dtype).mul_(LEVELS / (LEVELS - dropped))


class FastDropout(nn.Dropout):
    """What a Dropout becomes for the time of training."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training and self.p > 0 else input


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's attention; with dropout, which has no fused kernel on a CPU, written out.

    query, key, value: (texts, heads, tokens, width); attention_mask: what `sdpa_mask` gives. Returns (texts, tokens,
    heads, width).
    """
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    is_plain = query.shape[1] == key.shape[1] and not causal and options.get("position_bias") is None
    if not dropout or not is_plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = drop(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


@contextmanager
def fast_dropout(encoder: MultiVectorEncoder, device: torch.device) -> Iterator[None]:
    """Let an encoder that trains on a CPU drop activations by this file."""
    model = backbone_of(encoder).model
    modules = [module for module in encoder.modules() if type(module) is nn.Dropout]
    if device.type != "cpu" or not any(module.p for module in modules):
        yield
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    was = model.config._attn_implementation
    try:
        for module in modules:
            module.__class__ = FastDropout
        if was == "sdpa":
            model.set_attn_implementation(ATTENTION)
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Dropout
        if was == "sdpa":
            model.set_attn_implementation(was)
