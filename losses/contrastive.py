"""Contrastive loss with in-batch and explicit negatives, those of all processes included."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from losses.batch import EncodedBatch
from losses.gather import gather_texts
from losses.maxsim import maxsim


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """Mean cross-entropy of each query's positive among the documents of all processes (InfoNCE; van den Oord et al.
    2018, equation 4, with MaxSim as the score)."""

    temperature: float
    maxsim: str
    """The MaxSim backend that scores."""

    def __call__(self, batch: EncodedBatch) -> Tensor:
        """Return the mean over the batch's own queries in nats, a float32 scalar."""
        documents, document_mask, first = gather_texts(batch.documents, batch.document_mask)
        scores_QN = maxsim(batch.queries, documents, batch.query_mask, document_mask, backend=self.maxsim)
        return F.cross_entropy(scores_QN / self.temperature, first + batch.positive_index)
