"""`lateforge::maxsim`, one torch operator over both backends, with its gradient and its shapes for torch.compile.

The backend is an argument, so that what was chosen once is what runs; `auto` is resolved from device, type and sizes
alone, the same for real tensors and for those that torch.compile traces with.
"""

from typing import Any

import torch
from torch import Tensor

from losses.maxsim import kernels, reference
from losses.maxsim.kernels import Index, Side

BACKENDS = ("auto", "cuda", "reference")

_INPUTS = (
    "Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, Tensor? query_offsets, "
    "Tensor? document_offsets, SymInt query_tokens, SymInt document_tokens, SymInt candidates, str backend"
)
torch.library.define("lateforge::maxsim", f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "lateforge::maxsim_backward",
    f"(Tensor gradient, {_INPUTS}, Tensor winners, Tensor counts, Tensor positions, bool query_wanted, "
    "bool document_wanted) -> (Tensor, Tensor)",
)


def choose_backend(
    choice: str, *, device: torch.device, dtype: torch.dtype, embedding_size: int, longest_text: int
) -> str:
    """Return `cuda` or `reference`: which backend scores vectors of this type on this device.

    longest_text: tokens of the longest query or document.
    Raises ValueError where `cuda` is asked for and cannot run.
    """
    if choice not in BACKENDS:
        raise ValueError(f"maxsim={choice} must be one of {', '.join(BACKENDS)}")
    if choice == "reference":
        return choice
    obstacle = kernels.obstacle(device, dtype, embedding_size, longest_text)
    if obstacle is None:
        return "cuda"
    if choice == "cuda":
        raise ValueError(f"maxsim=cuda: {obstacle}; or use maxsim=auto or maxsim=reference")
    return "reference"


def _forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_offsets: Tensor | None,
    document_offsets: Tensor | None,
    query_tokens: int,
    document_tokens: int,
    candidates: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = Side(queries, query_mask, query_offsets, query_tokens)
    right = Side(documents, document_mask, document_offsets, document_tokens)
    if _resolve(backend, left, right) == "cuda":
        scores, winners, index = kernels.forward(left, right, candidates, save=save)
        return scores, winners, *index
    assert query_mask is not None
    assert document_mask is not None
    scores, winners = reference.forward(queries, documents, query_mask, document_mask, candidates or None, save=save)
    scores = scores.view(left.texts, candidates or right.texts)
    return scores, winners, *_no_index(queries)


def _forward_shapes(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_offsets: Tensor | None,
    document_offsets: Tensor | None,
    query_tokens: int,
    document_tokens: int,
    candidates: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = Side(queries, query_mask, query_offsets, query_tokens)
    right = Side(documents, document_mask, document_offsets, document_tokens)
    if _resolve(backend, left, right) == "cuda":
        scores, winners, index = kernels.allocate_results(left, right, candidates, save=save)
        return scores, winners, *index
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = queries.new_empty(left.texts, candidates or right.texts, dtype=dtype)
    rows = query_tokens if candidates else left.texts * query_tokens
    return scores, queries.new_empty(right.texts if save else 0, rows, dtype=torch.int32), *_no_index(queries)


def _backward(
    gradient: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_offsets: Tensor | None,
    document_offsets: Tensor | None,
    query_tokens: int,
    document_tokens: int,
    candidates: int,
    backend: str,
    winners: Tensor,
    counts: Tensor,
    positions: Tensor,
    query_wanted: bool,
    document_wanted: bool,
) -> tuple[Tensor, Tensor]:
    left = Side(queries, query_mask, query_offsets, query_tokens)
    right = Side(documents, document_mask, document_offsets, document_tokens)
    if _resolve(backend, left, right) == "cuda":
        index = Index(counts, positions)
        found = kernels.backward(
            gradient, left, right, candidates, winners, index, wanted=(query_wanted, document_wanted)
        )
    else:
        assert query_mask is not None
        assert document_mask is not None
        if candidates:
            gradient = gradient.reshape(1, -1)
        found = reference.backward(gradient, queries, documents, query_mask, document_mask, winners, candidates or None)
    # An operator returns tensors: one without elements stands for what is not wanted.
    return (
        found[0] if query_wanted and found[0] is not None else queries.new_empty(0),
        found[1] if document_wanted and found[1] is not None else documents.new_empty(0),
    )


def _backward_shapes(gradient: Tensor, queries: Tensor, documents: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    query_wanted, document_wanted = others[-2:]
    return (
        torch.empty_like(queries) if query_wanted else queries.new_empty(0),
        torch.empty_like(documents) if document_wanted else documents.new_empty(0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, query_tokens, document_tokens, candidates, backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.sizes = query_tokens, document_tokens, candidates, backend


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, winners, counts, positions = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.lateforge.maxsim_backward(gradient, *tensors, *ctx.sizes, winners, counts, positions, *wanted)
    return *(found if needed else None for found, needed in zip(gradients, wanted, strict=True)), *[None] * 9


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("MaxSim has no second derivative")


def _resolve(backend: str, queries: Side, documents: Side) -> str:
    vectors = documents.vectors
    return choose_backend(
        backend,
        device=vectors.device,
        dtype=vectors.dtype,
        embedding_size=vectors.shape[-1],
        # torch.compile would ask which side is longer, and compile again where that changes.
        longest_text=torch.sym_max(queries.longest, documents.longest),
    )


def _no_index(vectors: Tensor) -> tuple[Tensor, Tensor]:
    return vectors.new_empty(0, dtype=torch.int32), vectors.new_empty(0, dtype=torch.int16)


torch.library.impl("lateforge::maxsim", "default", _forward)
torch.library.register_fake("lateforge::maxsim", _forward_shapes)
torch.library.register_autograd("lateforge::maxsim", _differentiate, setup_context=_save_for_backward)
torch.library.impl("lateforge::maxsim_backward", "default", _backward)
torch.library.register_fake("lateforge::maxsim_backward", _backward_shapes)
torch.library.register_autograd("lateforge::maxsim_backward", _refuse_second_derivative)
