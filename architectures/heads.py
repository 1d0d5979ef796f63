"""Cut the head of a trained model, so that it gives narrower vectors."""

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn

from configs.schema import Activation

# Each component of what they give follows from that component alone; a softmax would see that others are gone.
ELEMENTWISE = {activation.value for activation in Activation}


def cut_head(encoder: MultiVectorEncoder, width: int) -> None:
    """Make the encoder give the first `width` components of its vectors, at unit length; its own width changes nothing.

    Raises ValueError for a width below 1 or above the model's, and for a model whose last layer cannot be cut.
    """
    index, dense = _last_dense(encoder)
    if not 1 <= width <= dense.out_features:
        raise ValueError(f"width={width} must be from 1 to {dense.out_features}, the width of the model's vectors")
    if width == dense.out_features:
        return
    activation = type(dense.activation_function).__name__
    if activation not in ELEMENTWISE:
        raise ValueError(f"a Dense layer with {activation} cannot be cut, only with {', '.join(sorted(ELEMENTWISE))}")
    after = [type(module) for module in list(encoder)[index + 1 :]]
    if Normalize not in after or not {Normalize, MultiVectorMask}.issuperset(after):
        names = ", ".join(kind.__name__ for kind in after) or "nothing"
        raise ValueError(
            f"the last Dense layer is followed by {names}: only MultiVectorMask and Normalize may follow, and "
            "Normalize must"
        )
    if dense.use_residual and dense.in_features == width:
        # Cut to the width of its input, a Dense would add that input itself and not the learned map of it.
        encoder.insert(index + 1, _selection(dense, width))
        return
    if dense.use_residual and dense.in_features == dense.out_features:
        # Between unequal widths a Dense adds a linear map of its input: here the rows of the identity.
        dense.residual = nn.Linear(dense.in_features, dense.out_features, bias=False)
        dense.residual.weight = nn.Parameter(torch.eye(dense.in_features).to(dense.linear.weight))
    _cut(dense.linear, width)
    if dense.use_residual:
        _cut(dense.residual, width)
    dense.out_features = width


def _last_dense(encoder: MultiVectorEncoder) -> tuple[int, Dense]:
    """The layer that gives the vectors their width, and its place among the modules."""
    for index, module in reversed(list(enumerate(encoder))):
        if isinstance(module, Dense):
            return index, module
    raise ValueError("the model has no Dense layer, and no other can be cut")


def _selection(dense: Dense, width: int) -> Dense:
    """A layer that keeps the first components of what another gives."""
    return Dense(
        in_features=dense.out_features,
        out_features=width,
        bias=False,
        activation_function=nn.Identity(),
        init_weight=torch.eye(width, dense.out_features).to(dense.linear.weight),
        module_input_name=dense.module_output_name,
        module_output_name=dense.module_output_name,
    )


def _cut(linear: nn.Linear, width: int) -> None:
    """Keep the first rows, in place."""
    linear.weight = nn.Parameter(linear.weight[:width].detach().clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:width].detach().clone())
    linear.out_features = width
