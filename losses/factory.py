"""From the config to the loss."""

from collections.abc import Callable

from torch import Tensor

from configs.schema import LossConfig, LossName
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss

Loss = Callable[[EncodedBatch], Tensor]


def build_loss(config: LossConfig, *, maxsim: str) -> Loss:
    """Return the loss that the config names, scored by the named MaxSim backend; a new loss gets its line here."""
    match config.name:
        case LossName.contrastive:
            return ContrastiveLoss(temperature=config.temperature, maxsim=maxsim)
