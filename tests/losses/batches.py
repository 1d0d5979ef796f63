"""Batches of stored vectors, and what the losses must make of them: loops in Python's numbers, from the formulas.

A derivative of a formula is exact, without automatic differentiation: the imaginary part of its value a step of 1e-30i
aside (Squire and Trapp 1998), which takes nothing from the real part.

Q queries, N documents, K documents of the query that has most, I query tokens, J document tokens, H embedding size
"""

import cmath
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import (
    ContrastiveConfig,
    DistillationConfig,
    LossConfig,
    LossTerms,
    MarginMSEConfig,
    MatryoshkaConfig,
    Normalization,
    Score,
)
from losses.batch import EncodedBatch
from losses.scores import Scores, gather_pool, mean_over_tokens, score

STEP = 1e-30
SIZE = 6
"""Embedding size of every batch made here."""

Numbers = Sequence[Sequence[complex]]
"""Scores, Q x N."""
Formula = Callable[[Numbers], complex]
Value = TypeVar("Value")
Expected = tuple[float, Tensor, Tensor]
"""A value, and its gradients for queries and documents."""


def make_batch(
    counts: Sequence[int],
    *,
    seed: int = 1,
    query_tokens: int = 4,
    document_tokens: int = 6,
    dtype: torch.dtype = torch.float64,
) -> EncodedBatch:
    """Queries with counts[q] documents each, one query after the other; holes in every mask, no document twice.

    Where a query has fewer documents than another, its teacher scores are filled up with a number that would show.
    """
    generator = torch.Generator().manual_seed(seed)

    def texts(count: int, tokens: int) -> tuple[Tensor, Tensor]:
        vectors = torch.randn(count, tokens, SIZE, generator=generator, dtype=torch.float64)
        mask = torch.rand(count, tokens, generator=generator) > 0.3
        # One token of each text at least, and not always the first.
        mask[torch.arange(count), torch.arange(count) % tokens] = True
        return F.normalize(vectors, dim=-1).to(dtype).requires_grad_(), mask

    queries, query_mask = texts(len(counts), query_tokens)
    documents, document_mask = texts(sum(counts), document_tokens)
    rows = iter(range(sum(counts)))
    own = [[next(rows) for _ in range(count)] for count in counts]
    document_ids = torch.arange(11, 11 + sum(counts))
    teacher = 3 * torch.randn(len(counts), max(counts), generator=generator, dtype=torch.float64)
    candidates = table(own, fill=-1)
    return EncodedBatch(
        queries=queries,
        query_mask=query_mask,
        documents=documents,
        document_mask=document_mask,
        candidates=candidates,
        teacher_scores=teacher.masked_fill(candidates < 0, 1e3),
        document_ids=document_ids,
        known_positives=document_ids[candidates[:, :1]],
    )


def table(rows: Sequence[Sequence[int]], *, fill: int) -> Tensor:
    """Rows of different lengths, filled up."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def own_documents(batch: EncodedBatch) -> list[list[int]]:
    """The documents of each query, its positive first."""
    return [[row for row in rows if row >= 0] for rows in batch.candidates.tolist()]


def make_scores(batch: EncodedBatch, *, pool: bool = True, width: int = SIZE, kind: Score = Score.maxsim) -> Scores:
    """What a term reads."""
    found = score(batch, gather_pool(batch) if pool else None, width=width, maxsim_backend="reference")
    return found if kind is Score.maxsim else mean_over_tokens(found)


def make_loss_config(**terms: float) -> LossConfig:
    """A loss of these terms and weights, in which no other value is one that would change nothing."""
    return LossConfig(
        terms=LossTerms(**({"contrastive": 0.0, "distillation": 0.0, "margin_mse": 0.0} | terms)),
        contrastive=ContrastiveConfig(
            score=Score.maxsim,
            temperature=0.5,
            learn_temperature=True,
            temperature_bounds=[0.1, 2.0],
            symmetric=True,
            own_negatives=False,
            mask_known_positives=True,
            max_negative_ratio=1.25,
        ),
        distillation=DistillationConfig(
            score=Score.mean_maxsim,
            student_temperature=0.75,
            teacher_temperature=2.0,
            normalization=Normalization.min_max,
        ),
        margin_mse=MarginMSEConfig(score=Score.mean_maxsim, teacher_temperature=4.0),
        matryoshka=MatryoshkaConfig(widths=[], weights=[]),
    )


def take_gradients(loss: Tensor, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
    """Gradients for queries and documents; the graph can be used again."""
    queries, documents = torch.autograd.grad(loss, [batch.queries, batch.documents], retain_graph=True)
    return queries, documents


def assert_equal(loss: Tensor, batch: EncodedBatch, expected: Expected) -> None:
    """Value and gradients, each within some thousand roundings of float64."""
    value, *gradients = expected
    assert loss.dtype == torch.float64
    assert abs(loss.item() - value) <= 1e-12 + 1e-10 * abs(value), f"{loss.item()} is not {value}"
    for found, gradient in zip(take_gradients(loss, batch), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def loop(batch: EncodedBatch, formula: Formula, *, width: int = SIZE, kind: Score = Score.maxsim) -> Expected:
    """Value and gradients of a formula of the scores: of each score by a step, of a score by its winning tokens."""
    scores, winners = _score_all(batch, width, kind)
    queries, documents = _cut(batch.queries, width), _cut(batch.documents, width)
    query_gradient, document_gradient = torch.zeros_like(queries), torch.zeros_like(documents)
    for q, row in enumerate(scores):
        tokens = max(1, int(batch.query_mask[q].sum())) if kind is Score.mean_maxsim else 1
        for n in range(len(row)):
            stepped = [list(values) for values in scores]
            stepped[q][n] += STEP * 1j
            weight = formula(stepped).imag / STEP / tokens
            for i, j in winners[q][n]:
                query_gradient[q, i] += weight * documents[n, j]
                document_gradient[n, j] += weight * queries[q, i]
    return (
        formula(scores).real,
        _uncut(query_gradient, batch.queries),
        _uncut(document_gradient, batch.documents),
    )


def loop_scores(batch: EncodedBatch, *, width: int = SIZE, kind: Score = Score.maxsim) -> list[list[complex]]:
    """Every query's score of every document."""
    return _score_all(batch, width, kind)[0]


def add_up(*parts: tuple[float, Expected]) -> Expected:
    """The sum of what is expected, by weights."""
    return (
        math.fsum(weight * value for weight, (value, _, _) in parts),
        torch.stack([weight * gradient for weight, (_, gradient, _) in parts]).sum(dim=0),
        torch.stack([weight * gradient for weight, (_, _, gradient) in parts]).sum(dim=0),
    )


def contrastive(
    batch: EncodedBatch,
    *,
    temperature: complex,
    symmetric: bool = False,
    left_out: Collection[tuple[int, int]] = (),
    only: int | None = None,
) -> Formula:
    """Mean of -log softmax of each query's positive among the documents, those left out (query, document) aside; with
    symmetric, the mean of that and of the same for each positive's query among the queries. only: of one query."""
    positives = [documents[0] for documents in own_documents(batch)]

    def formula(scores: Numbers) -> complex:
        total = 0j
        for q, positive in _chosen(positives, only):
            among = [n for n in range(len(scores[q])) if (q, n) not in left_out]
            logits = [scores[q][n] / temperature for n in among]
            total -= log_softmax(logits)[among.index(positive)]
        if symmetric:
            for q, positive in _chosen(positives, only):
                among = [other for other in range(len(positives)) if (other, positive) not in left_out]
                logits = [scores[other][positive] / temperature for other in among]
                total -= log_softmax(logits)[among.index(q)]
            total /= 2
        return total / len(_chosen(positives, only))

    return formula


def distillation(
    batch: EncodedBatch,
    *,
    student_temperature: float,
    teacher_temperature: float,
    min_max: bool,
    only: int | None = None,
) -> Formula:
    """Mean of T_s^2 x sum p_t (log p_t - log p_s) over each query's own documents; only: of one query."""
    assert batch.teacher_scores is not None
    teacher = batch.teacher_scores.tolist()

    def formula(scores: Numbers) -> complex:
        total = 0j
        for q, documents in _chosen(own_documents(batch), only):
            student = [scores[q][n] for n in documents]
            if min_max:
                lowest, highest = min(student, key=_real), max(student, key=_real)
                student = [(value - lowest) / (highest - lowest + 1e-8) for value in student]
            log_student = log_softmax([value / student_temperature for value in student])
            log_teacher = log_softmax([value / teacher_temperature for value in teacher[q][: len(documents)]])
            for ours, theirs in zip(log_student, log_teacher, strict=True):
                total += cmath.exp(theirs) * (theirs - ours)
        return total / len(_chosen(scores, only)) * student_temperature**2

    return formula


def margin_mse(batch: EncodedBatch, *, teacher_temperature: float, only: int | None = None) -> Formula:
    """Mean over the queries of the mean over a query's margins of (student's - teacher's)^2; 0 without a margin. only:
    of one query."""
    assert batch.teacher_scores is not None
    teacher = batch.teacher_scores.tolist()

    def formula(scores: Numbers) -> complex:
        total = 0j
        for q, (positive, *others) in _chosen(own_documents(batch), only):
            errors = [
                scores[q][positive] - scores[q][other] - (teacher[q][0] - teacher[q][k]) / teacher_temperature
                for k, other in enumerate(others, start=1)
            ]
            total += sum(error**2 for error in errors) / max(1, len(errors))
        return total / len(_chosen(scores, only))

    return formula


def _chosen(values: Sequence[Value], only: int | None) -> list[tuple[int, Value]]:
    """What each query has, or one alone, with the query's number."""
    return list(enumerate(values)) if only is None else [(only, values[only])]


def log_softmax(values: Sequence[complex]) -> list[complex]:
    largest = max(value.real for value in values)
    log_total = largest + cmath.log(sum(cmath.exp(value - largest) for value in values))
    return [value - log_total for value in values]


class StoredEmbeddings(nn.Module):
    """Stand for an encoder of sentence-transformers: hand back the token embeddings that lie in the input."""

    def forward(self, features: dict[str, Any], task: str) -> dict[str, Any]:
        return features


def make_their_encoder() -> Any:
    """What their losses take for an encoder."""
    return StoredEmbeddings()


def as_features(batch: EncodedBatch) -> list[dict[str, Tensor]]:
    """The input of a loss of sentence-transformers: the queries, all positives, each further document of all."""
    columns = [
        {"token_embeddings": batch.documents[rows], "attention_mask": batch.document_mask[rows]}
        for rows in batch.candidates.unbind(dim=1)
    ]
    return [{"token_embeddings": batch.queries, "attention_mask": batch.query_mask}, *columns]


def assert_equal_to_theirs(ours: Tensor, theirs: Tensor, batch: EncodedBatch) -> None:
    """Value and gradients against the largest; sentence-transformers rounds its scores to float32, a step of 6e-8."""
    assert abs(ours.item() - theirs.item()) <= 1e-6 * abs(theirs.item()), f"{ours.item()} is not {theirs.item()}"
    for found, expected in zip(take_gradients(ours, batch), take_gradients(theirs, batch), strict=True):
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-6, error


def with_ids(
    batch: EncodedBatch, document_ids: Sequence[int], known_positives: Sequence[Sequence[int]]
) -> EncodedBatch:
    return replace(batch, document_ids=torch.tensor(document_ids), known_positives=table(known_positives, fill=0))


def _score_all(
    batch: EncodedBatch, width: int, kind: Score
) -> tuple[list[list[complex]], list[list[list[tuple[int, int]]]]]:
    """Scores Q x N and, for each, the pairs of a query token and the document token that it is nearest to."""
    queries, documents = _cut(batch.queries, width).tolist(), _cut(batch.documents, width).tolist()
    query_mask, document_mask = batch.query_mask.tolist(), batch.document_mask.tolist()
    scores: list[list[complex]] = []
    winners: list[list[list[tuple[int, int]]]] = []
    for q, query in enumerate(queries):
        scores.append([])
        winners.append([])
        for n, document in enumerate(documents):
            total, pairs = 0.0, []
            for i, query_token in enumerate(query):
                similarities = [
                    (sum(a * b for a, b in zip(query_token, document_token, strict=True)), j)
                    for j, document_token in enumerate(document)
                    if query_mask[q][i] and document_mask[n][j]
                ]
                if similarities:
                    best, j = max(similarities)
                    total += best
                    pairs.append((i, j))
            tokens = max(1, sum(query_mask[q])) if kind is Score.mean_maxsim else 1
            scores[-1].append(total / tokens)
            winners[-1].append(pairs)
    return scores, winners


def _cut(vectors: Tensor, width: int) -> Tensor:
    """The first components in float64, each vector divided by its length if it was longer."""
    part = vectors.detach().double()[..., :width].clone()
    if width < vectors.shape[-1]:
        for vector in part.view(-1, width):
            vector /= math.sqrt(sum(value**2 for value in vector.tolist()))
    return part


def _uncut(gradient: Tensor, vectors: Tensor) -> Tensor:
    """The gradient for a whole vector v, from that for its cut u = p / |p|: (g - (g . u) u) / |p|, 0 behind the cut."""
    width = gradient.shape[-1]
    if width == vectors.shape[-1]:
        return gradient
    whole = torch.zeros(vectors.shape, dtype=torch.float64)
    for row, g, vector in zip(
        whole.view(-1, whole.shape[-1]),
        gradient.view(-1, width),
        vectors.detach().double().reshape(-1, whole.shape[-1]),
        strict=True,
    ):
        part = vector[:width]
        length = math.sqrt(sum(value**2 for value in part.tolist()))
        row[:width] = (g - (g @ part) * part / length**2) / length
    return whole


def _real(value: complex) -> float:
    return value.real


def averaged(
    term: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
) -> Callable[[Any], tuple[Tensor, dict[str, Tensor]]]:
    """A term, or a whole loss, by the mean of its values, one a query: what is minimised."""

    def value(given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        values, facts = term(given)
        assert values.shape == (len((given.batch if isinstance(given, Scores) else given).queries),)
        return values.mean(), facts

    return value
