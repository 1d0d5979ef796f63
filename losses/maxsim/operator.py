"""`lateforge::maxsim`, one torch operator over both backends, with its gradient and its shapes for torch.compile.

The backend is an argument, so that what was chosen is what runs.
"""

from typing import Any

import torch
from torch import Tensor, library

from losses.maxsim import kernels, reference
from losses.maxsim.kernels import Index, Side

BACKENDS = ("auto", "cuda", "reference")

# SymInt and not int: torch.compile would make a constant of a size.
_INPUTS = (
    "Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, Tensor? query_offsets, "
    "Tensor? document_offsets, SymInt query_tokens, SymInt document_tokens, SymInt candidates, str backend"
)
library.define("lateforge::maxsim", f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
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


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, candidates, backend, save = inputs
    queries, documents = _sides(*tensors)
    if backend == "cuda":
        scores, winners, index = kernels.forward(queries, documents, candidates, save=save)
        return scores, winners, *index
    vectors_and_masks: tuple[Tensor, Tensor, Tensor, Tensor] = tuple(tensors[:4])
    scores, winners = reference.forward(*vectors_and_masks, candidates or None, save=save)
    return scores.view(queries.texts, candidates or documents.texts), winners, *_no_index(queries)


def _forward_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, candidates, backend, save = inputs
    queries, documents = _sides(*tensors)
    if backend == "cuda":
        scores, winners, index = kernels.allocate_results(queries, documents, candidates, save=save)
        return scores, winners, *index
    dtype = torch.float64 if queries.vectors.dtype == torch.float64 else torch.float32
    scores = queries.vectors.new_empty(queries.texts, candidates or documents.texts, dtype=dtype)
    rows = queries.longest if candidates else queries.texts * queries.longest
    winners = queries.vectors.new_empty(documents.texts if save else 0, rows, dtype=torch.int32)
    return scores, winners, *_no_index(queries)


def _backward(gradient: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *tensors, candidates, backend, winners, counts, positions, query_wanted, document_wanted = inputs
    queries, documents = _sides(*tensors)
    wanted, index = (query_wanted, document_wanted), Index(counts, positions)
    found: tuple[Tensor | None, Tensor | None]
    if backend == "cuda":
        found = kernels.backward(gradient, queries, documents, candidates, winners, index, wanted=wanted)
    else:
        gradient = gradient.reshape(1, -1) if candidates else gradient
        vectors_and_masks: tuple[Tensor, Tensor, Tensor, Tensor] = tuple(tensors[:4])
        found = reference.backward(gradient, *vectors_and_masks, winners, candidates or None)
    # An operator returns tensors: one without elements stands for what is not wanted.
    left, right = (
        one if one is not None and needed else side.vectors.new_empty(0)
        for one, needed, side in zip(found, wanted, (queries, documents), strict=True)
    )
    return left, right


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


def _sides(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_offsets: Tensor | None,
    document_offsets: Tensor | None,
    query_tokens: int,
    document_tokens: int,
) -> tuple[Side, Side]:
    return (
        Side(queries, query_mask, query_offsets, query_tokens),
        Side(documents, document_mask, document_offsets, document_tokens),
    )


def _no_index(side: Side) -> tuple[Tensor, Tensor]:
    return side.vectors.new_empty(0, dtype=torch.int32), side.vectors.new_empty(0, dtype=torch.int16)


library.impl("lateforge::maxsim", "default", _forward)
library.register_fake("lateforge::maxsim", _forward_shapes)
library.register_autograd("lateforge::maxsim", _differentiate, setup_context=_save_for_backward)
library.impl("lateforge::maxsim_backward", "default", _backward)
library.register_fake("lateforge::maxsim_backward", _backward_shapes)
library.register_autograd("lateforge::maxsim_backward", _refuse_second_derivative)
