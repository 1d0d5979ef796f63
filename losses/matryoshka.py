"""Vectors that can be cut: the first components of each, at unit length again (Kusupati et al. 2022, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def cut(vectors: Tensor, width: int) -> Tensor:
    """Return the first `width` components of unit-length vectors (..., H), at unit length; all of them as they are."""
    return vectors if width == vectors.shape[-1] else F.normalize(vectors[..., :width], dim=-1)
