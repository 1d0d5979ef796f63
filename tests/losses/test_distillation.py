"""The distillation term against a loop in Python's numbers, and against the loss of sentence-transformers."""

import math
from dataclasses import replace

import pytest
import torch
from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss
from sentence_transformers.multi_vector_encoder.scoring import colbert_kd_scores, mean_colbert_kd_scores

from configs.schema import Score
from losses.distillation import DistillationLoss
from tests.losses.batches import (
    as_features,
    assert_equal,
    assert_equal_to_theirs,
    averaged,
    distillation,
    loop,
    make_batch,
    make_scores,
    make_their_encoder,
    take_gradients,
)

COUNTS = {"three documents each": [3, 3, 3], "unequal numbers of documents": [4, 1, 2]}


@pytest.mark.parametrize("kind", Score)
@pytest.mark.parametrize("min_max", [False, True], ids=["as they are", "min-max"])
@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.25)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_value_and_gradients_equal_the_loop(
    counts: list[int], student: float, teacher: float, min_max: bool, kind: Score
) -> None:
    batch = make_batch(counts)
    term = DistillationLoss(student_temperature=student, teacher_temperature=teacher, min_max=min_max)
    formula = distillation(batch, student_temperature=student, teacher_temperature=teacher, min_max=min_max)
    loss, facts = averaged(term)(make_scores(batch, pool=False, kind=kind))
    assert_equal(loss, batch, loop(batch, formula, kind=kind))
    assert facts == {}


def test_min_max_takes_the_ends_of_documents_that_exist_where_all_scores_are_negative() -> None:
    batch = make_batch([4, 1, 2])
    opposed = replace(
        batch,
        queries=batch.queries.detach().abs().requires_grad_(),
        documents=-batch.documents.detach().abs().requires_grad_(),
    )
    formula = distillation(opposed, student_temperature=0.5, teacher_temperature=2.0, min_max=True)
    scores = make_scores(opposed, pool=False)
    assert scores.own.max() < 0
    loss, _ = averaged(DistillationLoss(student_temperature=0.5, teacher_temperature=2.0, min_max=True))(scores)
    assert_equal(loss, opposed, loop(opposed, formula))


def test_a_student_that_agrees_with_its_teacher_up_to_a_constant_costs_nothing() -> None:
    batch = make_batch([4, 1, 2])
    own = make_scores(batch, pool=False).own.detach()
    # The teacher's logits are those of the student: 2 x own / 4 and own / 2.
    batch = replace(batch, teacher_scores=2 * own + torch.tensor([[3.0], [-7.0], [100.0]]))
    loss, _ = averaged(DistillationLoss(student_temperature=2.0, teacher_temperature=4.0, min_max=False))(
        make_scores(batch, pool=False)
    )
    # Logits of up to 25, whose last bit is 4e-15.
    assert abs(loss.item()) < 1e-14
    for gradient in take_gradients(loss, batch):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("min_max", [False, True], ids=["as they are", "min-max"])
def test_queries_with_one_document_cost_nothing_and_get_no_gradient(min_max: bool) -> None:
    batch = make_batch([1, 1])
    term = DistillationLoss(student_temperature=0.5, teacher_temperature=1.0, min_max=min_max)
    loss, _ = averaged(term)(make_scores(batch, pool=False))
    assert_equal(loss, batch, (0.0, torch.zeros_like(batch.queries), torch.zeros_like(batch.documents)))


def test_min_max_makes_equal_scores_a_uniform_distribution() -> None:
    batch = make_batch([3, 2])
    same = replace(
        batch,
        documents=batch.documents[:1].expand(5, -1, -1),
        document_mask=batch.document_mask[:1].expand(5, -1),
        teacher_scores=torch.tensor([[0.0, 0.0, 0.0], [math.log(3), 0.0, 5.0]]),
    )
    term = DistillationLoss(student_temperature=0.5, teacher_temperature=1.0, min_max=True)
    loss, _ = averaged(term)(make_scores(same, pool=False))
    # 3/4 and 1/4 against one half each; the first query's teacher is uniform, too.
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    # The teacher's scores are float32 here.
    assert loss.item() == pytest.approx(0.25 * divergence / 2, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in take_gradients(loss, batch))


@pytest.mark.parametrize("min_max", [False, True], ids=["as they are", "min-max"])
def test_a_teacher_that_is_sure_gives_a_finite_value_and_gradient_in_float32(min_max: bool) -> None:
    batch = make_batch([4, 1, 2], dtype=torch.float32)
    assert batch.teacher_scores is not None
    # exp(-1e4) is 0 in float32; 0 x log 0 is 0.
    batch = replace(batch, teacher_scores=1e4 * batch.teacher_scores.float())
    term = DistillationLoss(student_temperature=0.01, teacher_temperature=1.0, min_max=min_max)
    formula = distillation(batch, student_temperature=0.01, teacher_temperature=1.0, min_max=min_max)
    loss, _ = averaged(term)(make_scores(batch, pool=False))
    value, *gradients = loop(batch, formula)
    assert loss.dtype == torch.float32
    # Logits of up to 4 / 0.01 in float32.
    assert loss.item() == pytest.approx(value, rel=1e-5)
    for found, gradient in zip(take_gradients(loss, batch), gradients, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-6)


# What each of their scores is here.
THEIR_SCORES = {Score.maxsim: colbert_kd_scores, Score.mean_maxsim: mean_colbert_kd_scores}


@pytest.mark.parametrize("kind", THEIR_SCORES)
@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.5, 2.0)])
def test_equals_the_loss_of_sentence_transformers_on_the_same_vectors(
    student: float, teacher: float, kind: Score
) -> None:
    batch = make_batch([3, 3, 3])
    theirs = MultiVectorDistillKLDivLoss(
        make_their_encoder(),
        similarity_fct=THEIR_SCORES[kind],
        student_temperature=student,
        teacher_temperature=teacher,
    )(as_features(batch), batch.teacher_scores)
    ours, _ = averaged(DistillationLoss(student_temperature=student, teacher_temperature=teacher, min_max=False))(
        make_scores(batch, pool=False, kind=kind)
    )
    assert_equal_to_theirs(ours, theirs, batch)
