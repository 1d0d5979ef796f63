"""Encoding in chunks against one padded forward of all texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from architectures.factory import build_encoder
from configs.schema import Config
from trainer.data.batches import Batch, tokenize
from trainer.encoding import encode_batch, encode_texts

CPU = torch.device("cpu")
# float32 matrices of other shapes sum in another order.
FLOAT32 = 1e-5
TEXTS = ["the dog barks.", "what", "a cat meows, that swims", "fish", "is it the animal", "a", "which cat is a dog?"]
CHUNK_TOKENS = [1, 30, 1000]


def whole_forward(encoder: MultiVectorEncoder, texts: list[str], task: str) -> tuple[Tensor, Tensor]:
    """Vectors and scoring mask of all texts, padded to the longest, by the encoder's own preprocessing."""
    output = encoder(encoder.preprocess(texts, prompt=encoder.prompts[task], task=task), task=task)
    return output["token_embeddings"], output["attention_mask"].bool()


def chunked_forward(
    encoder: MultiVectorEncoder, texts: list[str], task: str, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    return encode_texts(encoder, tokenize(encoder, texts, task=task, chunk_tokens=chunk_tokens), CPU, task=task)


def scored_vectors(vectors: Tensor, mask: Tensor) -> list[Tensor]:
    return [text[scored] for text, scored in zip(vectors, mask, strict=True)]


def gradients(encoder: MultiVectorEncoder, vectors: list[Tensor]) -> dict[str, Tensor]:
    """Gradient of every parameter for a fixed random weight of every scored number."""
    generator = torch.Generator().manual_seed(3)
    encoder.zero_grad()
    weighted = [(tokens * torch.randn(tokens.shape, generator=generator)).sum() for tokens in vectors]
    torch.stack(weighted).sum().backward()
    return {
        name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_chunks_give_the_vectors_and_masks_of_one_padded_forward(
    task: str, chunk_tokens: int, encoder: MultiVectorEncoder
) -> None:
    encoder.eval()
    expected, expected_mask = whole_forward(encoder, TEXTS, task)
    vectors, mask = chunked_forward(encoder, TEXTS, task, chunk_tokens)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(vectors[mask], expected[mask], atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_chunks_give_the_gradients_of_one_padded_forward(
    task: str, chunk_tokens: int, encoder: MultiVectorEncoder
) -> None:
    encoder.eval()
    expected = gradients(encoder, scored_vectors(*whole_forward(encoder, TEXTS, task)))
    ours = gradients(encoder, scored_vectors(*chunked_forward(encoder, TEXTS, task, chunk_tokens)))
    assert len(ours) == len(list(encoder.parameters()))
    # Of sums over some 300 tokens, so against the largest of them.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * largest, rtol=0)


def test_expansion_is_scored_and_punctuation_of_documents_is_not(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    _, query_mask = chunked_forward(encoder, ["a.", "what is it"], "query", 1)
    _, document_mask = chunked_forward(encoder, ["a, cat.", "the dog barks"], "document", 1)
    assert query_mask.tolist() == [[True] * 8] * 2
    # [CLS] [D] a , cat . [SEP]
    assert document_mask.tolist() == [[True, True, True, False, True, False, True], [True] * 6 + [False]]


def test_a_batch_has_its_positives_in_the_order_of_its_queries(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    queries, documents = (
        ["a cat", "what barks", "fish"],
        ["the cat meows, a lot", "dog", "it swims", "no", "that is it"],
    )
    batch = Batch(
        queries=tokenize(encoder, queries, task="query", chunk_tokens=16),
        documents=tokenize(encoder, documents, task="document", chunk_tokens=16),
        rows=[0, 1, 2],
        share=1.0,
    )
    encoded = encode_batch(encoder, batch, CPU)
    expected_queries, expected_query_mask = whole_forward(encoder, queries, "query")
    expected_documents, expected_document_mask = whole_forward(encoder, documents, "document")
    assert encoded.positive_index.tolist() == [0, 1, 2]
    assert torch.equal(encoded.query_mask, expected_query_mask)
    assert torch.equal(encoded.document_mask, expected_document_mask)
    torch.testing.assert_close(
        encoded.queries[encoded.query_mask], expected_queries[expected_query_mask], atol=FLOAT32, rtol=FLOAT32
    )
    torch.testing.assert_close(
        encoded.documents[encoded.document_mask], expected_documents[expected_document_mask], atol=FLOAT32, rtol=FLOAT32
    )


def test_encoding_leaves_the_batch_as_it_was(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    texts = tokenize(encoder, TEXTS, task="document", chunk_tokens=30)
    names = [set(chunk) for chunk in texts.chunks]
    first, first_mask = encode_texts(encoder, texts, CPU, task="document")
    second, second_mask = encode_texts(encoder, texts, CPU, task="document")
    assert [set(chunk) for chunk in texts.chunks] == names
    assert torch.equal(first, second)
    assert torch.equal(first_mask, second_mask)


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_padding_on_the_left_gives_the_vectors_of_one_padded_forward(
    task: str, chunk_tokens: int, make_config: Callable[..., Config], tiny_bert: Path, tmp_path: Path
) -> None:
    # Rotary positions are relative, so where the padding stands cannot change a vector.
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    backbone = ModernBertModel(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    backbone.save_pretrained(tmp_path / "modern")
    tokenizer.save_pretrained(tmp_path / "modern")
    config = make_config(f"backbone.name={tmp_path}/modern")
    encoder = build_encoder(config.backbone, config.head).eval()
    encoder.tokenizer.padding_side = "left"

    expected = scored_vectors(*whole_forward(encoder, TEXTS, task))
    ours = scored_vectors(*chunked_forward(encoder, TEXTS, task, chunk_tokens))
    for vectors, others in zip(ours, expected, strict=True):
        torch.testing.assert_close(vectors, others, atol=FLOAT32, rtol=FLOAT32)
