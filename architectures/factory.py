"""From config to model: MultiVectorEncoder([Transformer, Dense..., MultiVectorMask, Normalize])."""

import inspect
import json
import logging
from collections.abc import Sequence

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.util import load_file_path
from torch import nn
from transformers import MODEL_MAPPING, AddedToken, AutoConfig, PreTrainedTokenizerBase

from architectures.weights import locate_backbone
from configs.schema import Activation, BackboneConfig, ConfigError, Expansion, HeadConfig, HeadLayer, Keep

logger = logging.getLogger(__name__)

# The width that PyLate, sentence-transformers and ColBERT give to a checkpoint without a head.
DEFAULT_LAYER = HeadLayer(out_features=128, bias=False, activation=Activation.identity, residual=False)


def build_encoder(backbone: BackboneConfig, head: HeadConfig) -> MultiVectorEncoder:
    """Load the backbone and put the head on it.

    New layers and tokens are drawn from torch's random state: seed it before. Weights are float32, on the CPU.
    Raises ConfigError for all that `locate_backbone` refuses and for a prefix that is not one token.
    """
    source = locate_backbone(backbone)
    loaded = MultiVectorEncoder(source, device="cpu", revision=backbone.revision, model_kwargs=_model_kwargs(backbone, source))
    transformer, mask = loaded[0], next(module for module in loaded if isinstance(module, MultiVectorMask))
    own_layers = [module for module in loaded if isinstance(module, Dense)] if _has_head(source, backbone) else []
    layers = build_head(head, own_layers, transformer.get_embedding_dimension())
    _set_lengths(transformer, backbone)
    if backbone.skiplist is not None:
        mask = _build_mask(transformer.tokenizer, backbone)
    encoder = MultiVectorEncoder(
        modules=[transformer, *layers, mask, Normalize(module_input_name="token_embeddings")],
        prompts=_add_prefixes(transformer, loaded.prompts, backbone),
        device="cpu",
    )
    return encoder


def build_head(head: HeadConfig, own_layers: Sequence[Dense], width: int) -> list[Dense]:
    """Return the kept layers and the new ones, widths chained.

    own_layers: the Dense layers of the checkpoint; width: the backbone's.
    """
    layers = list(own_layers) if head.keep is Keep.all else []
    specs = list(head.layers)
    if not layers and not specs:
        specs = [DEFAULT_LAYER]
    for spec in specs:
        out_features = spec.out_features
        if out_features is None:
            assert spec.factor is not None, "parse_config lets no layer without a width pass"
            out_features = round(spec.factor * width)
        layers.append(
            # Every argument: the library's own defaults are Tanh, a bias and the pooled embedding.
            Dense(
                in_features=layers[-1].out_features if layers else width,
                out_features=out_features,
                bias=spec.bias,
                activation_function=getattr(nn, spec.activation.value)(),
                module_input_name="token_embeddings",
                module_output_name="token_embeddings",
                use_residual=spec.residual,
            )
        )
    return layers


def _model_kwargs(backbone: BackboneConfig, source: str) -> dict[str, object]:
    # A checkpoint stored in half precision would otherwise be trained in it.
    kwargs: dict[str, object] = {"dtype": torch.float32, "attn_implementation": backbone.attention.name}
    model_class = MODEL_MAPPING[type(AutoConfig.from_pretrained(source, revision=backbone.revision))]
    # An unused pooler gets no gradient, which breaks DistributedDataParallel at the second step.
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        kwargs["add_pooling_layer"] = False
    return kwargs


def _has_head(source: str, backbone: BackboneConfig) -> bool:
    """Whether the checkpoint has projection layers of its own; the loader adds a random one where it has none."""
    modules = load_file_path(source, "modules.json", revision=backbone.revision)
    if modules is not None:
        with open(modules, encoding="utf-8") as file:
            return any(module["type"].endswith(".Dense") for module in json.load(file))
    config = load_file_path(source, "config.json", revision=backbone.revision)
    with open(config, encoding="utf-8") as file:
        return "HF_ColBERT" in (json.load(file).get("architectures") or [])


def _set_lengths(transformer: Transformer, backbone: BackboneConfig) -> None:
    if backbone.document_length is not None:
        transformer.document_length = backbone.document_length
    if backbone.expansion is None:
        transformer.query_length = backbone.query_length or transformer.query_length
        return
    # Assigned first: the library refuses an expansion that is longer than the query length it finds.
    transformer.query_length = None if backbone.expansion is Expansion.min else backbone.query_length
    if backbone.expansion is Expansion.none:
        transformer.query_expansion = None
    else:
        transformer.query_expansion = {
            "strategy": backbone.expansion.name,
            "attend": backbone.attend_to_expansion,
            "length": backbone.query_length,
        }


def _build_mask(tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig) -> MultiVectorMask:
    """Mask of the tokens that are scored; words outside the vocabulary would mask every unknown token, so they go."""
    assert backbone.skiplist is not None
    vocabulary = tokenizer.get_vocab()
    known = [word for word in backbone.skiplist if word in vocabulary]
    if dropped := [word for word in backbone.skiplist if word not in vocabulary]:
        logger.warning("backbone.skiplist: dropped %s, no single tokens of this vocabulary", " ".join(dropped))
    return MultiVectorMask(known, skiplist_tasks=[side.name for side in backbone.skiplist_sides])


def _add_prefixes(transformer: Transformer, own_prompts: dict[str, str], backbone: BackboneConfig) -> dict[str, str]:
    """Make each prefix one special token, which stands right after the first special token as in PyLate."""
    prompts, tokenizer = dict(own_prompts), transformer.tokenizer
    for side, prefix in (("query", backbone.query_prefix), ("document", backbone.document_prefix)):
        if prefix is None:
            continue
        prompts[side] = prefix
        if not prefix:
            continue
        # A marker that the vocabulary already has, such as [unused0], is taken with or without its trailing space.
        marker = prefix.strip() if prefix.strip() in tokenizer.get_vocab() else prefix
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(marker, normalized=False, special=True)]},
            replace_extra_special_tokens=False,
        )
        if len(tokenizer.tokenize(prefix)) != 1:
            raise ConfigError(
                f"backbone.{side}_prefix={prefix!r} must be one token, the tokenizer makes {tokenizer.tokenize(prefix)}: "
                "use a marker such as '[Q] ' or an empty text"
            )
    if len(tokenizer) > transformer.model.get_input_embeddings().num_embeddings:
        transformer.model.resize_token_embeddings(len(tokenizer))
    return prompts
