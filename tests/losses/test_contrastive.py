"""The contrastive term against a loop in Python's numbers, and against the loss of sentence-transformers."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, mean_colbert_scores
from torch import Tensor

from architectures.factory import build_encoder
from configs.schema import Config, Score
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.factory import build_loss
from tests.losses.batches import (
    as_features,
    assert_equal,
    assert_equal_to_theirs,
    averaged,
    contrastive,
    loop,
    loop_scores,
    make_batch,
    make_scores,
    make_their_encoder,
    own_documents,
    with_ids,
)
from tests.trainer.made import chunked
from trainer.data.batches import Batch
from trainer.data.order import Place
from trainer.encoding import encode_batch

# Documents of each query.
COUNTS = {
    "in-batch negatives": [1, 1, 1],
    "one negative each": [2, 2, 2],
    "unequal numbers of negatives": [3, 1, 2],
}


def make_term(
    *,
    temperature: float = 0.5,
    symmetric: bool = False,
    own_negatives: bool = True,
    mask_known_positives: bool = False,
    max_negative_ratio: float | None = None,
) -> ContrastiveLoss:
    return ContrastiveLoss(
        temperature=temperature,
        symmetric=symmetric,
        own_negatives=own_negatives,
        mask_known_positives=mask_known_positives,
        max_negative_ratio=max_negative_ratio,
    )


@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "symmetric"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_value_and_gradients_equal_the_loop(counts: list[int], temperature: float, symmetric: bool) -> None:
    batch = make_batch(counts)
    loss, facts = averaged(make_term(temperature=temperature, symmetric=symmetric))(make_scores(batch))
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=temperature, symmetric=symmetric)))
    assert facts == {}


def test_the_mean_score_is_over_the_scored_tokens_of_each_query() -> None:
    batch = make_batch([3, 1, 2])
    assert len(set(batch.query_mask.sum(dim=1).tolist())) > 1
    loss, _ = averaged(make_term())(make_scores(batch, kind=Score.mean_maxsim))
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5), kind=Score.mean_maxsim))


def test_without_own_negatives_a_query_meets_those_of_other_queries_alone() -> None:
    batch = make_batch([3, 1, 2])
    left_out = {(q, negative) for q, (_, *negatives) in enumerate(own_documents(batch)) for negative in negatives}
    assert len(left_out) == 3
    loss, facts = averaged(make_term(own_negatives=False))(make_scores(batch))
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5, left_out=left_out)))
    assert facts == {}


def share_positives(batch: EncodedBatch) -> tuple[EncodedBatch, set[tuple[int, int]], set[tuple[int, int]]]:
    """A batch in which queries 0 and 2 have the same positive, the second document of query 0 also answers query 1, and
    the third answers query 0 itself; and the pairs (query, document) to leave out for the one reason and the other."""
    (first, second, third), (positive_1,), (positive_2, _) = own_documents(batch)
    ids = list(range(21, 27))
    ids[positive_2] = ids[first]
    # 99 and 98 are in no batch. Each query's own positive is named among its answers, as the data names it.
    known = [[99, ids[third], ids[first]], [ids[positive_1], ids[second]], [98, ids[positive_2]]]
    return with_ids(batch, ids, known), {(0, positive_2), (2, first)}, {(0, third), (1, second)}


@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "symmetric"])
def test_the_positive_at_another_row_and_other_known_positives_are_left_out_and_counted(symmetric: bool) -> None:
    batch, same, known = share_positives(make_batch([3, 1, 2]))
    formula = contrastive(batch, temperature=0.5, symmetric=symmetric, left_out=same | known)
    loss, facts = averaged(make_term(symmetric=symmetric, mask_known_positives=True))(make_scores(batch))
    assert_equal(loss, batch, loop(batch, formula))
    # Two documents each, of three queries; a positive that stands again is also a known one, and counted once.
    assert {name: value.item() for name, value in facts.items()} == {
        "same_document_masked": pytest.approx(2 / 3),
        "known_positives_masked": pytest.approx(2 / 3),
    }


def test_known_positives_are_negatives_like_all_others_where_they_are_not_masked() -> None:
    batch, _, _ = share_positives(make_batch([3, 1, 2]))
    loss, facts = averaged(make_term(mask_known_positives=False))(make_scores(batch))
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5)))
    assert facts == {}


def test_nothing_is_masked_where_no_document_stands_twice_and_nothing_else_is_known() -> None:
    batch = make_batch([3, 1, 2])
    loss, facts = averaged(make_term(mask_known_positives=True))(make_scores(batch))
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5)))
    assert set(facts) == {"same_document_masked", "known_positives_masked"}
    assert not any(facts.values())


def find_above(batch: EncodedBatch, ratio: float, kind: Score = Score.maxsim) -> set[tuple[int, int]]:
    """Pairs of a query and a document other than its positive that scores above the ratio's share of it."""
    scores = loop_scores(batch, kind=kind)
    return {
        (q, n)
        for q, (positive, *_) in enumerate(own_documents(batch))
        for n, value in enumerate(scores[q])
        if n != positive and value.real > ratio * scores[q][positive].real
    }


@pytest.mark.parametrize("ratio", [0.8, 1.25])
@pytest.mark.parametrize("kind", Score)
@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "symmetric"])
def test_negatives_above_the_ratio_are_left_out_and_counted(symmetric: bool, kind: Score, ratio: float) -> None:
    batch = make_batch([3, 1, 2])
    left_out = find_above(batch, ratio, kind)
    assert 0 < len(left_out) < 15, "all or none of 3 x 6 - 3"
    formula = contrastive(batch, temperature=0.5, symmetric=symmetric, left_out=left_out)
    loss, facts = averaged(make_term(symmetric=symmetric, max_negative_ratio=ratio))(make_scores(batch, kind=kind))
    assert_equal(loss, batch, loop(batch, formula, kind=kind))
    assert set(facts) == {"above_ratio_masked"}
    assert facts["above_ratio_masked"].item() == pytest.approx(len(left_out) / 3)


def test_the_ratio_is_where_a_negative_begins_to_be_left_out() -> None:
    batch = make_batch([3, 1, 2])
    positive, negative, _ = own_documents(batch)[0]
    scores = loop_scores(batch)[0]
    share = scores[negative].real / scores[positive].real
    others = find_above(batch, share) - {(0, negative)}
    # The least above and below; the two scores are equal to 1e-15.
    for ratio, left_out in ((share * (1 - 1e-12), others | {(0, negative)}), (share * (1 + 1e-12), others)):
        loss, facts = averaged(make_term(max_negative_ratio=ratio))(make_scores(batch))
        assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5, left_out=left_out)))
        assert facts["above_ratio_masked"].item() == pytest.approx(len(left_out) / 3)


def test_what_several_rules_leave_out_is_counted_by_the_first() -> None:
    batch, same, known = share_positives(make_batch([3, 1, 2]))
    own = {(q, negative) for q, (_, *negatives) in enumerate(own_documents(batch)) for negative in negatives}
    above = find_above(batch, 0.6)
    assert above & same
    assert above & (known | own)
    rest = above - same - known - own
    assert rest
    loss, facts = averaged(make_term(own_negatives=False, mask_known_positives=True, max_negative_ratio=0.6))(
        make_scores(batch)
    )
    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=0.5, left_out=same | known | own | above)))
    assert {name: value.item() for name, value in facts.items()} == {
        "same_document_masked": pytest.approx(2 / 3),
        "known_positives_masked": pytest.approx(2 / 3),
        "above_ratio_masked": pytest.approx(len(rest) / 3),
    }


def test_a_query_that_is_left_no_negative_costs_nothing_and_gets_no_gradient() -> None:
    batch = make_batch([1, 1])
    batch = with_ids(batch, [7, 7], [[7], [7]])
    for symmetric in (False, True):
        loss, _ = averaged(make_term(mask_known_positives=True, symmetric=symmetric))(make_scores(batch))
        assert_equal(loss, batch, (0.0, torch.zeros_like(batch.queries), torch.zeros_like(batch.documents)))


def test_documents_that_all_score_the_same_cost_the_log_of_their_number() -> None:
    batch = make_batch([3, 2, 2])
    same = replace(
        batch,
        documents=batch.documents[:1].expand(7, -1, -1),
        document_mask=batch.document_mask[:1].expand(7, -1),
    )
    loss, _ = averaged(make_term(temperature=0.05))(make_scores(same))
    assert loss.item() == pytest.approx(math.log(7), rel=1e-12)


def test_bfloat16_vectors_give_a_float32_loss_of_the_same_value() -> None:
    half = make_batch([3, 2, 2], dtype=torch.bfloat16)
    loss, _ = averaged(make_term(temperature=0.05))(make_scores(half))
    assert loss.dtype == torch.float32
    # The loop reads the rounded vectors, so only float32 sums of at most 4 / 0.05 = 80 are between the two.
    assert loss.item() == pytest.approx(loop(half, contrastive(half, temperature=0.05))[0], abs=1e-4)


# What each of their scores is here.
THEIR_SCORES = {Score.maxsim: colbert_scores, Score.mean_maxsim: mean_colbert_scores}


@pytest.mark.parametrize("kind", THEIR_SCORES)
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3, 3]], ids=["pairs", "two negatives each"])
def test_equals_the_loss_of_sentence_transformers_on_the_same_vectors(counts: list[int], kind: Score) -> None:
    batch = make_batch(counts)
    theirs = MultiVectorMultipleNegativesRankingLoss(
        make_their_encoder(), scale=2.0, similarity_fct=THEIR_SCORES[kind]
    )(as_features(batch))
    ours, _ = averaged(make_term(temperature=0.5))(make_scores(batch, kind=kind))
    assert_equal_to_theirs(ours, theirs, batch)


QUERIES = ["what is a cat", "which animal barks", "a fish", "what swims"]
POSITIVES = ["the cat is an animal that meows", "a dog barks.", "the fish, that swims", "fish swims"]
NEGATIVES = [
    ["dog", "the dog is an animal", "a cat meows", "what"],
    ["a fish of the cat!", "which", "the animal that barks", "is it a dog or a cat"],
]


@pytest.mark.usefixtures("own_caches")
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("columns", [0, 2], ids=["pairs", "two negatives each"])
def test_equals_the_loss_of_sentence_transformers_in_value_and_in_every_gradient(
    columns: int, temperature: float, make_config: Callable[..., Config]
) -> None:
    config = make_config(f"loss.contrastive.temperature={temperature}")
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
    expected = take_parameter_gradients(encoder)

    documents = [text for texts in zip(POSITIVES, *negatives, strict=True) for text in texts]
    candidates = torch.arange(len(documents)).view(len(QUERIES), -1)
    batch = Batch(
        queries=chunked(encoder, QUERIES, "query", 24),
        documents=chunked(encoder, documents, "document", 24),
        candidates=candidates,
        teacher_scores=None,
        document_ids=torch.arange(1, len(documents) + 1),
        known_positives=candidates[:, :1] + 1,
        places=[Place(0, 0, row) for row in range(4)],
        share=1.0,
    )
    encoded = encode_batch(encoder, batch, torch.device("cpu"))
    ours, _ = averaged(build_loss(config.loss, width=encoded.queries.shape[-1], maxsim="reference"))(encoded)
    ours.backward()

    # Scores of up to 8 / temperature carry an error of 6e-8 of that, and so do the softmax and its gradient.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert len(expected) == len(list(encoder.parameters()))
    # Against the largest of all gradients: those of the keys' biases are 0 but for rounding.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in take_parameter_gradients(encoder).items():
        error = (gradient - expected[name]).abs().max() / largest
        assert error < 1e-5, f"{name}: {error}"


def take_parameter_gradients(encoder: MultiVectorEncoder) -> dict[str, Tensor]:
    """The gradient of every parameter that has one; none is left behind."""
    gradients = {
        name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None
    }
    encoder.zero_grad()
    return gradients
