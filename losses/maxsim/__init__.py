"""MaxSim, the late-interaction score, with one visible dispatch between its backends.

s(q, d) = sum over the scored tokens i of q of the maximum over the scored tokens j of d of <q_i, d_j>
(Khattab and Zaharia 2020, section 3.3).

A masked document token never wins, also when every similarity is negative; a masked query token adds nothing; a
document without a scored token scores 0 and gets no gradient. The gradient goes to the first of equal maxima. The same
inputs give the same bits, forward and backward.

backend: `cuda`, the kernel, for bfloat16 and float16 vectors on GPUs from compute capability 8.0 on; `reference`, plain
PyTorch, for all; `auto`, the kernel where it can run. Under autocast the kernel gets what a matrix product would get.

Shapes: Q queries, N documents, B queries with K candidates each, I query tokens, J document tokens, H embedding size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.maxsim.kernels import obstacle as kernel_obstacle
from losses.maxsim.operator import BACKENDS, choose_backend

__all__ = [
    "BACKENDS",
    "Packed",
    "check_kernel",
    "choose_backend",
    "kernel_obstacle",
    "maxsim",
    "maxsim_candidates",
    "maxsim_packed",
]


@dataclass(frozen=True)
class Packed:
    """Token vectors of several texts, one text after the other, without padding. Every token is scored."""

    vectors: Tensor
    """(tokens, H)"""
    offsets: Tensor
    """(texts + 1) int64, rising: the first token of each text, and the end of the last. Checked on a CPU only: to look
    on a GPU would wait for it."""
    longest: int
    """Tokens of the longest text, or more; a text that is longer is cut there."""

    def pad(self) -> tuple[Tensor, Tensor]:
        """Return padded vectors (texts, longest, H) and their mask (texts, longest)."""
        places = self.offsets[:-1, None] + torch.arange(self.longest, device=self.offsets.device)
        mask = places < self.offsets[1:, None]
        tokens = self.vectors.shape[0]
        if not tokens:
            return self.vectors.new_zeros(*places.shape, self.vectors.shape[1]), mask
        # Places past the end repeat the last token; masked, it gets no gradient from there.
        return self.vectors[places.clamp(max=tokens - 1)], mask


def maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Score every query against every document.

    queries: (Q, I, H); documents: (N, J, H); masks: bool (Q, I) and (N, J), True = scored, any pattern.
    Returns (Q, N) in float32, in float64 for float64 inputs.
    Raises ValueError or TypeError if a shape, a type or a device does not fit, or the backend cannot run.
    """
    _check_padded(queries, documents, query_mask, document_mask, document_dimensions=3)
    chosen, dtype = _choose(backend, queries, (queries.shape[1], documents.shape[1]))
    return _score(chosen, queries.to(dtype), documents.to(dtype), (query_mask, document_mask), candidates=0)


def maxsim_candidates(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Score each query against its own candidates.

    queries: (B, I, H); documents: (B, K, J, H); masks: bool (B, I) and (B, K, J), True = scored, any pattern.
    Returns (B, K) in float32, in float64 for float64 inputs.
    Raises ValueError or TypeError if a shape, a type or a device does not fit, or the backend cannot run.
    """
    _check_padded(queries, documents, query_mask, document_mask, document_dimensions=4)
    if queries.shape[0] != documents.shape[0]:
        raise ValueError(f"{queries.shape[0]} queries, but candidates for {documents.shape[0]}")
    masks, candidates = (query_mask, document_mask.flatten(0, 1)), documents.shape[1]
    chosen, dtype = _choose(backend, queries, (queries.shape[1], documents.shape[2]))
    return _score(chosen, queries.to(dtype), documents.flatten(0, 1).to(dtype), masks, candidates=candidates)


def maxsim_packed(
    queries: Packed, documents: Packed, *, candidates: int | None = None, backend: str = "auto"
) -> Tensor:
    """Score packed queries against packed documents, all pairs, or each against `candidates` of its own, in order.

    Returns (Q, N), or (Q, candidates), in float32, in float64 for float64 inputs.
    Raises ValueError or TypeError if a shape, a type or a device does not fit, or the backend cannot run.
    """
    for side, packed in (("queries", queries), ("documents", documents)):
        _check_packed(side, packed)
    _check_vectors(queries.vectors, documents.vectors)
    num_queries, num_documents = queries.offsets.shape[0] - 1, documents.offsets.shape[0] - 1
    if candidates is not None and num_queries * candidates != num_documents:
        raise ValueError(f"{num_queries} queries with {candidates} candidates each, but {num_documents} documents")
    longest = queries.longest, documents.longest
    chosen, dtype = _choose(backend, queries.vectors, longest)
    if chosen == "reference":
        (left, left_mask), (right, right_mask) = queries.pad(), documents.pad()
        return _score(chosen, left, right, (left_mask, right_mask), candidates=candidates or 0)
    return _score(
        chosen,
        queries.vectors.to(dtype),
        documents.vectors.to(dtype),
        (None, None),
        offsets=(queries.offsets, documents.offsets),
        longest=longest,
        candidates=candidates or 0,
    )


def check_kernel(device: torch.device, dtype: torch.dtype, embedding_size: int) -> None:
    """Compile the kernel and hold it against the reference on a few texts with holes, in value and gradient.

    Raises RuntimeError where it does not compile, does not run, or does not agree.
    """
    # With this seed a token's two best similarities are 6e-5 apart or more, for every embedding size and both types, so
    # that no rounding changes a winner.
    generator = torch.Generator().manual_seed(4)
    queries = F.normalize(torch.randn(2, 20, embedding_size, generator=generator), dim=-1).to(device, dtype)
    documents = F.normalize(torch.randn(3, 150, embedding_size, generator=generator), dim=-1).to(device, dtype)
    query_mask = (torch.rand(2, 20, generator=generator) > 0.2).to(device)
    document_mask = (torch.rand(3, 150, generator=generator) > 0.2).to(device)
    weights = torch.randn(2, 3, generator=generator).to(device)

    def run(backend: str) -> list[Tensor]:
        # Equal vectors in both, float32 for the reference's gradients.
        kind = dtype if backend == "cuda" else torch.float32
        sides = [side.detach().to(kind).requires_grad_() for side in (queries, documents)]
        scores = maxsim(sides[0], sides[1], query_mask, document_mask, backend=backend)
        return [scores.detach(), *torch.autograd.grad((scores * weights).sum(), sides)]

    rounding = torch.finfo(dtype).eps
    for what, ours, theirs, tolerance in zip(
        ("scores", "gradients of queries", "gradients of documents"),
        run("cuda"),
        run("reference"),
        (1e-4, rounding, rounding),
        strict=True,
    ):
        error = (ours.float() - theirs).abs().max() / theirs.abs().max()
        if not error <= tolerance:
            raise RuntimeError(
                f"the MaxSim kernel does not agree with the reference on this device: {what} differ by {error:.1e} of "
                f"the largest, {tolerance:.1e} is allowed"
            )


def _choose(backend: str, vectors: Tensor, longest: tuple[int, int]) -> tuple[str, torch.dtype]:
    """Which backend scores, and the type of its vectors: under autocast the kernel's are cast, as for a product."""
    device, dtype = vectors.device, vectors.dtype
    cast = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    kernel_dtype = torch.get_autocast_dtype(device.type) if cast else dtype
    # sym_max: torch.compile would ask which side is longer, and compile again where that changes.
    chosen = choose_backend(
        backend,
        device=device,
        dtype=kernel_dtype,
        embedding_size=vectors.shape[-1],
        longest_text=torch.sym_max(*longest),
    )
    return chosen, kernel_dtype if chosen == "cuda" else dtype


def _score(
    backend: str,
    queries: Tensor,
    documents: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    *,
    candidates: int,
    offsets: tuple[Tensor | None, Tensor | None] = (None, None),
    longest: tuple[int, int] | None = None,
) -> Tensor:
    # Contiguous before the operator, which then saves no more than this one copy.
    queries, documents = queries.contiguous(), documents.contiguous()
    tokens = longest or (queries.shape[1], documents.shape[1])
    save = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    scores: Tensor = torch.ops.lateforge.maxsim(
        queries, documents, *masks, *offsets, *tokens, candidates, backend, save
    )[0]
    return scores


def _check_padded(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, *, document_dimensions: int
) -> None:
    if queries.dim() != 3 or documents.dim() != document_dimensions:
        raise ValueError(
            f"queries must have 3 and documents {document_dimensions} dimensions; "
            f"got {tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    _check_vectors(queries, documents)
    for side, vectors, mask in (("query", queries, query_mask), ("document", documents, document_mask)):
        if mask.dtype != torch.bool:
            raise TypeError(f"{side}_mask must be bool, got {mask.dtype}")
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(f"{side}_mask is {tuple(mask.shape)}, its vectors are {tuple(vectors.shape)}")
        if mask.device != vectors.device:
            raise ValueError(f"{side}_mask is on {mask.device}, its vectors are on {vectors.device}")


def _check_packed(side: str, packed: Packed) -> None:
    vectors, offsets = packed.vectors, packed.offsets
    if vectors.dim() != 2 or offsets.dim() != 1 or not offsets.shape[0]:
        raise ValueError(
            f"packed {side} must be (tokens, H) with offsets (texts + 1,); "
            f"got {tuple(vectors.shape)} and {tuple(offsets.shape)}"
        )
    if offsets.dtype != torch.int64:
        raise TypeError(f"the offsets of packed {side} must be int64, got {offsets.dtype}")
    if offsets.device != vectors.device:
        raise ValueError(f"the offsets of packed {side} are on {offsets.device}, the vectors on {vectors.device}")
    if packed.longest < 0:
        raise ValueError(f"longest={packed.longest} of packed {side} must be 0 or more tokens")
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets[0] < 0 or offsets[-1] > vectors.shape[0] or (offsets.diff() < 0).any():
        raise ValueError(f"the offsets of packed {side} must rise from 0 or more to {vectors.shape[0]} at most")


def _check_vectors(queries: Tensor, documents: Tensor) -> None:
    for side, vectors in (("query", queries), ("document", documents)):
        if not vectors.is_floating_point():
            raise TypeError(f"{side} vectors must be floating point, got {vectors.dtype}")
    if queries.shape[-1] != documents.shape[-1]:
        raise ValueError(f"embedding sizes differ: queries {queries.shape[-1]}, documents {documents.shape[-1]}")
    if queries.dtype != documents.dtype:
        raise TypeError(f"queries are {queries.dtype} and documents {documents.dtype}: they must be of one type")
    if queries.device != documents.device:
        raise ValueError(f"queries are on {queries.device} and documents on {documents.device}: put them on one")
