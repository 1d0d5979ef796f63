"""What the benchmark of MaxSim compares, on which workloads, and how a contestant shows that its scores are right.

Ours, the Triton kernels of late-interaction-kernels (LIK) and of flash-maxsim (FM), torch.compile and eager PyTorch. A
rival is imported where it takes part, so that none need be installed.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses import maxsim

SCORES_LIMIT, GRADIENTS_LIMIT = 1e-3, 5e-3
# By name, the package.
CONTESTANTS = {
    "ours": "",
    "LIK": "late-interaction-kernels",
    "FM": "flash-maxsim",
    "torch.compile": "",
    "eager": "",
}
FORWARD, BOTH, WALL = "forward", "forward + backward", "forward, host clock"


@dataclass(frozen=True)
class Workload:
    name: str
    queries: int
    documents: int
    """Of each query, where they are its candidates."""
    query_tokens: int
    document_tokens: int
    candidates: bool = False
    mean_length: int | None = None
    """Scored tokens of a document, which come first; None = all."""
    holes: float = 0.0
    skewed: bool = False
    """One token of each document is close to most query tokens."""
    packed: bool = False
    embedding: int = 128

    @property
    def shape(self) -> str:
        return f"{self.queries} x {self.documents} x {self.query_tokens} x {self.document_tokens}"


# The shape that the goals are about.
TRAINING = functools.partial(Workload, queries=256, documents=512, query_tokens=32, document_tokens=300)
SMALL, PAGES = Workload("small", 32, 32, 32, 300), Workload("page images", 1, 1000, 1024, 1024)


def _both(*workloads: Workload) -> list[tuple[Workload, str]]:
    return [(workload, step) for workload in workloads for step in (FORWARD, BOTH)]


# What matters most comes first. Last, what a rival compiles for long: it unrolls 1024 query tokens.
PLAN = [
    *_both(TRAINING("training"), TRAINING("ragged", mean_length=80)),
    *_both(Workload("candidates", 32, 32, 32, 300, candidates=True), SMALL),
    (SMALL, WALL),
    *_both(Workload("large", 2048, 4096, 32, 300), Workload("long documents", 64, 128, 32, 2048)),
    (PAGES, FORWARD),
    *_both(Workload("long both", 256, 256, 128, 8192)),
    *_both(Workload("more candidates", 128, 32, 32, 300, candidates=True), TRAINING("skewed winners", skewed=True)),
    *_both(TRAINING("ragged, packed", mean_length=80, packed=True)),
    *_both(TRAINING("ragged, 10 % holes", mean_length=80, holes=0.1)),
    *_both(Workload("large, skewed", 2048, 4096, 32, 300, skewed=True)),
    (PAGES, BOTH),
]


@dataclass(frozen=True)
class Batch:
    """Vectors (Q, I, H) and (N, J, H), or (Q, K, J, H) for candidates, their masks, and a gradient of the scores."""

    queries: Tensor
    documents: Tensor
    query_mask: Tensor
    document_mask: Tensor
    gradient: Tensor

    def leaves(self, *, packed: bool, gradients: bool) -> tuple[Tensor, Tensor]:
        queries, documents = self.queries, self.documents
        if packed:
            queries, documents = queries.flatten(0, 1), documents[self.document_mask]
        return queries.detach().requires_grad_(gradients), documents.detach().requires_grad_(gradients)

    @property
    def flop(self) -> float:
        """Of the products with scored document tokens."""
        num_queries = 1 if self.documents.dim() == 4 else len(self.queries)
        return 2.0 * num_queries * self.queries.shape[1] * self.queries.shape[2] * self.document_mask.sum().item()


@dataclass(frozen=True)
class Entry:
    """One way of a contestant to compute the scores."""

    contestant: str
    variant: str
    score: Callable[[Tensor, Tensor], Tensor]
    packed: bool = False
    gated: bool = True
    """Whether it must pass the gate to be timed; plain PyTorch in bf16 rounds similarities, so its winners differ."""


def make_batch(workload: Workload, device: torch.device, dtype: torch.dtype) -> Batch:
    """Draw unit vectors and masks; the same workload gets the same."""
    draw = torch.Generator(device).manual_seed(0)
    shape = (workload.queries, workload.documents) if workload.candidates else (workload.documents,)
    queries = torch.randn(workload.queries, workload.query_tokens, workload.embedding, generator=draw, device=device)
    documents = torch.randn(*shape, workload.document_tokens, workload.embedding, generator=draw, device=device)
    mask = torch.ones(*shape, workload.document_tokens, dtype=torch.bool, device=device)
    if workload.mean_length is not None:
        spread = 0.6  # of the logarithm of the lengths
        normal = torch.randn(*shape, 1, generator=draw, device=device)
        lengths = torch.exp(normal * spread + math.log(workload.mean_length) - spread**2 / 2).round()
        mask = torch.arange(workload.document_tokens, device=device) < lengths.clamp(8, workload.document_tokens)
    if workload.holes:
        mask &= torch.rand(mask.shape, generator=draw, device=device) >= workload.holes
    if workload.skewed:
        hub = torch.randn(workload.embedding, generator=draw, device=device)
        most = torch.rand(*queries.shape[:2], 1, generator=draw, device=device) < 0.8
        queries = torch.where(most, queries + hub, queries)
        place = torch.randint(workload.document_tokens, (*shape, 1, 1), generator=draw, device=device)
        closest = (0.3 * documents[..., :1, :] + hub).expand(*shape, 1, workload.embedding)
        documents.scatter_(-2, place.expand_as(closest), closest)
    queries, documents = (torch.nn.functional.normalize(side, dim=-1).to(dtype) for side in (queries, documents))
    query_mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=device)
    gradient = torch.randn(workload.queries, workload.documents, generator=draw, device=device)
    return Batch(queries, documents, query_mask, mask, gradient)


def contestants(workload: Workload, batch: Batch, *, gradients: bool) -> tuple[list[Entry], dict[str, str]]:
    """Return what takes part, and for those that do not, why."""
    entries, absent = list(ours(workload, batch, "cuda")), dict[str, str]()
    if workload.holes:
        return entries, absent
    rivals: dict[str, Callable[..., Iterator[Entry]]] = {"LIK": late_interaction_kernels, "FM": flash_maxsim}
    for name, build in rivals.items():
        try:
            entries += build(workload, batch, gradients=gradients)
        except Exception as error:  # a rival that cannot be imported here
            missing = isinstance(error, ModuleNotFoundError) and error.name == CONTESTANTS[name].replace("-", "_")
            absent[name] = "not installed" if missing else first_line(error)
        if name not in absent and not any(entry.contestant == name for entry in entries):
            absent[name] = "has no packed layout for several queries"
    if not workload.packed:
        mask = batch.document_mask if workload.mean_length else None
        needed = 2 * batch.gradient.numel() * workload.query_tokens * workload.document_tokens
        if needed > torch.cuda.get_device_properties(batch.queries.device).total_memory:
            reason = f"not run: its similarities alone take {needed / 1e9:.0f} GB"
            return entries, absent | {"torch.compile": reason, "eager": reason}
        compiled = torch.compile(plain, dynamic=False)
        entries.append(Entry("torch.compile", "", functools.partial(compiled, mask=mask), gated=False))
        entries.append(Entry("eager", "", functools.partial(plain, mask=mask), gated=False))
    return entries, absent


def ours(workload: Workload, batch: Batch, backend: str) -> Iterator[Entry]:
    """Yield our own operator, padded or packed."""
    if workload.packed:
        query_offsets, document_offsets = token_offsets(batch.query_mask), token_offsets(batch.document_mask)

        def packed(queries: Tensor, documents: Tensor) -> Tensor:
            left = maxsim.Packed(queries, query_offsets, workload.query_tokens)
            right = maxsim.Packed(documents, document_offsets, workload.document_tokens)
            return maxsim.maxsim_packed(left, right, backend=backend)

        yield Entry("ours", "packed", packed, packed=True)
        return
    operator = maxsim.maxsim_candidates if workload.candidates else maxsim.maxsim
    masks = {"query_mask": batch.query_mask, "document_mask": batch.document_mask}
    yield Entry("ours", "", functools.partial(operator, **masks, backend=backend))


def late_interaction_kernels(workload: Workload, batch: Batch, *, gradients: bool) -> Iterator[Entry]:
    """Yield LIK: padded at each choice of backward, and packed wherever documents are ragged, with packing free."""
    module = importlib.import_module("late_interaction_kernels")
    if not workload.packed:
        mask = batch.document_mask if workload.mean_length else None
        for backward in ("auto", "unified", "lowmem") if gradients else ("auto",):
            yield Entry("LIK", backward, functools.partial(module.maxsim, d_mask=mask, backward=backward))
    if workload.mean_length and not workload.candidates:
        left, right = (token_offsets(mask).int() for mask in (batch.query_mask, batch.document_mask))
        lengths = {"max_seqlen_q": workload.query_tokens, "max_seqlen_d": workload.document_tokens}
        score = functools.partial(module.maxsim_varlen, cu_seqlens_q=left, cu_seqlens_d=right, **lengths)
        yield Entry("LIK", "varlen", score, packed=True)


def flash_maxsim(workload: Workload, batch: Batch, *, gradients: bool) -> Iterator[Entry]:
    """Yield FM: each public forward, or its training function at each FLASH_BWD_PATH."""
    module = importlib.import_module("flash_maxsim")
    if workload.packed:
        return
    lengths = batch.document_mask.sum(dim=-1).flatten().int() if workload.mean_length else None
    shared = not workload.candidates
    if gradients:

        def train(queries: Tensor, documents: Tensor, *, path: str) -> Tensor:
            os.environ["FLASH_BWD_PATH"] = path  # read by the backward that follows
            scores: Tensor = module.flash_maxsim_batched_train(queries, documents, shared, lengths)
            return scores

        # For candidates, atomic_unified and invgrid are atomic; the first of each list is what `auto` takes.
        for path in ("atomic_unified", "atomic", "invgrid", "sparse_dd") if shared else ("atomic", "sparse_dd"):
            yield Entry("FM", path, functools.partial(train, path=path))
        return
    yield Entry(
        "FM", "batched", functools.partial(module.flash_maxsim_batched, doc_lengths=lengths, shared_docs=shared)
    )
    if shared:
        yield Entry("FM", "persistent", functools.partial(module.flash_maxsim_persistent, doc_lengths=lengths))
    if workload.queries == 1 and shared:

        def split(queries: Tensor, documents: Tensor) -> Tensor:
            scores: Tensor = module.flash_maxsim(queries[0], documents, lengths, splitk=True)
            return scores[None]

        yield Entry("FM", "split", split)


def token_offsets(mask: Tensor) -> Tensor:
    """First token of each text when packed, and the end of the last."""
    return torch.nn.functional.pad(mask.sum(dim=-1).flatten().cumsum(0), (1, 0))


def plain(queries: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
    """Scores as one writes them in PyTorch: similarities in the type of the vectors, all at once in memory."""
    best = similarities(queries, documents, mask).max(dim=-1).values
    return best.sum(dim=-1, dtype=torch.promote_types(best.dtype, torch.float32))


def similarities(queries: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
    """(Q, N, I, J), for candidates (Q, K, I, J); -inf where a document token is masked."""
    letters = "qih,qkjh->qkij" if documents.dim() == 4 else "qih,njh->qnij"
    similarity = torch.einsum(letters, queries, documents)
    return similarity if mask is None else similarity.masked_fill(~mask[..., None, :], -math.inf)


@dataclass(frozen=True)
class Expected:
    """Scores and gradients in float64 of some queries against some documents, all others having no gradient."""

    pairs: tuple[Tensor, Tensor]
    scores: Tensor
    gradient: Tensor
    """Of all scores, in float32: zero outside of the pairs, and where rounding could choose another winner."""
    query_gradient: Tensor
    document_gradient: Tensor


def expect(batch: Batch) -> Expected:
    """Compute in float64 what is held against every contestant."""
    num_queries, num_documents = batch.gradient.shape
    tokens = batch.queries.shape[1] * batch.documents.shape[-2]
    most = max(1, 2**26 // tokens)  # pairs: half a gigabyte of similarities
    rows = _spread(num_queries, min(8, math.isqrt(most))).to(batch.gradient.device)
    columns = _spread(num_documents, min(16, most // len(rows))).to(batch.gradient.device)
    candidates = batch.documents.dim() == 4
    own = (rows[:, None], columns) if candidates else (columns,)
    queries = batch.queries[rows].double().requires_grad_()
    documents = batch.documents[own].double().requires_grad_()
    similarity = similarities(queries, documents, batch.document_mask[own])
    best = similarity.detach().topk(2, dim=-1).values
    close = (best[..., 0] - best[..., 1] < 1e-5).any(dim=-1)
    pairs = rows[:, None], columns
    gradient = torch.where(close, 0.0, batch.gradient[pairs])
    scores = similarity.amax(dim=-1).sum(dim=-1)
    query_gradient, document_gradient = torch.autograd.grad(scores, (queries, documents), gradient.double())
    full = torch.zeros_like(batch.gradient)
    full[pairs] = gradient
    return Expected(pairs, scores.detach(), full, query_gradient, document_gradient)


def gate(entry: Entry, batch: Batch, expected: Expected, *, gradients: bool) -> tuple[str | None, dict[str, Any]]:
    """Return what is wrong, if anything, and the errors relative to the largest score and the gradient's norm."""
    leaves = batch.leaves(packed=entry.packed, gradients=gradients)
    scores = entry.score(*leaves)
    if scores.shape != expected.gradient.shape:
        return f"wrong: scores of shape {tuple(scores.shape)}", {}
    difference = (scores.detach()[expected.pairs].double() - expected.scores).abs().max()
    errors = {"scores_error": (difference / expected.scores.abs().max()).item()}
    if gradients:
        left, right = torch.autograd.grad(scores, leaves, expected.gradient.to(scores.dtype))
        if entry.packed:
            left, right = padded(left, batch.query_mask), padded(right, batch.document_mask)
        rows, columns = expected.pairs
        own = expected.pairs if batch.documents.dim() == 4 else (columns,)
        errors["gradients_error"] = max(
            _distance(left.clone(), (rows[:, 0],), expected.query_gradient),
            _distance(right.clone(), own, expected.document_gradient),
            key=lambda error: math.inf if math.isnan(error) else error,
        )
    limits = {"scores_error": SCORES_LIMIT, "gradients_error": GRADIENTS_LIMIT}
    # `not <=`, so that NaN is wrong.
    wrong = [
        f"{name.removesuffix('_error')} off by {errors[name]:.1e}"
        for name in errors
        if not errors[name] <= limits[name]
    ]
    return (f"wrong: {', '.join(wrong)}" if wrong else None), errors


def padded(packed: Tensor, mask: Tensor) -> Tensor:
    """Packed vectors with the mask's shape: zero where it is False."""
    vectors = packed.new_zeros(*mask.shape, packed.shape[-1])
    vectors[mask] = packed
    return vectors


def _distance(found: Tensor, own: tuple[Tensor, ...], expected: Tensor) -> float:
    """Norm of the difference, relative; elements that are not `own` are expected to be zero, and are overwritten."""
    inside = torch.linalg.vector_norm(found[own].double() - expected)
    found[own] = 0
    outside = torch.linalg.vector_norm(found, dtype=torch.promote_types(found.dtype, torch.float32))
    return float(torch.hypot(inside, outside.double()) / torch.linalg.vector_norm(expected))


def _spread(size: int, wanted: int) -> Tensor:
    """So many places or fewer, the first and the last among them."""
    return torch.linspace(0, size - 1, max(1, min(size, wanted))).round().long()


def call(entry: Entry, batch: Batch, *, gradients: bool) -> Callable[[], object]:
    """Return what is timed."""
    leaves = batch.leaves(packed=entry.packed, gradients=gradients)

    def forward() -> object:
        with torch.no_grad():
            return entry.score(*leaves)

    def forward_backward() -> object:
        return torch.autograd.grad(entry.score(*leaves), leaves, batch.gradient)

    return forward_backward if gradients else forward


def memory(entry: Entry, batch: Batch) -> dict[str, int]:
    """Bytes of a forward and backward: the peak above the inputs, and what is kept between them besides the scores."""
    leaves = batch.leaves(packed=entry.packed, gradients=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = entry.score(*leaves)
    saved = torch.cuda.memory_allocated() - before - scores.numel() * scores.element_size()
    gradients = torch.autograd.grad(scores, leaves, batch.gradient)
    torch.cuda.synchronize()
    del gradients
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "saved_bytes": saved}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
