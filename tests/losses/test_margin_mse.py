"""The margin-MSE term against a loop in Python's numbers, and against the loss of sentence-transformers."""

from dataclasses import replace

import pytest
import torch
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores_pairwise, mean_colbert_scores_pairwise

from configs.schema import Score
from losses.margin_mse import MarginMSELoss
from tests.losses.batches import (
    as_features,
    assert_equal,
    assert_equal_to_theirs,
    averaged,
    loop,
    make_batch,
    make_scores,
    make_their_encoder,
    margin_mse,
)

COUNTS = {
    "three documents each": [3, 3, 3],
    "unequal numbers of documents": [4, 3, 2],
    "a query without a margin": [4, 1, 2],
    "no margin at all": [1, 1],
}


@pytest.mark.parametrize("kind", Score)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_value_and_gradients_equal_the_loop(counts: list[int], temperature: float, kind: Score) -> None:
    batch = make_batch(counts)
    loss, facts = averaged(MarginMSELoss(teacher_temperature=temperature))(make_scores(batch, pool=False, kind=kind))
    assert_equal(loss, batch, loop(batch, margin_mse(batch, teacher_temperature=temperature), kind=kind))
    assert facts == {}


def test_a_constant_on_all_of_a_query_s_teacher_scores_changes_nothing() -> None:
    batch = make_batch([4, 1, 2])
    assert batch.teacher_scores is not None
    term = MarginMSELoss(teacher_temperature=2.0)
    moved = replace(batch, teacher_scores=batch.teacher_scores + torch.tensor([[3.0], [-7.0], [100.0]]))
    loss, _ = averaged(term)(make_scores(batch, pool=False))
    # The sums of numbers near 100 lose 1e-14.
    assert averaged(term)(make_scores(moved, pool=False))[0].item() == pytest.approx(loss.item(), rel=1e-12)


# What each of their scores is here.
THEIR_SCORES = {Score.maxsim: colbert_scores_pairwise, Score.mean_maxsim: mean_colbert_scores_pairwise}


@pytest.mark.parametrize("kind", THEIR_SCORES)
@pytest.mark.parametrize("counts", [[2, 2, 2], [4, 4, 4]], ids=["one margin each", "three margins each"])
def test_equals_the_loss_of_sentence_transformers_on_the_same_vectors(counts: list[int], kind: Score) -> None:
    batch = make_batch(counts)
    theirs = MultiVectorMarginMSELoss(make_their_encoder(), similarity_fct=THEIR_SCORES[kind])(
        as_features(batch), batch.teacher_scores
    )
    ours, _ = averaged(MarginMSELoss(teacher_temperature=1.0))(make_scores(batch, pool=False, kind=kind))
    assert_equal_to_theirs(ours, theirs, batch)
