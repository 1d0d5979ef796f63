"""write_layout and obstacle: the files as PyLate 1.6 and Stanford's ColBERT write them, read by sentence-transformers'
own loader and by build_encoder; each reason that a layout cannot hold a model; and what to type to load one."""

import ast
import json
import re
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, BertTokenizer, PreTrainedModel

from architectures.export import Format, how_to_load, loading_lines, obstacle, runs_own_code, write_layout
from architectures.factory import build_encoder
from architectures.heads import head_of
from configs.schema import Activation, Attention, BackboneConfig, Expansion, HeadConfig, HeadLayer, Norm, Side
from tests.checkpoints import Checkpoint, bert

PYLATE, STANFORD, OWN = Format.pylate, Format.stanford, Format.sentence_transformers
OTHERS = pytest.mark.parametrize("layout", [PYLATE, STANFORD], ids=["pylate", "stanford"])
EVERY = pytest.mark.parametrize("layout", list(Format), ids=[layout.name for layout in Format])
# Cut, filled, skipped, empty, and with a marker typed as text.
QUERIES = ["what is a cat?", "dog", "", "which animal is a fish that swims, what is the dog that barks"]
DOCUMENTS = ["the cat meows, a dog barks!", "fish", "", "[D] the fish swims. " * 20]

# Every key null: what the checkpoint says, and PyLate's values where it says nothing.
BACKBONE = BackboneConfig(
    name="",
    revision=None,
    sha256=None,
    trust_remote_code=False,
    allow_pickle=False,
    attention=Attention.sdpa,
    dropout=None,
    query_length=None,
    document_length=None,
    query_prefix=None,
    document_prefix=None,
    expansion=None,
    attend_to_expansion=None,
    skiplist=None,
    skiplist_sides=None,
)
LINEAR = HeadLayer(out_features=24, bias=False, activation=Activation.identity, residual=False)
WIDE = HeadLayer(out_features=48, bias=True, activation=Activation.gelu, residual=True)
# Widens over a learned residual, then over the input itself, then projects.
DEEP = (WIDE, replace(WIDE, bias=False), LINEAR)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make_encoder(folder: Path, *layers: HeadLayer, **keys: Any) -> MultiVectorEncoder:
    """An encoder on a checkpoint: with these layers, or its own head; keys are those of configs/backbone."""
    head = HeadConfig(keep="none" if layers else "all", embedding_size=None, seed=None, layers=list(layers))
    torch.manual_seed(0)
    return build_encoder(replace(BACKBONE, name=str(folder), **keys), head).eval()


def make_trained(folder: Path, *layers: HeadLayer, **keys: Any) -> MultiVectorEncoder:
    """The same, with markers that differ: fresh ones lie so close to each other that one would pass for the other."""
    encoder = make_encoder(folder, *layers, **keys)
    model: PreTrainedModel = transformer_of(encoder).model
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    with torch.no_grad():
        for prompt in filter(None, encoder.prompts.values()):
            marker = encoder.tokenizer.convert_tokens_to_ids(encoder.tokenizer.tokenize(prompt)[0])
            embeddings.weight[marker] = 0.02 * torch.randn(embeddings.embedding_dim)
    return encoder


def transformer_of(encoder: MultiVectorEncoder) -> Transformer:
    transformer: Transformer = next(module for module in encoder if isinstance(module, Transformer))
    return transformer


def mask_of(encoder: MultiVectorEncoder) -> MultiVectorMask:
    (mask,) = (module for module in encoder if isinstance(module, MultiVectorMask))
    return mask


def written(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_layout(encoder, layout, folder)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def scores(encoder: MultiVectorEncoder) -> Tensor:
    return encoder.similarity(encoder.encode_query(QUERIES), encoder.encode_document(DOCUMENTS))


def assert_scores_equal(actual: MultiVectorEncoder, expected: MultiVectorEncoder) -> None:
    """Equal up to 64 sums, of at most 32 cosines each, of float32 numbers that were added in another order."""
    found, wanted = scores(actual), scores(expected)
    # Texts that a model cannot tell apart would prove nothing.
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


# --- PyLate's files --------------------------------------------------------------------------------------------------

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="session")
def deep_pylate(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiVectorEncoder, Path]:
    """A model with three layers, and its export in PyLate's layout."""
    encoder = make_encoder(tiny_bert, *DEEP, query_length=12, document_length=16)
    return encoder, written(encoder, PYLATE, tmp_path_factory.mktemp("deep_pylate"))


def test_pylates_layout_has_the_files_of_pylate_and_no_other(deep_pylate: tuple[MultiVectorEncoder, Path]) -> None:
    layers = {f"{index}_Dense/{file}" for index in (1, 2, 3) for file in ("config.json", "model.safetensors")}
    settings = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    assert files_of(deep_pylate[1]) == {"config.json", "model.safetensors"} | TOKENIZER_FILES | settings | layers


def test_pylates_modules_are_a_transformer_at_the_root_and_its_own_dense_layers(
    deep_pylate: tuple[MultiVectorEncoder, Path],
) -> None:
    assert read_json(deep_pylate[1] / "modules.json") == [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "pylate.models.Dense.Dense"},
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "pylate.models.Dense.Dense"},
    ]


def test_pylates_dense_layers_state_widths_bias_activation_and_residual(
    deep_pylate: tuple[MultiVectorEncoder, Path],
) -> None:
    gelu, identity = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"
    keys = ("in_features", "out_features", "bias", "activation_function", "use_residual")
    expected = [(32, 48, True, gelu, True), (48, 48, False, gelu, True), (48, 24, False, identity, False)]
    for index, values in enumerate(expected, start=1):
        config = read_json(deep_pylate[1] / f"{index}_Dense" / "config.json")
        assert config == dict(zip(keys, values, strict=True))


def test_pylates_dense_layers_hold_the_weights_of_the_encoder_under_pylates_names(
    deep_pylate: tuple[MultiVectorEncoder, Path],
) -> None:
    encoder, folder = deep_pylate
    names = [{"linear.weight", "linear.bias", "residual.weight"}, {"linear.weight"}, {"linear.weight"}]
    for index, (layer, expected) in enumerate(zip(head_of(encoder), names, strict=True), start=1):
        weights = load_file(folder / f"{index}_Dense" / "model.safetensors")
        assert set(weights) == expected
        assert same(weights, layer.state_dict())


def test_pylates_backbone_is_what_transformers_saves(deep_pylate: tuple[MultiVectorEncoder, Path]) -> None:
    encoder, folder = deep_pylate
    assert same(load_file(folder / "model.safetensors"), transformer_of(encoder).model.state_dict())
    assert read_json(folder / "config.json")["architectures"] == ["BertModel"]


def test_every_activation_is_written_as_the_import_path_of_its_class(tiny_bert: Path, tmp_path: Path) -> None:
    layers = [replace(LINEAR, out_features=32, activation=activation) for activation in Activation]
    folder = written(make_encoder(tiny_bert, *layers), PYLATE, tmp_path / "all")
    paths = [read_json(folder / f"{i}_Dense" / "config.json")["activation_function"] for i in range(1, len(layers) + 1)]
    classes = ["ReLU", "LeakyReLU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid"]
    assert paths == ["torch.nn.modules.linear.Identity", *(f"torch.nn.modules.activation.{name}" for name in classes)]


# What PyLate 1.6 gives a plain backbone; 64 is all that the tiny one holds.
DEFAULTS: dict[str, Any] = {
    "model_type": "ColBERT",
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 32,
    "document_length": 64,
    "attend_to_expansion_tokens": False,
    "skiplist_words": list(string.punctuation),
    "do_query_expansion": True,
}


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({}, {}),
        ({"expansion": Expansion.none}, {"do_query_expansion": False}),
        ({"expansion": Expansion.none, "query_length": 9}, {"do_query_expansion": False, "query_length": 9}),
        ({"attend_to_expansion": True}, {"attend_to_expansion_tokens": True}),
        ({"query_length": 12, "document_length": 20}, {"query_length": 12, "document_length": 20}),
        ({"query_prefix": "", "document_prefix": ""}, {"query_prefix": "", "document_prefix": ""}),
        ({"query_prefix": "[ask] ", "document_prefix": ""}, {"query_prefix": "[ask] ", "document_prefix": ""}),
        ({"skiplist": ["cat", "no such word", ","]}, {"skiplist_words": ["cat", ","]}),
        ({"skiplist": []}, {"skiplist_words": []}),
    ],
    ids=[
        "defaults",
        "no expansion",
        "no expansion, another length",
        "attended",
        "other lengths",
        "no prefixes",
        "other prefixes",
        "filtered skiplist",
        "no skiplist",
    ],
)
def test_pylates_settings_say_what_the_encoder_does(
    tiny_bert: Path, tmp_path: Path, keys: dict[str, Any], changed: dict[str, Any]
) -> None:
    folder = written(make_encoder(tiny_bert, LINEAR, **keys), PYLATE, tmp_path / "out")
    settings = read_json(folder / "config_sentence_transformers.json")
    assert settings.pop("__version__").keys() == {"transformers"}
    assert settings == DEFAULTS | changed


@OTHERS
def test_an_export_states_the_lengths_of_the_model_and_not_what_was_tokenised_last(
    pylate: Checkpoint, tmp_path: Path, layout: Format
) -> None:
    # PyLate leaves in sentence_bert_config.json whatever it tokenised last: 7 in this checkpoint.
    encoder = make_encoder(pylate.folder, LINEAR, skiplist=list(string.punctuation))
    folder = written(encoder, layout, tmp_path / "out")
    if layout is PYLATE:
        settings = read_json(folder / "config_sentence_transformers.json")
        lengths = settings["query_length"], settings["document_length"]
    else:
        metadata = read_json(folder / "artifact.metadata")
        lengths = metadata["query_maxlen"], metadata["doc_maxlen"]
    assert lengths == (pylate.query_length, pylate.document_length)


# --- Stanford's files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def linear_stanford(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiVectorEncoder, Path]:
    """A model with one bias-free linear layer, and its export in Stanford's layout."""
    encoder = make_encoder(tiny_bert, LINEAR, query_length=12, document_length=16)
    return encoder, written(encoder, STANFORD, tmp_path_factory.mktemp("linear_stanford"))


def test_stanfords_layout_has_the_files_of_stanford_and_no_other(
    linear_stanford: tuple[MultiVectorEncoder, Path],
) -> None:
    assert files_of(linear_stanford[1]) == {"config.json", "model.safetensors", "artifact.metadata"} | TOKENIZER_FILES


def test_stanfords_weights_are_the_backbone_under_bert_and_one_matrix_at_the_root_all_float32(
    linear_stanford: tuple[MultiVectorEncoder, Path],
) -> None:
    encoder, folder = linear_stanford
    weights = load_file(folder / "model.safetensors")
    backbone = {f"bert.{name}": tensor for name, tensor in transformer_of(encoder).model.state_dict().items()}
    assert same(weights, backbone | {"linear.weight": head_of(encoder)[0].linear.weight})
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    config = read_json(folder / "config.json")
    assert (config["architectures"], config["vocab_size"]) == (["HF_ColBERT"], len(encoder.tokenizer))


def test_stanfords_weights_of_another_architecture_lie_under_the_name_that_transformers_gives_its_backbone(
    modernbert: Path, tmp_path: Path
) -> None:
    encoder = make_encoder(modernbert, LINEAR)
    weights = load_file(written(encoder, STANFORD, tmp_path / "out") / "model.safetensors")
    backbone = {f"model.{name}": tensor for name, tensor in transformer_of(encoder).model.state_dict().items()}
    assert same(weights, backbone | {"linear.weight": head_of(encoder)[0].linear.weight})


def test_stanfords_weights_are_one_file_where_transformers_would_write_several(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(tiny_bert, LINEAR)
    model = transformer_of(encoder).model
    monkeypatch.setattr(model, "save_pretrained", partial(model.save_pretrained, max_shard_size="20KB"))
    assert "model.safetensors.index.json" in files_of(written(encoder, PYLATE, tmp_path / "pylate"))
    folder = written(encoder, STANFORD, tmp_path / "stanford")
    assert files_of(folder) == {"config.json", "model.safetensors", "artifact.metadata"} | TOKENIZER_FILES
    assert len(load_file(folder / "model.safetensors")) == len(model.state_dict()) + 1


METADATA: dict[str, Any] = {
    "query_maxlen": 32,
    "doc_maxlen": 64,
    "dim": 24,
    "query_token_id": "[Q] ",
    "doc_token_id": "[D] ",
    "query_token": "[Q]",
    "doc_token": "[D]",
    "mask_punctuation": True,
    "attend_to_mask_tokens": False,
    "similarity": "cosine",
    "interaction": "colbert",
}


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({}, {}),
        ({"attend_to_expansion": True}, {"attend_to_mask_tokens": True}),
        ({"query_length": 12, "document_length": 20}, {"query_maxlen": 12, "doc_maxlen": 20}),
        (
            {"query_prefix": "[ask] ", "document_prefix": "[text] "},
            {"query_token_id": "[ask] ", "doc_token_id": "[text] "},
        ),
    ],
    ids=["defaults", "attended", "other lengths", "other prefixes"],
)
def test_stanfords_metadata_says_what_the_encoder_does(
    tiny_bert: Path, tmp_path: Path, keys: dict[str, Any], changed: dict[str, Any]
) -> None:
    folder = written(make_encoder(tiny_bert, LINEAR, **keys), STANFORD, tmp_path / "out")
    assert read_json(folder / "artifact.metadata") == METADATA | changed


def test_a_stanford_model_goes_back_with_its_own_metadata_and_weights(stanford: Checkpoint, tmp_path: Path) -> None:
    folder = written(make_encoder(stanford.folder), STANFORD, tmp_path / "out")
    own = read_json(stanford.folder / "artifact.metadata")
    assert read_json(folder / "artifact.metadata") == own | {"interaction": "colbert"}
    weights = load_file(stanford.folder / "model.safetensors")
    # Nothing uses the pooler, and no gradient would reach it.
    assert same(
        load_file(folder / "model.safetensors"), {name: weights[name] for name in weights if "pooler" not in name}
    )


# --- The tokenizer's files -------------------------------------------------------------------------------------------


@OTHERS
@pytest.mark.parametrize("family", ["tiny_bert", "modernbert"])
def test_the_tokenizer_is_written_in_words_that_older_transformers_know(
    family: str, layout: Format, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = make_encoder(request.getfixturevalue(family), LINEAR)
    folder = written(encoder, layout, tmp_path / "out")
    settings = read_json(folder / "tokenizer_config.json")
    known = {"tiny_bert": "BertTokenizer", "modernbert": "PreTrainedTokenizerFast"}
    assert settings["tokenizer_class"] == known[family]
    assert not isinstance(settings.get("extra_special_tokens", {}), list)
    assert {"[Q] ", "[D] "} <= set(settings["additional_special_tokens"])
    text = "[Q] what is a cat? [D] the fish"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == encoder.tokenizer(text)["input_ids"]


# --- The backbone's config -------------------------------------------------------------------------------------------


@OTHERS
def test_other_bases_of_rotary_positions_are_written_in_words_that_older_transformers_know(
    modernbert: Path, tmp_path: Path, layout: Format
) -> None:
    # transformers 4 reads these two and takes 160,000 and 10,000 where they are missing.
    folder = Path(shutil.copytree(modernbert, tmp_path / "turned"))
    config = read_json(folder / "config.json")
    for kind, base in (("full_attention", 77.0), ("sliding_attention", 55.0)):
        config["rope_parameters"][kind]["rope_theta"] = base
    (folder / "config.json").write_text(json.dumps(config))
    encoder = make_trained(folder, LINEAR, query_length=12)
    exported = written(encoder, layout, tmp_path / "out")
    settings = read_json(exported / "config.json")
    assert (settings["global_rope_theta"], settings["local_rope_theta"]) == (77.0, 55.0)
    assert_scores_equal(make_encoder(exported), encoder)


def test_gemmas_bases_are_written_under_its_own_old_names(embeddinggemma: Path, tmp_path: Path) -> None:
    encoder = make_encoder(embeddinggemma, LINEAR, query_prefix="", document_prefix="")
    config = transformer_of(encoder).model.config
    for kind, base in (("full_attention", 77.0), ("sliding_attention", 55.0)):
        config.rope_parameters[kind]["rope_theta"] = base
    settings = read_json(written(encoder, PYLATE, tmp_path / "out") / "config.json")
    assert (settings["rope_theta"], settings["rope_local_base_freq"]) == (77.0, 55.0)


# --- Read by others --------------------------------------------------------------------------------------------------

# Layouts are exact for all of these; the second holds in PyLate's alone.
SETTINGS: dict[str, tuple[tuple[HeadLayer, ...], dict[str, Any], tuple[Format, ...]]] = {
    "linear": ((LINEAR,), {}, (PYLATE, STANFORD)),
    "deep": (DEEP, {}, (PYLATE,)),
    "attended": ((LINEAR,), {"attend_to_expansion": True}, (PYLATE, STANFORD)),
    "no expansion": ((LINEAR,), {"expansion": Expansion.none}, (PYLATE,)),
    "no prefixes": ((LINEAR,), {"query_prefix": "", "document_prefix": ""}, (PYLATE,)),
    "other skiplist": ((LINEAR,), {"skiplist": ["cat", "the"]}, (PYLATE,)),
    "no skiplist": ((LINEAR,), {"skiplist": []}, (PYLATE,)),
}
CASES = [(name, layout) for name, (_, _, layouts) in SETTINGS.items() for layout in layouts]
IDS = [f"{name}-{layout.name}" for name, layout in CASES]


@pytest.mark.parametrize(("case", "layout"), CASES, ids=IDS)
def test_sentence_transformers_and_build_encoder_score_an_export_as_the_model(
    case: str, layout: Format, tiny_bert: Path, tmp_path: Path
) -> None:
    layers, keys, _ = SETTINGS[case]
    # Shorter than some of the texts, and with room for mask tokens after others.
    encoder = make_trained(tiny_bert, *layers, **({"query_length": 12, "document_length": 30} | keys))
    folder = written(encoder, layout, tmp_path / "out")
    assert_scores_equal(MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).eval(), encoder)
    again = make_encoder(folder)
    assert_scores_equal(again, encoder)
    assert [layer.in_features for layer in head_of(again)] == [layer.in_features for layer in head_of(encoder)]
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("family", "layout"),
    # Not XLM-R in Stanford's: the marks of this one are two tokens each, so it cannot skip what Stanford skips.
    [
        ("modernbert", OWN),
        ("modernbert", PYLATE),
        ("modernbert", STANFORD),
        ("xlm_roberta", OWN),
        ("xlm_roberta", PYLATE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_exports_of_other_tokenizers_score_as_the_model(
    family: str, layout: Format, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = make_trained(request.getfixturevalue(family), LINEAR, query_length=20, document_length=30)
    folder = written(encoder, layout, tmp_path / "out")
    assert_scores_equal(make_encoder(folder), encoder)
    # Behind a marker of Stanford's, the library puts a space of its own, which is a token here.
    if layout is not STANFORD:
        assert_scores_equal(MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).eval(), encoder)


# --- What a layout cannot hold ---------------------------------------------------------------------------------------

Change = Callable[[MultiVectorEncoder], None]


def set_similarity(encoder: MultiVectorEncoder) -> None:
    encoder.similarity_fn_name = "meanmaxsim"


def fill_with_padding(encoder: MultiVectorEncoder) -> None:
    transformer = transformer_of(encoder)
    assert transformer.query_expansion is not None
    transformer.query_expansion = transformer.query_expansion | {"token": "[PAD]"}


def score_listed_tokens(encoder: MultiVectorEncoder) -> None:
    mask_of(encoder).keep_only_token_ids = [7]


DENSE_ALONE = "has Dense layers alone"


@OTHERS
@pytest.mark.parametrize(
    ("layers", "keys", "change", "reason"),
    [
        ((replace(WIDE, gated=True), LINEAR), {}, None, f"layer 0 of the head is gated, and {{}} {DENSE_ALONE}"),
        (
            (WIDE, replace(LINEAR, norm=Norm.layer_norm)),
            {},
            None,
            f"layer 1 of the head is normalised before by LayerNorm, and {{}} {DENSE_ALONE}",
        ),
        (
            (replace(LINEAR, norm=Norm.rms_norm, gated=True, dropout=0.1),),
            {},
            None,
            "layer 0 of the head is normalised before by RMSNorm and gated and trained with dropout 0.1, "
            f"and {{}} {DENSE_ALONE}",
        ),
        ((LINEAR,), {}, set_similarity, "it scores by meanmaxsim, and {} by maxsim"),
        (
            (LINEAR,),
            {"expansion": Expansion.min, "query_length": 12},
            None,
            "backbone.expansion=min, and {} fills to a fixed length or not at all",
        ),
        ((LINEAR,), {}, fill_with_padding, "queries are filled with '[PAD]', and {} fills them with the mask token"),
        (
            (LINEAR,),
            {"skiplist_sides": [Side.query, Side.document]},
            None,
            "backbone.skiplist_sides=['query', 'document'], and {} skips tokens of documents alone",
        ),
        ((LINEAR,), {}, score_listed_tokens, "it scores listed tokens alone, and {} all but listed ones"),
    ],
    ids=["gated", "norm", "all three", "similarity", "min", "padding", "queries", "listed"],
)
def test_a_layout_says_why_it_cannot_hold_a_model_and_writes_nothing(
    tiny_bert: Path,
    tmp_path: Path,
    layout: Format,
    layers: tuple[HeadLayer, ...],
    keys: dict[str, Any],
    change: Change | None,
    reason: str,
) -> None:
    encoder = make_encoder(tiny_bert, *layers, **keys)
    if change is not None:
        change(encoder)
    assert obstacle(encoder, layout) == reason.format(layout.value)
    assert obstacle(encoder, OWN) is None
    problem = f"{layout.value} cannot hold this model: {reason.format(layout.value)}"
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        write_layout(encoder, layout, tmp_path)
    assert list(tmp_path.iterdir()) == []


@OTHERS
def test_a_layout_says_that_a_prefix_of_words_is_no_marker(embeddinggemma: Path, layout: Format) -> None:
    assert obstacle(make_encoder(embeddinggemma), layout) == (
        f"the prefix 'what is : ' of a query is several tokens, and {layout.value} puts one token before a text"
    )
    assert obstacle(make_encoder(embeddinggemma, query_prefix=""), layout) == (
        f"the prefix 'a : the : ' of a document is several tokens, and {layout.value} puts one token before a text"
    )


S = "Stanford ColBERT 0.2"


@pytest.mark.parametrize(
    ("layers", "keys", "reason"),
    [
        ((WIDE, LINEAR), {}, f"its head is no linear map, and {S} has one bias-free linear layer"),
        (
            (replace(LINEAR, activation=Activation.relu),),
            {},
            f"its head is no linear map, and {S} has one bias-free linear layer",
        ),
        ((replace(LINEAR, bias=True),), {}, f"its head has a bias, and {S} has one bias-free linear layer"),
        (
            (replace(LINEAR, bias=True), LINEAR),
            {},
            f"its head has a bias, and {S} has one bias-free linear layer",
        ),
        (
            (LINEAR, LINEAR),
            {},
            f"its head is one linear map in several layers, and {S} has one layer: fold=true writes it as one",
        ),
        (
            (replace(LINEAR, residual=True),),
            {},
            f"its head is one linear map in several layers, and {S} has one layer: fold=true writes it as one",
        ),
        (
            (LINEAR,),
            {"expansion": Expansion.none},
            f"its queries are not filled with mask tokens, and {S} always fills them",
        ),
        ((LINEAR,), {"query_prefix": ""}, f"it has no prefix on each side, and {S} always puts one"),
        ((LINEAR,), {"document_prefix": ""}, f"it has no prefix on each side, and {S} always puts one"),
        (
            (LINEAR,),
            {"skiplist": ["cat"]},
            f"its skiplist is not the 32 punctuation marks, which {S} skips",
        ),
        (
            (LINEAR,),
            {"skiplist": [*string.punctuation, "cat"]},
            f"its skiplist is not the 32 punctuation marks, which {S} skips",
        ),
        (
            (LINEAR,),
            {"skiplist": list(string.punctuation[1:])},
            f"its skiplist is not the 32 punctuation marks, which {S} skips",
        ),
    ],
    ids=[
        "two layers",
        "relu",
        "bias",
        "bias first",
        "chain",
        "residual",
        "no expansion",
        "no query prefix",
        "no document prefix",
        "other skiplist",
        "longer skiplist",
        "shorter skiplist",
    ],
)
def test_stanfords_layout_says_why_it_cannot_hold_what_pylates_can(
    tiny_bert: Path, layers: tuple[HeadLayer, ...], keys: dict[str, Any], reason: str
) -> None:
    encoder = make_encoder(tiny_bert, *layers, **keys)
    assert obstacle(encoder, STANFORD) == reason
    assert obstacle(encoder, PYLATE) is None


def test_stanfords_layout_cannot_hold_a_model_that_skips_nothing(tiny_bert: Path) -> None:
    # colbert-ai 0.2.22 makes its skiplist only where mask_punctuation is true, and reads it for every document:
    # docFromText ends in "AttributeError: 'Checkpoint' object has no attribute 'skiplist'".
    assert obstacle(make_encoder(tiny_bert, LINEAR, skiplist=[]), STANFORD) == (
        f"it scores every token of a document, and {S} fails to encode documents with mask_punctuation=false"
    )


def test_stanfords_layout_cannot_hold_an_architecture_that_its_class_factory_does_not_find(
    embeddinggemma: Path,
) -> None:
    # It looks for a class of transformers named model_type + "Model", and "gemma3_textmodel" is none, though
    # Gemma3TextModel is there; it would load a bert-base-uncased instead.
    encoder = make_encoder(embeddinggemma, LINEAR, query_prefix="[Q] ", document_prefix="[D] ", query_length=12)
    transformer = transformer_of(encoder)
    transformer.query_expansion = {"strategy": "fixed", "attend": False, "length": 12, "token": None}
    assert obstacle(encoder, PYLATE) is None
    assert obstacle(encoder, STANFORD) == f"{S} finds no class Gemma3TextModel in transformers"


def test_stanfords_layout_cannot_fill_queries_without_a_mask_token(tiny_bert: Path) -> None:
    encoder = make_encoder(tiny_bert, LINEAR)
    encoder.tokenizer.mask_token, encoder.tokenizer.eos_token = None, "[SEP]"
    assert obstacle(encoder, STANFORD) == f"its tokenizer has no mask token, with which {S} fills queries"
    assert obstacle(encoder, PYLATE) is None


def test_stanfords_layout_pads_with_another_token_than_the_mask_which_pylate_saves_as_padding(
    tiny_bert: Path, tmp_path: Path
) -> None:
    encoder = make_encoder(tiny_bert, LINEAR)
    encoder.tokenizer.pad_token = "[MASK]"
    write_layout(encoder, STANFORD, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"
    transformer_of(encoder).model.config.pad_token_id = None
    assert obstacle(encoder, STANFORD) == f"its padding is the mask token, and {S} scores no token that is padding"


@pytest.mark.parametrize("name", ["OwnModel", "ElectraModel"])
def test_stanfords_layout_cannot_hold_a_class_that_is_not_the_one_of_its_config(tiny_bert: Path, name: str) -> None:
    encoder = make_encoder(tiny_bert, LINEAR)
    transformer_of(encoder).model.__class__ = type(name, (BertModel,), {})
    assert obstacle(encoder, STANFORD) == f"{S} finds no class {name} in transformers"
    assert obstacle(encoder, PYLATE) is None


def test_stanfords_layout_cannot_skip_marks_that_are_unknown_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    words = (tiny_bert / "vocab.txt").read_text().splitlines()
    words = [word for word in words if word not in ("~", "`")]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path)
    bert(len(words)).save_pretrained(tmp_path)
    assert obstacle(make_encoder(tmp_path, LINEAR), STANFORD) == (
        f"its vocabulary lacks punctuation marks, for which {S} would skip every unknown token"
    )


@pytest.mark.parametrize("family", ["tiny_bert", "modernbert", "stanford"])
@EVERY
def test_every_layout_holds_a_linear_model_with_the_defaults(
    family: str, layout: Format, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(family)
    folder, layers = (found.folder, ()) if isinstance(found, Checkpoint) else (found, (LINEAR,))
    assert obstacle(make_encoder(folder, *layers), layout) is None


@pytest.mark.parametrize("layers", [(LINEAR,), (LINEAR, LINEAR), (replace(LINEAR, bias=True),)])
def test_obstacles_are_the_same_on_the_device_that_the_model_was_trained_on(
    tiny_bert: Path, layers: tuple[HeadLayer, ...]
) -> None:
    # The device without memory stands for a GPU: neither computes with tensors of the CPU.
    encoder = make_encoder(tiny_bert, *layers)
    on_the_cpu = obstacle(encoder, STANFORD)
    assert obstacle(encoder.to("meta"), STANFORD) == on_the_cpu


# --- What writing does to the encoder --------------------------------------------------------------------------------

DROPPED = replace(WIDE, dropout=0.5)


def state(encoder: MultiVectorEncoder) -> tuple[list[tuple[str, int]], dict[str, Tensor], list[bool], torch.device]:
    """Its modules by name and identity, its tensors, what is in training, its device."""
    modules = [(name, id(module)) for name, module in encoder.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    return modules, tensors, [module.training for module in encoder.modules()], encoder.device


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_writing_leaves_the_encoder_as_it_is(tiny_bert: Path, tmp_path: Path, layout: Format, training: bool) -> None:
    encoder = make_encoder(tiny_bert, replace(LINEAR, dropout=0.5)).train(training)
    modules, tensors, in_training, device = state(encoder)
    written(encoder, layout, tmp_path / "out")
    assert (state(encoder)[0], state(encoder)[2], state(encoder)[3]) == (modules, in_training, device)
    assert same(state(encoder)[1], tensors)
    assert [type(module).__name__ for module in encoder] == [
        "Transformer",
        "Projection",
        "MultiVectorMask",
        "Normalize",
    ]


def test_a_write_that_fails_leaves_the_encoder_as_it_is(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(tiny_bert, DROPPED, LINEAR)
    modules = state(encoder)[0]

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("architectures.export.save_file", full)
    monkeypatch.setattr(Dense, "save_torch_weights", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_layout(encoder, PYLATE, tmp_path)
    assert state(encoder)[0] == modules


@pytest.mark.parametrize("layout", [OWN, PYLATE])
def test_a_layer_with_dropout_alone_is_written_as_the_dense_layer_that_it_is_outside_of_training(
    tiny_bert: Path, tmp_path: Path, layout: Format
) -> None:
    encoder = make_trained(tiny_bert, DROPPED, replace(DROPPED, bias=False), LINEAR, query_length=12)
    folder = written(encoder, layout, tmp_path / "out")
    assert not (folder / "projection.py").exists()
    kinds = [entry["type"].rpartition(".")[2] for entry in read_json(folder / "modules.json")]
    assert kinds == ["Transformer", "Dense", "Dense", "Dense"] + (["MultiVectorMask", "Normalize"] * (layout is OWN))
    # No trust_remote_code: there is nothing of ours to run.
    assert_scores_equal(MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).eval(), encoder)


def test_the_own_layout_keeps_layers_that_are_no_dense_layers(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = make_trained(tiny_bert, replace(WIDE, gated=True), DROPPED, LINEAR, query_length=12)
    folder = written(encoder, OWN, tmp_path / "out")
    types = [entry["type"] for entry in read_json(folder / "modules.json")][1:4]
    dense = "sentence_transformers.base.modules.dense.Dense"
    assert types == ["projection.Projection", dense, dense]
    assert_scores_equal(make_encoder(folder), encoder)


# --- How to load it --------------------------------------------------------------------------------------------------


def test_the_lines_for_sentence_transformers_load_and_score(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(tiny_bert, replace(WIDE, gated=True), LINEAR)
    folder = tmp_path / "model"
    encoder.save_pretrained(str(folder), create_model_card=False)
    lines = loading_lines(encoder, str(folder))[OWN.value]
    names: dict[str, Any] = {}
    exec(lines, names)
    expected = encoder.similarity(encoder.encode_query(["a query"]), encoder.encode_document(["a document"]))
    torch.testing.assert_close(names["scores"], expected, atol=1e-4, rtol=0)


def test_the_lines_for_the_others_name_the_export_and_its_folder(tiny_bert: Path) -> None:
    lines = loading_lines(make_encoder(tiny_bert, LINEAR), "outputs/run/model")
    assert list(lines) == ["sentence-transformers 6", "PyLate 1.6", "Stanford ColBERT 0.2"]
    for layout in (PYLATE, STANFORD):
        folder = f"outputs/run/model_{layout.name}"
        command = f"# after python scripts/export.py model=outputs/run/model format={layout.name}\n"
        assert lines[layout.value] == command + how_to_load(layout, folder)
        assert folder in how_to_load(layout, folder)
        ast.parse(lines[layout.value])


def test_the_lines_say_why_a_library_cannot_hold_it(tiny_bert: Path) -> None:
    lines = loading_lines(make_encoder(tiny_bert, WIDE, LINEAR), "model")
    assert lines[STANFORD.value] == (
        "cannot hold it: its head is no linear map, and Stanford ColBERT 0.2 has one bias-free linear layer"
    )
    assert "cannot" not in lines[PYLATE.value]


@pytest.mark.parametrize(
    ("layers", "in_a_run", "exported"),
    [
        ((LINEAR,), False, False),
        ((DROPPED, LINEAR), True, False),
        ((replace(WIDE, gated=True), LINEAR), True, True),
        ((replace(LINEAR, norm=Norm.layer_norm),), True, True),
    ],
    ids=["dense", "dropout", "gated", "norm"],
)
def test_code_of_ours_has_to_be_trusted_where_a_folder_holds_it(
    tiny_bert: Path, tmp_path: Path, layers: tuple[HeadLayer, ...], in_a_run: bool, exported: bool
) -> None:
    encoder = make_encoder(tiny_bert, *layers)
    assert (runs_own_code(encoder), runs_own_code(encoder, OWN)) == (in_a_run, exported)
    assert not runs_own_code(encoder, PYLATE)
    assert not runs_own_code(encoder, STANFORD)
    assert ("trust_remote_code=True" in loading_lines(encoder, "model")[OWN.value]) == in_a_run
    encoder.save_pretrained(str(tmp_path / "run"), create_model_card=False)
    assert (tmp_path / "run" / "projection.py").exists() == in_a_run
    assert (written(encoder, OWN, tmp_path / "export") / "projection.py").exists() == exported


def test_code_of_the_backbone_has_to_be_trusted_in_every_layout_and_by_the_export(tiny_bert: Path) -> None:
    encoder = make_encoder(tiny_bert, LINEAR)
    transformer_of(encoder).model.config.auto_map = {"AutoModel": "modeling_own.OwnModel"}
    assert all(runs_own_code(encoder, layout) for layout in (None, *Format))
    lines = loading_lines(encoder, "model")
    assert 'MultiVectorEncoder("model", trust_remote_code=True)' in lines[OWN.value]
    assert 'models.ColBERT("model_pylate", trust_remote_code=True)' in lines[PYLATE.value]
    # Without it the command refuses the folder.
    assert "scripts/export.py model=model format=pylate trust_remote_code=true\n" in lines[PYLATE.value]
