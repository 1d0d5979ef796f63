"""Vectors that are cut, and the whole loss at several widths, against loops in Python's numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import Score
from losses.contrastive import ContrastiveLoss
from losses.distillation import DistillationLoss
from losses.factory import Loss
from losses.margin_mse import MarginMSELoss
from losses.matryoshka import cut
from tests.losses.batches import (
    SIZE,
    add_up,
    assert_equal,
    averaged,
    contrastive,
    distillation,
    loop,
    make_batch,
    make_scores,
    margin_mse,
)


def make_loss(widths: dict[int, float]) -> Loss:
    return Loss(
        terms={
            "contrastive": ContrastiveLoss(
                temperature=0.5,
                symmetric=True,
                own_negatives=True,
                mask_known_positives=True,
                max_negative_ratio=None,
            ),
            "distillation": DistillationLoss(student_temperature=0.5, teacher_temperature=2.0, min_max=True),
            "margin_mse": MarginMSELoss(teacher_temperature=4.0),
        },
        weights={"contrastive": 0.5, "distillation": 2.0, "margin_mse": 0.25},
        reads={"contrastive": Score.maxsim, "distillation": Score.mean_maxsim, "margin_mse": Score.maxsim},
        widths=widths,
        learnt=nn.ModuleDict(),
        maxsim="reference",
    )


def test_a_cut_vector_has_the_first_components_at_unit_length_and_its_gradient_is_tangent() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(3, 4, SIZE, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
    weights = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    found = cut(vectors, 2)
    [gradients] = torch.autograd.grad((found * weights).sum(), [vectors])
    for vector, unit, gradient, weight in zip(
        vectors.view(-1, SIZE).tolist(),
        found.view(-1, 2).tolist(),
        gradients.view(-1, SIZE).tolist(),
        weights.view(-1, 2).tolist(),
        strict=True,
    ):
        length = math.hypot(*vector[:2])
        first, second = vector[0] / length, vector[1] / length
        assert unit == pytest.approx([first, second], rel=1e-14)
        # Only what is across the vector turns it.
        across = (weight[0] * -second + weight[1] * first) / length
        assert gradient == pytest.approx([across * -second, across * first, 0, 0, 0, 0], rel=1e-12, abs=1e-14)


def test_vectors_of_the_whole_width_come_back_as_they_are() -> None:
    vectors = torch.full((2, 3, SIZE), 2.0)
    assert cut(vectors, SIZE) is vectors


@pytest.mark.parametrize("pool", [True, False], ids=["all documents", "own documents"])
def test_the_scores_at_a_width_are_those_of_cut_vectors(pool: bool) -> None:
    batch = make_batch([4, 1, 2])
    formula = margin_mse(batch, teacher_temperature=4.0)
    for width in (5, 2, 1):
        loss, _ = averaged(MarginMSELoss(teacher_temperature=4.0))(make_scores(batch, pool=pool, width=width))
        assert_equal(loss, batch, loop(batch, formula, width=width))


def test_the_loss_is_the_weighted_sum_over_widths_of_the_weighted_sum_of_terms() -> None:
    batch = make_batch([3, 1, 2])
    loss, logged = averaged(make_loss({6: 1.0, 4: 0.75, 2: 0.125}))(batch)
    parts, values = [], {}
    for width, width_weight in ((6, 1.0), (4, 0.75), (2, 0.125)):
        for name, weight, formula, kind in (
            ("contrastive", 0.5, contrastive(batch, temperature=0.5, symmetric=True), Score.maxsim),
            (
                "distillation",
                2.0,
                distillation(batch, student_temperature=0.5, teacher_temperature=2.0, min_max=True),
                Score.mean_maxsim,
            ),
            ("margin_mse", 0.25, margin_mse(batch, teacher_temperature=4.0), Score.maxsim),
        ):
            expected = loop(batch, formula, width=width, kind=kind)
            parts.append((width_weight * weight, expected))
            values[f"{name}@{width}"] = expected[0]
    assert_equal(loss, batch, add_up(*parts))
    # Each term before its weights, and the facts of the widest.
    values |= {"same_document_masked": 0.0, "known_positives_masked": 0.0}
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(values, rel=1e-10, abs=1e-12)


def test_one_width_is_logged_without_its_number() -> None:
    batch = make_batch([3, 1, 2])
    assert set(make_loss({4: 1.0})(batch)[1]) == {
        "contrastive",
        "distillation",
        "margin_mse",
        "same_document_masked",
        "known_positives_masked",
    }


def test_the_facts_of_several_widths_are_those_of_the_widest() -> None:
    batch = make_batch([3, 1, 2])
    loss = make_loss({6: 1.0, 1: 1.0})
    term = ContrastiveLoss(
        temperature=0.5, symmetric=False, own_negatives=True, mask_known_positives=False, max_negative_ratio=0.8
    )
    loss.terms["contrastive"] = term
    found = {width: term(make_scores(batch, width=width))[1]["above_ratio_masked"].item() for width in (6, 1)}
    assert found[6] != found[1]
    assert loss(batch)[1]["above_ratio_masked"].item() == found[6]
