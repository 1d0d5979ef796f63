"""The scores that terms read, against a loop in Python's numbers."""

from dataclasses import replace

import pytest
import torch

from configs.schema import Score
from losses.scores import gather_pool
from tests.losses.batches import (
    SIZE,
    Formula,
    Numbers,
    assert_equal,
    loop,
    loop_scores,
    make_batch,
    make_scores,
    own_documents,
)

# Weights of each query's own documents, and of all documents.
OWN = torch.tensor([[0.5, -2.0, 1.5, 3.0], [1.0, 0.0, 0.0, 0.0], [-0.25, 0.75, 0.0, 0.0]], dtype=torch.float64)
ALL = torch.arange(-10.0, 11.0, dtype=torch.float64).view(3, 7)


@pytest.mark.parametrize("width", [SIZE, 3])
@pytest.mark.parametrize("kind", Score)
@pytest.mark.parametrize("pool", [True, False], ids=["all documents", "own documents"])
def test_each_query_s_own_documents_have_the_loop_s_scores_and_gradients(pool: bool, kind: Score, width: int) -> None:
    batch = make_batch([4, 1, 2])

    def formula(scores: Numbers) -> complex:
        return sum(
            (OWN[q, k].item() * scores[q][n] for q, own in enumerate(own_documents(batch)) for k, n in enumerate(own)),
            0j,
        )

    found = make_scores(batch, pool=pool, kind=kind, width=width)
    scores = loop_scores(batch, kind=kind, width=width)
    assert found.exists.tolist() == [[k < count for k in range(4)] for count in (4, 1, 2)]
    for q, own in enumerate(own_documents(batch)):
        assert found.own[q, : len(own)].tolist() == pytest.approx([scores[q][n].real for n in own], rel=1e-12)
    # No term reads, and none gives a gradient to, what is of no meaning.
    assert_equal((found.own * OWN).sum(), batch, loop(batch, formula, kind=kind, width=width))


@pytest.mark.parametrize("width", [SIZE, 3])
@pytest.mark.parametrize("kind", Score)
def test_all_documents_have_the_loop_s_scores_and_gradients(kind: Score, width: int) -> None:
    batch = make_batch([4, 1, 2])

    def formula(scores: Numbers) -> complex:
        return sum((ALL[q, n].item() * scores[q][n] for q in range(3) for n in range(7)), 0j)

    found = make_scores(batch, kind=kind, width=width)
    assert found.of_pool is not None
    assert_equal((found.of_pool * ALL).sum(), batch, loop(batch, formula, kind=kind, width=width))


def test_without_a_pool_there_are_no_other_documents() -> None:
    found = make_scores(make_batch([4, 1, 2]), pool=False, kind=Score.mean_maxsim)
    assert found.pool is None
    assert found.of_pool is None


def test_a_query_without_a_scored_token_scores_zero_by_either_score() -> None:
    batch = make_batch([2, 2])
    mask = batch.query_mask.clone()
    mask[1] = False
    batch = replace(batch, query_mask=mask)

    def formula_of(pairs: list[tuple[int, int]]) -> Formula:
        return lambda scores: sum((scores[q][n] for q, n in pairs), 0j)

    everything = formula_of([(q, n) for q in range(2) for n in range(4)])
    for kind in Score:
        found = make_scores(batch, kind=kind)
        assert found.of_pool is not None
        assert found.of_pool[1].tolist() == [0.0] * 4
        assert_equal(found.of_pool.sum(), batch, loop(batch, everything, kind=kind))


def test_in_one_process_the_pool_is_the_batch_s_own_documents() -> None:
    batch = make_batch([4, 1, 2])
    pool = gather_pool(batch)
    assert pool.documents is batch.documents
    assert pool.mask is batch.document_mask
    assert pool.ids is batch.document_ids
    assert torch.equal(pool.columns, batch.candidates)


def test_teacher_scores_have_the_type_of_the_student_s() -> None:
    batch = make_batch([4, 1, 2], dtype=torch.bfloat16)
    assert batch.teacher_scores is not None
    assert batch.teacher_scores.dtype == torch.float64
    # bfloat16 vectors have float32 scores.
    assert torch.equal(make_scores(batch).teacher, batch.teacher_scores.float())
