"""The losses against what PyLate's own returned for the same vectors, recorded in pylate/values.json by record.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.distillation import DistillationLoss
from tests.losses.batches import averaged, contrastive, loop, make_scores

VALUES = Path(__file__).parent / "pylate" / "values.json"
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in json.loads(VALUES.read_text())["cases"]}


def make_leaves(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries (Q, I, H) and documents (Q, K, J, H), of which PyLate's gradients are."""
    queries, documents = (
        torch.tensor(case[side], dtype=torch.float64, requires_grad=True) for side in ("queries", "documents")
    )
    return queries, documents


def make_batch(case: dict[str, Any], queries: Tensor, documents: Tensor) -> EncodedBatch:
    """PyLate's losses pass what the model gives them through F.normalize."""
    candidates = torch.arange(documents.shape[0] * documents.shape[1]).view(documents.shape[:2])
    teacher = case["teacher_scores"]
    return EncodedBatch(
        queries=F.normalize(queries, dim=-1),
        query_mask=torch.tensor(case["query_mask"]),
        documents=F.normalize(documents, dim=-1).flatten(0, 1),
        document_mask=torch.tensor(case["document_mask"]).flatten(0, 1),
        candidates=candidates,
        teacher_scores=None if teacher is None else torch.tensor(teacher, dtype=torch.float64),
        document_ids=1 + candidates.flatten(),
        known_positives=1 + candidates[:, :1],
    )


def compute_loss(case: dict[str, Any], batch: EncodedBatch) -> Tensor:
    arguments = case["arguments"]
    if case["loss_class"] == "Distillation":
        term = DistillationLoss(student_temperature=1.0, teacher_temperature=1.0, min_max=arguments["normalize_scores"])
        return averaged(term)(make_scores(batch, pool=False, width=batch.queries.shape[-1]))[0]
    assert case["loss_class"] == "Contrastive"
    return averaged(make_contrastive(arguments["temperature"]))(make_scores(batch, width=batch.queries.shape[-1]))[0]


def make_contrastive(temperature: float) -> ContrastiveLoss:
    return ContrastiveLoss(
        temperature=temperature,
        symmetric=False,
        own_negatives=True,
        mask_known_positives=True,
        max_negative_ratio=None,
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "padding_wins"])
def test_value_and_gradients_equal_pylate_s(name: str) -> None:
    case = CASES[name]
    queries, documents = make_leaves(case)
    loss = compute_loss(case, make_batch(case, queries, documents))
    query_gradient, document_gradient = torch.autograd.grad(loss, [queries, documents])
    # Both are float64, of similarities added up in another order.
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    for found, expected in ((query_gradient, "query_gradient"), (document_gradient, "document_gradient")):
        torch.testing.assert_close(found, torch.tensor(case[expected], dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_padding_that_pylate_lets_win_does_not_win_here() -> None:
    case = CASES["padding_wins"]
    queries, documents = make_leaves(case)
    batch = make_batch(case, queries, documents)
    loss = compute_loss(case, batch)
    assert loss.item() == pytest.approx(loop(batch, contrastive(batch, temperature=1.0), width=8)[0], rel=1e-10)
    assert loss.item() == pytest.approx(1.06107, abs=1e-5)

    # PyLate's value follows from similarities of masked tokens that are 0 where all others are negative.
    similarity = torch.einsum("qih,njh->qnij", batch.queries, batch.documents)
    assert similarity[batch.query_mask[:, None, :, None] & batch.document_mask[:, None]].max() < 0
    scores = (similarity * batch.document_mask[:, None]).amax(dim=3).mul(batch.query_mask[:, None]).sum(dim=2)
    theirs = F.cross_entropy(scores, batch.candidates[:, 0])
    assert theirs.item() == pytest.approx(case["loss"], rel=1e-10)
    assert case["loss"] == pytest.approx(1.49739, abs=1e-5)
