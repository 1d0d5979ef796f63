"""Contrastive loss with in-batch and explicit negatives."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from losses.batch import EncodedBatch
from losses.maxsim import maxsim


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """Mean cross-entropy of each query's positive among all documents of the batch (InfoNCE; van den Oord et al. 2018,
    equation 4, with MaxSim as the score)."""

    temperature: float

    def __call__(self, batch: EncodedBatch) -> Tensor:
        """Return the loss in nats, a float32 scalar."""
        scores_QN = maxsim(batch.queries, batch.documents, batch.query_mask, batch.document_mask)
        return F.cross_entropy(scores_QN / self.temperature, batch.positive_index)
