"""Dropout on a CPU, four activations to a random number.

torch draws a number of its own for each activation, one after the other: with MiniLM's dropout that is an eighth of a
training step. Here 16 bits decide about each, so a share is rounded to 1/65536.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn

LEVELS = 2**16


def drop(values: Tensor, share: float) -> Tensor:
    """Put 0 in place of a share of the values, and scale the others up so that the mean stays."""
    return values * factors(values.numel(), share, values.dtype).view(values.shape)


def factors(count: int, share: float, dtype: torch.dtype) -> Tensor:
    """(count,): by what dropout multiplies that many activations."""
    dropped = round(share * LEVELS)
    if dropped == LEVELS:
        return torch.zeros(count, dtype=dtype)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[:count] >= dropped - LEVELS // 2
    return kept.to(dtype).mul_(LEVELS / (LEVELS - dropped))


class FastDropout(nn.Dropout):
    """What a Dropout becomes for the time of training."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training and self.p > 0 else input


@contextmanager
def fast_dropout(encoder: MultiVectorEncoder, device: torch.device) -> Iterator[None]:
    """Let an encoder that trains on a CPU drop activations by this file; attention does by `trainer.attention`."""
    dropping = (module for module in encoder.modules() if type(module) is nn.Dropout and module.p > 0)
    modules = list(dropping) if device.type == "cpu" else []
    try:
        for module in modules:
            module.__class__ = FastDropout
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Dropout
