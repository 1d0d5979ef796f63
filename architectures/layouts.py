"""The layouts that late-interaction models are published in, and the settings that their files state.

Light on purpose: neither torch nor transformers is imported, so a damaged or foreign folder answers at once.
"""

import string
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from architectures.weights import check_lengths, find_file, locate_backbone, positions_of, read_json
from configs.schema import Activation, Attention, BackboneConfig, ConfigError, Expansion, Norm, Side


class Layout(Enum):
    """What a checkpoint is, by its files; the value is what a person reads."""

    plain = "a plain backbone"
    sentence_transformers = "a sentence-transformers model"
    multi_vector = "a sentence-transformers MultiVectorEncoder"
    pylate = "a PyLate model"
    stanford = "a Stanford ColBERT"


# What PyLate writes into config_sentence_transformers.json, of every version; model_type came late and not always.
PYLATE_KEYS = {"query_prefix", "document_prefix", "attend_to_expansion_tokens", "skiplist_words", "do_query_expansion"}
# Classes of modules.json whose meaning survives at token level; pooling and dropout have none there.
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize", "Dense", "MultiVectorMask", "Dropout", "ColBERT"}
# The module of our own, whose file a saved model carries; we never run that file, but our own.
PROJECTION = "projection.Projection"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been found and looked through, without its weights.

    source: folder or Hub name; settings: the config, with what the checkpoint says in place of null where its files say
    it in words of their own; head: its projection layers, as class and folder; unusable: by index of such a layer, why
    it cannot be kept.
    """

    source: str
    layout: Layout
    settings: BackboneConfig
    head: tuple[tuple[str, str], ...]
    unusable: dict[int, str]

    @property
    def has_head(self) -> bool:
        return self.layout is Layout.stanford or bool(self.head)


def read_checkpoint(backbone: BackboneConfig) -> Checkpoint:
    """Find a backbone, tell its layout, and take its settings for every key that is null.

    Raises ConfigError for all that `locate_backbone` refuses, code that may not run, pickles that may not be read, and
    a file that is damaged or says what no model can do.
    """
    source = locate_backbone(backbone)
    config = read_json(source, "config.json", backbone)
    _check_code(config, backbone)
    modules = _modules(source, backbone)
    head = tuple((kind, path) for kind, path in modules if kind.endswith(".Dense") or kind == PROJECTION)
    saved = _read(source, "config_sentence_transformers.json", backbone)
    layout = _layout(config, saved, has_modules=bool(modules))
    _check_pickles(source, ["", *(path for _, path in head)], backbone)
    unusable = {}
    for index, (kind, path) in enumerate(head):
        check = _projection_problem if kind == PROJECTION else _dense_problem
        if problem := check(source, path, backbone):
            unusable[index] = problem
    if layout is Layout.multi_vector and not any(kind.endswith(".Normalize") for kind, _ in modules):
        raise ConfigError(
            f"backbone.name={backbone.name}: modules.json has no Normalize: its vectors are of any length, and those "
            "trained here are of unit length"
        )
    positions = positions_of(config)
    match layout:
        case Layout.stanford:
            metadata = _read(source, "artifact.metadata", backbone)
            own = _stanford(_Reader(f"backbone.name={backbone.name}: artifact.metadata", metadata, positions))
        case Layout.multi_vector:
            own = {}  # the loader has them, in the words of the library itself
        case Layout.pylate | Layout.sentence_transformers | Layout.plain:
            file = f"backbone.name={backbone.name}: config_sentence_transformers.json"
            own = _pylate(_Reader(file, saved if layout is Layout.pylate else {}, positions))
            if layout is not Layout.pylate:
                own |= _prompts_of_words(_Reader(file, saved, positions))
    given = {key: value for key, value in own.items() if getattr(backbone, key) is None}
    settings = replace(backbone, **given)
    saved = _read(source, "sentence_bert_config.json", backbone)
    file = f"backbone.name={backbone.name}: sentence_bert_config.json"
    expansion = _Reader(file, saved, positions).mapping("query_expansion")
    stated: dict[str, Any] = {}
    if layout is Layout.multi_vector:
        lengths = {
            "query_length": expansion.get("length") or saved.get("query_length"),
            "document_length": saved.get("document_length"),
        }
        stated = {key: length for key, length in lengths.items() if getattr(settings, key) is None}
    check_lengths(replace(settings, **stated), positions)
    _check_attention(settings, expansion or None)
    return Checkpoint(source=source, layout=layout, settings=settings, head=head, unusable=unusable)


def _read(source: str, filename: str, backbone: BackboneConfig) -> dict[str, Any]:
    """The object that a file holds, empty where there is no such file."""
    found: dict[str, Any] = {}
    if find_file(source, filename, backbone) is not None:
        found = read_json(source, filename, backbone)
    return found


def _check_code(config: dict[str, Any], backbone: BackboneConfig) -> None:
    """Refuse a backbone of its own code, unless that may run."""
    code = _Reader(f"backbone.name={backbone.name}: config.json", config, None).mapping("auto_map")
    files = set()
    for key in {"AutoConfig", "AutoModel"} & set(code):
        repository, _, name = str(code[key]).rpartition("--")
        files.add(f"{name.split('.')[0]}.py" + (f" of {repository}" if repository else ""))
    if files and not backbone.trust_remote_code:
        raise ConfigError(
            f"backbone.name={backbone.name} runs Python code of its own ({', '.join(sorted(files))}): "
            "read it, then set backbone.trust_remote_code=true"
        )


def _check_attention(settings: BackboneConfig, saved: dict[str, Any] | None) -> None:
    """saved: the query_expansion of a sentence-transformers 6 model."""
    expands, attends = settings.expansion in (Expansion.fixed, Expansion.min), settings.attend_to_expansion
    if settings.expansion is None:
        expands = saved is not None
    if attends is None:
        attends = bool(saved and saved.get("attend"))
    if settings.attention is Attention.flash_attention_2 and expands and not attends:
        raise ConfigError(
            "backbone.attention=flash_attention_2 cannot keep unattended expansion tokens apart: "
            "set backbone.attend_to_expansion=true, backbone.expansion=none or backbone.attention=sdpa"
        )


def _layout(config: dict[str, Any], saved: dict[str, Any], *, has_modules: bool) -> Layout:
    if saved.get("model_type") == "MultiVectorEncoder":
        return Layout.multi_vector
    if saved.get("model_type") == "ColBERT" or PYLATE_KEYS & set(saved):
        return Layout.pylate
    if "HF_ColBERT" in (config.get("architectures") or []):
        return Layout.stanford
    return Layout.sentence_transformers if has_modules else Layout.plain


def _modules(source: str, backbone: BackboneConfig) -> list[tuple[str, str]]:
    """Class and folder of each entry of modules.json, if there is one."""
    path = find_file(source, "modules.json", backbone)
    if path is None:
        return []
    entries = read_json(source, "modules.json", backbone, kind=list)
    modules = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"type", "path"} <= set(entry):
            raise ConfigError(f"backbone.name={backbone.name}: {path} must list modules, each with type and path")
        kind = str(entry["type"])
        known = kind.startswith(("sentence_transformers.", "pylate.")) and kind.split(".")[-1] in KNOWN_MODULES
        if not known and kind != PROJECTION:
            raise ConfigError(
                f"backbone.name={backbone.name}: {path} names {kind}, which cannot be moved to token level; "
                f"known are {', '.join(sorted(KNOWN_MODULES))} of sentence-transformers and PyLate"
            )
        modules.append((kind, str(entry["path"])))
    return modules


def _check_pickles(source: str, folders: list[str], backbone: BackboneConfig) -> None:
    """Refuse weights that lie in pickles alone, unless they are allowed."""
    if backbone.allow_pickle:
        return
    if not Path(source).is_dir():
        # Those of a backbone on the Hub are fetched once all else is checked; the loader is told to take no pickle.
        folders = [folder for folder in folders if folder]
    for folder in folders:
        names = [f"{folder}/{name}".lstrip("/") for name in ("model.safetensors", "model.safetensors.index.json")]
        pickles = [f"{folder}/{name}".lstrip("/") for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")]
        if any(find_file(source, name, backbone) for name in names):
            continue
        for name in pickles:
            if find_file(source, name, backbone):
                raise ConfigError(
                    f"backbone.name={backbone.name} has its weights in a pickle, {name}, and none in safetensors: "
                    "a pickle can hold code; backbone.allow_pickle=true reads its tensors and nothing else"
                )


def _dense_problem(source: str, folder: str, backbone: BackboneConfig) -> str | None:
    """Why a Dense cannot be kept: an activation that the loader would replace, or that has arguments nobody saved.

    Raises ConfigError for a config that no Dense can have.
    """
    file, layer = _layer_config(source, folder, backbone)
    activation = layer.text("activation_function", "torch.nn.modules.activation.Tanh")
    known = {choice.value for choice in Activation}
    if activation.startswith("torch.nn.") and activation.split(".")[-1] in known:
        return None
    return (
        f"backbone.name={backbone.name}: {file}: activation_function={activation} is none of torch.nn's "
        f"{', '.join(sorted(known))}: drop the layer with head.keep=none or the number of layers before it"
    )


def _projection_problem(source: str, folder: str, backbone: BackboneConfig) -> None:
    """Raise ConfigError for a config that no Projection of ours can have."""
    _, layer = _layer_config(source, folder, backbone)
    layer.choice("activation", [choice.value for choice in Activation])
    layer.choice("norm", [choice.value for choice in Norm])


def _layer_config(source: str, folder: str, backbone: BackboneConfig) -> tuple[str, "_Reader"]:
    file = f"{folder}/config.json"
    if find_file(source, file, backbone) is None:
        raise ConfigError(f"backbone.name={backbone.name}: {file} is missing: is the model complete?")
    layer = _Reader(f"backbone.name={backbone.name}: {file}", read_json(source, file, backbone), None)
    for key in ("in_features", "out_features"):
        layer.length(key, 0)
    return file, layer


class _Reader:
    """Typed values of a JSON object, with strings for booleans tolerated, as published files have them.

    positions: what no default of a length exceeds; None where there is no limit.
    """

    def __init__(self, place: str, values: dict[str, Any], positions: int | None) -> None:
        self._place = place
        self._values = values
        self._positions = positions

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        words = {"true": True, "false": False, "1": True, "0": False}
        if isinstance(value, bool | int | str) and (word := str(value).lower()) in words:
            return words[word]
        raise self._wrong(key, value, "true or false")

    def length(self, key: str, default: int) -> int:
        value = self._get(key, min(default, self._positions or default))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def choice(self, key: str, among: list[str]) -> None:
        if (value := self._values.get(key)) not in among:
            raise self._wrong(key, value, f"one of {', '.join(among)}")

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def texts(self, key: str, default: list[str]) -> list[str]:
        value = self._get(key, default)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._wrong(key, value, "a list of texts")
        return list(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def _wrong(self, key: str, value: object, rule: str) -> ConfigError:
        return ConfigError(f"{self._place}: {key}={value!r} must be {rule}: mend the file, or download it again")


def _pylate(saved: _Reader) -> dict[str, Any]:
    """Settings of a PyLate model; what it leaves out, and any model that states none, has PyLate's defaults."""
    return {
        "query_length": saved.length("query_length", 32),
        "document_length": saved.length("document_length", 180),
        "query_prefix": saved.text("query_prefix", "[Q] "),
        "document_prefix": saved.text("document_prefix", "[D] "),
        "expansion": Expansion.fixed if saved.boolean("do_query_expansion", True) else Expansion.none,
        "attend_to_expansion": saved.boolean("attend_to_expansion_tokens", False),
        "skiplist": saved.texts("skiplist_words", list(string.punctuation)),
        "skiplist_sides": [Side.document],
    }


def _prompts_of_words(saved: _Reader) -> dict[str, None]:
    """The prefixes that a sentence-transformers model has as words. These stay, so no marker of one token is set: None
    leaves them to the loader."""
    prompts = saved.mapping("prompts")
    sides = {"query_prefix": ("query",), "document_prefix": ("document", "passage", "corpus")}
    return {key: None for key, names in sides.items() if any(prompts.get(name) for name in names)}


def _stanford(metadata: _Reader) -> dict[str, Any]:
    """Settings of a Stanford ColBERT, with the defaults of its own ColBERTConfig; queries are always filled."""
    return {
        "query_length": metadata.length("query_maxlen", 32),
        "document_length": metadata.length("doc_maxlen", 220),
        "query_prefix": metadata.text("query_token_id", "[unused0]"),
        "document_prefix": metadata.text("doc_token_id", "[unused1]"),
        "expansion": Expansion.fixed,
        "attend_to_expansion": metadata.boolean("attend_to_mask_tokens", False),
        "skiplist": list(string.punctuation) if metadata.boolean("mask_punctuation", True) else [],
        "skiplist_sides": [Side.document],
    }
