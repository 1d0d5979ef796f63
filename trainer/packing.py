"""Texts of a chunk one behind the other in one row, so that no padding is computed.

All but attention works on each token by itself, and `trainer.attention` is told where each text ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn

from architectures.heads import backbone_of
from trainer.attention import use_own_attention
from trainer.data.tokens import TokenizedTexts
from trainer.transfer import send

# How far vectors of unit length may be from those of the padded texts, where float32 is all that rounds.
FLOAT32 = 1e-5
# What backbones call the share of attention's weights that they drop.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
# What a model, or a torch, raises that knows no texts in one row.
UNFIT = (ImportError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class TextBounds:
    """Where the texts of a row begin and end."""

    offsets: Tensor
    """(texts + 1,) int32: where each begins, and where the last ends."""
    lengths: list[int]
    """Tokens of each."""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """(tokens,) int64: the place of each token in its text, on the host."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def to(self, device: torch.device) -> "TextBounds":
        return replace(self, offsets=send(self.offsets, device))


def is_packed(features: Mapping[str, Any]) -> bool:
    """Whether `pack` changes these: not queries with expansion tokens, which no text may see."""
    return "query_expansion_positions" not in features


def pack(features: Mapping[str, Any], first_position: int = 0) -> dict[str, Any]:
    """The features of padded texts as those of one row, or as they are.

    first_position: the number of a text's first position, which is not 0 for RoBERTa and its kin.
    Returns input_ids, position_ids and whatever else has a number a token (1, tokens), `bounds`, and attention_mask
    (1, 1, 1, tokens), which transformers passes on to each layer as it is.
    """
    if not is_packed(features):
        return dict(features)
    is_text = features["attention_mask"].bool()
    lengths = is_text.sum(dim=1)
    bounds = TextBounds(nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), lengths.tolist())
    row = {
        name: value[is_text][None] if isinstance(value, Tensor) and value.shape == is_text.shape else value
        for name, value in features.items()
    }
    return row | {
        "position_ids": bounds.positions[None] + first_position,
        # Of a kind that torch's own attention refuses, to which texts of one row would be one text.
        "attention_mask": torch.ones(1, 1, 1, len(bounds.positions), dtype=torch.int32),
        "bounds": bounds,
    }


def pack_texts(texts: TokenizedTexts, first_position: int = 0) -> TokenizedTexts:
    """The same texts, each chunk as one row."""
    chunks = [pack(chunk, first_position) for chunk in texts.chunks]
    return replace(texts, chunks=chunks, padded_tokens=sum(chunk["input_ids"].numel() for chunk in chunks))


def first_position(encoder: MultiVectorEncoder) -> int:
    """What RoBERTa and its kin count positions from: the number after the padding's."""
    for module in backbone_of(encoder).model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def packing_obstacle(encoder: MultiVectorEncoder, texts: TokenizedTexts, accelerator: Accelerator) -> str | None:
    """Why documents must be padded, judged by what the encoder makes of the chunk with most padding; None where they
    need not be.

    In bfloat16 and float16 the vectors may be twice as far from those of float32 as the padded ones are.
    """
    model, device = backbone_of(encoder).model, accelerator.device
    if not use_own_attention(encoder):
        return f"backbone.attention={model.config._attn_implementation} has another attention than ours"
    if device.type == "cuda" and accelerator.mixed_precision == "no":
        return "on a GPU, attention without padding takes bf16 or fp16"
    if device.type == "cuda" and any(getattr(model.config, name, 0) for name in ATTENTION_DROPOUT):
        return "on a GPU, attention without padding drops no weights: backbone.dropout=0 would do"
    chunk = max(texts.chunks, key=lambda chunk: int((~chunk["attention_mask"].bool()).sum()))
    is_text = chunk["attention_mask"].bool()

    def vectors(features: Mapping[str, Any]) -> Tensor:
        copy = {name: value.to(device) if hasattr(value, "to") else value for name, value in features.items()}
        found: Tensor = encoder(copy, task="document")["token_embeddings"]
        return found.float().cpu()

    was_training = encoder.training
    encoder.to(device).eval()
    try:
        with torch.no_grad():
            exact = padded = vectors(chunk)[is_text]
            with accelerator.autocast():
                if accelerator.mixed_precision != "no":
                    padded = vectors(chunk)[is_text]
                packed = vectors(pack(chunk, first_position(encoder)))[0]
    except UNFIT as error:
        return f"{type(model).__name__} takes no texts in one row ({(str(error).splitlines() or [''])[0]})"
    finally:
        encoder.train(was_training)
    allowed = max(2 * float((padded - exact).abs().max()), FLOAT32)
    if packed.shape != exact.shape or not float((packed - exact).abs().max()) <= allowed:
        return f"{type(model).__name__} makes other vectors of texts in one row"
    return None
