"""read_checkpoint: every published layout, the settings that its files state, and every file that is damaged."""

import json
import re
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError

from architectures.layouts import PYLATE_KEYS, Layout, read_checkpoint
from configs.schema import Activation, Attention, BackboneConfig, ConfigError, Expansion, Side
from tests.architectures.conftest import Copy, backbone_config, edit
from tests.checkpoints import Checkpoint
from tests.conftest import ROOT

SAVED = "config_sentence_transformers.json"
METADATA = "artifact.metadata"
MARKS = list(string.punctuation)
KEYS = (
    "query_length",
    "document_length",
    "query_prefix",
    "document_prefix",
    "expansion",
    "attend_to_expansion",
    "skiplist",
    "skiplist_sides",
)
# What PyLate's constructor says where a model says nothing, cut to the 64 positions of these checkpoints.
DEFAULTS: dict[str, Any] = {
    "query_length": 32,
    "document_length": 64,
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "expansion": Expansion.fixed,
    "attend_to_expansion": False,
    "skiplist": MARKS,
    "skiplist_sides": [Side.document],
}
# What the files of the fixtures say.
PYLATE = DEFAULTS | {
    "query_length": 10,
    "document_length": 18,
    "attend_to_expansion": True,
    "skiplist": [",", "cat"],
}
STANFORD = DEFAULTS | {
    "query_length": 12,
    "document_length": 20,
    "query_prefix": "[unused0]",
    "document_prefix": "[unused1]",
}
NOTHING = dict.fromkeys(KEYS)

Folder = Callable[[str], Path]


@pytest.fixture
def folder(request: pytest.FixtureRequest, multi_vector_files: Path) -> Folder:
    """The folder of a checkpoint by the name of its fixture."""

    def folder_of(name: str) -> Path:
        found = multi_vector_files if name == "multi_vector_files" else request.getfixturevalue(name)
        return found.folder if isinstance(found, Checkpoint) else found

    return folder_of


@pytest.fixture
def multi_vector_files(tiny_bert: Path, copy: Copy) -> Path:
    """A MultiVectorEncoder as far as its JSON files say: unattended expansion to 9 tokens, two Dense layers."""
    found = copy(tiny_bert)
    kinds = ["base.modules.transformer.Transformer", "base.modules.dense.Dense", "base.modules.dense.Dense"]
    kinds += ["multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask", "base.modules.normalize.Normalize"]
    write_modules(found, *(f"sentence_transformers.{kind}" for kind in kinds))
    for name in ("1_Dense", "2_Dense"):
        (found / name).mkdir()
        identity = {"activation_function": "torch.nn.modules.linear.Identity"}
        write(found / name / "config.json", {"in_features": 32, "out_features": 32, **identity})
    write(found / SAVED, {"model_type": "MultiVectorEncoder", "prompts": {"query": "[ask] "}})
    expansion = {"strategy": "fixed", "attend": False, "token": None, "length": 9}
    write(found / "sentence_bert_config.json", {"document_length": 14, "query_expansion": expansion})
    return found


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def write_modules(folder: Path, *kinds: str) -> None:
    """modules.json with the backbone at the root and every other module in a folder of its own."""
    names = ["", *(f"{index}_{kind.rpartition('.')[2]}" for index, kind in enumerate(kinds[1:], start=1))]
    write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": name, "type": kind}
            for index, (kind, name) in enumerate(zip(kinds, names, strict=True))
        ],
    )


def settings_of(backbone: BackboneConfig) -> dict[str, Any]:
    settings = read_checkpoint(backbone).settings
    return {key: getattr(settings, key) for key in KEYS}


def refuses(backbone: BackboneConfig, message: str) -> None:
    """message: what follows the backbone's name."""
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(backbone)
    assert str(caught.value) == f"backbone.name={backbone.name}{message}"


# --- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "head"),
    [
        ("tiny_bert", Layout.plain, []),
        ("sentence_bert", Layout.sentence_transformers, []),
        ("embeddinggemma", Layout.sentence_transformers, ["2_Dense", "3_Dense"]),
        ("multi_vector_files", Layout.multi_vector, ["1_Dense", "2_Dense"]),
        ("pylate", Layout.pylate, ["1_Dense", "2_Dense"]),
        ("pylate_without_type", Layout.pylate, ["1_Dense", "2_Dense"]),
        ("stanford", Layout.stanford, []),
    ],
)
def test_every_layout_is_told_by_its_files(folder: Folder, name: str, layout: Layout, head: list[str]) -> None:
    checkpoint = read_checkpoint(backbone_config(folder(name)))
    assert checkpoint.layout is layout
    assert checkpoint.source == str(folder(name))
    assert [path for _, path in checkpoint.head] == head
    # A Stanford ColBERT has its layer among the weights of the backbone.
    assert checkpoint.has_head == (bool(head) or layout is Layout.stanford)


@pytest.mark.parametrize("key", sorted(PYLATE_KEYS))
def test_one_key_of_pylates_tells_its_layout(sentence_bert: Path, copy: Copy, key: str) -> None:
    found = copy(sentence_bert)
    edit(found / SAVED, "model_type", **{key: None})
    assert read_checkpoint(backbone_config(found)).layout is Layout.pylate


def test_pylates_model_type_tells_its_layout_without_any_of_its_keys(pylate: Checkpoint, copy: Copy) -> None:
    found = copy(pylate.folder)
    write(found / SAVED, {"model_type": "ColBERT"})
    assert read_checkpoint(backbone_config(found)).layout is Layout.pylate


def test_a_multi_vector_encoder_that_was_a_stanford_colbert_is_read_as_what_it_is(
    multi_vector_files: Path,
) -> None:
    edit(multi_vector_files / "config.json", architectures=["HF_ColBERT"])
    assert read_checkpoint(backbone_config(multi_vector_files)).layout is Layout.multi_vector


def test_modules_that_have_no_meaning_at_token_level_are_no_part_of_the_head(tiny_bert: Path, copy: Copy) -> None:
    found = copy(tiny_bert)
    kinds = ("Transformer", "Pooling", "Dropout", "Normalize")
    write_modules(found, *(f"sentence_transformers.models.{kind}" for kind in kinds))
    checkpoint = read_checkpoint(backbone_config(found))
    assert checkpoint.layout is Layout.sentence_transformers
    assert checkpoint.head == ()


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny_bert", DEFAULTS),
        ("sentence_bert", DEFAULTS),
        ("embeddinggemma", DEFAULTS | {"query_prefix": None, "document_prefix": None}),
        ("multi_vector_files", NOTHING),
        ("pylate", PYLATE),
        ("pylate_without_type", PYLATE),
        ("stanford", STANFORD),
    ],
)
def test_null_keys_are_what_the_files_say_or_pylates_defaults(
    folder: Folder, name: str, settings: dict[str, Any]
) -> None:
    assert settings_of(backbone_config(folder(name))) == settings


@pytest.mark.parametrize("name", ["tiny_bert", "embeddinggemma", "multi_vector_files", "pylate", "stanford"])
def test_keys_that_are_given_win(folder: Folder, name: str) -> None:
    given = {
        "query_length": 7,
        "document_length": 9,
        "query_prefix": "",
        "document_prefix": "[other]",
        "expansion": Expansion.min,
        "attend_to_expansion": True,
        "skiplist": [],
        "skiplist_sides": [Side.query],
    }
    backbone = backbone_config(folder(name), dropout=0.25, attention=Attention.eager, **given)
    assert read_checkpoint(backbone).settings == backbone


@pytest.mark.parametrize("key", KEYS)
def test_one_key_that_is_given_leaves_the_others_to_the_checkpoint(pylate: Checkpoint, key: str) -> None:
    assert settings_of(backbone_config(pylate.folder, **{key: STANFORD[key]})) == PYLATE | {key: STANFORD[key]}


def test_the_lengths_of_a_sentence_transformer_are_not_those_of_a_late_interaction_model(sentence_bert: Path) -> None:
    assert json.loads((sentence_bert / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    assert settings_of(backbone_config(sentence_bert))["document_length"] == 64


@pytest.mark.parametrize(
    ("prompts", "query_prefix", "document_prefix"),
    [
        ({"query": "what : "}, None, "[D] "),
        ({"document": "a : "}, "[Q] ", None),
        ({"passage": "a : "}, "[Q] ", None),
        ({"corpus": "a : "}, "[Q] ", None),
        ({"query": "", "document": ""}, "[Q] ", "[D] "),
        ({"Clustering": "of : "}, "[Q] ", "[D] "),
        (None, "[Q] ", "[D] "),
    ],
)
def test_a_side_of_a_sentence_transformer_keeps_its_prompt_of_words_and_gets_a_marker_where_it_has_none(
    sentence_bert: Path, copy: Copy, prompts: object, query_prefix: str | None, document_prefix: str | None
) -> None:
    found = copy(sentence_bert)
    edit(found / SAVED, prompts=prompts)
    settings = settings_of(backbone_config(found))
    assert (settings["query_prefix"], settings["document_prefix"]) == (query_prefix, document_prefix)


# Positions


@pytest.mark.parametrize(("positions", "query", "document"), [(512, 32, 180), (64, 32, 64), (20, 20, 20)])
def test_a_default_never_exceeds_the_positions(
    tiny_bert: Path, copy: Copy, positions: int, query: int, document: int
) -> None:
    found = copy(tiny_bert)
    edit(found / "config.json", max_position_embeddings=positions)
    settings = settings_of(backbone_config(found))
    assert (settings["query_length"], settings["document_length"]) == (query, document)


def test_a_default_never_exceeds_the_positions_that_padding_leaves(xlm_roberta: Path) -> None:
    assert settings_of(backbone_config(xlm_roberta))["document_length"] == 64  # of 66


def test_a_default_is_pylates_where_positions_have_no_limit(tiny_bert: Path, copy: Copy) -> None:
    found = copy(tiny_bert)
    edit(found / "config.json", "max_position_embeddings")
    assert settings_of(backbone_config(found))["document_length"] == 180


@pytest.mark.parametrize(
    ("name", "file", "key"), [("pylate", SAVED, "document_length"), ("stanford", METADATA, "doc_maxlen")]
)
def test_the_default_of_a_length_that_a_file_leaves_out_never_exceeds_the_positions(
    folder: Folder, copy: Copy, name: str, file: str, key: str
) -> None:
    found = copy(folder(name))
    edit(found / file, key)
    assert settings_of(backbone_config(found))["document_length"] == 64


@pytest.mark.parametrize(
    ("name", "file", "key"), [("pylate", SAVED, "document_length"), ("stanford", METADATA, "doc_maxlen")]
)
def test_a_length_beyond_the_positions_that_a_file_states_is_refused(
    folder: Folder, copy: Copy, name: str, file: str, key: str
) -> None:
    found = copy(folder(name))
    edit(found / file, **{key: 65})
    with pytest.raises(ConfigError, match=r"exceeds the backbone's 64 positions"):
        read_checkpoint(backbone_config(found))
    assert settings_of(backbone_config(found, document_length=64))["document_length"] == 64


@pytest.mark.parametrize("key", ["query_length", "document_length"])
def test_a_length_beyond_the_positions_that_a_multi_vector_encoder_states_is_refused(
    multi_vector_files: Path, key: str
) -> None:
    edit(multi_vector_files / "sentence_bert_config.json", query_expansion=None, **{key: 65})
    with pytest.raises(ConfigError, match=r"exceeds the backbone's 64 positions"):
        read_checkpoint(backbone_config(multi_vector_files))
    given: dict[str, Any] = {key: 64}
    assert settings_of(backbone_config(multi_vector_files, **given))[key] == 64


def test_an_expansion_of_a_multi_vector_encoder_that_is_no_object_is_refused(multi_vector_files: Path) -> None:
    edit(multi_vector_files / "sentence_bert_config.json", query_expansion="fixed")
    refuses(
        backbone_config(multi_vector_files),
        ": sentence_bert_config.json: query_expansion='fixed' must be an object: mend the file, or download it again",
    )


# PyLate


@pytest.mark.parametrize(
    ("file_key", "key", "default"),
    [
        ("query_length", "query_length", 32),
        ("query_prefix", "query_prefix", "[Q] "),
        ("document_prefix", "document_prefix", "[D] "),
        ("do_query_expansion", "expansion", Expansion.fixed),
        ("attend_to_expansion_tokens", "attend_to_expansion", False),
        ("skiplist_words", "skiplist", MARKS),
    ],
)
@pytest.mark.parametrize("stated", ["left out", "null"])
def test_a_key_that_pylates_file_does_not_state_has_pylates_default(
    pylate: Checkpoint, copy: Copy, file_key: str, key: str, default: object, stated: str
) -> None:
    found = copy(pylate.folder)
    if stated == "null":
        edit(found / SAVED, **{file_key: None})
    else:
        edit(found / SAVED, file_key)
    assert settings_of(backbone_config(found)) == PYLATE | {key: default}


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"do_query_expansion": False}, {"expansion": Expansion.none}),
        ({"skiplist_words": []}, {"skiplist": []}),
        ({"query_prefix": "", "document_prefix": ""}, {"query_prefix": "", "document_prefix": ""}),
        ({"query_prefix": "[unused3] "}, {"query_prefix": "[unused3] "}),
    ],
)
def test_what_pylates_file_states_is_taken(
    pylate: Checkpoint, copy: Copy, change: dict[str, object], settings: dict[str, object]
) -> None:
    found = copy(pylate.folder)
    edit(found / SAVED, **change)
    assert settings_of(backbone_config(found)) == PYLATE | settings


# Stanford


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        *((value, True) for value in (True, "True", "true", "TRUE", 1, "1")),
        *((value, False) for value in (False, "False", "false", "FALSE", 0, "0")),
    ],
)
def test_stanfords_words_for_true_and_false_are_read_as_such(
    stanford: Checkpoint, copy: Copy, value: object, truth: bool
) -> None:
    found = copy(stanford.folder)
    edit(found / METADATA, attend_to_mask_tokens=value, mask_punctuation=value)
    expected = {"attend_to_expansion": truth, "skiplist": MARKS if truth else []}
    assert settings_of(backbone_config(found)) == STANFORD | expected


@pytest.mark.parametrize("key", ["query_maxlen", "doc_maxlen"])
def test_a_number_that_is_written_as_a_text_is_refused_by_its_key(stanford: Checkpoint, copy: Copy, key: str) -> None:
    found = copy(stanford.folder)
    edit(found / METADATA, **{key: "12"})
    with pytest.raises(ConfigError, match=rf"artifact\.metadata: {key}='12' must be a whole number above 0: "):
        read_checkpoint(backbone_config(found))


@pytest.mark.parametrize(
    ("file_key", "key", "default"),
    [
        ("query_maxlen", "query_length", 32),
        ("doc_maxlen", "document_length", 220),
        ("query_token_id", "query_prefix", "[unused0]"),
        ("doc_token_id", "document_prefix", "[unused1]"),
        ("attend_to_mask_tokens", "attend_to_expansion", False),
        ("mask_punctuation", "skiplist", MARKS),
    ],
)
@pytest.mark.parametrize("stated", ["left out", "null"])
def test_a_key_that_stanfords_file_does_not_state_has_stanfords_default(
    stanford: Checkpoint, copy: Copy, file_key: str, key: str, default: object, stated: str
) -> None:
    found = copy(stanford.folder)
    edit(found / "config.json", max_position_embeddings=512)
    # Values other than the defaults: a default that is taken everywhere would pass otherwise.
    edit(found / METADATA, query_token_id="[unused7]", doc_token_id="[unused8]")
    edit(found / METADATA, attend_to_mask_tokens=True, mask_punctuation=False)
    other = STANFORD | {"query_prefix": "[unused7]", "document_prefix": "[unused8]"}
    other |= {"attend_to_expansion": True, "skiplist": []}
    if stated == "null":
        edit(found / METADATA, **{file_key: None})
    else:
        edit(found / METADATA, file_key)
    assert settings_of(backbone_config(found)) == other | {key: default}


def test_a_stanford_colbert_without_its_file_has_stanfords_defaults(stanford: Checkpoint, copy: Copy) -> None:
    found = copy(stanford.folder)
    (found / METADATA).unlink()
    edit(found / "config.json", max_position_embeddings=512)
    lengths = {"query_length": 32, "document_length": 220}
    assert settings_of(backbone_config(found)) == STANFORD | lengths


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("stanford", METADATA), ("pylate", SAVED), ("pylate", "modules.json")])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": 1,\n "b" }', ":2 is no JSON: Expecting ':' delimiter"),
        ("", ":1 is no JSON: Expecting value"),
        ('"a text"', ":1 must hold a JSON {kind}"),
    ],
    ids=["line", "empty", "kind"],
)
def test_a_file_that_is_no_json_is_named_with_its_line(
    folder: Folder, copy: Copy, name: str, file: str, content: str, problem: str
) -> None:
    found = copy(folder(name))
    (found / file).write_text(content)
    kind = "array" if file == "modules.json" else "object"
    refuses(backbone_config(found), f": {found}/{file}{problem.format(kind=kind)}")


def test_a_file_that_is_no_text_is_named(stanford: Checkpoint, copy: Copy) -> None:
    found = copy(stanford.folder)
    (found / METADATA).write_bytes(b'{"query_maxlen": \xff}')
    message = f"^backbone\\.name={found}: {found}/{METADATA} is no text: 'utf-8' codec can't decode byte 0xff"
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(backbone_config(found))


NO_LENGTHS: list[object] = [0, -1, 12.0, "12.5", "long", True, [180]]
NO_TRUTHS: list[object] = ["yes", "", 2, 1.0, []]
LENGTH, TRUTH = "a whole number above 0", "true or false"
TEXT, TEXTS, OBJECT = "a text", "a list of texts", "an object"


@pytest.mark.parametrize(
    ("name", "file", "key", "value", "rule"),
    [
        *(("stanford", METADATA, "doc_maxlen", value, LENGTH) for value in NO_LENGTHS),
        ("stanford", METADATA, "query_maxlen", "", LENGTH),
        *(("stanford", METADATA, "attend_to_mask_tokens", value, TRUTH) for value in NO_TRUTHS),
        ("stanford", METADATA, "mask_punctuation", "maybe", TRUTH),
        ("stanford", METADATA, "query_token_id", 1, TEXT),
        ("stanford", METADATA, "doc_token_id", ["[unused1]"], TEXT),
        ("pylate", SAVED, "query_length", -32, LENGTH),
        ("pylate", SAVED, "do_query_expansion", "on", TRUTH),
        ("pylate", SAVED, "document_prefix", False, TEXT),
        ("pylate", SAVED, "skiplist_words", ".,!", TEXTS),
        ("pylate", SAVED, "skiplist_words", [".", 1], TEXTS),
        ("sentence_bert", SAVED, "prompts", ["what : "], OBJECT),
        ("tiny_bert", "config.json", "auto_map", "modeling_own.OwnModel", OBJECT),
    ],
)
def test_a_value_that_means_nothing_is_named_with_its_file_and_key(
    folder: Folder, copy: Copy, name: str, file: str, key: str, value: object, rule: str
) -> None:
    found = copy(folder(name))
    edit(found / file, **{key: value})
    refuses(backbone_config(found), f": {file}: {key}={value!r} must be {rule}: mend the file, or download it again")


# modules.json


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.LayerNorm",
        "sentence_transformers.models.LSTM",
        "sentence_transformers.models.WeightedLayerPooling",
        "sentence_transformers.multi_vector_encoder.modules.TokenPooling",
        "modeling_own.Dense",
        "someone--repository.Transformer",
    ],
)
def test_a_module_that_cannot_be_moved_to_token_level_is_refused(sentence_bert: Path, copy: Copy, kind: str) -> None:
    found = copy(sentence_bert)
    write_modules(found, "sentence_transformers.models.Transformer", kind)
    refuses(
        backbone_config(found, trust_remote_code=True),
        f": {found}/modules.json names {kind}, which cannot be moved to token level; known are ColBERT, Dense, "
        "Dropout, MultiVectorMask, Normalize, Pooling, Transformer of sentence-transformers and PyLate",
    )


@pytest.mark.parametrize(
    "entry", [1, "sentence_transformers.models.Dense", {"path": "2_Dense"}, {"type": "pylate.models.Dense.Dense"}]
)
def test_a_module_without_type_and_path_is_refused(embeddinggemma: Path, copy: Copy, entry: object) -> None:
    found = copy(embeddinggemma)
    modules = json.loads((found / "modules.json").read_text())
    write(found / "modules.json", [*modules, entry])
    refuses(backbone_config(found), f": {found}/modules.json must list modules, each with type and path")


# Dense


@pytest.mark.parametrize(
    "activation",
    [
        "torch.nn.modules.activation.Softmax",
        "torch.nn.modules.activation.PReLU",
        "torch.nn.functional.gelu",
        "torch.nn.modules.activation.gelu",
        "modeling_own.GELU",
        "transformers.activations.GELUActivation",
        "torch.nnn.GELU",
    ],
)
def test_a_dense_layer_with_an_activation_outside_the_table_cannot_be_kept(
    embeddinggemma: Path, copy: Copy, activation: str
) -> None:
    found = copy(embeddinggemma)
    edit(found / "3_Dense" / "config.json", activation_function=activation)
    unusable = read_checkpoint(backbone_config(found, trust_remote_code=True)).unusable
    assert list(unusable) == [1]  # of the two layers
    assert unusable[1].startswith(
        f"backbone.name={found}: 3_Dense/config.json: activation_function={activation} is none of torch.nn's "
        "GELU, Identity, LeakyReLU, Mish, ReLU, SiLU, Sigmoid, Tanh: "
    )


@pytest.mark.parametrize(
    "activation",
    [
        *(f"torch.nn.modules.activation.{choice.value}" for choice in Activation if choice is not Activation.identity),
        "torch.nn.modules.linear.Identity",
        "torch.nn.GELU",
    ],
)
def test_a_dense_layer_with_an_activation_of_the_table_is_taken(
    embeddinggemma: Path, copy: Copy, activation: str
) -> None:
    found = copy(embeddinggemma)
    edit(found / "3_Dense" / "config.json", activation_function=activation)
    assert len(read_checkpoint(backbone_config(found)).head) == 2


def test_a_dense_layer_that_states_no_activation_has_the_librarys_tanh(embeddinggemma: Path, copy: Copy) -> None:
    found = copy(embeddinggemma)
    edit(found / "3_Dense" / "config.json", "activation_function")
    assert len(read_checkpoint(backbone_config(found)).head) == 2


@pytest.mark.parametrize("value", [None, 0, -32, 1.5, "32", True])
@pytest.mark.parametrize("key", ["in_features", "out_features"])
def test_a_layer_without_a_width_is_refused_by_its_file(
    embeddinggemma: Path, copy: Copy, key: str, value: object
) -> None:
    found = copy(embeddinggemma)
    edit(found / "2_Dense" / "config.json", **{key: value})
    stated = 0 if value is None else value
    refuses(
        backbone_config(found),
        f": 2_Dense/config.json: {key}={stated!r} must be a whole number above 0: mend the file, or download it again",
    )


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("activation", "Softmax", "Identity, ReLU, LeakyReLU, GELU, SiLU, Mish, Tanh, Sigmoid"),
        ("activation", None, "Identity, ReLU, LeakyReLU, GELU, SiLU, Mish, Tanh, Sigmoid"),
        ("norm", "BatchNorm1d", "none, LayerNorm, RMSNorm"),
    ],
)
def test_a_layer_of_our_own_with_an_unknown_class_is_refused_by_its_file(
    tiny_bert: Path, copy: Copy, key: str, value: object, known: str
) -> None:
    found = copy(tiny_bert)
    write_modules(found, "sentence_transformers.models.Transformer", "projection.Projection")
    (found / "1_Projection").mkdir()
    layer = {"in_features": 32, "out_features": 8, "activation": "GELU", "norm": "none"}
    write(found / "1_Projection" / "config.json", layer)
    assert read_checkpoint(backbone_config(found)).head == (("projection.Projection", "1_Projection"),)
    write(found / "1_Projection" / "config.json", layer | {key: value})
    refuses(
        backbone_config(found),
        f": 1_Projection/config.json: {key}={value!r} must be one of {known}: mend the file, or download it again",
    )


def test_a_multi_vector_encoder_whose_vectors_are_of_any_length_is_refused(multi_vector_files: Path) -> None:
    modules = json.loads((multi_vector_files / "modules.json").read_text())
    write(multi_vector_files / "modules.json", [entry for entry in modules if "normalize" not in entry["type"]])
    refuses(
        backbone_config(multi_vector_files),
        ": modules.json has no Normalize: its vectors are of any length, and those trained here are of unit length",
    )


def test_a_dense_layer_without_its_config_is_refused(pylate: Checkpoint, copy: Copy) -> None:
    found = copy(pylate.folder)
    (found / "2_Dense" / "config.json").unlink()
    refuses(backbone_config(found), ": 2_Dense/config.json is missing: is the model complete?")


# --- Code, pickles and attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        ({"AutoModel": "modeling_own.OwnModel"}, "modeling_own.py"),
        ({"AutoConfig": "configuration_own.OwnConfig"}, "configuration_own.py"),
        (
            {"AutoModel": "modeling_own.OwnModel", "AutoConfig": "someone/else--configuration_own.OwnConfig"},
            "configuration_own.py of someone/else, modeling_own.py",
        ),
        ({"AutoModel": "own.Model", "AutoConfig": "own.Config"}, "own.py"),
    ],
)
@pytest.mark.parametrize("name", ["tiny_bert", "embeddinggemma", "pylate", "stanford"])
def test_code_of_a_checkpoint_is_refused_by_its_files_and_accepted_where_it_is_trusted(
    folder: Folder, copy: Copy, name: str, auto_map: dict[str, str], files: str
) -> None:
    found = copy(folder(name))
    edit(found / "config.json", auto_map=auto_map)
    refuses(
        backbone_config(found),
        f" runs Python code of its own ({files}): read it, then set backbone.trust_remote_code=true",
    )
    trusted = read_checkpoint(backbone_config(found, trust_remote_code=True))
    assert trusted.layout is read_checkpoint(backbone_config(folder(name))).layout


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoModelForMaskedLM": "modeling_own.OwnForMaskedLM"}])
def test_code_that_is_never_run_asks_for_no_trust(tiny_bert: Path, copy: Copy, auto_map: object) -> None:
    found = copy(tiny_bert)
    edit(found / "config.json", auto_map=auto_map)
    assert read_checkpoint(backbone_config(found)).layout is Layout.plain


PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("pickle", PICKLES)
@pytest.mark.parametrize(("name", "place"), [("tiny_bert", ""), ("stanford", ""), ("pylate", "2_Dense/")])
def test_weights_in_pickles_alone_are_refused_by_their_file(
    folder: Folder, copy: Copy, name: str, place: str, pickle: str
) -> None:
    found = copy(folder(name))
    (found / place / "model.safetensors").rename(found / place / pickle)
    refuses(
        backbone_config(found),
        f" has its weights in a pickle, {place}{pickle}, and none in safetensors: "
        "a pickle can hold code; backbone.allow_pickle=true reads its tensors and nothing else",
    )
    assert read_checkpoint(backbone_config(found, allow_pickle=True)).source == str(found)


@pytest.mark.parametrize("safe", ["model.safetensors", "model.safetensors.index.json"])
def test_pickles_beside_safetensors_are_left_alone(tiny_bert: Path, copy: Copy, safe: str) -> None:
    found = copy(tiny_bert)
    (found / "model.safetensors").rename(found / safe)
    for pickle in PICKLES:
        (found / pickle).touch()
    assert read_checkpoint(backbone_config(found)).source == str(found)


FLASH = (
    "backbone.attention=flash_attention_2 cannot keep unattended expansion tokens apart: "
    "set backbone.attend_to_expansion=true, backbone.expansion=none or backbone.attention=sdpa"
)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        # The default of a plain backbone, what a file says, and what a key says against it.
        ("tiny_bert", {}),
        ("tiny_bert", {"expansion": Expansion.min}),
        ("embeddinggemma", {}),
        ("stanford", {}),
        ("pylate", {"attend_to_expansion": False}),
        ("multi_vector_files", {"expansion": Expansion.fixed, "attend_to_expansion": False}),
        ("multi_vector_files", {}),
    ],
)
def test_flash_attention_2_is_refused_with_unattended_expansion_whoever_asks_for_it(
    folder: Folder, name: str, keys: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(FLASH)}$"):
        read_checkpoint(backbone_config(folder(name), attention=Attention.flash_attention_2, **keys))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("pylate", {}),
        ("stanford", {"attend_to_expansion": True}),
        ("tiny_bert", {"expansion": Expansion.none}),
        ("multi_vector_files", {"attend_to_expansion": True}),
    ],
)
def test_flash_attention_2_is_taken_where_attention_sees_the_expansion_or_there_is_none(
    folder: Folder, name: str, keys: dict[str, Any]
) -> None:
    flash = Attention.flash_attention_2
    assert read_checkpoint(backbone_config(folder(name), attention=flash, **keys)).settings.attention is flash


@pytest.mark.parametrize("expansion", [{"strategy": "min", "attend": True, "length": 9}, None])
def test_flash_attention_2_is_taken_where_a_multi_vector_encoder_attends_to_its_expansion_or_has_none(
    multi_vector_files: Path, expansion: object
) -> None:
    edit(multi_vector_files / "sentence_bert_config.json", query_expansion=expansion)
    flash = Attention.flash_attention_2
    assert read_checkpoint(backbone_config(multi_vector_files, attention=flash)).settings.attention is flash


# --- The Hub, and the cost -------------------------------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str | None]]:
    """Serve a folder as every name of the Hub; returns the list of files, with revisions, that are asked for."""
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, filename: str, *, revision: str | None) -> str:
        asked.append((filename, revision))
        if not (folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_a_model_on_the_hub_is_looked_through_at_its_revision_without_the_weights_of_its_backbone(
    pylate: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(monkeypatch, pylate.folder)
    backbone = backbone_config("someone/something", revision="v2")
    checkpoint = read_checkpoint(backbone)
    assert (checkpoint.source, checkpoint.layout) == ("someone/something", Layout.pylate)
    assert settings_of(backbone) == PYLATE
    assert {revision for _, revision in asked} == {"v2"}
    assert not {"model.safetensors", *PICKLES} & {file for file, _ in asked}


def test_a_pickle_in_the_head_of_a_model_on_the_hub_is_refused(
    pylate: Checkpoint, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = copy(pylate.folder)
    (found / "1_Dense" / "model.safetensors").rename(found / "1_Dense" / "pytorch_model.bin")
    hub(monkeypatch, found)
    with pytest.raises(ConfigError, match=r"has its weights in a pickle, 1_Dense/pytorch_model\.bin, and none in"):
        read_checkpoint(backbone_config("someone/something"))


def test_reading_a_checkpoint_loads_neither_torch_nor_transformers(pylate: Checkpoint) -> None:
    program = (
        "import sys\n"
        "from architectures.layouts import read_checkpoint\n"
        "from configs.schema import Activation, Attention, BackboneConfig\n"
        f"keys = dict.fromkeys({KEYS} + ('revision', 'sha256', 'dropout'))\n"
        f"backbone = BackboneConfig(name={str(pylate.folder)!r}, trust_remote_code=False, allow_pickle=False, "
        "attention=Attention.sdpa, **keys)\n"
        "print(read_checkpoint(backbone).layout.value)\n"
        "print(sorted({'torch', 'transformers', 'sentence_transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("a PyLate model\n[]\n", "")
