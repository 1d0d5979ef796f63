"""Encoding in chunks against one padded forward of all texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from architectures.factory import build_encoder
from configs.schema import Config
from losses.temperature import LearntTemperature
from tests.trainer.made import chunked
from trainer.data.batches import Batch
from trainer.data.order import Place
from trainer.data.tokens import Task
from trainer.encoding import TrainedModel, encode_batch, encode_texts

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
    encoder: MultiVectorEncoder, texts: list[str], task: Task, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    return encode_texts(encoder, chunked(encoder, texts, task, chunk_tokens), CPU, task=task)


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
    task: Task, chunk_tokens: int, encoder: MultiVectorEncoder
) -> None:
    encoder.eval()
    expected, expected_mask = whole_forward(encoder, TEXTS, task)
    vectors, mask = chunked_forward(encoder, TEXTS, task, chunk_tokens)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(vectors[mask], expected[mask], atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_chunks_give_the_gradients_of_one_padded_forward(
    task: Task, chunk_tokens: int, encoder: MultiVectorEncoder
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


def make_batch(
    encoder: MultiVectorEncoder, queries: list[str], documents: list[str], *, teacher_scores: Tensor | None
) -> Batch:
    """Three queries, of which the second has one document and each of the others two; numbers that tell apart."""
    return Batch(
        queries=chunked(encoder, queries, "query", 16),
        documents=chunked(encoder, documents, "document", 16),
        candidates=torch.tensor([[0, 1], [2, -1], [3, 4]]),
        teacher_scores=teacher_scores,
        document_ids=torch.tensor([11, 12, 2**62, 14, 15]),
        known_positives=torch.tensor([[11, 0], [2**62, 99], [14, 0]]),
        places=[Place(0, 0, row) for row in range(3)],
        share=1.0,
    )


def test_a_batch_is_encoded_in_the_order_of_its_texts(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    queries, documents = (
        ["a cat", "what barks", "fish"],
        ["the cat meows, a lot", "dog", "it swims", "no", "that is it"],
    )
    encoded = encode_batch(encoder, make_batch(encoder, queries, documents, teacher_scores=None), CPU)
    expected_queries, expected_query_mask = whole_forward(encoder, queries, "query")
    expected_documents, expected_document_mask = whole_forward(encoder, documents, "document")
    assert torch.equal(encoded.query_mask, expected_query_mask)
    assert torch.equal(encoded.document_mask, expected_document_mask)
    torch.testing.assert_close(
        encoded.queries[encoded.query_mask], expected_queries[expected_query_mask], atol=FLOAT32, rtol=FLOAT32
    )
    torch.testing.assert_close(
        encoded.documents[encoded.document_mask], expected_documents[expected_document_mask], atol=FLOAT32, rtol=FLOAT32
    )


@pytest.mark.parametrize("teacher_scores", [None, torch.tensor([[9.0, -3.0], [1.0, 0.0], [2.5, 2.0]])])
def test_whose_documents_they_are_and_what_a_teacher_says_is_passed_on(
    teacher_scores: Tensor | None, encoder: MultiVectorEncoder
) -> None:
    batch = make_batch(encoder, ["a", "b", "c"], ["d", "e", "f", "g", "h"], teacher_scores=teacher_scores)
    encoded = encode_batch(encoder, batch, CPU)
    for name in ("candidates", "document_ids", "known_positives"):
        passed_on, given = getattr(encoded, name), getattr(batch, name)
        assert passed_on.dtype == torch.int64, name
        assert torch.equal(passed_on, given), name
    if teacher_scores is None:
        assert encoded.teacher_scores is None
    else:
        assert encoded.teacher_scores is not None
        assert torch.equal(encoded.teacher_scores, teacher_scores)


def test_the_trained_model_encodes_as_its_encoder_and_has_what_the_loss_learns(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    learnt = nn.ModuleDict({"temperature": LearntTemperature(0.5, (0.1, 1.0))})
    model = TrainedModel(encoder, learnt)
    texts = chunked(encoder, TEXTS, "query", 30)
    for ours, theirs in zip(
        encode_texts(model, texts, CPU, task="query"), encode_texts(encoder, texts, CPU, task="query"), strict=True
    ):
        assert torch.equal(ours, theirs)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert parameters == {id(parameter) for parameter in (*encoder.parameters(), *learnt.parameters())}


def test_encoding_leaves_the_batch_as_it_was(encoder: MultiVectorEncoder) -> None:
    encoder.eval()
    texts = chunked(encoder, TEXTS, "document", 30)
    names = [set(chunk) for chunk in texts.chunks]
    first, first_mask = encode_texts(encoder, texts, CPU, task="document")
    second, second_mask = encode_texts(encoder, texts, CPU, task="document")
    assert [set(chunk) for chunk in texts.chunks] == names
    assert torch.equal(first, second)
    assert torch.equal(first_mask, second_mask)


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_padding_on_the_left_gives_the_vectors_of_one_padded_forward(
    task: Task, chunk_tokens: int, make_config: Callable[..., Config], tiny_bert: Path, tmp_path: Path
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
