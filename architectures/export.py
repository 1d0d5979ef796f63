"""Write an encoder in the layout of another library: sentence-transformers, PyLate 1.6 or Stanford's ColBERT 0.2.

A layout that cannot hold a model says why; nothing is left out in silence.
"""

import json
import string
from enum import Enum
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from transformers import PreTrainedTokenizerBase

from architectures.heads import as_dense, backbone_of, describe_extras, head_of, is_linear, portable, replace_head
from architectures.projection import Projection
from architectures.weights import positions_of


class Format(Enum):
    """The layouts that a model can be handed on in; the value is what a person reads."""

    sentence_transformers = "sentence-transformers 6"
    pylate = "PyLate 1.6"
    stanford = "Stanford ColBERT 0.2"


def obstacle(encoder: MultiVectorEncoder, layout: Format) -> str | None:
    """Why a layout cannot hold the model, None where it can."""
    if layout is Format.sentence_transformers:
        return None
    reason = _obstacle_of_both(encoder, layout.value)
    return reason or (_stanford_obstacle(encoder, layout.value) if layout is Format.stanford else None)


def write_layout(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> None:
    """Write the model into a folder that exists and is empty.

    Raises ValueError where the layout cannot hold it. A layer of our own that computes what a Dense does outside of
    training is written as one.
    """
    if reason := obstacle(encoder, layout):
        raise ValueError(f"{layout.value} cannot hold this model: {reason}")
    layers = head_of(encoder)
    replace_head(encoder, [as_dense(layer) if portable(layer) else layer for layer in layers])
    try:
        match layout:
            case Format.sentence_transformers:
                encoder.save_pretrained(str(folder), create_model_card=False)
            case Format.pylate:
                _write_pylate(encoder, folder)
            case Format.stanford:
                _write_stanford(encoder, folder)
    finally:
        replace_head(encoder, layers)


def loading_lines(encoder: MultiVectorEncoder, folder: str) -> dict[str, str]:
    """For each library the lines of Python that load a saved model, or in one line why it cannot hold it."""
    own, *others = Format
    lines = {own.value: how_to_load(own, folder, trust=runs_own_code(encoder))}
    for layout in others:
        reason, trust = obstacle(encoder, layout), runs_own_code(encoder, layout)
        command = f"# after python scripts/export.py model={folder} format={layout.name}"
        command += " trust_remote_code=true\n" if trust else "\n"
        lines[layout.value] = (
            f"cannot hold it: {reason}"
            if reason
            else command + how_to_load(layout, f"{folder}_{layout.name}", trust=trust)
        )
    return lines


def how_to_load(layout: Format, folder: str, *, trust: bool = False) -> str:
    """The lines of Python that load it. trust: whether that runs code in the folder."""
    remote = ", trust_remote_code=True" if trust else ""
    match layout:
        case Format.sentence_transformers:
            return (
                "from sentence_transformers import MultiVectorEncoder\n"
                f'model = MultiVectorEncoder("{folder}"{remote})\n'
                'scores = model.similarity(model.encode_query(["a query"]), model.encode_document(["a document"]))'
            )
        case Format.pylate:
            return (
                "from pylate import models, scores\n"
                f'model = models.ColBERT("{folder}"{remote})\n'
                'queries = model.encode(["a query"], is_query=True)\n'
                'documents = model.encode(["a document"], is_query=False)\n'
                "similarities = scores.colbert_scores(queries, documents)"
            )
        case Format.stanford:
            return (
                "from colbert.infra import ColBERTConfig\n"
                "from colbert.modeling.checkpoint import Checkpoint\n"
                f'model = Checkpoint("{folder}", ColBERTConfig.load_from_checkpoint("{folder}"))\n'
                'queries, documents = model.queryFromText(["a query"]), model.docFromText(["a document"])'
            )


def runs_own_code(encoder: MultiVectorEncoder, layout: Format | None = None) -> bool:
    """Whether loading the model runs Python code of its folder: that of its backbone, or our own module.

    layout: None is the model as a run saves it, with the layers that it was trained with.
    """
    transformer, *_ = _parts(encoder)
    if getattr(transformer.model.config, "auto_map", None):
        return True
    layers = [layer for layer in head_of(encoder) if isinstance(layer, Projection)]
    if layout is None:
        return bool(layers)
    return layout is Format.sentence_transformers and not all(portable(layer) for layer in layers)


def _parts(encoder: MultiVectorEncoder) -> tuple[Transformer, PreTrainedTokenizerBase, MultiVectorMask]:
    transformer, mask = backbone_of(encoder), next(module for module in encoder if isinstance(module, MultiVectorMask))
    assert transformer.tokenizer is not None, "a text backbone has a tokenizer"
    return transformer, transformer.tokenizer, mask


def _obstacle_of_both(encoder: MultiVectorEncoder, library: str) -> str | None:
    """What neither PyLate nor Stanford's ColBERT can say."""
    transformer, tokenizer, mask = _parts(encoder)
    for index, layer in enumerate(head_of(encoder)):
        if not portable(layer):
            assert isinstance(layer, Projection)
            return f"layer {index} of the head is {describe_extras(layer)}, and {library} has Dense layers alone"
    if encoder.similarity_fn_name != "maxsim":
        return f"it scores by {encoder.similarity_fn_name}, and {library} by maxsim"
    for side in ("query", "document"):
        prompt = encoder.prompts.get(side) or ""
        if prompt and len(tokenizer.tokenize(prompt)) != 1:
            return f"the prefix {prompt!r} of a {side} is several tokens, and {library} puts one token before a text"
    if (expansion := transformer.query_expansion) is not None:
        if expansion["strategy"] != "fixed":
            return f"backbone.expansion={expansion['strategy']}, and {library} fills to a fixed length or not at all"
        if expansion["token"] not in (None, tokenizer.mask_token):
            return f"queries are filled with {expansion['token']!r}, and {library} fills them with the mask token"
    if mask.skiplist_words and mask.skiplist_tasks != ["document"]:
        return f"backbone.skiplist_sides={mask.skiplist_tasks}, and {library} skips tokens of documents alone"
    if mask.keep_only_token_ids:
        return f"it scores listed tokens alone, and {library} all but listed ones"
    return None


def _stanford_obstacle(encoder: MultiVectorEncoder, library: str) -> str | None:
    transformer, tokenizer, mask = _parts(encoder)
    layers = head_of(encoder)
    if not is_linear(layers):
        return f"its head is no linear map, and {library} has one bias-free linear layer"
    if any(layer.linear.bias is not None for layer in layers):
        return f"its head has a bias, and {library} has one bias-free linear layer"
    if len(layers) > 1 or layers[0].use_residual:
        return f"its head is one linear map in several layers, and {library} has one layer: fold=true writes it as one"
    if transformer.query_expansion is None:
        return f"its queries are not filled with mask tokens, and {library} always fills them"
    if not all(encoder.prompts.get(side) for side in ("query", "document")):
        return f"it has no prefix on each side, and {library} always puts one"
    if tokenizer.mask_token is None:
        return f"its tokenizer has no mask token, with which {library} fills queries"
    if _padding(transformer, tokenizer) in (None, tokenizer.mask_token_id):
        return f"its padding is the mask token, and {library} scores no token that is padding"
    if not mask.skiplist_words:
        return (
            f"it scores every token of a document, and {library} fails to encode documents with mask_punctuation=false"
        )
    skipped = {tokenizer.convert_tokens_to_ids(word) for word in mask.skiplist_words}
    punctuation = {tokenizer.encode(symbol, add_special_tokens=False)[0] for symbol in string.punctuation}
    # A mark outside the vocabulary is its unknown token, which skiplists leave alone.
    if skipped != punctuation - {tokenizer.unk_token_id}:
        return f"its skiplist is not the 32 punctuation marks, which {library} skips"
    if tokenizer.unk_token_id in punctuation:
        return f"its vocabulary lacks punctuation marks, for which {library} would skip every unknown token"
    config = transformer.model.config
    # It puts a class together from two names, and takes bert-base-uncased where it finds none.
    names, kind = {name.lower() for name in dir(transformers)}, config.model_type.replace("-", "").lower()
    known = type(transformer.model).__name__.lower() == f"{kind}model" in names and (
        f"{kind}pretrainedmodel" in names or kind == "xlmroberta"
    )
    if not known and not getattr(config, "auto_map", None):
        return f"{library} finds no class {type(transformer.model).__name__} in transformers"
    return None


def _longest(transformer: Transformer, length: int | None) -> int:
    """The length of a side, which these libraries state for every model."""
    assert transformer.tokenizer is not None
    most = transformer.max_seq_length or transformer.tokenizer.model_max_length
    positions = positions_of(transformer.model.config.to_dict()) or most
    return int(min(length or most, positions))


def _padding(transformer: Transformer, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that pads, as the tokenizer says, or the backbone where that names the mask token."""
    own = tokenizer.pad_token_id
    padding = transformer.model.config.pad_token_id if own == tokenizer.mask_token_id else own
    return padding if isinstance(padding, int) else None


def _prefix_token(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return tokenizer.tokenize(prompt)[0] if prompt else ""


def _write_backbone(transformer: Transformer, folder: Path) -> None:
    transformer.model.save_pretrained(folder)
    assert transformer.tokenizer is not None
    transformer.tokenizer.save_pretrained(folder)
    # Older releases of transformers know neither the name of the new common class nor a list of special tokens.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(path, settings)
    _write_json(
        folder / "config.json", _with_rope_of_old(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    )


def _with_rope_of_old(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the bases of rotary positions under the names that transformers 4 reads, too: it takes its
    defaults otherwise."""
    rope = config.get("rope_parameters") or {}
    names = {
        "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
        "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    }.get(config.get("model_type", ""), {})
    old = {name: rope[kind]["rope_theta"] for kind, name in names.items() if kind in rope}
    if "rope_theta" in rope:
        old["rope_theta"] = rope["rope_theta"]
    return config | old


def _write_pylate(encoder: MultiVectorEncoder, folder: Path) -> None:
    transformer, tokenizer, mask = _parts(encoder)
    _write_backbone(transformer, folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, layer in enumerate(head_of(encoder), start=1):
        dense, name = as_dense(layer), f"{index}_Dense"
        (folder / name).mkdir()
        dense.save_torch_weights(str(folder / name))
        activation = type(dense.activation_function)
        _write_json(
            folder / name / "config.json",
            {
                "in_features": dense.in_features,
                "out_features": dense.out_features,
                "bias": dense.bias,
                "activation_function": f"{activation.__module__}.{activation.__name__}",
                "use_residual": dense.use_residual,
            },
        )
        modules.append({"idx": index, "name": str(index), "path": name, "type": "pylate.models.Dense.Dense"})
    _write_json(folder / "modules.json", modules)
    expansion = transformer.query_expansion
    query_length = _longest(transformer, expansion["length"] if expansion else transformer.query_length)
    settings: dict[str, Any] = {
        "model_type": "ColBERT",
        "__version__": {"transformers": transformers.__version__},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": _prefix_token(tokenizer, encoder.prompts.get("query") or ""),
        "document_prefix": _prefix_token(tokenizer, encoder.prompts.get("document") or ""),
        "query_length": query_length,
        "document_length": _longest(transformer, transformer.document_length),
        "attend_to_expansion_tokens": bool(expansion and expansion["attend"]),
        "skiplist_words": [word for word in mask.skiplist_words if word in tokenizer.get_vocab()],
        "do_query_expansion": expansion is not None,
    }
    _write_json(folder / "config_sentence_transformers.json", settings)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": query_length, "do_lower_case": False})


def _write_stanford(encoder: MultiVectorEncoder, folder: Path) -> None:
    transformer, tokenizer, _ = _parts(encoder)
    _write_backbone(transformer, folder)
    # It scores no token that is its padding, and PyLate saves the mask token as such.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    padding = _padding(transformer, tokenizer)
    assert padding is not None, "an obstacle otherwise"
    _write_json(path, settings | {"pad_token": tokenizer.convert_ids_to_tokens(padding)})
    (dense,) = (as_dense(layer) for layer in head_of(encoder))
    prefix = transformer.model.base_model_prefix
    weights = {f"{prefix}.{name}": tensor.contiguous() for name, tensor in transformer.model.state_dict().items()}
    weights["linear.weight"] = dense.linear.weight.detach().contiguous()
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", config | {"architectures": ["HF_ColBERT"]})
    expansion = transformer.query_expansion
    assert expansion is not None, "an obstacle otherwise"
    metadata = {
        "query_maxlen": expansion["length"],
        "doc_maxlen": _longest(transformer, transformer.document_length),
        "dim": dense.out_features,
        "query_token_id": _prefix_token(tokenizer, encoder.prompts["query"] or ""),
        "doc_token_id": _prefix_token(tokenizer, encoder.prompts["document"] or ""),
        "query_token": "[Q]",
        "doc_token": "[D]",
        "mask_punctuation": True,
        "attend_to_mask_tokens": expansion["attend"],
        "similarity": "cosine",
        "interaction": "colbert",
    }
    _write_json(folder / "artifact.metadata", metadata)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
