"""Losses over token vectors and masks: values that know no model."""

from collections.abc import Callable

from torch import Tensor

from configs.schema import LossConfig, LossName
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss

Loss = Callable[[EncodedBatch], Tensor]


def build_loss(config: LossConfig) -> Loss:
    """Return the loss that the config names; a new loss gets its line here."""
    match config.name:
        case LossName.contrastive:
            return ContrastiveLoss(temperature=config.temperature)
