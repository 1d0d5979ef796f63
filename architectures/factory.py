"""From config to model: MultiVectorEncoder([Transformer, head..., MultiVectorMask, Normalize])."""

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AddedToken,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from architectures.heads import backbone_of, build_head, head_of
from architectures.layouts import PROJECTION, Checkpoint, Layout, read_checkpoint
from architectures.projection import Projection
from configs.schema import Attention, BackboneConfig, ConfigError, HeadConfig

logger = logging.getLogger(__name__)

# Words of which one stands at the start of a word and one within, where tokenizers tell these apart.
PROBE = "what is a cat"


def build_encoder(
    backbone: BackboneConfig, head: HeadConfig, *, checkpoint: Checkpoint | None = None
) -> MultiVectorEncoder:
    """Load the backbone and put the head on it.

    checkpoint: what `read_checkpoint` says of the backbone, where it has been asked already.
    New layers and tokens are drawn from torch's random state, layers from head.seed where there is one: seed it before.
    Weights are float32, on the CPU.
    Raises ConfigError for all that `read_checkpoint` refuses, weights that are not all there, layers that do not fit
    and a prefix that is not one token.
    """
    checkpoint = checkpoint or read_checkpoint(backbone)
    asked, backbone = backbone, checkpoint.settings
    loaded = _load(checkpoint)
    transformer = backbone_of(loaded)
    mask = next((module for module in loaded if isinstance(module, MultiVectorMask)), MultiVectorMask())
    tokenizer = transformer.tokenizer
    assert tokenizer is not None, "a text backbone has a tokenizer"
    # Where positions are absolute, padding before a text would move it.
    tokenizer.padding_side = "right"
    own_layers = head_of(loaded) if checkpoint.has_head else []
    width = transformer.get_embedding_dimension()
    layers = build_head(head, own_layers, width)
    for index, problem in checkpoint.unusable.items():
        if own_layers[index] in layers:
            raise ConfigError(problem)
    _set_lengths(transformer, backbone)
    if checkpoint.layout is Layout.stanford and asked.skiplist is None:
        backbone = replace(backbone, skiplist=_as_stanford_skips(tokenizer, backbone.skiplist or []))
    if backbone.skiplist is not None or backbone.skiplist_sides is not None:
        mask = _build_mask(tokenizer, mask, backbone, warn=asked.skiplist is not None)
    if backbone.attention is Attention.flash_attention_2:
        _set_flash_attention(transformer)
    prompts = {side: prompt or "" for side, prompt in loaded.prompts.items()}
    if not prompts.get("document"):  # other names for it, as the library has them
        prompts["document"] = next(filter(None, (prompts.get(name) for name in ("passage", "corpus"))), "")
    markers = _add_prefixes(transformer.model, tokenizer, backbone)
    for side, own_prefix in (("query", asked.query_prefix), ("document", asked.document_prefix)):
        if own_prefix is None and side in markers and checkpoint.layout is Layout.pylate:
            # PyLate puts its prefix before a prompt of words, where a model has both.
            prefix = (backbone.query_prefix if side == "query" else backbone.document_prefix) or ""
            markers[side] += prompts.get(side, "").removeprefix(prefix)
    encoder = MultiVectorEncoder(
        modules=[transformer, *layers, mask, Normalize(module_input_name="token_embeddings")],
        prompts=prompts | markers,
        default_prompt_name=loaded.default_prompt_name,
        similarity_fn_name=loaded.similarity_fn_name,
        device="cpu",
    )
    # A save would otherwise ask the Hub for a model of the folder's name.
    encoder.model_card_data.local_files_only = Path(checkpoint.source).is_dir()
    return encoder


def _load(checkpoint: Checkpoint) -> MultiVectorEncoder:
    """The checkpoint as the library reads it, with all of its weights."""
    backbone, source = checkpoint.settings, checkpoint.source
    try:
        model_kwargs, config_kwargs = _loading_options(source, backbone)
        options: dict[str, Any] = {
            "device": "cpu",
            "revision": backbone.revision,
            "model_kwargs": model_kwargs,
            "config_kwargs": config_kwargs,
            "trust_remote_code": backbone.trust_remote_code,
        }
        if any(kind == PROJECTION for kind, _ in checkpoint.head):
            # Our own class, not the file in the folder: it would run.
            loaded = MultiVectorEncoder._load_with_module_classes(source, {PROJECTION: Projection}, **options)
        else:
            loaded = MultiVectorEncoder(source, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split("\n")[:2])
        problem = f"backbone.name={backbone.name} cannot be loaded ({' '.join(reason.split())})"
        remedy = "is the model complete, and of a kind that transformers knows?"
        if not backbone.allow_pickle and "model.safetensors" in reason:
            remedy += " If its weights are pickles alone, backbone.allow_pickle=true reads their tensors."
        raise ConfigError(f"{problem}: {remedy}") from error
    transformer = backbone_of(loaded)
    missing = _not_loaded(transformer.model)
    if missing:
        raise ConfigError(
            f"backbone.name={backbone.name} has no weights for {len(missing)} parameters of its "
            f"{type(transformer.model).__name__}, such as {missing[0]}: they would be random; is the model complete?"
        )
    return loaded


def _not_loaded(model: PreTrainedModel) -> list[str]:
    """Names of parameters that the checkpoint did not hold; transformers marks those that it read."""
    read = {name: getattr(parameter, "_is_hf_initialized", False) for name, parameter in model.named_parameters()}
    return [name for name, was_read in read.items() if not was_read] if any(read.values()) else list(read)


def _loading_options(source: str, backbone: BackboneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers is told about the weights and about their config."""
    config = AutoConfig.from_pretrained(
        source, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
    )
    # A checkpoint stored in half precision would otherwise be trained in it.
    # FlashAttention is set at the end: the library refuses it beside an expansion that a key may yet replace.
    flash = backbone.attention is Attention.flash_attention_2
    model_kwargs: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": Attention.sdpa.name if flash else backbone.attention.name,
        # Said outright, as the checkpoint's own files may ask for less.
        "weights_only": True,
    }
    if not backbone.allow_pickle:
        model_kwargs["use_safetensors"] = True
    model_class = _model_class(source, config, backbone)
    # An unused pooler gets no gradient, which breaks DistributedDataParallel at the second step.
    if "add_pooling_layer" in inspect.signature(model_class).parameters:
        model_kwargs["add_pooling_layer"] = False
    config_kwargs: dict[str, Any] = {}
    if backbone.dropout is not None:
        # Each architecture has names of its own, such as hidden_dropout_prob and attention_dropout.
        shares = {name: value for name, value in config.to_dict().items() if "dropout" in name}
        config_kwargs = {name: backbone.dropout for name, value in shares.items() if isinstance(value, int | float)}
    return model_kwargs, config_kwargs


def _model_class(source: str, config: PretrainedConfig, backbone: BackboneConfig) -> Any:
    own = (getattr(config, "auto_map", None) or {}).get("AutoModel")
    if own is not None and backbone.trust_remote_code:
        return get_class_from_dynamic_module(own, source, revision=backbone.revision)
    return MODEL_MAPPING[type(config)]


def _set_flash_attention(transformer: Transformer) -> None:
    try:
        transformer.model.set_attn_implementation(Attention.flash_attention_2.name)
    except (ImportError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"backbone.attention=flash_attention_2 cannot run ({reason}): install flash-attn, or use sdpa"
        ) from error
    transformer.unpad_inputs = False  # a batch is cut into chunks from its padded form


def _set_lengths(transformer: Transformer, backbone: BackboneConfig) -> None:
    if backbone.document_length is not None:
        transformer.document_length = backbone.document_length
    if backbone.query_length is None and backbone.expansion is None and backbone.attend_to_expansion is None:
        return
    own, own_cap = transformer.query_expansion, transformer.query_length
    length = backbone.query_length or (own["length"] if own else transformer.query_length)
    strategy: str = own["strategy"] if own else "none"
    attend = own["attend"] if own else False
    if backbone.expansion is not None:
        strategy = backbone.expansion.name
    if backbone.attend_to_expansion is not None:
        attend = backbone.attend_to_expansion
    # Lifted first: the library refuses an expansion that is longer than the query length it finds.
    transformer.query_length = None
    if strategy == "none":
        transformer.query_expansion = None
    elif length is None:
        raise ConfigError(
            f"backbone.query_length=null: expansion={strategy} fills queries to a length, and the checkpoint states "
            "none: give one"
        )
    else:
        transformer.query_expansion = {
            "strategy": "min" if strategy == "min" else "fixed",
            "attend": attend,
            "length": length,
            "token": own["token"] if own else None,
        }
    if strategy != "min":
        transformer.query_length = length
    elif backbone.query_length is None:
        transformer.query_length = own_cap


def _as_stanford_skips(tokenizer: PreTrainedTokenizerBase, marks: list[str]) -> list[str]:
    """The first token of each mark typed alone, which is another than the mark where words begin with one of their own,
    as in SentencePiece; unknown marks are left out, or every unknown token would go with them."""
    first = [tokenizer.tokenize(mark)[0] for mark in marks]
    return [token for token in dict.fromkeys(first) if token != tokenizer.unk_token]


def _build_mask(
    tokenizer: PreTrainedTokenizerBase, own: MultiVectorMask, backbone: BackboneConfig, *, warn: bool
) -> MultiVectorMask:
    """Mask of the tokens that are scored; words outside the vocabulary would mask every unknown token, so they go.

    warn: whether they were asked for.
    """
    words = own.skiplist_words if backbone.skiplist is None else backbone.skiplist
    sides = own.skiplist_tasks
    if backbone.skiplist_sides is not None:
        sides = [side.name for side in backbone.skiplist_sides]
    vocabulary = tokenizer.get_vocab()
    known = [word for word in words if word in vocabulary]
    if (dropped := [word for word in words if word not in vocabulary]) and warn:
        logger.warning("backbone.skiplist: dropped %s, no single tokens of this vocabulary", " ".join(dropped))
    return MultiVectorMask(known, skiplist_tasks=sides, keep_only_token_ids=own.keep_only_token_ids)


def _add_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig
) -> dict[str, str]:
    """Make each prefix one special token, which stands right after the first special token as in PyLate; return what
    stands before a text of each side that has one."""
    prompts: dict[str, str] = {}
    for side, prefix in (("query", backbone.query_prefix), ("document", backbone.document_prefix)):
        if prefix is None:
            continue
        prompts[side] = prefix
        if not prefix:
            continue
        if len(prefix.split()) != 1:
            raise ConfigError(
                f"backbone.{side}_prefix={prefix!r} must be one token, without a space within: "
                "use a marker such as '[Q] ' or an empty text"
            )
        # A marker that the vocabulary holds but text never gives, such as [unused0], is taken as it is.
        word = prefix.strip()
        is_marker = word in tokenizer.added_tokens_encoder or tokenizer.tokenize(word) != [word]
        known = [text for text in (prefix, word) if text in tokenizer.get_vocab()]
        marker = known[0] if known and is_marker else prefix
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(marker, normalized=False, special=True)]},
            replace_extra_special_tokens=False,
        )
        if len(tokens := tokenizer.tokenize(prefix)) != 1:
            raise ConfigError(
                f"backbone.{side}_prefix={prefix!r} must be one token, the tokenizer makes {tokens} of it: "
                "use a marker such as '[Q] ' or an empty text"
            )
        prompts[side] = _before_text(tokenizer, prefix)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return prompts


def _before_text(tokenizer: PreTrainedTokenizerBase, prefix: str) -> str:
    """The prefix, with a space or without, so that the text after it has the tokens that it has alone, as where PyLate
    and Stanford's ColBERT put the marker's id among those of the text."""
    alone = tokenizer.tokenize(PROBE)
    spellings = (prefix, f"{prefix} ", prefix.rstrip())
    return next((spelling for spelling in spellings if tokenizer.tokenize(spelling + PROBE)[1:] == alone), prefix)
