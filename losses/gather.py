"""Token vectors of all processes, with the gradient that one process would have."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_texts(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the token vectors and masks of all processes, in their order, and where this one's texts begin.

    vectors: (N, J, H); mask: (N, J) bool; N and J may differ between processes, which pad to the widest. Every process
    must call it. With one process the tensors come back as they are.

    The gradient of a vector is the sum of what every process's loss gives it. Under DistributedDataParallel, which
    takes the mean of the processes, a loss weighted by the process's share of the queries times the number of
    processes therefore has the gradient of the mean over all queries; no other factor is due.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return vectors, mask, 0
    shape = torch.tensor(mask.shape, device=vectors.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    counts, widths = (column.tolist() for column in torch.stack(shapes).unbind(dim=1))
    missing = max(widths) - vectors.shape[1]
    gathered: Tensor = _GatherRows.apply(F.pad(vectors, (0, 0, 0, missing)), counts)
    # As bytes: not every backend carries booleans.
    masks = _all_gather(F.pad(mask, (0, missing)).to(torch.uint8), counts)
    return gathered, masks.bool(), sum(counts[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all processes; backward adds up what all processes have for this one's rows.

    Not `torch.distributed.nn.all_gather`: on gloo its gradient is wrong where the incoming one is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # float32 also where the vectors are half as wide: the sum over many processes would lose their last bits.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        parts = [_padded(part, max(ctx.counts)) for part in total.split(ctx.counts)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own[: ctx.counts[dist.get_rank()]].to(gradient.dtype), None


def _all_gather(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of all processes; counts: how many each has."""
    own = _padded(rows, max(counts))
    everyone = [torch.empty_like(own) for _ in counts]
    dist.all_gather(everyone, own)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


def _padded(rows: Tensor, count: int) -> Tensor:
    # Collectives take tensors of one shape.
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
