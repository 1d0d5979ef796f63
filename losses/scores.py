"""The scores of a batch at one width, which all terms read: MaxSim runs once for them.

Q queries of this process, K documents of the query that has most, M documents of all processes.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from losses.batch import EncodedBatch
from losses.gather import gather_rows
from losses.matryoshka import cut
from losses.maxsim import maxsim, maxsim_candidates


@dataclass(frozen=True)
class Pool:
    """The documents of all processes, which a query is to tell its own from."""

    documents: Tensor
    """(M, J, H)"""
    mask: Tensor
    """(M, J) bool"""
    ids: Tensor
    """(M,)"""
    columns: Tensor
    """(Q, K): where each query's own documents stand, its positive first; -1 where it has fewer."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    batch: EncodedBatch
    own: Tensor
    """(Q, K): of each query's own documents, its positive first; of no meaning where `exists` is False."""
    pool: Pool | None
    """None where no term asks for it."""
    of_pool: Tensor | None
    """(Q, M)"""

    @property
    def exists(self) -> Tensor:
        """(Q, K) bool: whether the query has so many documents."""
        return self.batch.candidates >= 0

    @property
    def teacher(self) -> Tensor:
        """(Q, K): what the teacher gives each query's own documents."""
        assert self.batch.teacher_scores is not None, "checked before training"
        return self.batch.teacher_scores.to(self.own.dtype)


def gather_pool(batch: EncodedBatch) -> Pool:
    """Gather the documents of all processes. Every process must call it."""
    (documents, mask, ids), first = gather_rows(batch.documents, batch.document_mask, batch.document_ids)
    return Pool(documents, mask, ids, (batch.candidates + first).where(batch.candidates >= 0, -1))


def score(batch: EncodedBatch, pool: Pool | None, *, width: int, maxsim_backend: str) -> Scores:
    """Score each query against its own documents and, where there is a pool, all of it, at the first `width`
    components of the vectors."""
    queries = cut(batch.queries, width)
    if pool is not None:
        of_pool = maxsim(queries, cut(pool.documents, width), batch.query_mask, pool.mask, backend=maxsim_backend)
        own = of_pool.gather(1, pool.columns.clamp_min(0))
        return Scores(batch=batch, own=own, pool=pool, of_pool=of_pool)
    documents, mask = cut(batch.documents, width), batch.document_mask
    if batch.candidates.numel() == len(documents):  # as many of each query, in order: nothing to copy
        documents, mask = (tensor.unflatten(0, batch.candidates.shape) for tensor in (documents, mask))
    else:
        rows = batch.candidates.clamp_min(0)
        documents, mask = documents[rows], mask[rows]
    own = maxsim_candidates(queries, documents, batch.query_mask, mask, backend=maxsim_backend)
    return Scores(batch=batch, own=own, pool=None, of_pool=None)


def mean_over_tokens(scores: Scores) -> Scores:
    """The same over the number of scored tokens of each query (mean MaxSim)."""
    tokens = scores.batch.query_mask.sum(dim=1, keepdim=True).clamp_min(1)
    of_pool = None if scores.of_pool is None else scores.of_pool / tokens
    return replace(scores, own=scores.own / tokens, of_pool=of_pool)
