"""A text has the same vectors alone, beside longer texts, in a wider batch and with another attention, on every
architecture."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.factory import build_encoder
from configs.schema import Attention, BackboneConfig, Config, Expansion
from tests.architectures.conftest import head_config
from tests.checkpoints import ARCHITECTURES

QUERY_LENGTH = 12
EXPANSIONS: dict[str, dict[str, Any]] = {
    "fixed, unattended": {"expansion": Expansion.fixed, "attend_to_expansion": False},
    "fixed, attended": {"expansion": Expansion.fixed, "attend_to_expansion": True},
    "min, unattended": {"expansion": Expansion.min, "attend_to_expansion": False},
    "min, attended": {"expansion": Expansion.min, "attend_to_expansion": True},
    "none": {"expansion": Expansion.none},
}
QUERY, LONG_QUERY = "a cat", "a cat is a cat " * 4
DOCUMENT, LONG_DOCUMENT = "a cat, a cat is a cat " * 2, "a cat. " * 90

Encode = Callable[..., list[Tensor]]
# Encoders and presets of this module by what they were built from.
Built = dict[tuple[object, ...], Any]


@pytest.fixture(scope="module")
def built() -> Built:
    return {}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build(
    architecture: str, request: pytest.FixtureRequest, make_config: Callable[..., Config], built: Built
) -> Callable[..., MultiVectorEncoder]:
    """The architecture with its preset's settings and an expansion, built once."""
    preset, fixture, document_length = ARCHITECTURES[architecture]
    folder: Path = request.getfixturevalue(fixture)

    def build_with(expansion: str, attention: Attention = Attention.sdpa) -> MultiVectorEncoder:
        if (architecture,) not in built:
            lengths = [f"backbone.query_length={QUERY_LENGTH}", f"backbone.document_length={document_length}"]
            source = [f"backbone={preset}", f"backbone.name={folder}", "data=pairs", "data.path=prose.jsonl"]
            built[architecture,] = make_config(*source, *lengths).backbone
        backbone: BackboneConfig = replace(built[architecture,], **EXPANSIONS[expansion], attention=attention)
        key = (architecture, expansion, attention)
        if key not in built:
            torch.manual_seed(0)
            built[key] = build_encoder(backbone, head_config()).eval()
        encoder: MultiVectorEncoder = built[key]
        return encoder

    return build_with


def scored(encoder: MultiVectorEncoder, texts: list[str], side: str, *, columns: int = 0) -> list[Tensor]:
    """The scored vectors of each text in one batch, padded by so many more columns."""
    features = encoder.preprocess(texts, prompt=encoder.prompts[side], task=side)
    padding = {"input_ids": encoder.tokenizer.pad_token_id}
    for name, value in features.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            features[name] = F.pad(value, (0, columns), value=padding.get(name, 0))
    with torch.no_grad():
        output = encoder(features, task=side)
    return [vectors[mask] for vectors, mask in zip(output["token_embeddings"], output["attention_mask"], strict=True)]


def assert_same(ours: list[Tensor], others: list[Tensor]) -> None:
    """Vectors of unit length, whose sums are taken in another order."""
    for one, other in zip(ours, others, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_query_is_the_same_alone_and_beside_a_longer_one(
    build: Callable[..., MultiVectorEncoder], expansion: str
) -> None:
    encoder = build(expansion)
    texts = [QUERY, LONG_QUERY, "cat", ""]
    assert_same(scored(encoder, texts, "query"), [scored(encoder, [text], "query")[0] for text in texts])


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_query_is_the_same_in_a_wider_batch(build: Callable[..., MultiVectorEncoder], expansion: str) -> None:
    encoder = build(expansion)
    expected = scored(encoder, [QUERY, "cat"], "query")
    for columns in (1, 9):
        assert_same(scored(encoder, [QUERY, "cat"], "query", columns=columns), expected)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_query_is_the_same_with_eager_attention(build: Callable[..., MultiVectorEncoder], expansion: str) -> None:
    texts = [QUERY, LONG_QUERY, "cat"]
    eager, sdpa = (
        scored(build(expansion, attention), texts, "query") for attention in (Attention.eager, Attention.sdpa)
    )
    assert_same(eager, sdpa)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_query_has_as_many_vectors_as_its_expansion_says(
    build: Callable[..., MultiVectorEncoder], expansion: str
) -> None:
    encoder = build(expansion)
    short, long = scored(encoder, [QUERY, LONG_QUERY], "query")
    prefix = encoder.prompts["query"] or ""
    alone, whole = (len(encoder.tokenizer(prefix + text)["input_ids"]) for text in (QUERY, LONG_QUERY))
    assert alone < QUERY_LENGTH < whole
    assert len(short) == (alone if expansion == "none" else QUERY_LENGTH)
    assert len(long) == (whole if expansion.startswith("min") else QUERY_LENGTH)


def test_a_document_is_the_same_alone_beside_a_longer_one_and_in_a_wider_batch(
    build: Callable[..., MultiVectorEncoder],
) -> None:
    encoder = build("none")
    texts = [DOCUMENT, "cat", LONG_DOCUMENT, ""]
    together = scored(encoder, texts, "document")
    assert_same(together, [scored(encoder, [text], "document")[0] for text in texts])
    assert_same(scored(encoder, texts, "document", columns=3), together)


def test_a_document_is_the_same_with_eager_attention(build: Callable[..., MultiVectorEncoder]) -> None:
    texts = [DOCUMENT, "cat", LONG_DOCUMENT]
    eager, sdpa = (
        scored(build("none", attention), texts, "document") for attention in (Attention.eager, Attention.sdpa)
    )
    assert_same(eager, sdpa)


def test_encode_gives_the_vectors_of_a_text_alone_whatever_it_is_batched_with(
    build: Callable[..., MultiVectorEncoder],
) -> None:
    encoder = build("fixed, unattended")
    texts = [DOCUMENT, LONG_DOCUMENT, "cat"]
    encoded = [torch.as_tensor(vectors) for vectors in encoder.encode_document(texts, batch_size=3)]
    assert_same(encoded, [scored(encoder, [text], "document")[0] for text in texts])


@pytest.mark.parametrize("architecture", ["bert"], indirect=True)
def test_padding_on_the_left_would_move_a_text_where_positions_are_absolute(
    build: Callable[..., MultiVectorEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build("none")
    alone = scored(encoder, [DOCUMENT], "document")[0]
    assert encoder.tokenizer.padding_side == "right"
    monkeypatch.setattr(encoder.tokenizer, "padding_side", "left")
    moved = scored(encoder, [DOCUMENT, LONG_DOCUMENT], "document")[0]
    assert (moved - alone).abs().max() > 1e-2
