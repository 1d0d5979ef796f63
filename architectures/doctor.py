"""Say what a head is: its widths and parameters, whether it is linear in disguise, what an index of it costs, and which
library can hold it."""

from collections.abc import Iterator

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn

from architectures.export import Format, obstacle, runs_own_code
from architectures.heads import HeadModule, describe_extras, fold, head_of, is_linear
from architectures.projection import Projection

# An index of ColBERTv2 (Santhanam et al. 2022, section 3.3) keeps the number of a centroid and a residual per vector.
CENTROID_BYTES = 4


def describe_modules(encoder: MultiVectorEncoder) -> list[tuple[str, str, int]]:
    """Each module's class, what it does in words, and its parameters."""
    return [
        (type(module).__name__, describe_module(module), sum(parameter.numel() for parameter in module.parameters()))
        for module in encoder
    ]


def describe_module(module: nn.Module) -> str:
    """One line about a module: widths, and what it does to them."""
    match module:
        case Transformer():
            return f"{type(module.model).__name__}, {module.get_embedding_dimension()} wide"
        case Dense() | Projection():
            parts = [f"{module.in_features} -> {module.out_features}", type(module.activation_function).__name__]
            parts += ["bias"] if module.bias else ["no bias"]
            if isinstance(module, Projection) and (extras := describe_extras(module)):
                parts.append(extras)
            if module.use_residual:
                parts.append("residual over a learned map" if _learns_residual(module) else "residual")
            return ", ".join(parts)
        case MultiVectorMask():
            sides = " and ".join(module.skiplist_tasks)
            return (
                f"{len(module.skiplist_words)} tokens not scored in a {sides}"
                if module.skiplist_words
                else "scores every token"
            )
    return "unit length"


def head_parameters(encoder: MultiVectorEncoder) -> int:
    """How many parameters the layers of the head have."""
    return sum(parameter.numel() for layer in head_of(encoder) for parameter in layer.parameters())


def diagnose(encoder: MultiVectorEncoder) -> dict[str, str]:
    """The facts of the head, by name."""
    layers, trained = head_of(encoder), head_parameters(encoder)
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    width = widths[-1]
    return {
        "head": f"{' -> '.join(map(str, widths))}, {trained:,} parameters; {_linearity(layers, trained)}",
        "residuals": ", ".join(_residuals(layers)) or "none",
        "index": f"{2 * width:,.0f} MB per million tokens at float16, "
        f"{width / 4 + CENTROID_BYTES:,.0f} MB at 2 bits with {CENTROID_BYTES} bytes for the centroid",
        "exports": "; ".join(_exports(encoder)),
    }


def _learns_residual(layer: HeadModule) -> bool:
    return layer.use_residual and layer.in_features != layer.out_features


def _linearity(layers: list[HeadModule], trained: int) -> str:
    if not is_linear(layers):
        return "not linear"
    weight, bias = fold(layers)
    kind = "linear" if bias is None else "linear with a bias"
    if len(layers) == 1 and not layers[0].use_residual:
        return kind
    rows, columns = weight.shape
    size = weight.numel() + (0 if bias is None else bias.numel())
    # A map through a narrow layer reaches fewer directions than its two widths suggest.
    rank = int(torch.linalg.matrix_rank(weight.float()))
    narrow = f" of rank {rank}" if rank < min(weight.shape) else ""
    fewer = f", {trained / size:.3g} times fewer" if trained > size else ""
    return f"{kind} in disguise: it folds to one {columns} -> {rows} matrix{narrow} of {size:,} parameters{fewer}"


def _residuals(layers: list[HeadModule]) -> Iterator[str]:
    for index, layer in enumerate(layers):
        if _learns_residual(layer):
            yield (
                f"layer {index} adds a learned {layer.in_features} -> {layer.out_features} map of its input, "
                "not the input"
            )
        elif layer.use_residual:
            yield f"layer {index} adds its input"


def _exports(encoder: MultiVectorEncoder) -> Iterator[str]:
    for layout in Format:
        reason = obstacle(encoder, layout)
        if reason is not None:
            yield f"{layout.name} no ({reason})"
        else:
            yield f"{layout.name} " + ("with trust_remote_code" if runs_own_code(encoder, layout) else "yes")
