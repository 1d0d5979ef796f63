"""Attention as lateforge's training needs it: within each text of a row, and with fast dropout on a CPU."""

from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from architectures.heads import backbone_of
from trainer.dropout import drop, factors

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
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        raise ValueError("attention within the texts of a row has no softcap or bias")
    window = options.get("sliding_window")
    if query.device.type == "cuda":
        if dropout:
            raise ValueError("torch's attention without padding drops no weights")
        return _varlen(query, key, value, bounds, scaling=scaling, causal=causal, window=window), None
    return _by_text(query, key, value, bounds, dropout=dropout, scaling=scaling, causal=causal, window=window), None


def _by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: "TextBounds",
    *,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """One text after the other; what concerns all of them is done for the row, as starting an operation costs as much
    as a short text."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    lengths, sizes = bounds.lengths, [heads * length**2 for length in bounds.lengths]
    kept = factors(sum(sizes), dropout, query.dtype).split(sizes) if dropout else [None] * len(lengths)
    # In one split: the gradient of a slice would be a row of zeros for each text.
    rows = ((query * scaling)[0], key[0], value[0])
    texts = zip(lengths, *(states.split(lengths, dim=1) for states in rows), kept, strict=True)
    outputs = []
    for length, own_query, own_key, own_value, own_kept in texts:
        seen = _seen(length, causal=causal, window=window)
        if own_kept is None:
            states = own_query[None], own_key[None], own_value[None]
            output = nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=1.0)[0]
        else:
            weights = _weights(own_query, own_key, seen)
            output = (weights * own_kept.view(weights.shape)) @ own_value
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)[None]


def _seen(length: int, *, causal: bool, window: int | None) -> Tensor | None:
    """(length, length) bool: which tokens of a text each sees; None where each sees all."""
    if not causal and (window is None or window >= length):
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance.abs() < (window or length)
    return seen & (distance >= 0) if causal else seen


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
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = drop(_weights(scaled, key, attention_mask), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _weights(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """What each scaled query gives to each key of those that it sees."""
    scores = query @ key.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


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


def mask(*, device: torch.device | str, **options: Any) -> Tensor | None:
    """torch's, without asking a GPU whether anything is masked: the host would wait for the answer at each chunk."""
    if torch.device(device).type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    masked: Tensor | None = sdpa_mask(device=device, **options)
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
