"""The contrastive loss against a loop in Python floats, and against the loss of sentence-transformers."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from torch import Tensor

from architectures.factory import build_encoder
from configs.schema import Config
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.factory import build_loss
from trainer.data.batches import Batch, tokenize
from trainer.encoding import encode_batch


def make_batch(num_negatives: int, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> EncodedBatch:
    """Three queries of unit-length token vectors, their positives and some explicit negatives; holes in every mask."""
    generator = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(3, 4, 5, generator=generator, dtype=torch.float64), dim=-1)
    documents = F.normalize(torch.randn(3 + num_negatives, 6, 5, generator=generator, dtype=torch.float64), dim=-1)
    document_mask = torch.rand(3 + num_negatives, 6, generator=generator) > 0.3
    document_mask[:, 0] = True
    return EncodedBatch(
        queries=queries.to(dtype).requires_grad_(),
        query_mask=torch.rand(3, 4, generator=generator) > 0.3,
        documents=documents.to(dtype).requires_grad_(),
        document_mask=document_mask,
        positive_index=torch.arange(3),
    )


def loop_loss(batch: EncodedBatch, temperature: float) -> tuple[float, Tensor, Tensor]:
    """Loss and its gradients for queries and documents: MaxSim as a triple loop, the log-softmax by hand."""
    queries, documents = batch.queries.detach().double(), batch.documents.detach().double()
    query_gradient, document_gradient = torch.zeros_like(queries), torch.zeros_like(documents)
    loss = 0.0
    for q, query in enumerate(queries.tolist()):
        logits: list[float] = []
        winners: list[list[tuple[int, int]]] = []
        for n, document in enumerate(documents.tolist()):
            score, pairs = 0.0, []
            for i, query_token in enumerate(query):
                if batch.query_mask[q, i]:
                    similarities = [
                        (sum(a * b for a, b in zip(query_token, document_token, strict=True)), j)
                        for j, document_token in enumerate(document)
                        if batch.document_mask[n, j]
                    ]
                    best, j = max(similarities)
                    score += best
                    pairs.append((i, j))
            logits.append(score / temperature)
            winners.append(pairs)
        largest = max(logits)
        log_total = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
        positive = int(batch.positive_index[q])
        loss -= (logits[positive] - log_total) / len(queries)
        for n, logit in enumerate(logits):
            weight = (math.exp(logit - log_total) - (n == positive)) / temperature / len(queries)
            for i, j in winners[n]:
                query_gradient[q, i] += weight * documents[n, j]
                document_gradient[n, j] += weight * queries[q, i]
    return loss, query_gradient, document_gradient


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("num_negatives", [0, 4], ids=["in-batch negatives", "and explicit negatives"])
def test_value_and_gradients_equal_the_loop(num_negatives: int, temperature: float) -> None:
    batch = make_batch(num_negatives)
    value, query_gradient, document_gradient = loop_loss(batch, temperature)

    loss = ContrastiveLoss(temperature=temperature, maxsim="reference")(batch)
    loss.backward()

    # Both sides are float64: the default tolerance of 1e-7 is far above their rounding.
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(batch.queries.grad, query_gradient)
    torch.testing.assert_close(batch.documents.grad, document_gradient)


def test_the_positive_is_the_document_that_positive_index_names() -> None:
    batch = make_batch(2)
    order = torch.tensor([4, 2, 0, 3, 1])
    moved = EncodedBatch(
        queries=batch.queries,
        query_mask=batch.query_mask,
        documents=batch.documents[order],
        document_mask=batch.document_mask[order],
        positive_index=order.argsort()[:3],
    )
    loss = ContrastiveLoss(temperature=0.5, maxsim="reference")
    assert moved.positive_index.tolist() == [2, 4, 1]
    assert loss(moved).item() == pytest.approx(loss(batch).item(), rel=1e-12)


def test_documents_that_all_score_the_same_cost_the_log_of_their_number() -> None:
    batch = make_batch(4)
    same = EncodedBatch(
        queries=batch.queries,
        query_mask=batch.query_mask,
        documents=batch.documents[:1].expand(7, -1, -1),
        document_mask=batch.document_mask[:1].expand(7, -1),
        positive_index=batch.positive_index,
    )
    assert ContrastiveLoss(temperature=0.05, maxsim="reference")(same).item() == pytest.approx(math.log(7), rel=1e-12)


def test_bfloat16_vectors_give_a_float32_loss_of_the_same_value() -> None:
    half = make_batch(4, dtype=torch.bfloat16)
    loss = ContrastiveLoss(temperature=0.05, maxsim="reference")(half)
    assert loss.dtype == torch.float32
    # The loop reads the rounded vectors, so only float32 sums of at most 4 / 0.05 = 80 are between the two.
    assert loss.item() == pytest.approx(loop_loss(half, 0.05)[0], abs=1e-4)


def test_the_config_gives_the_loss_its_temperature(make_config: Callable[..., Config]) -> None:
    assert build_loss(make_config("loss.temperature=0.05").loss, maxsim="cuda") == ContrastiveLoss(
        temperature=0.05, maxsim="cuda"
    )


QUERIES = ["what is a cat", "which animal barks", "a fish", "what swims"]
POSITIVES = ["the cat is an animal that meows", "a dog barks.", "the fish, that swims", "fish swims"]
NEGATIVES = [
    ["dog", "the dog is an animal", "a cat meows", "what"],
    ["a fish of the cat!", "which", "the animal that barks", "is it a dog or a cat"],
]


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("columns", [0, 2], ids=["pairs", "two negatives each"])
def test_equals_the_loss_of_sentence_transformers_in_value_and_in_every_gradient(
    columns: int, temperature: float, make_config: Callable[..., Config]
) -> None:
    config = make_config()
    torch.manual_seed(0)
    # Without dropout; in float64, of which their scores and nothing else are rounded to float32.
    encoder = build_encoder(config.backbone, config.head).eval().double()
    negatives = NEGATIVES[:columns]

    sides = [("query", QUERIES), ("document", POSITIVES), *(("document", texts) for texts in negatives)]
    features = [
        encoder.preprocess(texts, prompt=encoder.prompts[task], task=task) | {"task": task} for task, texts in sides
    ]
    theirs = MultiVectorMultipleNegativesRankingLoss(encoder, scale=1 / temperature)(features)
    theirs.backward()
    expected = take_gradients(encoder)

    documents = [*POSITIVES, *(text for texts in zip(*negatives, strict=True) for text in texts)]
    batch = Batch(
        queries=tokenize(encoder, QUERIES, task="query", chunk_tokens=24),
        documents=tokenize(encoder, documents, task="document", chunk_tokens=24),
        rows=[0, 1, 2, 3],
        share=1.0,
    )
    ours = ContrastiveLoss(temperature=temperature, maxsim="reference")(
        encode_batch(encoder, batch, torch.device("cpu"))
    )
    ours.backward()

    # Scores of up to 8 / temperature carry an error of 6e-8 of that, and so do the softmax and its gradient.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert len(expected) == len(list(encoder.parameters()))
    # Against the largest of all gradients: those of the keys' biases are 0 but for rounding.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in take_gradients(encoder).items():
        error = (gradient - expected[name]).abs().max() / largest
        assert error < 1e-5, f"{name}: {error}"


def take_gradients(encoder: MultiVectorEncoder) -> dict[str, Tensor]:
    """The gradient of every parameter that has one; none is left behind."""
    gradients = {
        name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None
    }
    encoder.zero_grad()
    return gradients
