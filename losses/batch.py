"""What every loss gets: the token vectors of a batch, who answers whom, and what a teacher thinks of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What one process encodes: Q queries, N documents, K documents of the query that has most, I query tokens,
    J document tokens, H embedding size, P known positives of the query that has most."""

    queries: Tensor
    """(Q, I, H) unit-length."""
    query_mask: Tensor
    """(Q, I) bool, True = scored."""
    documents: Tensor
    """(N, J, H) unit-length: each query's own, its positive first, one query after the other."""
    document_mask: Tensor
    """(N, J) bool, True = scored."""
    candidates: Tensor
    """(Q, K) int64: the rows of each query's own documents; -1 where it has fewer."""
    teacher_scores: Tensor | None
    """(Q, K): what a teacher gives a query's own documents; None without a teacher."""
    document_ids: Tensor
    """(N,) int64 above 0: equal where two documents are the same."""
    known_positives: Tensor
    """(Q, P) int64: ids of all documents that the data names as answers to the query; 0 where there are fewer."""
