"""Attention as lateforge's training needs it: within each text of a row, and with fast dropout on a CPU."""

from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from architectures.heads import backbone_of
from trainer.dropout import drop

if TYPE_CHECKING:
    from trainer.packing import TextBounds

ATTENTION = "lateforge"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    bounds: "TextBounds | None" = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's attention, each text of a row by itself.

    query, key, value: (texts, heads, tokens, width), where `bounds` are given of one row; attention_mask: what
    `mask` gives, not read where `bounds` are given. Returns (texts, tokens, heads, width).
    """
    causal = options.get("is_causal")
    options["is_causal"] = causal = getattr(module, "is_causal", True) if causal is None else causal
    if bounds is None:
        return _padded(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    window = options.get("sliding_window")
    if query.device.type == "cuda":
        if dropout or options.get("softcap") is not None or options.get("position_bias") is not None:
            raise ValueError("torch's attention without padding has no dropout, softcap or bias")
        return _varlen(query, key, value, bounds, scaling=scaling, causal=causal, window=window), None
    # In one split: the gradient of a slice would be a row of zeros for each text.
    texts = zip(bounds.lengths, *(states.split(bounds.lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for length, own_query, own_key, own_value in texts:
        mask, own = None, options
        if window is not None and window < length:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            mask, own = distance.abs() < window, options | {"is_causal": False}
            mask = mask & (distance >= 0) if causal else mask
        output, _ = _padded(module, own_query, own_key, own_value, mask, dropout=dropout, scaling=scaling, **own)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's; with dropout, which has no fused kernel on a CPU, written out."""
    is_plain = query.shape[1] == key.shape[1] and not options["is_causal"] and options.get("position_bias") is None
    if not dropout or not is_plain or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = drop(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: "TextBounds",
    *,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """torch's attention without padding, which knows float16 and bfloat16 alone."""
    from torch.nn.attention.varlen import varlen_attn

    # Rotary embeddings leave float32 under autocast.
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    queries, keys, values = (each[0].transpose(0, 1).to(kind) for each in (query, key, value))
    reach = -1 if window is None else window - 1
    output = varlen_attn(
        queries,
        keys,
        values,
        bounds.offsets,
        bounds.offsets,
        bounds.longest,
        bounds.longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "nothing else was asked for"
    return output[None]


def mask(*given: Any, device: torch.device | str = "cpu", **options: Any) -> Tensor | None:
    """torch's, without asking a GPU whether anything is masked: the host would wait for the answer at each chunk."""
    if torch.device(device).type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    masked: Tensor | None = sdpa_mask(*given, device=device, **options)
    return masked


def use_own_attention(encoder: MultiVectorEncoder) -> bool:
    """Let an encoder that uses torch's attention use this one, which is the same where nothing more is asked of it;
    return whether it does."""
    model = backbone_of(encoder).model
    if model.config._attn_implementation == "sdpa":
        # Compiled, it would be compiled anew for each text's length.
        AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))
        AttentionMaskInterface.register(ATTENTION, mask)
        model.set_attn_implementation(ATTENTION)
    return bool(model.config._attn_implementation == ATTENTION)
