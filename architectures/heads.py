"""Build the projection head, cut a trained one to a width, and fold one without activations into one map."""

from collections.abc import Sequence
from typing import cast

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor, nn

from architectures.projection import Projection
from configs.schema import Activation, ConfigError, HeadConfig, HeadLayer, Norm

# The width that PyLate, sentence-transformers and ColBERT give to a checkpoint without a head.
DEFAULT_WIDTH = 128
# Each component of what they give follows from that component alone; a softmax would see that others are gone.
ELEMENTWISE = {activation.value for activation in Activation}

HeadModule = Dense | Projection


def backbone_of(encoder: MultiVectorEncoder) -> Transformer:
    """The module with the backbone, which stands first."""
    backbone = encoder[0]
    assert isinstance(backbone, Transformer), "build_encoder puts the backbone first"
    return cast(Transformer, backbone)


def head_of(encoder: MultiVectorEncoder) -> list[HeadModule]:
    """The projection layers of an encoder, in order."""
    return [module for module in encoder if isinstance(module, Dense | Projection)]


def build_head(head: HeadConfig, own_layers: Sequence[HeadModule], width: int) -> list[HeadModule]:
    """Return the kept layers and the new ones, widths chained; new ones are drawn from head.seed where there is one.

    own_layers: the projection layers of the checkpoint; width: the backbone's.
    Raises ConfigError for layers that do not fit each other, and for more to keep than there are.
    """
    if head.seed is None:
        return _build_head(head, own_layers, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head.seed)
        return _build_head(head, own_layers, width)


def _build_head(head: HeadConfig, own_layers: Sequence[HeadModule], width: int) -> list[HeadModule]:
    kept = {"all": len(own_layers), "none": 0}.get(head.keep)
    if kept is None:
        kept = int(head.keep)
    if kept > len(own_layers):
        raise ConfigError(
            f"head.keep={kept}: the checkpoint has {len(own_layers)} layers of its own: set {len(own_layers)} or less, "
            "or all"
        )
    layers = list(own_layers[:kept])
    widths = [width, *(layer.out_features for layer in layers)]
    for index, (before, layer) in enumerate(zip(widths, layers, strict=False)):
        if layer.in_features != before:
            raise ConfigError(
                f"head.keep={head.keep}: layer {index} of the checkpoint's head takes vectors of {layer.in_features}, "
                f"and the one before gives {before}: set head.keep={index or 'none'}"
            )
    for index, spec in enumerate(head.layers):
        before = layers[-1].out_features if layers else width
        if spec.in_features is not None and spec.in_features != before:
            raise ConfigError(
                f"head.layers[{index}].in_features={spec.in_features}, and the one before gives {before}: "
                "set it to that, or leave it out"
            )
        layers.append(_build_layer(spec, before, _out_features(spec, width, index)))
    last = layers[-1].out_features if layers else None
    if last is None or head.embedding_size not in (None, last):
        plain = HeadLayer(bias=False, activation=Activation.identity, residual=False)
        layers.append(_build_layer(plain, last or width, head.embedding_size or DEFAULT_WIDTH))
    return layers


def _out_features(spec: HeadLayer, width: int, index: int) -> int:
    if spec.out_features is not None:
        return spec.out_features
    assert spec.factor is not None, "parse_config lets no layer without a width pass"
    if out_features := round(spec.factor * width):
        return out_features
    raise ConfigError(f"head.layers[{index}].factor={spec.factor} of {width} gives a width of 0: raise it")


def _build_layer(spec: HeadLayer, in_features: int, out_features: int) -> HeadModule:
    if spec.gated or spec.dropout or spec.norm is not Norm.none:
        return Projection(
            in_features,
            out_features,
            bias=spec.bias,
            activation=spec.activation.value,
            norm=spec.norm.value,
            gated=spec.gated,
            dropout=spec.dropout,
            use_residual=spec.residual,
        )
    # Every argument: the library's own defaults are Tanh, a bias and the pooled embedding.
    return Dense(
        in_features=in_features,
        out_features=out_features,
        bias=spec.bias,
        activation_function=getattr(nn, spec.activation.value)(),
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
        use_residual=spec.residual,
    )


def portable(layer: HeadModule) -> bool:
    """Whether a Dense layer computes the same outside of training, as it does where dropout alone is more."""
    return isinstance(layer, Dense) or (layer.norm == "none" and not layer.gated)


def as_dense(layer: HeadModule) -> Dense:
    """The layer as a Dense that computes the same outside of training; the weights are shared.

    Raises ValueError where it is not portable.
    """
    if isinstance(layer, Dense):
        return layer
    if not portable(layer):
        raise ValueError(f"a layer that is {describe_extras(layer)} is no Dense")
    dense = Dense(
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias,
        activation_function=layer.activation_function,
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
        use_residual=layer.use_residual,
    )
    dense.linear = layer.linear
    if layer.use_residual and layer.in_features != layer.out_features:
        dense.residual = layer.residual
    return dense


def describe_extras(layer: Projection) -> str:
    """What it has beyond a Dense, in words."""
    extras = [f"normalised before by {layer.norm}"] if layer.norm != "none" else []
    extras += ["gated"] if layer.gated else []
    extras += [f"trained with dropout {layer.dropout:g}"] if layer.dropout else []
    return " and ".join(extras)


def is_linear(layers: Sequence[HeadModule]) -> bool:
    """Whether the layers together are one affine map of their input, however many parameters they train."""
    return all(portable(layer) and isinstance(layer.activation_function, nn.Identity) for layer in layers)


def fold(layers: Sequence[HeadModule]) -> tuple[Tensor, Tensor | None]:
    """Return the weight (out, in) and the bias (out) of the one map that linear layers are; no bias where none has one.

    Computed in float64 and rounded once. Raises ValueError where a layer is not linear.
    """
    if not layers or not is_linear(layers):
        raise ValueError("only a head without activations, gates and norms folds to one linear map")
    device = layers[0].linear.weight.device
    weight = torch.eye(layers[0].in_features, dtype=torch.float64, device=device)
    bias, biased = torch.zeros(layers[0].in_features, dtype=torch.float64, device=device), False
    for layer in layers:
        step = layer.linear.weight.detach().double()
        if layer.use_residual:
            equal = layer.in_features == layer.out_features
            step = step + (torch.eye(layer.in_features, device=device) if equal else layer.residual.weight.detach())
        weight, bias = step @ weight, step @ bias
        if layer.linear.bias is not None:
            bias, biased = bias + layer.linear.bias.detach().double(), True
    dtype = layers[0].linear.weight.dtype
    return weight.to(dtype), bias.to(dtype) if biased else None


def fold_head(encoder: MultiVectorEncoder) -> None:
    """Put the one layer in place of a linear head. Raises ValueError where it is not linear."""
    layers = head_of(encoder)
    weight, bias = fold(layers)
    folded = Dense(
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        bias=bias is not None,
        activation_function=nn.Identity(),
        init_weight=weight,
        init_bias=bias,
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
    )
    replace_head(encoder, [folded])


def replace_head(encoder: MultiVectorEncoder, layers: Sequence[HeadModule]) -> None:
    """Put other layers in place of the encoder's head."""
    others = [module for module in encoder if not isinstance(module, Dense | Projection)]
    modules = [others[0], *layers, *others[1:]]
    # A Sequential names its modules by their place.
    for name in list(encoder._modules):
        del encoder._modules[name]
    for module in modules:
        encoder.append(module)


def cut_head(encoder: MultiVectorEncoder, width: int) -> None:
    """Make the encoder give the first `width` components of its vectors, at unit length; its own width changes nothing.

    Raises ValueError for a width below 1 or above the model's, and for a model whose last layer cannot be cut.
    """
    index, dense = _last_layer(encoder)
    if not 1 <= width <= dense.out_features:
        raise ValueError(f"width={width} must be from 1 to {dense.out_features}, the width of the model's vectors")
    if width == dense.out_features:
        return
    activation = type(dense.activation_function).__name__
    if isinstance(dense, Dense) and activation not in ELEMENTWISE:
        raise ValueError(f"a Dense layer with {activation} cannot be cut, only with {', '.join(sorted(ELEMENTWISE))}")
    after = [type(module) for module in list(encoder)[index + 1 :]]
    if Normalize not in after or not {Normalize, MultiVectorMask}.issuperset(after):
        names = ", ".join(kind.__name__ for kind in after) or "nothing"
        raise ValueError(
            f"the last Dense layer is followed by {names}: only MultiVectorMask and Normalize may follow, and "
            "Normalize must"
        )
    if isinstance(dense, Projection) or (dense.use_residual and dense.in_features == width):
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


def _last_layer(encoder: MultiVectorEncoder) -> tuple[int, HeadModule]:
    """The layer that gives the vectors their width, and its place among the modules."""
    for index, module in reversed(list(enumerate(encoder))):
        if isinstance(module, Dense | Projection):
            return index, module
    raise ValueError("the model has no Dense layer, and no other can be cut")


def _selection(layer: HeadModule, width: int) -> Dense:
    """A layer that keeps the first components of what another gives."""
    return Dense(
        in_features=layer.out_features,
        out_features=width,
        bias=False,
        activation_function=nn.Identity(),
        init_weight=torch.eye(width, layer.out_features).to(layer.linear.weight),
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
    )


def _cut(linear: nn.Linear, width: int) -> None:
    """Keep the first rows, in place."""
    linear.weight = nn.Parameter(linear.weight[:width].detach().clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:width].detach().clone())
    linear.out_features = width
