"""Texts in one row against the padded ones, on every architecture: vectors, gradients, and where it is refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.factory import build_encoder
from configs.schema import Config
from tests.checkpoints import ARCHITECTURES
from tests.trainer.made import chunked
from trainer import packing
from trainer.attention import use_own_attention
from trainer.data.tokens import TokenizedTexts
from trainer.encoding import encode_texts
from trainer.packing import first_position, pack, pack_texts, packing_obstacle

CPU = torch.device("cpu")
TEXTS = ["a cat.", "what", "a cat, a cat is a cat " * 4, "", "is it the animal", "a cat. " * 90]
CHUNK_TOKENS = 150  # several texts in most chunks, one alone in the last


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, make_config: Callable[..., Config]) -> MultiVectorEncoder:
    preset, fixture, length = ARCHITECTURES[request.param]
    folder: Path = request.getfixturevalue(fixture)
    keys = [f"backbone={preset}", f"backbone.name={folder}", "backbone.dropout=0", f"backbone.document_length={length}"]
    config = make_config("data=pairs", "data.path=prose.jsonl", "head=mlp_residual", *keys)
    torch.manual_seed(0)
    return build_encoder(config.backbone, config.head)


def forward(encoder: MultiVectorEncoder, texts: TokenizedTexts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Vectors, mask, and the gradients of a fixed random weight of each scored number."""
    encoder.zero_grad()
    vectors, mask = encode_texts(encoder, texts, CPU, task="document")
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    (vectors * weights).sum().backward()
    return vectors.detach(), mask, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def test_vectors_masks_and_gradients_are_those_of_padded_texts(architecture: MultiVectorEncoder) -> None:
    encoder = architecture.train()
    texts = chunked(encoder, TEXTS, "document", CHUNK_TOKENS)
    expected, expected_mask, expected_gradients = forward(encoder, texts)
    rows = pack_texts(texts, first_position(encoder))
    assert any(len(chunk["bounds"].lengths) > 2 for chunk in rows.chunks)
    assert rows.padded_tokens == rows.tokens < texts.padded_tokens
    assert use_own_attention(encoder)
    vectors, mask, gradients = forward(encoder, rows)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(vectors[mask], expected[mask], rtol=0, atol=2e-6)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * largest)
    assert packing_obstacle(encoder, texts, Accelerator(cpu=True)) is None


def test_positions_of_roberta_begin_behind_the_padding(architecture: MultiVectorEncoder) -> None:
    model: Any = architecture[0]
    is_roberta = model.model.config.model_type == "xlm-roberta"
    assert first_position(architecture) == (model.model.config.pad_token_id + 1 if is_roberta else 0)


def test_a_row_has_each_text_behind_the_other(encoder: MultiVectorEncoder) -> None:
    features = encoder.preprocess(["a cat", "fish", "what is it"], prompt="[D] ", task="document")
    lengths = features["attention_mask"].sum(dim=1).tolist()
    row = pack(features, first_position=2)
    ids = [ids[:length] for ids, length in zip(features["input_ids"], lengths, strict=True)]
    assert row["input_ids"].tolist() == [torch.cat(ids).tolist()]
    assert row["position_ids"].tolist() == [[2 + place for length in lengths for place in range(length)]]
    assert row["bounds"].lengths == lengths
    assert row["bounds"].offsets.tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert row["bounds"].longest == max(lengths)


def test_queries_that_are_filled_with_mask_tokens_stay_as_they_are(encoder: MultiVectorEncoder) -> None:
    texts = chunked(encoder, ["a cat", "what is it"], "query", 30)
    assert pack_texts(texts) == texts


def refused(encoder: MultiVectorEncoder) -> str:
    reason = packing_obstacle(encoder, chunked(encoder, TEXTS, "document", 1000), Accelerator(cpu=True))
    assert reason is not None
    return reason


def test_an_encoder_that_makes_other_vectors_of_a_row_gets_padded_texts(
    encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packing_obstacle(encoder, chunked(encoder, TEXTS, "document", 1000), Accelerator(cpu=True)) is None
    monkeypatch.setattr(packing, "first_position", lambda encoder: 1)
    assert refused(encoder) == "BertModel makes other vectors of texts in one row"
    assert encoder.training  # as it was


def test_an_encoder_that_does_not_pass_on_where_texts_end_gets_padded_texts(encoder: MultiVectorEncoder) -> None:
    transformer: Any = encoder[0]
    transformer.model_forward_params = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    assert refused(encoder).startswith("BertModel takes no texts in one row (Expected attn_mask dtype")


def test_an_encoder_that_fails_on_a_row_gets_padded_texts(
    encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer: Any = encoder[0]
    forward = transformer.model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if "bounds" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'bounds'\nand more")
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformer.model, "forward", fail)
    assert refused(encoder) == (
        "BertModel takes no texts in one row (forward() got an unexpected keyword argument 'bounds')"
    )


def test_another_attention_gets_padded_texts(encoder: MultiVectorEncoder) -> None:
    transformer: Any = encoder[0]
    transformer.model.set_attn_implementation("eager")
    assert refused(encoder) == "backbone.attention=eager has another attention than ours"


@pytest.mark.parametrize(
    ("precision", "shift", "refuses"), [("bf16", 1e-3, False), ("bf16", 0.5, True), ("no", 1e-3, True)]
)
def test_bfloat16_may_be_as_far_again_from_float32_as_padded_texts_are(
    precision: str, shift: float, refuses: bool, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, texts = Accelerator(cpu=True, mixed_precision=precision), chunked(encoder, TEXTS, "document", 1000)
    assert packing_obstacle(encoder, texts, accelerator) is None
    monkeypatch.setattr(packing, "pack", lambda chunk, first: pack(chunk, first) | {"shift": shift})
    with shifted(encoder):
        assert (packing_obstacle(encoder, texts, accelerator) is not None) == refuses


@contextmanager
def shifted(encoder: MultiVectorEncoder) -> Iterator[None]:
    """Add to the vectors what the features say, before they are normalised."""

    def add(module: Any, given: tuple[dict[str, Any], ...], output: dict[str, Any]) -> None:
        output["token_embeddings"][..., 0] += given[0].get("shift", 0.0)

    hook = encoder[0].register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
