"""build_encoder on tiny folders laid out as published checkpoints are: layers, tokens, values and what a save holds."""

import json
import math
import os
import pickle
import re
import shutil
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
)

from architectures.factory import build_encoder
from architectures.heads import HeadModule, build_head, describe_extras, head_of, is_linear, portable
from architectures.projection import Projection
from configs.schema import Activation, Attention, Config, ConfigError, Expansion, HeadLayer, parse_config
from tests.architectures.conftest import Copy, backbone_config, edit, head_config
from tests.checkpoints import Checkpoint, Row

HEADS = Path(__file__).parents[2] / "configs" / "head"
QUERY = "what is a cat?"
QUERY_TOKENS = ["what", "is", "a", "cat", "?"]
DOCUMENT_TOKENS = ["the", "cat", "meows", ",", "a", "dog", "barks", "!"]
# Longer than every length below, in a model of 64 positions.
DOCUMENT = " ".join(DOCUMENT_TOKENS * 5)

Build = Callable[..., MultiVectorEncoder]

# The formulas of torch.nn's documentation.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "ReLU": lambda x: x.clamp(min=0),
    "LeakyReLU": lambda x: torch.where(x > 0, x, 0.01 * x),
    "GELU": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "SiLU": lambda x: x / (1 + torch.exp(-x)),
    "Mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "Tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "Sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}

# What the first line of each file in configs/head promises for a backbone 32 wide.
PRESETS: dict[str, list[Row]] = {
    "default": [(32, 128, "Identity", False, False)],
    "linear": [(32, 128, "Identity", False, False)],
    "mlp": [(32, 64, "GELU", True, False), (64, 128, "Identity", False, False)],
    "mlp_residual": [(32, 64, "GELU", True, True), (64, 128, "Identity", False, False)],
    "deep": [(32, 64, "GELU", True, True), (64, 64, "GELU", True, True), (64, 128, "Identity", False, False)],
    "ettin_mlp": [(32, 64, "Identity", False, True), (64, 32, "Identity", False, False)],
}


# The variants of the projection study, likewise, and what a layer has beyond a Dense.
PROJECT: Row = (32, 128, "Identity", False, False)
STUDY: dict[str, list[tuple[Row, str]]] = {
    "linear": [(PROJECT, "")],
    "upscaled": [((32, 64, "Identity", False, False), ""), ((64, 128, "Identity", False, False), "")],
    "deeper": [((32, 32, "Identity", False, False), ""), (PROJECT, "")],
    "deepest": [((32, 32, "Identity", False, False), ""), ((32, 32, "Identity", False, False), ""), (PROJECT, "")],
    "gelu": [((32, 32, "GELU", False, False), ""), (PROJECT, "")],
    "relu": [((32, 32, "ReLU", False, False), ""), (PROJECT, "")],
    "silu": [((32, 32, "SiLU", False, False), ""), (PROJECT, "")],
    "residual": [((32, 32, "Identity", False, True), ""), (PROJECT, "")],
    "best": [((32, 64, "Identity", False, True), ""), ((64, 128, "Identity", False, False), "")],
    "glu": [((32, 32, "Sigmoid", False, False), "gated"), (PROJECT, "")],
    "swiglu": [((32, 32, "SiLU", False, False), "gated"), (PROJECT, "")],
}
# No activation, gate or norm: one linear map, in however many layers.
LINEAR = {"default", "linear", "ettin_mlp"}
LINEAR |= {f"study/{name}" for name in ("linear", "upscaled", "deeper", "deepest", "residual", "best")}
ALL_PRESETS: dict[str, list[Row]] = PRESETS | {
    f"study/{name}": [row for row, _ in layers] for name, layers in STUDY.items()
}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One text as the encoder sees it: each token, whether attention sees it, whether it is scored, its vector."""

    tokens: list[str]
    attended: list[bool]
    scored: list[bool]
    vectors: Tensor

    @property
    def scored_tokens(self) -> list[str]:
        return [token for token, scored in zip(self.tokens, self.scored, strict=True) if scored]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def composed() -> dict[tuple[str, ...], Config]:
    """Configs by the groups they were composed from."""
    return {}


@pytest.fixture
def build(make_config: Callable[..., Config], composed: dict[tuple[str, ...], Config]) -> Build:
    """Build from the command line's overrides, after seeding."""

    def build_from(*overrides: str, seed: int = 0) -> MultiVectorEncoder:
        # Groups are composed once and keys merged in: composing anew takes longer than building the encoder.
        keys = [override for override in overrides if override.startswith(("backbone.", "head."))]
        groups = tuple(override for override in overrides if override not in keys)
        if groups not in composed:
            # Prose: the embedded default's source code would have no skiplist.
            composed[groups] = make_config("data=pairs", "data.path=prose.jsonl", *groups)
        merged = OmegaConf.merge(OmegaConf.structured(composed[groups]), OmegaConf.from_dotlist(keys))
        assert isinstance(merged, DictConfig)
        config = parse_config(merged)
        torch.manual_seed(seed)
        return build_encoder(config.backbone, config.head).eval()

    return build_from


@pytest.fixture
def own(build: Build, tmp_path: Path) -> Checkpoint:
    """A model of this project, saved."""
    encoder = build(
        "head=mlp_residual",
        "backbone.query_length=9",
        "backbone.document_length=14",
        "backbone.query_prefix='[ask] '",
        "backbone.document_prefix='[text] '",
        "backbone.attend_to_expansion=true",
        "backbone.skiplist=[a]",
        "backbone.skiplist_sides=[query,document]",
    )
    folder = tmp_path / "own"
    encoder.save_pretrained(str(folder), create_model_card=False)
    return Checkpoint(
        folder=folder,
        rows=PRESETS["mlp_residual"],
        weights=[layer.state_dict() for layer in head_of(encoder)],
        query_prefix="[ask] ",
        document_prefix="[text] ",
        query_length=9,
        document_length=14,
        attends=True,
        skipped={"a"},
        skips_in_queries=True,
    )


@pytest.fixture(params=["stanford", "pylate", "pylate_without_type", "own"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def with_own_settings(folder: Path) -> list[str]:
    """Overrides that leave everything to the checkpoint."""
    lengths = ["backbone.query_length=null", "backbone.document_length=null"]
    return ["backbone=checkpoint", f"backbone.name={folder}", "head=default", *lengths]


def layer(out_features: int, *, bias: bool = False, activation: str = "identity", residual: bool = False) -> str:
    """One element of head.layers as it is typed."""
    return f"{{out_features: {out_features}, bias: {bias}, activation: {activation}, residual: {residual}}}"


def backbone_of(encoder: MultiVectorEncoder) -> PreTrainedModel:
    module: nn.Module = encoder[0]
    assert isinstance(module, Transformer)
    model = module.model
    assert isinstance(model, PreTrainedModel)
    return model


def embedding_table(encoder: MultiVectorEncoder) -> Tensor:
    embeddings = backbone_of(encoder).get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.weight


def rows(layers: Sequence[HeadModule]) -> list[Row]:
    return [
        (
            dense.linear.in_features,
            dense.linear.out_features,
            type(dense.activation_function).__name__,
            dense.linear.bias is not None,
            dense.use_residual,
        )
        for dense in layers
    ]


def kinds(encoder: MultiVectorEncoder) -> list[str]:
    return [type(module).__name__ for module in encoder]


def encode(encoder: MultiVectorEncoder, text: str, side: str) -> Encoded:
    features = encoder.preprocess([text], prompt=encoder.prompts[side], task=side)
    # Not convert_ids_to_tokens, which shows a token that was added with normalization, as PyLate does, in lower case.
    by_id = {index: token for token, index in encoder.tokenizer.get_vocab().items()}
    tokens = [by_id[index] for index in features["input_ids"][0].tolist()]
    attended = features["attention_mask"][0].bool().tolist()
    with torch.no_grad():
        output = encoder(features, task=side)
    return Encoded(
        tokens=tokens,
        attended=attended,
        scored=output["attention_mask"][0].tolist(),
        vectors=output["token_embeddings"][0],
    )


def project_by_hand(hidden: Tensor, head: list[Row], weights: list[dict[str, Tensor]]) -> Tensor:
    """Vectors of unit length from the backbone's: activation(linear(x)) + x per layer, as the rows say."""
    for (in_features, out_features, activation, bias, residual), tensors in zip(head, weights, strict=True):
        output = F.linear(hidden, tensors["linear.weight"], tensors["linear.bias"] if bias else None)
        output = FORMULAS[activation](output)
        if "gate.weight" in tensors:
            output = output * F.linear(hidden, tensors["gate.weight"], tensors.get("gate.bias"))
        if residual:
            output = output + (hidden if in_features == out_features else F.linear(hidden, tensors["residual.weight"]))
        hidden = output
    return hidden / hidden.square().sum(dim=-1, keepdim=True).sqrt()


def hidden_states(folder: Path, encoder: MultiVectorEncoder, text: str) -> Tensor:
    """The backbone's own output for a document, without any class of sentence-transformers."""
    features = encoder.preprocess([text], prompt=encoder.prompts["document"], task="document")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to sums of at most 512 products of float32 numbers near 1."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def scores(encoder: MultiVectorEncoder) -> Tensor:
    queries = encoder.encode_query([QUERY, "dog"])
    documents = encoder.encode_document([DOCUMENT, "the fish swims.", "a dog, which barks!"])
    return encoder.similarity(queries, documents)


# --- The examples of PyLate's model page, layer by layer -------------------------------------------------------------


def test_a_plain_bert_with_the_default_head_gets_one_bias_free_layer_to_128(build: Build) -> None:
    encoder = build("head=default")
    assert kinds(encoder) == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    assert rows(head_of(encoder)) == [(32, 128, "Identity", False, False)]


def test_a_sentence_transformer_without_dense_layers_gets_one_bias_free_layer_to_128(
    build: Build, sentence_bert: Path
) -> None:
    encoder = build("head=default", f"backbone.name={sentence_bert}")
    assert kinds(encoder) == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    assert rows(head_of(encoder)) == [(32, 128, "Identity", False, False)]


def test_a_sentence_transformer_keeps_its_dense_layers_with_their_weights_and_loses_its_pooling(
    build: Build, embeddinggemma: Path
) -> None:
    encoder = build("head=default", f"backbone.name={embeddinggemma}")
    assert kinds(encoder) == ["Transformer", "Dense", "Dense", "MultiVectorMask", "Normalize"]
    assert rows(head_of(encoder)) == [(32, 128, "Identity", False, False), (128, 32, "Identity", False, False)]
    for dense, folder in zip(head_of(encoder), ["2_Dense", "3_Dense"], strict=True):
        stored = load_file(embeddinggemma / folder / "model.safetensors")
        assert torch.equal(dense.linear.weight, stored["linear.weight"])


def test_kept_dense_layers_project_every_token(build: Build, embeddinggemma: Path) -> None:
    encoder = build("head=default", f"backbone.name={embeddinggemma}", "backbone.document_prefix=''")
    text = "the cat meows"
    weights = [load_file(embeddinggemma / folder / "model.safetensors") for folder in ("2_Dense", "3_Dense")]
    by_hand = project_by_hand(hidden_states(embeddinggemma, encoder, text), rows(head_of(encoder)), weights)
    assert_close(encode(encoder, text, "document").vectors, by_hand)


def test_listed_layers_are_appended_to_those_kept(build: Build, embeddinggemma: Path) -> None:
    encoder = build("head=default", f"backbone.name={embeddinggemma}", f"head.layers=[{layer(128)}]")
    assert rows(head_of(encoder)) == [
        (32, 128, "Identity", False, False),
        (128, 32, "Identity", False, False),
        (32, 128, "Identity", False, False),
    ]
    for dense, folder in zip(head_of(encoder), ["2_Dense", "3_Dense"], strict=False):
        stored = load_file(embeddinggemma / folder / "model.safetensors")
        assert torch.equal(dense.linear.weight, stored["linear.weight"])


def test_an_appended_layer_is_kept_by_a_save_and_deleted_by_another_list(
    build: Build, embeddinggemma: Path, tmp_path: Path
) -> None:
    appended = build("head=default", f"backbone.name={embeddinggemma}", f"head.layers=[{layer(128)}]")
    folder = tmp_path / "appended"
    appended.save_pretrained(str(folder), create_model_card=False)

    kept = build(*with_own_settings(folder))
    deleted = build(*with_own_settings(folder), "head.keep=none", f"head.layers=[{layer(128)},{layer(32)}]")

    assert rows(head_of(kept)) == rows(head_of(appended))
    for ours, saved in zip(head_of(kept), head_of(appended), strict=True):
        assert torch.equal(ours.linear.weight, saved.linear.weight)
    assert rows(head_of(deleted)) == [(32, 128, "Identity", False, False), (128, 32, "Identity", False, False)]
    for ours, saved in zip(head_of(deleted), head_of(appended), strict=False):
        assert not torch.equal(ours.linear.weight, saved.linear.weight)


def test_embeddinggemmas_preset_keeps_its_prompts_of_words_and_expands_nothing(
    build: Build, embeddinggemma: Path
) -> None:
    lengths = ["backbone.query_length=null", "backbone.document_length=null"]
    encoder = build("backbone=embeddinggemma_300m", "head=default", f"backbone.name={embeddinggemma}", *lengths)
    query, document = encode(encoder, "cat.", "query"), encode(encoder, "dog!", "document")
    assert query.scored_tokens == ["[CLS]", "what", "is", ":", "cat", ".", "[SEP]"]
    assert document.scored_tokens == ["[CLS]", "a", ":", "the", ":", "dog", "!", "[SEP]"]
    assert encoder.prompts["Clustering"] == "of : "


def test_modernberts_modular_list_is_a_gelu_layer_to_512_and_a_linear_one_to_128(
    build: Build, modernbert: Path
) -> None:
    head = f"head.layers=[{layer(512, activation='gelu')},{layer(128)}]"
    encoder = build("backbone=modernbert_base", "head=default", f"backbone.name={modernbert}", head)
    assert rows(head_of(encoder)) == [(32, 512, "GELU", False, False), (512, 128, "Identity", False, False)]


def test_modernberts_preset_fills_queries_to_32_and_cuts_documents_at_300(build: Build, modernbert: Path) -> None:
    lengths = ["backbone.query_length=32", "backbone.document_length=300"]
    encoder = build("backbone=modernbert_base", f"backbone.name={modernbert}", *lengths)
    query, document = encode(encoder, "cat", "query"), encode(encoder, "cat " * 400, "document")
    assert query.tokens == ["[CLS]", "[Q] ", "cat", "[SEP]", *["[MASK]"] * 28]
    assert document.tokens == ["[CLS]", "[D] ", "cat", *["Ġcat"] * 296, "[SEP]"]


def test_ettins_tip_widens_by_two_with_a_learned_residual_and_comes_back(build: Build, modernbert: Path) -> None:
    encoder = build("backbone=ettin_32m", f"backbone.name={modernbert}", "head=ettin_mlp")
    assert rows(head_of(encoder)) == [(32, 64, "Identity", False, True), (64, 32, "Identity", False, False)]
    residual = head_of(encoder)[0].residual
    assert residual.bias is None
    assert residual.weight.shape == (64, 32)
    assert residual.weight.requires_grad


def test_a_checkpoint_keeps_its_own_layers_with_exactly_their_weights(build: Build, checkpoint: Checkpoint) -> None:
    encoder = build(*with_own_settings(checkpoint.folder))
    assert rows(head_of(encoder)) == checkpoint.rows
    for dense, stored in zip(head_of(encoder), checkpoint.weights, strict=True):
        assert dense.state_dict().keys() == stored.keys()
        assert all(torch.equal(dense.state_dict()[name], stored[name]) for name in stored)


def test_a_checkpoint_keeps_its_own_query_length_prefix_and_expansion(build: Build, checkpoint: Checkpoint) -> None:
    query = encode(build(*with_own_settings(checkpoint.folder)), QUERY, "query")
    text = ["[CLS]", checkpoint.query_prefix, *QUERY_TOKENS, "[SEP]"]
    num_masks = checkpoint.query_length - len(text)
    assert query.tokens == text + ["[MASK]"] * num_masks
    assert query.attended == [True] * len(text) + [checkpoint.attends] * num_masks


def test_a_checkpoint_keeps_its_own_document_length_and_prefix(build: Build, checkpoint: Checkpoint) -> None:
    document = encode(build(*with_own_settings(checkpoint.folder)), DOCUMENT, "document")
    text = islice(cycle(DOCUMENT_TOKENS), checkpoint.document_length - 3)
    assert document.tokens == ["[CLS]", checkpoint.document_prefix, *text, "[SEP]"]


def test_a_checkpoint_keeps_its_own_skiplist_and_the_sides_of_it(build: Build, checkpoint: Checkpoint) -> None:
    encoder = build(*with_own_settings(checkpoint.folder))
    document, query = encode(encoder, DOCUMENT, "document"), encode(encoder, QUERY, "query")
    skipped_in_queries = checkpoint.skipped if checkpoint.skips_in_queries else set()
    assert document.scored == [token not in checkpoint.skipped for token in document.tokens]
    assert query.scored == [token not in skipped_in_queries for token in query.tokens]


def test_a_checkpoint_scores_as_the_stock_class_scores_it(build: Build, checkpoint: Checkpoint) -> None:
    stock = MultiVectorEncoder(str(checkpoint.folder), device="cpu")
    torch.testing.assert_close(
        scores(build(*with_own_settings(checkpoint.folder))), scores(stock), rtol=1e-5, atol=1e-6
    )


def test_a_checkpoint_keeps_its_own_similarity(build: Build, tmp_path: Path) -> None:
    saved = build()
    plain = scores(saved)
    saved.similarity_fn_name = "meanmaxsim"
    saved.save_pretrained(str(tmp_path), create_model_card=False)
    encoder = build(*with_own_settings(tmp_path))
    assert encoder.similarity_fn_name == "meanmaxsim"
    # Every query has the default's 8 scored tokens, the mask tokens included.
    torch.testing.assert_close(scores(encoder), plain / 8, rtol=1e-5, atol=0)


def test_stanfords_missing_keys_take_its_defaults(build: Build, stanford: Checkpoint, tmp_path: Path) -> None:
    missing = ["query_maxlen", "query_token_id", "doc_token_id", "mask_punctuation", "attend_to_mask_tokens"]
    folder = edited_stanford(stanford, tmp_path, {}, without=missing)
    encoder = build(*with_own_settings(folder))
    query, document = encode(encoder, "cat", "query"), encode(encoder, "cat, dog!", "document")
    assert query.tokens == ["[CLS]", "[unused0]", "cat", "[SEP]", *["[MASK]"] * 28]
    assert query.attended == [True] * 4 + [False] * 28
    assert document.scored_tokens == ["[CLS]", "[unused1]", "cat", "dog", "[SEP]"]


def edited_stanford(
    stanford: Checkpoint, tmp_path: Path, changes: dict[str, str], without: list[str] | None = None
) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(stanford.folder, folder)
    path = folder / "artifact.metadata"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if key not in (without or [])}))
    return folder


# --- Keys against what the checkpoint says ---------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["tiny_bert", "sentence_bert"])
def test_null_keys_on_a_model_that_is_not_late_interaction_are_pylates_defaults(
    build: Build, request: pytest.FixtureRequest, backbone: str
) -> None:
    encoder = build(*with_own_settings(request.getfixturevalue(backbone)))
    query, document = encode(encoder, QUERY, "query"), encode(encoder, "cat, dog!", "document")
    assert query.tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS, "[SEP]", *["[MASK]"] * 24]
    assert query.attended == [True] * 8 + [False] * 24
    assert query.scored == [True] * 32
    assert document.tokens == ["[CLS]", "[D] ", "cat", ",", "dog", "!", "[SEP]"]
    assert document.scored_tokens == ["[CLS]", "[D] ", "cat", "dog", "[SEP]"]
    # As many as the backbone has positions, fewer than PyLate's 180.
    assert len(encode(encoder, DOCUMENT * 2, "document").tokens) == 64


def test_a_side_without_a_prompt_of_words_gets_a_marker(build: Build, sentence_bert: Path, copy: Copy) -> None:
    folder = copy(sentence_bert)
    edit(folder / "config_sentence_transformers.json", prompts={"passage": "a : "})
    encoder = build(*with_own_settings(folder))
    assert encode(encoder, "cat", "query").tokens[:4] == ["[CLS]", "[Q] ", "cat", "[SEP]"]
    assert encode(encoder, "cat", "document").tokens == ["[CLS]", "a", ":", "cat", "[SEP]"]
    assert "[D] " not in encoder.tokenizer.get_vocab()


def test_an_expansion_without_a_length_anywhere_is_refused(build: Build, tmp_path: Path) -> None:
    encoder = build("backbone.expansion=none")
    transformer: nn.Module = encoder[0]
    assert isinstance(transformer, Transformer)
    transformer.query_length = None
    encoder.save_pretrained(str(tmp_path), create_model_card=False)
    message = (
        "backbone.query_length=null: expansion=fixed fills queries to a length, and the checkpoint states none: "
        "give one"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(*with_own_settings(tmp_path), "backbone.expansion=fixed")
    assert len(encode(build(*with_own_settings(tmp_path)), "cat " * 40, "query").tokens) == 43


def test_stanfords_strings_in_place_of_booleans_are_read_as_these(
    build: Build, stanford: Checkpoint, copy: Copy
) -> None:
    folder = copy(stanford.folder)
    edit(folder / "artifact.metadata", attend_to_mask_tokens="False", mask_punctuation="False", doc_maxlen=9)
    encoder = build(*with_own_settings(folder))
    assert encode(encoder, "cat", "query").attended == [True] * 4 + [False] * 8
    assert encode(encoder, "cat, dog!", "document").scored == [True] * 7
    assert len(encode(encoder, DOCUMENT, "document").tokens) == 9


@pytest.mark.parametrize(
    "keys", [{"attend_to_expansion": True}, {"expansion": Expansion.none}], ids=["attended", "no expansion"]
)
@pytest.mark.parametrize("backbone", ["tiny_bert", "stanford"])
def test_what_flash_attention_2_is_said_to_need_is_enough(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, backbone: str, keys: dict[str, Any]
) -> None:
    # As where its package is installed; nothing is computed with it.
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _, name, *a, **k: name)
    monkeypatch.setattr(Transformer, "_can_flatten_inputs", lambda _: False)
    found = request.getfixturevalue(backbone)
    folder = found.folder if isinstance(found, Checkpoint) else found
    encoder = build_encoder(backbone_config(folder, attention=Attention.flash_attention_2, **keys), head_config())
    assert backbone_of(encoder).config._attn_implementation == "flash_attention_2"


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_2_that_is_not_installed_is_refused_with_what_to_do(tiny_bert: Path) -> None:
    backbone = backbone_config(tiny_bert, attention=Attention.flash_attention_2, expansion=Expansion.none)
    message = r"^backbone\.attention=flash_attention_2 cannot run \(.*\): install flash-attn, or use sdpa$"
    with pytest.raises(ConfigError, match=message):
        build_encoder(backbone, head_config())


@pytest.mark.parametrize(
    ("keys", "length", "attended"),
    [
        ([], 12, False),
        (["backbone.attend_to_expansion=true"], 12, True),
        (["backbone.expansion=min"], 12, False),
        (["backbone.query_length=7"], None, False),
    ],
)
def test_a_cap_on_queries_that_are_filled_to_fewer_tokens_stays_until_a_length_is_given(
    build: Build, tmp_path: Path, keys: list[str], length: int | None, attended: bool
) -> None:
    saved = build("backbone.expansion=min", "backbone.query_length=6")
    transformer: nn.Module = saved[0]
    assert isinstance(transformer, Transformer)
    transformer.query_length = 12
    saved.save_pretrained(str(tmp_path), create_model_card=False)
    encoder = build(*with_own_settings(tmp_path), *keys)
    short, long = encode(encoder, "cat", "query"), encode(encoder, "cat " * 40, "query")
    assert short.tokens == ["[CLS]", "[Q] ", "cat", "[SEP]", *["[MASK]"] * (2 if length else 3)]
    assert short.attended == [True] * 4 + [attended] * (2 if length else 3)
    assert len(long.tokens) == (length or 43)


def test_keys_that_are_given_replace_what_the_checkpoint_says(build: Build, checkpoint: Checkpoint) -> None:
    encoder = build(
        *with_own_settings(checkpoint.folder),
        "backbone.query_length=11",
        "backbone.document_length=13",
        "backbone.query_prefix='[other] '",
        "backbone.document_prefix=''",
        "backbone.expansion=fixed",
        "backbone.attend_to_expansion=false",
        "backbone.skiplist=[dog]",
        "backbone.skiplist_sides=[document]",
    )
    query, document = encode(encoder, QUERY, "query"), encode(encoder, DOCUMENT, "document")
    assert query.scored_tokens == query.tokens == ["[CLS]", "[other] ", *QUERY_TOKENS, "[SEP]", *["[MASK]"] * 3]
    assert query.attended == [True] * 8 + [False] * 3
    assert document.tokens == ["[CLS]", *islice(cycle(DOCUMENT_TOKENS), 11), "[SEP]"]
    assert document.scored == [token != "dog" for token in document.tokens]


def test_an_empty_skiplist_scores_what_the_checkpoint_skips(build: Build, stanford: Checkpoint) -> None:
    encoder = build(*with_own_settings(stanford.folder), "backbone.skiplist=[]")
    assert encode(encoder, "cat, dog!", "document").scored_tokens == [
        "[CLS]",
        "[unused1]",
        "cat",
        ",",
        "dog",
        "!",
        "[SEP]",
    ]


@pytest.mark.parametrize("checkpoint", ["stanford", "own"], indirect=True)
@pytest.mark.parametrize("length", [8, 15])
def test_a_query_length_given_alone_moves_the_checkpoints_own_expansion(
    build: Build, checkpoint: Checkpoint, length: int
) -> None:
    encoder = build(*with_own_settings(checkpoint.folder), f"backbone.query_length={length}")
    query = encode(encoder, "cat", "query")
    assert query.tokens == ["[CLS]", checkpoint.query_prefix, "cat", "[SEP]", *["[MASK]"] * (length - 4)]


@pytest.mark.parametrize("checkpoint", ["stanford", "own"], indirect=True)
def test_a_shorter_query_length_than_the_checkpoints_survives_a_save(
    build: Build, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    encoder = build(*with_own_settings(checkpoint.folder), "backbone.query_length=8")
    encoder.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    reloaded = MultiVectorEncoder(str(tmp_path / "saved"), device="cpu")
    assert len(encode(reloaded, QUERY, "query").tokens) == 8


@pytest.mark.parametrize("checkpoint", ["stanford", "own"], indirect=True)
def test_switching_the_expansion_off_keeps_the_checkpoints_own_query_length(
    build: Build, checkpoint: Checkpoint
) -> None:
    encoder = build(*with_own_settings(checkpoint.folder), "backbone.expansion=none")
    short, long = encode(encoder, "cat", "query"), encode(encoder, "cat " * 40, "query")
    assert short.tokens == ["[CLS]", checkpoint.query_prefix, "cat", "[SEP]"]
    assert len(long.tokens) == checkpoint.query_length


# --- The head --------------------------------------------------------------------------------------------------------


def test_every_head_preset_is_described_here() -> None:
    assert PRESETS.keys() == {path.stem for path in HEADS.glob("*.yaml")}
    assert STUDY.keys() == {path.stem for path in HEADS.glob("study/*.yaml")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_head_preset_gives_the_layers_that_its_comment_says(build: Build, name: str) -> None:
    assert rows(head_of(build(f"head={name}"))) == PRESETS[name]


@pytest.mark.parametrize("name", STUDY)
def test_a_variant_of_the_study_gives_its_layers_and_says_in_its_first_line_whether_they_are_portable(
    build: Build, name: str
) -> None:
    layers = head_of(build(f"head=study/{name}"))
    extras = [describe_extras(layer) if isinstance(layer, Projection) else "" for layer in layers]
    assert list(zip(rows(layers), extras, strict=True)) == STUDY[name]
    first_line = (HEADS / "study" / f"{name}.yaml").read_text().splitlines()[0]
    assert first_line.rpartition("; ")[2] == ("portable" if all(map(portable, layers)) else "native")


@pytest.mark.parametrize("name", ALL_PRESETS)
def test_a_head_preset_computes_what_the_formulas_give_by_hand(build: Build, tiny_bert: Path, name: str) -> None:
    encoder = build(f"head={name}", "backbone.document_prefix=''")
    weights = [dense.state_dict() for dense in head_of(encoder)]
    by_hand = project_by_hand(hidden_states(tiny_bert, encoder, "the cat meows"), ALL_PRESETS[name], weights)
    assert_close(encode(encoder, "the cat meows", "document").vectors, by_hand)


@pytest.mark.parametrize("name", ALL_PRESETS)
def test_a_head_preset_without_activation_and_gate_is_linear_and_no_other(build: Build, name: str) -> None:
    assert is_linear(head_of(build(f"head={name}"))) is (name in LINEAR)


@pytest.mark.parametrize("name", ["glu", "swiglu"])
def test_a_gate_takes_as_many_parameters_as_the_linear_map_beside_it(build: Build, name: str) -> None:
    weights = head_of(build(f"head=study/{name}"))[0].state_dict()
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        "linear.weight": (32, 32),
        "gate.weight": (32, 32),
    }


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("out_features", [6, 4], ids=["wider", "equal width"])
@pytest.mark.parametrize("activation", Activation)
def test_a_layer_is_the_activation_of_a_linear_map_plus_with_residual_its_input(
    activation: Activation, out_features: int, residual: bool
) -> None:
    torch.manual_seed(5)
    spec = HeadLayer(bias=True, activation=activation, residual=residual, out_features=out_features)
    (dense,) = build_head(head_config(spec, keep="none"), [], 4)
    inputs = torch.randn(3, 5, 4)

    outputs = dense({"token_embeddings": inputs})["token_embeddings"]

    weights = dense.state_dict()
    expected = FORMULAS[activation.value](F.linear(inputs, weights["linear.weight"], weights["linear.bias"]))
    if residual:
        expected = expected + (F.linear(inputs, weights["residual.weight"]) if out_features == 6 else inputs)
    assert_close(outputs, expected)
    assert ("residual.weight" in weights) == (residual and out_features == 6)


def test_each_layer_takes_the_width_of_the_one_before(build: Build) -> None:
    dense = head_of(build("head=linear", f"head.layers=[{layer(24)},{layer(40)},{layer(8)}]"))
    assert [(one.linear.in_features, one.linear.out_features) for one in dense] == [(32, 24), (24, 40), (40, 8)]
    assert all(before.linear.out_features == after.linear.in_features for before, after in pairwise(dense))


def test_a_factor_multiplies_the_backbones_width_and_not_the_width_before() -> None:
    spec = HeadLayer(bias=False, activation=Activation.identity, residual=False, factor=1.5)
    layers = build_head(head_config(spec, spec, keep="none"), [], 32)
    assert [(dense.linear.in_features, dense.linear.out_features) for dense in layers] == [(32, 48), (48, 48)]


def test_out_features_wins_over_factor() -> None:
    spec = HeadLayer(bias=False, activation=Activation.identity, residual=False, out_features=7, factor=2)
    (dense,) = build_head(head_config(spec, keep="none"), [], 32)
    assert dense.linear.weight.shape == (7, 32)


def test_a_factor_that_leaves_no_width_is_refused(build: Build) -> None:
    spec = "{factor: 0.01, bias: false, activation: identity, residual: false}"
    with pytest.raises(ConfigError, match=r"head\.layers\[0\]\.factor=0\.01"):
        build("head=linear", f"head.layers=[{spec}]")


def test_a_plain_backbone_with_listed_layers_gets_those_and_no_layer_to_128(build: Build) -> None:
    encoder = build("head=default", f"head.layers=[{layer(16, bias=True, activation='tanh')}]")
    assert rows(head_of(encoder)) == [(32, 16, "Tanh", True, False)]


@pytest.mark.parametrize("side", ["query", "document"])
def test_every_vector_has_unit_length(build: Build, side: str) -> None:
    vectors = encode(build("head=mlp_residual"), QUERY, side).vectors
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)), rtol=1e-6, atol=0)


# --- Tokens ----------------------------------------------------------------------------------------------------------


TOKENIZERS = ["tiny_bert", "modernbert", "xlm_roberta", "gemma"]
TEXTS = ["what is a cat?", "cat", " cat", "?", "-cat", "Ω a", "Cat", "a\ncat", "[Q] cat", "[D]cat", ""]


@pytest.mark.parametrize("backbone", TOKENIZERS)
@pytest.mark.parametrize(("side", "prefix"), [("query", "[Q] "), ("document", "[D] ")])
def test_a_prefix_is_one_token_after_the_first_and_leaves_the_text_as_it_was(
    build: Build, request: pytest.FixtureRequest, backbone: str, side: str, prefix: str
) -> None:
    folder: Path = request.getfixturevalue(backbone)
    lengths = ["backbone.query_length=32", "backbone.document_length=32"]
    encoder = build(f"backbone.name={folder}", "backbone.expansion=none", *lengths)
    first, *text, last = AutoTokenizer.from_pretrained(folder)("what is a cat?").tokens()
    assert encode(encoder, "what is a cat?", side).tokens == [first, prefix, *text, last]


@pytest.mark.parametrize("backbone", TOKENIZERS)
@pytest.mark.parametrize("prefix", ["[Q] ", "[ask]", "[ASK] "])
def test_the_tokens_of_a_text_are_those_it_has_alone_with_the_markers_id_inserted_at_position_1(
    build: Build, request: pytest.FixtureRequest, backbone: str, prefix: str
) -> None:
    # So do PyLate and Stanford's ColBERT, which never tokenise the marker with the text.
    encoder = build(
        *(f"backbone.name={request.getfixturevalue(backbone)}", "backbone.document_length=12"),
        *("backbone.query_prefix=''", f"backbone.document_prefix='{prefix}'"),
    )
    marker = encoder.tokenizer.convert_tokens_to_ids(prefix)
    assert marker != encoder.tokenizer.unk_token_id
    for text in [*TEXTS, "what is a cat? " * 4]:
        alone = encoder.tokenizer(text, truncation=True, max_length=12 - 1)["input_ids"]
        features = encoder.preprocess([text], prompt=encoder.prompts["document"], task="document")
        assert features["input_ids"][0].tolist() == [alone[0], marker, *alone[1:]], text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_text_keeps_its_tokens_where_only_the_first_word_of_a_row_gets_a_space_in_front(
    xlm_roberta: Path, copy: Copy, scheme: str
) -> None:
    # T5 and Llama tokenise so: behind a marker, a first word is none without a space of its own.
    folder = copy(xlm_roberta)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    edit(folder / "tokenizer.json", pre_tokenizer=spaces)
    encoder = build_encoder(backbone_config(folder), head_config())
    for text in ("what is a cat?", "cat", "?"):
        first, *alone = encoder.tokenizer(text).tokens()
        assert encode(encoder, text, "document").tokens == [first, "[D] ", *alone]


@pytest.mark.parametrize("prefix", ["[unused0]", "[unused0] "])
def test_stanfords_marker_is_inserted_at_position_1(build: Build, stanford: Checkpoint, prefix: str) -> None:
    encoder = build(*with_own_settings(stanford.folder), f"backbone.document_prefix='{prefix}'")
    for text in TEXTS:
        alone = encoder.tokenizer(text)["input_ids"]
        features = encoder.preprocess([text], prompt=encoder.prompts["document"], task="document")
        marker = encoder.tokenizer.convert_tokens_to_ids("[unused0]")
        assert features["input_ids"][0].tolist() == [alone[0], marker, *alone[1:]], text


@pytest.mark.parametrize("backbone", ["tiny_bert", "gemma"])
def test_padding_stands_on_the_right_even_where_the_checkpoint_says_left(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, backbone: str
) -> None:
    folder = copy(request.getfixturevalue(backbone))
    edit(folder / "tokenizer_config.json", padding_side="left")
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    encoder = build_encoder(backbone_config(folder, expansion=Expansion.none), head_config())
    mask = encoder.preprocess(["cat", "what is a cat?"], prompt=encoder.prompts["query"], task="query")[
        "attention_mask"
    ]
    assert mask[0].tolist() == [1] * 4 + [0] * (mask.shape[1] - 4)
    encoder.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"


def test_a_marker_of_the_vocabulary_becomes_the_prefix_without_a_new_token(build: Build, stanford: Checkpoint) -> None:
    prefixes = ["backbone.query_prefix='[unused1] '", "backbone.document_prefix='[unused0]'"]
    encoder = build(f"backbone.name={stanford.folder}", *prefixes)
    assert encode(encoder, "cat", "query").tokens[:4] == ["[CLS]", "[unused1]", "cat", "[SEP]"]
    assert encode(encoder, "cat", "document").tokens == ["[CLS]", "[unused0]", "cat", "[SEP]"]
    assert len(encoder.tokenizer) == len(AutoTokenizer.from_pretrained(stanford.folder))


def test_an_empty_prefix_means_none_even_where_the_checkpoint_has_one(build: Build, stanford: Checkpoint) -> None:
    encoder = build(*with_own_settings(stanford.folder), "backbone.query_prefix=''", "backbone.document_prefix=''")
    assert encode(encoder, "cat", "query").tokens[:3] == ["[CLS]", "cat", "[SEP]"]
    assert encode(encoder, "cat", "document").tokens == ["[CLS]", "cat", "[SEP]"]


def test_prefixes_are_special_tokens_beside_those_of_the_checkpoint(build: Build, tiny_bert: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_bert).all_special_tokens
    assert set(build().tokenizer.all_special_tokens) == {*own, "[Q] ", "[D] "}


def test_a_prefix_typed_in_lower_case_inside_a_text_stays_text(build: Build) -> None:
    tokens = encode(build(), "[d] cat", "document").tokens
    assert tokens == ["[CLS]", "[D] ", "[", "d", "]", "cat", "[SEP]"]


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_prefix_of_more_than_one_token_is_refused(build: Build, modernbert: Path, side: str) -> None:
    # In a byte-level vocabulary the space behind a marker that exists already is a token of its own.
    with pytest.raises(ConfigError, match=rf"backbone\.{side}_prefix='\[unused0\] ' must be one token"):
        build(f"backbone.name={modernbert}", f"backbone.{side}_prefix='[unused0] '")


@pytest.mark.parametrize("prefix", ["[Q] [ask] ", "what is ", " "])
def test_a_prefix_with_a_space_within_is_refused(build: Build, prefix: str) -> None:
    message = (
        f"backbone.document_prefix={prefix!r} must be one token, without a space within: "
        "use a marker such as '[Q] ' or an empty text"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(f"backbone.document_prefix='{prefix}'")


def test_pylates_prefix_stands_before_a_prompt_of_words_and_one_of_the_config_alone(
    build: Build, pylate: Checkpoint, copy: Copy
) -> None:
    folder = copy(pylate.folder)
    edit(folder / "config_sentence_transformers.json", prompts={"query": "what is ", "document": "[D] the "})
    own = build(*with_own_settings(folder))
    assert encode(own, "cat", "query").tokens[:6] == ["[CLS]", "[Q] ", "what", "is", "cat", "[SEP]"]
    assert encode(own, "cat", "document").tokens == ["[CLS]", "[D] ", "the", "cat", "[SEP]"]
    given = build(*with_own_settings(folder), "backbone.document_prefix='[other] '")
    assert encode(given, "cat", "document").tokens == ["[CLS]", "[other] ", "cat", "[SEP]"]


def test_a_checkpoint_keeps_the_name_of_its_default_prompt(embeddinggemma: Path, copy: Copy) -> None:
    folder = copy(embeddinggemma)
    edit(folder / "config_sentence_transformers.json", default_prompt_name="Clustering")
    assert build_encoder(backbone_config(folder), head_config()).default_prompt_name == "Clustering"


def test_new_prefixes_add_two_rows_to_a_full_embedding_table_and_change_no_other(build: Build, tiny_bert: Path) -> None:
    stored = load_file(tiny_bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    table = embedding_table(build())
    assert table.shape == (len(stored) + 2, 32)
    assert torch.equal(table[:-2], stored)


def test_new_prefixes_take_spare_rows_of_the_embedding_table(build: Build, modernbert: Path) -> None:
    stored = load_file(modernbert / "model.safetensors")["embeddings.tok_embeddings.weight"]
    encoder = build(f"backbone.name={modernbert}")
    assert torch.equal(embedding_table(encoder), stored)


def test_fixed_expansion_fills_a_query_with_mask_tokens_that_are_scored_and_unattended(build: Build) -> None:
    query = encode(build("backbone.query_length=12"), QUERY, "query")
    assert query.tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS, "[SEP]", *["[MASK]"] * 4]
    assert query.attended == [True] * 8 + [False] * 4
    assert query.scored == [True] * 12


def test_attend_to_expansion_lets_attention_see_the_mask_tokens(build: Build) -> None:
    query = encode(build("backbone.query_length=12", "backbone.attend_to_expansion=true"), QUERY, "query")
    assert query.tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS, "[SEP]", *["[MASK]"] * 4]
    assert query.attended == query.scored == [True] * 12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unattended_mask_tokens_leave_the_vectors_of_the_text_as_they_are(build: Build, attention: str) -> None:
    settings = ["backbone.query_length=12", f"backbone.attention={attention}"]
    plain = encode(build(*settings, "backbone.expansion=none"), QUERY, "query").vectors
    unattended = encode(build(*settings), QUERY, "query").vectors
    attended = encode(build(*settings, "backbone.attend_to_expansion=true"), QUERY, "query").vectors
    assert_close(unattended[: len(plain)], plain)
    assert (attended[: len(plain)] - plain).abs().max() > 1e-4


def test_fixed_expansion_cuts_a_longer_query_to_the_length(build: Build) -> None:
    query = encode(build("backbone.query_length=6"), QUERY, "query")
    assert query.scored_tokens == query.tokens == ["[CLS]", "[Q] ", "what", "is", "a", "[SEP]"]


def test_without_expansion_a_query_is_only_cut(build: Build) -> None:
    encoder = build("backbone.expansion=none", "backbone.query_length=6")
    assert encode(encoder, "cat", "query").tokens == ["[CLS]", "[Q] ", "cat", "[SEP]"]
    assert encode(encoder, QUERY, "query").tokens == ["[CLS]", "[Q] ", "what", "is", "a", "[SEP]"]


def test_min_expansion_fills_a_short_query_and_leaves_a_long_one_whole(build: Build) -> None:
    encoder = build("backbone.expansion=min", "backbone.query_length=6")
    short, long = encode(encoder, "cat", "query"), encode(encoder, QUERY, "query")
    assert short.scored_tokens == short.tokens == ["[CLS]", "[Q] ", "cat", "[SEP]", "[MASK]", "[MASK]"]
    assert short.attended == [True] * 4 + [False] * 2
    assert long.scored_tokens == long.tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS, "[SEP]"]


def test_documents_are_cut_and_never_filled_with_mask_tokens(build: Build) -> None:
    encoder = build("backbone.document_length=6")
    assert encode(encoder, "cat", "document").tokens == ["[CLS]", "[D] ", "cat", "[SEP]"]
    assert encode(encoder, DOCUMENT, "document").tokens == ["[CLS]", "[D] ", "the", "cat", "meows", "[SEP]"]


def test_documents_score_all_but_the_32_punctuation_marks(build: Build) -> None:
    document = encode(build("backbone.document_length=64"), "cat " + " ".join(string.punctuation), "document")
    assert document.tokens == ["[CLS]", "[D] ", "cat", *string.punctuation, "[SEP]"]
    assert document.scored_tokens == ["[CLS]", "[D] ", "cat", "[SEP]"]


def test_queries_score_their_punctuation_marks(build: Build) -> None:
    assert encode(build(), QUERY, "query").scored_tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS, "[SEP]"]


def test_a_skiplist_of_the_query_side_leaves_documents_alone(build: Build) -> None:
    encoder = build("backbone.skiplist_sides=[query]", "backbone.query_length=9")
    query, document = encode(encoder, QUERY, "query"), encode(encoder, QUERY, "document")
    assert query.scored_tokens == ["[CLS]", "[Q] ", *QUERY_TOKENS[:-1], "[SEP]", "[MASK]"]
    assert document.scored_tokens == ["[CLS]", "[D] ", *QUERY_TOKENS, "[SEP]"]


def test_unknown_skiplist_words_are_named_and_dropped_and_a_real_unknown_token_stays_scored(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = build("backbone.skiplist=[the,zebra,giraffe]")
    document = encode(encoder, "the cat Ω", "document")
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "architectures.factory")
    assert warning == "backbone.skiplist: dropped zebra giraffe, no single tokens of this vocabulary"
    assert document.tokens == ["[CLS]", "[D] ", "the", "cat", "[UNK]", "[SEP]"]
    assert document.scored_tokens == ["[CLS]", "[D] ", "cat", "[UNK]", "[SEP]"]


def test_marks_that_were_not_asked_for_are_dropped_without_a_word(
    build: Build, xlm_roberta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = build(f"backbone.name={xlm_roberta}", "backbone.document_length=32")
    document = encode(encoder, "a cat, a cat!", "document")
    assert {",", "!"} & set(document.tokens) == {",", "!"}
    assert not {",", "!"} & set(document.scored_tokens)
    assert not [record for record in caplog.records if record.name == "architectures.factory"]


def test_a_stanford_colbert_skips_the_first_token_of_each_mark_typed_alone(xlm_roberta: Path, copy: Copy) -> None:
    # Its own rule: in SentencePiece a mark alone is a space and the mark, so every lone space goes and marks stay.
    folder = copy(xlm_roberta)
    head = {"linear.weight": torch.eye(8, 32)}
    rewrite(folder / "model.safetensors", lambda weights: {f"roberta.{name}": weights[name] for name in weights} | head)
    edit(folder / "config.json", architectures=["HF_ColBERT"])
    document = encode(build_encoder(backbone_config(folder), head_config()), "a cat , 1", "document")
    assert document.tokens == ["<s>", "[unused1]", "▁a", "▁cat", "▁", ",", "▁", "<unk>", "</s>"]
    assert document.scored_tokens == ["<s>", "[unused1]", "▁a", "▁cat", ",", "<unk>", "</s>"]


def test_a_mark_outside_a_stanford_colberts_vocabulary_leaves_unknown_tokens_scored(
    stanford: Checkpoint, copy: Copy
) -> None:
    folder = copy(stanford.folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    del words["model"]["vocab"]["~"]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    document = encode(build_encoder(backbone_config(folder), head_config()), "cat ~ Ω , a", "document")
    assert document.tokens == ["[CLS]", "[unused1]", "cat", "[UNK]", "[UNK]", ",", "a", "[SEP]"]
    assert document.scored_tokens == ["[CLS]", "[unused1]", "cat", "[UNK]", "[UNK]", "a", "[SEP]"]


def test_unknown_skiplist_words_are_not_saved(build: Build, tmp_path: Path) -> None:
    build("backbone.skiplist=[the,zebra]").save_pretrained(str(tmp_path), create_model_card=False)
    config = json.loads((tmp_path / "2_MultiVectorMask" / "config.json").read_text())
    assert config["skiplist_words"] == ["the"]


def test_an_unknown_token_that_is_listed_is_left_out(build: Build) -> None:
    encoder = build("backbone.skiplist=['[UNK]']")
    assert encode(encoder, "cat Ω", "document").scored_tokens == ["[CLS]", "[D] ", "cat", "[SEP]"]


# --- The load --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["tiny_bert", "xlm_roberta", "sentence_bert", "stanford"])
def test_no_pooler_is_left_after_a_load(build: Build, request: pytest.FixtureRequest, backbone: str) -> None:
    found = request.getfixturevalue(backbone)
    folder: Path = found.folder if isinstance(found, Checkpoint) else found
    stored = load_file(folder / "model.safetensors")
    assert any("pooler" in name for name in stored)
    assert not any("pooler" in name for name, _ in build(f"backbone.name={folder}").named_parameters())


@pytest.mark.parametrize("backbone", ["modernbert", "xlm_roberta"])
def test_a_backbone_loads_with_its_stored_weights_whether_or_not_it_takes_a_pooler(
    build: Build, request: pytest.FixtureRequest, backbone: str
) -> None:
    folder: Path = request.getfixturevalue(backbone)
    encoder = build(f"backbone.name={folder}", "backbone.query_prefix=''", "backbone.document_prefix=''")
    stored = {name: value for name, value in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    loaded = backbone_of(encoder).state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_the_longest_document_that_is_allowed_runs_on_a_backbone_with_a_position_offset(
    build: Build, xlm_roberta: Path
) -> None:
    encoder = build(f"backbone.name={xlm_roberta}", "backbone.document_length=64")
    assert len(encode(encoder, "cat " * 80, "document").vectors) == 64
    with pytest.raises(ConfigError, match=r"backbone\.document_length=65 exceeds the backbone's 64 positions"):
        build(f"backbone.name={xlm_roberta}", "backbone.document_length=65")


@pytest.mark.parametrize("backbone", ["tiny_bert", "embeddinggemma", "stanford"])
def test_a_checkpoint_in_float16_is_loaded_in_float32(
    build: Build, request: pytest.FixtureRequest, tmp_path: Path, backbone: str
) -> None:
    found = request.getfixturevalue(backbone)
    folder = tmp_path / "halves"
    shutil.copytree(found.folder if isinstance(found, Checkpoint) else found, folder)
    for path in folder.rglob("model.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))

    encoder = build(*with_own_settings(folder))

    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    stored = load_file(folder / "model.safetensors")
    for name, value in backbone_of(encoder).state_dict().items():
        halves = stored[f"bert.{name}" if backbone == "stanford" else name]
        # A plain backbone gets two markers, whose rows are new.
        assert torch.equal(value[: len(halves)], halves.float())


@pytest.mark.parametrize(("attention", "calls"), [("sdpa", 2), ("eager", 0)])
def test_the_attention_of_the_config_is_the_one_that_runs_in_every_layer(
    build: Build, monkeypatch: pytest.MonkeyPatch, attention: str, calls: int
) -> None:
    encoder = build(f"backbone.attention={attention}")
    fused, seen = F.scaled_dot_product_attention, list[int]()

    def spy(query: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(query.shape[-2])
        return fused(query, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    encode(encoder, "cat", "document")
    assert seen == [4] * calls


def test_eager_and_sdpa_give_the_same_vectors(build: Build) -> None:
    eager, sdpa = (encode(build(f"backbone.attention={name}"), QUERY, "query").vectors for name in ("eager", "sdpa"))
    assert_close(eager, sdpa)


# --- The save --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", Activation)
def test_a_saved_encoder_scores_the_same_in_the_stock_class(
    build: Build, tmp_path: Path, activation: Activation
) -> None:
    # One residual with a learned map, one of equal widths.
    layers = ",".join(layer(24, bias=True, activation=activation.name, residual=True) for _ in range(2))
    encoder = build("head=linear", f"head.layers=[{layers},{layer(8)}]")
    encoder.save_pretrained(str(tmp_path), create_model_card=False)
    reloaded = MultiVectorEncoder(str(tmp_path), device="cpu")
    assert rows(head_of(reloaded)) == [
        (32, 24, activation.value, True, True),
        (24, 24, activation.value, True, True),
        (24, 8, "Identity", False, False),
    ]
    torch.testing.assert_close(scores(reloaded), scores(encoder), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backbone", ["modernbert", "xlm_roberta", "embeddinggemma"])
def test_a_saved_encoder_on_another_backbone_scores_the_same_in_the_stock_class(
    build: Build, request: pytest.FixtureRequest, tmp_path: Path, backbone: str
) -> None:
    lengths = ["backbone.query_length=32", "backbone.document_length=64"]
    encoder = build(f"backbone.name={request.getfixturevalue(backbone)}", *lengths)
    encoder.save_pretrained(str(tmp_path), create_model_card=False)
    torch.testing.assert_close(
        scores(MultiVectorEncoder(str(tmp_path), device="cpu")), scores(encoder), rtol=1e-5, atol=0
    )


def test_a_save_names_only_modules_of_sentence_transformers(build: Build, tmp_path: Path) -> None:
    build("head=linear").save_pretrained(str(tmp_path), create_model_card=False)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.base.modules.dense.Dense",
        "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        "sentence_transformers.base.modules.normalize.Normalize",
    ]


# --- The seed --------------------------------------------------------------------------------------------------------


def test_the_same_torch_seed_gives_the_same_weights(build: Build) -> None:
    first, second = (build("head=mlp_residual", seed=7).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_torch_seed_gives_other_new_weights_and_the_same_pretrained_ones(build: Build) -> None:
    first, second = (build("head=mlp_residual", seed=seed) for seed in (7, 8))
    for one, other in zip(head_of(first), head_of(second), strict=True):
        assert all(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    name = "embeddings.word_embeddings.weight"
    states = [backbone_of(encoder).state_dict() for encoder in (first, second)]
    tables = [state.pop(name) for state in states]
    assert torch.equal(tables[0][:-2], tables[1][:-2])
    assert not torch.isclose(tables[0][-2:], tables[1][-2:]).all()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("dropout", "varies"), [("0", False), ("0.5", True), ("null", True)])
def test_dropout_of_the_config_replaces_the_checkpoints(build: Build, dropout: str, varies: bool) -> None:
    encoder = build(f"backbone.dropout={dropout}").train()
    features = encoder.preprocess([QUERY], prompt="[Q] ", task="query")
    first, second = (encoder(dict(features), task="query")["token_embeddings"] for _ in range(2))
    assert torch.equal(first, second) is not varies


# --- Weights that are not all there, and those in pickles -------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("backbone", "key", "parameter"),
    [
        ("tiny_bert", "encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.weight"),
        ("tiny_bert", "embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias"),
        ("modernbert", "layers.0.attn.Wo.weight", "layers.0.attn.Wo.weight"),
        ("gemma", "layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"),
        ("stanford", "bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_parameter_is_refused_by_its_name(
    request: pytest.FixtureRequest, copy: Copy, backbone: str, key: str, parameter: str
) -> None:
    found = request.getfixturevalue(backbone)
    folder = copy(found.folder if isinstance(found, Checkpoint) else found)
    rewrite(folder / "model.safetensors", lambda weights: {name: weights[name] for name in weights if name != key})
    kind = {"tiny_bert": "Bert", "modernbert": "ModernBert", "gemma": "Gemma3Text", "stanford": "Bert"}[backbone]
    message = (
        f"backbone.name={folder} has no weights for 1 parameters of its {kind}Model, such as {parameter}: "
        "they would be random; is the model complete?"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_encoder(backbone_config(folder), head_config())


def test_weights_under_a_foreign_prefix_are_none_of_the_models(tiny_bert: Path, copy: Copy) -> None:
    folder = copy(tiny_bert)
    rewrite(folder / "model.safetensors", lambda weights: {f"student.{name}": weights[name] for name in weights})
    message = f"backbone.name={folder} has no weights for 37 parameters of its BertModel, such as embeddings."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build_encoder(backbone_config(folder), head_config())


def test_weights_under_the_prefix_of_the_architecture_are_the_models(tiny_bert: Path, copy: Copy) -> None:
    # As in every BertForMaskedLM, whose other weights are left.
    folder = copy(tiny_bert)
    stored = load_file(folder / "model.safetensors")
    extra = {"cls.predictions.bias": torch.zeros(3)}
    rewrite(folder / "model.safetensors", lambda weights: {f"bert.{name}": weights[name] for name in weights} | extra)
    loaded = backbone_of(build_encoder(backbone_config(folder), head_config())).state_dict()
    assert all(torch.equal(loaded[name][: len(stored[name])], stored[name]) for name in loaded)


def test_a_parameter_of_another_shape_is_refused(tiny_bert: Path, copy: Copy) -> None:
    folder, name = copy(tiny_bert), "encoder.layer.1.output.dense.weight"
    rewrite(folder / "model.safetensors", lambda weights: weights | {name: weights[name][:, :16].contiguous()})
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder} cannot be loaded"):
        build_encoder(backbone_config(folder), head_config())


def test_a_layer_of_the_head_that_lacks_a_parameter_is_refused_by_its_name(embeddinggemma: Path, copy: Copy) -> None:
    folder = copy(embeddinggemma)
    path = folder / "2_Dense" / "model.safetensors"
    rewrite(path, lambda weights: {"other.weight": weights["linear.weight"]})
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder} cannot be loaded \(.*linear\.weight"):
        build_encoder(backbone_config(folder), head_config())


def test_a_stanford_colbert_without_its_layer_is_refused_by_its_name(stanford: Checkpoint, copy: Copy) -> None:
    folder = copy(stanford.folder)
    rewrite(folder / "model.safetensors", lambda weights: {n: weights[n] for n in weights if n != "linear.weight"})
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder} cannot be loaded \(.*linear\.weight"):
        build_encoder(backbone_config(folder), head_config())


@pytest.mark.parametrize("change", [{"out_features": "many"}, {"in_features": None}], ids=["text", "null"])
def test_a_layer_of_the_head_whose_config_is_damaged_is_refused_by_its_file(
    embeddinggemma: Path, copy: Copy, change: dict[str, object]
) -> None:
    folder = copy(embeddinggemma)
    edit(folder / "2_Dense" / "config.json", **change)
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder}"):
        build_encoder(backbone_config(folder), head_config())


@pytest.mark.parametrize("change", [{"activation": "GeLU"}, {"norm": "batch"}, {"out_features": None}])
def test_a_layer_of_our_own_whose_config_is_damaged_is_refused_by_its_file(
    build: Build, tmp_path: Path, change: dict[str, object]
) -> None:
    build("head=study/glu").save_pretrained(str(tmp_path), create_model_card=False)
    edit(tmp_path / "1_Projection" / "config.json", **change)
    with pytest.raises(ConfigError, match=rf"^backbone\.name={tmp_path}"):
        build_encoder(backbone_config(tmp_path), head_config())


def test_a_multi_vector_encoder_without_a_mask_scores_every_token(build: Build, tmp_path: Path) -> None:
    encoder = build("backbone.expansion=none")
    modules = [module for module in encoder if not isinstance(module, MultiVectorMask)]
    prompts = {side: prompt or "" for side, prompt in encoder.prompts.items()}
    unmasked = MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
    unmasked.save_pretrained(str(tmp_path), create_model_card=False)
    document = encode(build(*with_own_settings(tmp_path)), "cat, dog!", "document")
    assert document.scored_tokens == ["[CLS]", "[D] ", "cat", ",", "dog", "!", "[SEP]"]


def test_the_remedy_for_a_layer_with_an_unknown_activation_is_to_leave_it_out(embeddinggemma: Path, copy: Copy) -> None:
    folder = copy(embeddinggemma)
    activation = "torch.nn.modules.activation.Softmax"
    edit(folder / "3_Dense" / "config.json", activation_function=activation)
    message = (
        f"activation_function={activation} .*: drop the layer with head.keep=none or the number of layers before it$"
    )
    with pytest.raises(ConfigError, match=message):
        build_encoder(backbone_config(folder), head_config())
    kept = build_encoder(backbone_config(folder), head_config(keep="1"))
    assert rows(head_of(kept)) == [(32, 128, "Identity", False, False)]
    dropped = build_encoder(backbone_config(folder), head_config(keep="none", embedding_size=8))
    assert rows(head_of(dropped)) == [(32, 8, "Identity", False, False)]


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("backbone", "places"), [("tiny_bert", [""]), ("stanford", [""]), ("pylate", ["", "1_Dense", "2_Dense"])]
)
def test_weights_in_pickles_are_those_in_safetensors_where_pickles_are_allowed(
    request: pytest.FixtureRequest, copy: Copy, backbone: str, places: list[str]
) -> None:
    found = request.getfixturevalue(backbone)
    safe = found.folder if isinstance(found, Checkpoint) else found
    folder = copy(safe)
    for place in places:
        as_pickle(folder / place)
    with pytest.raises(ConfigError, match=r"has its weights in a pickle, pytorch_model\.bin, and none in safetensors"):
        build_encoder(backbone_config(folder), head_config())
    torch.manual_seed(0)
    unpickled = build_encoder(backbone_config(folder, allow_pickle=True), head_config()).state_dict()
    torch.manual_seed(0)
    expected = build_encoder(backbone_config(safe), head_config()).state_dict()
    assert unpickled.keys() == expected.keys()
    assert all(torch.equal(unpickled[name], expected[name]) for name in expected)


def test_the_loader_itself_takes_no_pickle_where_the_files_of_the_hub_were_not_looked_at(
    tiny_bert: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(tiny_bert)
    as_pickle(folder)
    monkeypatch.setattr("architectures.layouts._check_pickles", lambda *_: None)
    message = rf"^backbone\.name={folder} cannot be loaded \(Error no file named model\.safetensors found"
    with pytest.raises(ConfigError, match=message):
        build_encoder(backbone_config(folder), head_config())


class Intruder:
    """Unpickled without care, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["", "2_Dense"])
def test_a_pickle_that_is_allowed_runs_no_code(embeddinggemma: Path, copy: Copy, tmp_path: Path, place: str) -> None:
    folder, trace = copy(embeddinggemma), tmp_path / "trace"
    (folder / place / "model.safetensors").unlink()
    torch.save({"linear.weight": Intruder(trace)}, folder / place / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder} cannot be loaded \("):
        build_encoder(backbone_config(folder, allow_pickle=True), head_config())
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))
    assert trace.exists()


def test_a_folder_without_weights_is_refused_by_its_name(build: Build, tiny_bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "incomplete"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"backbone\.name={folder} cannot be loaded \(.*\): is the model complete, "):
        build(f"backbone.name={folder}")


def test_weights_that_are_cut_off_are_refused_by_their_name(build: Build, tiny_bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "incomplete"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=rf"backbone\.name={folder} cannot be loaded \(.*\): is the model complete, "):
        build(f"backbone.name={folder}")


def test_weights_that_are_cut_off_behind_their_header_are_refused_by_their_name(tiny_bert: Path, copy: Copy) -> None:
    folder = copy(tiny_bert)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"^backbone\.name={folder} cannot be loaded \(.*: is the model complete, "):
        build_encoder(backbone_config(folder), head_config())
