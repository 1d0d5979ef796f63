"""MaxSim, the late-interaction score, with one visible dispatch between its backends.

s(q, d) = sum over the scored tokens i of q of the maximum over the scored tokens j of d of <q_i, d_j>
(Khattab and Zaharia 2020, section 3.3).

A masked document token never wins, also when every similarity is negative; a masked query token adds nothing; a
document without a scored token scores 0 and gets no gradient. The gradient goes to the first of equal maxima. The same
inputs give the same bits, forward and backward.

Shapes: Q queries, N documents, B queries with K candidates each, I query tokens, J document tokens, H embedding size.
"""

import torch
from torch import Tensor

from losses.maxsim import reference

BACKENDS = ("auto", "cuda", "reference")


def choose_backend(choice: str) -> str:
    """Decide once which backend runs: the answer goes to every call and into the start-up table.

    Raises ValueError for `cuda` where the kernel cannot run.
    """
    if choice not in BACKENDS:
        raise ValueError(f"maxsim={choice} must be one of {', '.join(BACKENDS)}")
    if choice == "cuda":
        raise ValueError("maxsim=cuda: this version has no CUDA kernel; use maxsim=auto or maxsim=reference")
    return "reference"


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Score every query against every document.

    queries: (Q, I, H); documents: (N, J, H); masks: bool (Q, I) and (N, J), True = scored, any pattern.
    Returns (Q, N) in float32, in float64 for float64 inputs.
    Raises ValueError if a shape, a type or a device does not fit.
    """
    _check(queries, documents, query_mask, document_mask, document_dimensions=3)
    return reference.maxsim(queries, documents, query_mask, document_mask)


def maxsim_candidates(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Score each query against its own candidates.

    queries: (B, I, H); documents: (B, K, J, H); masks: bool (B, I) and (B, K, J), True = scored, any pattern.
    Returns (B, K) in float32, in float64 for float64 inputs.
    Raises ValueError if a shape, a type or a device does not fit.
    """
    _check(queries, documents, query_mask, document_mask, document_dimensions=4)
    if queries.shape[0] != documents.shape[0]:
        raise ValueError(f"{queries.shape[0]} queries, but candidates for {documents.shape[0]}")
    return reference.maxsim_candidates(queries, documents, query_mask, document_mask)


def _check(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, *, document_dimensions: int
) -> None:
    if queries.dim() != 3 or documents.dim() != document_dimensions:
        raise ValueError(
            f"queries must have 3 and documents {document_dimensions} dimensions; "
            f"got {tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    if queries.shape[-1] != documents.shape[-1]:
        raise ValueError(f"embedding sizes differ: queries {queries.shape[-1]}, documents {documents.shape[-1]}")
    for side, vectors, mask in (("query", queries, query_mask), ("document", documents, document_mask)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{side}_mask must be bool, got {mask.dtype}")
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(f"{side}_mask is {tuple(mask.shape)}, its vectors are {tuple(vectors.shape)}")
        if not vectors.is_floating_point():
            raise ValueError(f"{side} vectors must be floating point, got {vectors.dtype}")
    if queries.dtype != documents.dtype:
        raise ValueError(f"queries are {queries.dtype} and documents {documents.dtype}: they must be of one type")
    if len({tensor.device for tensor in (queries, documents, query_mask, document_mask)}) > 1:
        raise ValueError("queries, documents and masks must lie on one device")
