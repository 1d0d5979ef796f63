"""From config to model: MultiVectorEncoder([Transformer, Dense..., MultiVectorMask, Normalize])."""

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.util import load_file_path
from torch import nn
from transformers import MODEL_MAPPING, AddedToken, AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from architectures.weights import locate_backbone
from configs.schema import Activation, Attention, BackboneConfig, ConfigError, HeadConfig, HeadLayer, Keep

logger = logging.getLogger(__name__)

# The width that PyLate, sentence-transformers and ColBERT give to a checkpoint without a head.
DEFAULT_LAYER = HeadLayer(out_features=128, bias=False, activation=Activation.identity, residual=False)


def build_encoder(backbone: BackboneConfig, head: HeadConfig) -> MultiVectorEncoder:
    """Load the backbone and put the head on it.

    New layers and tokens are drawn from torch's random state: seed it before. Weights are float32, on the CPU.
    Raises ConfigError for all that `locate_backbone` refuses and for a prefix that is not one token.
    """
    source = locate_backbone(backbone)
    try:
        model_kwargs, config_kwargs = _loading_options(source, backbone)
        loaded = MultiVectorEncoder(
            source, device="cpu", revision=backbone.revision, model_kwargs=model_kwargs, config_kwargs=config_kwargs
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"backbone.name={backbone.name} cannot be loaded ({reason})"
        raise ConfigError(f"{problem}: is the model complete, and of a kind that transformers knows?") from error
    transformer, mask = loaded[0], next(module for module in loaded if isinstance(module, MultiVectorMask))
    assert isinstance(transformer, Transformer), "the loader puts the backbone first"
    tokenizer = transformer.tokenizer
    assert tokenizer is not None, "a text backbone has a tokenizer"
    own_layers = [module for module in loaded if isinstance(module, Dense)] if _has_head(source, backbone) else []
    layers = build_head(head, own_layers, transformer.get_embedding_dimension())
    _set_lengths(transformer, backbone)
    if backbone.skiplist is not None:
        mask = _build_mask(tokenizer, backbone)
    if backbone.attention is Attention.flash_attention_2:
        transformer.unpad_inputs = False  # a batch is cut into chunks from its padded form
    encoder = MultiVectorEncoder(
        modules=[transformer, *layers, mask, Normalize(module_input_name="token_embeddings")],
        prompts=_add_prefixes(transformer.model, tokenizer, loaded.prompts, backbone),
        similarity_fn_name=loaded.similarity_fn_name,
        device="cpu",
    )
    # A save would otherwise ask the Hub for a model of the folder's name.
    encoder.model_card_data.local_files_only = Path(source).is_dir()
    return encoder


def build_head(head: HeadConfig, own_layers: Sequence[Dense], width: int) -> list[Dense]:
    """Return the kept layers and the new ones, widths chained.

    own_layers: the Dense layers of the checkpoint; width: the backbone's.
    """
    layers = list(own_layers) if head.keep is Keep.all else []
    specs = list(head.layers)
    if not layers and not specs:
        specs = [DEFAULT_LAYER]
    for index, spec in enumerate(specs):
        out_features = spec.out_features
        if out_features is None:
            assert spec.factor is not None, "parse_config lets no layer without a width pass"
            out_features = round(spec.factor * width)
        if out_features == 0:
            raise ConfigError(f"head.layers[{index}].factor={spec.factor} of {width} gives a width of 0: raise it")
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


def _loading_options(source: str, backbone: BackboneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers is told about the weights and about their config."""
    config = AutoConfig.from_pretrained(source, revision=backbone.revision)
    # A checkpoint stored in half precision would otherwise be trained in it.
    model_kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": backbone.attention.name}
    model_class: Any = MODEL_MAPPING[type(config)]
    # An unused pooler gets no gradient, which breaks DistributedDataParallel at the second step.
    if "add_pooling_layer" in inspect.signature(model_class).parameters:
        model_kwargs["add_pooling_layer"] = False
    config_kwargs: dict[str, Any] = {}
    if backbone.dropout is not None:
        # Each architecture has names of its own, such as hidden_dropout_prob and attention_dropout.
        shares = {name: value for name, value in config.to_dict().items() if "dropout" in name}
        config_kwargs = {name: backbone.dropout for name, value in shares.items() if isinstance(value, int | float)}
    return model_kwargs, config_kwargs


def _has_head(source: str, backbone: BackboneConfig) -> bool:
    """Whether the checkpoint has projection layers of its own; the loader adds a random one where it has none."""
    modules = load_file_path(source, "modules.json", revision=backbone.revision)
    if modules is not None:
        return any(
            module["type"].endswith(".Dense") for module in json.loads(Path(modules).read_text(encoding="utf-8"))
        )
    return "HF_ColBERT" in (AutoConfig.from_pretrained(source, revision=backbone.revision).architectures or [])


def _set_lengths(transformer: Transformer, backbone: BackboneConfig) -> None:
    if backbone.document_length is not None:
        transformer.document_length = backbone.document_length
    if backbone.expansion is None and backbone.query_length is None:
        return
    own = transformer.query_expansion
    length = backbone.query_length or (own["length"] if own else transformer.query_length)
    strategy: str = own["strategy"] if own else "none"
    attend = own["attend"] if own else False
    if backbone.expansion is not None:
        strategy, attend = backbone.expansion.name, backbone.attend_to_expansion
    # Lifted first: the library refuses an expansion that is longer than the query length it finds.
    transformer.query_length = None
    if strategy == "none":
        transformer.query_expansion = None
    else:
        assert length is not None, "parse_config asks for the length that an expansion fills"
        transformer.query_expansion = {
            "strategy": "min" if strategy == "min" else "fixed",
            "attend": attend,
            "length": length,
            "token": own["token"] if own else None,
        }
    if strategy != "min":
        transformer.query_length = length


def _build_mask(tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig) -> MultiVectorMask:
    """Mask of the tokens that are scored; words outside the vocabulary would mask every unknown token, so they go."""
    assert backbone.skiplist is not None
    vocabulary = tokenizer.get_vocab()
    known = [word for word in backbone.skiplist if word in vocabulary]
    if dropped := [word for word in backbone.skiplist if word not in vocabulary]:
        logger.warning("backbone.skiplist: dropped %s, no single tokens of this vocabulary", " ".join(dropped))
    return MultiVectorMask(known, skiplist_tasks=[side.name for side in backbone.skiplist_sides])


def _add_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own_prompts: dict[str, str | None],
    backbone: BackboneConfig,
) -> dict[str, str]:
    """Make each prefix one special token, which stands right after the first special token as in PyLate."""
    prompts = {side: prompt or "" for side, prompt in own_prompts.items()}
    for side, prefix in (("query", backbone.query_prefix), ("document", backbone.document_prefix)):
        if prefix is None:
            continue
        prompts[side] = prefix
        if not prefix:
            continue
        # A marker that the vocabulary holds but text never gives, such as [unused0], is taken as it is.
        word = prefix.strip()
        is_marker = word in tokenizer.added_tokens_encoder or tokenizer.tokenize(word) != [word]
        marker = word if word in tokenizer.get_vocab() and is_marker else prefix
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(marker, normalized=False, special=True)]},
            replace_extra_special_tokens=False,
        )
        if len(tokens := tokenizer.tokenize(prefix)) != 1:
            raise ConfigError(
                f"backbone.{side}_prefix={prefix!r} must be one token, the tokenizer makes {tokens} of it: "
                "use a marker such as '[Q] ' or an empty text"
            )
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return prompts
