"""Rows of all processes, with the gradient that one process would have."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_texts(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the token vectors (N, J, H) and masks (N, J) of all processes, and where this one's texts begin."""
    (all_vectors, all_masks), first = gather_rows(vectors, mask)
    return all_vectors, all_masks, first


def gather_rows(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """Return the rows of all processes, in their order, of each tensor, and where this process's rows begin.

    tensors: (N, ...) of one N each; N and the second dimension may differ between processes, which fill it up with
    zeros to the widest. Every process must call it. With one process the tensors come back as they are.

    The gradient of a row is the sum of what every process's loss gives it. Under DistributedDataParallel, which takes
    the mean of the processes, a loss weighted by the process's share of the queries times the number of processes
    therefore has the gradient of the mean over all queries; no other factor is due.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(tensors), 0
    shape = torch.tensor([len(tensors[0]), *map(_width, tensors)], device=tensors[0].device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    counts, *widths = torch.stack(shapes, dim=1).tolist()
    gathered = []
    for tensor, width in zip(tensors, widths, strict=True):
        missing = max(width) - _width(tensor)
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) if missing else tensor
        # As bytes: not every backend carries booleans.
        rows = padded.to(torch.uint8) if tensor.dtype == torch.bool else padded
        gathered.append(_GatherRows.apply(rows, counts).to(tensor.dtype))
    return gathered, sum(counts[: dist.get_rank()])


def _width(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.dim() > 1 else 0


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all processes; backward adds up what all processes have for this one's rows.

    Not `torch.distributed.nn.all_gather`: on gloo its gradient is wrong where the incoming one is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        own = _padded(rows, max(counts))
        everyone = [torch.empty_like(own) for _ in counts]
        dist.all_gather(everyone, own)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # float32 also where the vectors are half as wide: the sum over many processes would lose their last bits.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        parts = [_padded(part, max(ctx.counts)) for part in total.split(ctx.counts)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own[: ctx.counts[dist.get_rank()]].to(gradient.dtype), None


def _padded(rows: Tensor, count: int) -> Tensor:
    # Collectives take tensors of one shape.
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
