"""What every loss gets: the token vectors of a batch and who answers whom."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What one process encodes: Q queries, N documents, I query tokens, J document tokens, H embedding size."""

    queries: Tensor
    """(Q, I, H)"""
    query_mask: Tensor
    """(Q, I) bool, True = scored."""
    documents: Tensor
    """(N, J, H): the positive of each query first, in the queries' order, then all explicit negatives."""
    document_mask: Tensor
    """(N, J) bool, True = scored."""
    positive_index: Tensor
    """(Q,) int64: the row of each query's positive among the documents."""
