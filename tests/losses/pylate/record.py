"""Record what PyLate's own losses return for small stored embeddings, in `values.json` beside this file.

By hand, in an environment of its own; no test needs PyLate:

    pip install pylate==1.6.0
    python tests/losses/pylate/record.py

`values.json` holds `versions` and `cases`; a case is `name`, `loss_class`, `arguments` (of its constructor), `queries`
(Q, I, H), `query_mask` (Q, I), `documents` (Q, K, J, H), `document_mask` (Q, K, J), `teacher_scores` (Q, K) or null,
and what PyLate made of them: `loss`, `query_gradient`, `document_gradient`. A query's first document is its positive.
All in float64. The gradients are those of the model's output, which PyLate's losses pass through F.normalize: they are
tangent to the unit sphere.
"""

import json
import platform
import re
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from pylate import losses
from torch import Tensor, nn

# Q queries, K documents of each query, I query tokens, J document tokens, H embedding size

VALUES = Path(__file__).with_name("values.json")
EMBEDDING_SIZE = 8

# "0" stands for padding or, with tokens behind it, for a word on PyLate's skiplist.
QUERY_MASK = [[token == "1" for token in query] for query in ("1111", "1110", "1100")]
DOCUMENT_MASK = [
    [[token == "1" for token in document] for document in documents]
    for documents in (("1111", "1110", "1011"), ("1100", "1111", "1110"), ("1110", "0111", "1111"))
]
TEACHER_SCORES = [[9.5, 4.25, -1.0], [3.0, 7.5, 2.25], [0.5, 0.25, 6.0]]


def main() -> None:
    queries = _draw_unit_vectors(3, 4, lean=1.0, seed=0)
    documents = _draw_unit_vectors(3, 3, 4, lean=1.0, seed=1)
    positives = documents[:, :1]
    opposed = _draw_unit_vectors(3, 3, 4, lean=-2.0, seed=5)
    _check_winners(queries, documents, winners_positive=True)
    _check_winners(queries, opposed, winners_positive=False)

    cases = [
        _record("in_batch", "Contrastive", {"temperature": 1.0}, queries, positives),
        _record("in_batch_sharp", "Contrastive", {"temperature": 0.05}, queries, positives),
        _record("negatives", "Contrastive", {"temperature": 1.0}, queries, documents),
        _record("negatives_sharp", "Contrastive", {"temperature": 0.05}, queries, documents),
        _record("distillation", "Distillation", {"normalize_scores": False}, queries, documents),
        _record("distillation_normalized", "Distillation", {"normalize_scores": True}, queries, documents),
        # PyLate sets masked similarities to 0, so here a masked token beats every token that counts.
        _record("padding_wins", "Contrastive", {"temperature": 1.0}, queries, opposed[:, :1]),
    ]
    versions = {package: version(package) for package in ("pylate", "sentence-transformers", "torch")}
    VALUES.write_text(_to_json({"versions": versions | {"python": platform.python_version()}, "cases": cases}))


def _draw_unit_vectors(*shape: int, lean: float, seed: int) -> Tensor:
    """Draw vectors of two decimals and length 1 that lean towards (1, ..., 1) or, with lean < 0, away from it."""
    drawn = torch.randn(100_000, EMBEDDING_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hundredths = (100 * F.normalize(drawn + lean, dim=-1)).round()
    # Rounding leaves about one in 150 at length 1.
    exact = hundredths[hundredths.square().sum(-1) == 100**2][: prod(shape)]
    return (exact / 100).view(*shape, EMBEDDING_SIZE)


def _check_winners(queries_QIH: Tensor, documents_QKJH: Tensor, *, winners_positive: bool) -> None:
    """Make sure that every maximum is clear, and that a masked similarity set to 0 never or always beats it."""
    similarity = torch.einsum("qih,nkjh->qinkj", queries_QIH, documents_QKJH)[torch.tensor(QUERY_MASK)]
    similarity = similarity.masked_fill(~torch.tensor(DOCUMENT_MASK), -torch.inf)
    first, second = similarity.topk(2).values.unbind(-1)
    assert torch.all(first - second > 1e-3)  # the same winner in float32
    assert torch.all(first > 0.01) if winners_positive else torch.all(first < -0.01)


class StoredEmbeddings(nn.Module):
    """Stand for PyLate's ColBERT: hand back the token embeddings that lie in the input."""

    skiplist: list[int] = []
    do_query_expansion = False  # with True, PyLate leaves the query mask out

    def forward(self, feature: dict[str, Tensor]) -> dict[str, Tensor]:
        return feature


def _record(
    name: str, loss_class: str, arguments: dict[str, float], queries_QIH: Tensor, documents_QKJH: Tensor
) -> dict[str, object]:
    """Run PyLate's loss forward and backward; return the case as `values.json` holds it."""
    queries = queries_QIH.clone().requires_grad_()
    documents = documents_QKJH.clone().requires_grad_()
    query_mask = torch.tensor(QUERY_MASK)
    document_mask = torch.tensor(DOCUMENT_MASK)[:, : documents.shape[1]]
    teacher_scores = torch.tensor(TEACHER_SCORES, dtype=torch.float64) if loss_class == "Distillation" else None

    features = [_to_feature(queries, query_mask)]
    if loss_class == "Distillation":
        features.append(_to_feature(documents.flatten(0, 1), document_mask.flatten(0, 1)))
    else:
        features.extend(map(_to_feature, documents.unbind(1), document_mask.unbind(1)))
    loss = getattr(losses, loss_class)(StoredEmbeddings(), **arguments)(features, teacher_scores)
    loss.backward()
    assert queries.grad is not None
    assert documents.grad is not None

    return {
        "name": name,
        "loss_class": loss_class,
        "arguments": arguments,
        "queries": queries.tolist(),
        "query_mask": query_mask.tolist(),
        "documents": documents.tolist(),
        "document_mask": document_mask.tolist(),
        "teacher_scores": None if teacher_scores is None else teacher_scores.tolist(),
        "loss": loss.item(),
        "query_gradient": queries.grad.tolist(),
        "document_gradient": documents.grad.tolist(),
    }


def _to_feature(embeddings: Tensor, mask: Tensor) -> dict[str, Tensor]:
    # The ids are read only to find words of the skiplist.
    return {"token_embeddings": embeddings, "attention_mask": mask, "input_ids": torch.zeros_like(mask).long()}


def _to_json(values: dict[str, object]) -> str:
    """Write one token's vector, or one text's mask, a line."""
    indented = json.dumps(values, indent=1)
    return re.sub(r"\[[^][{}]+\]", lambda row: "".join(row[0].split()), indented) + "\n"


if __name__ == "__main__":
    main()
