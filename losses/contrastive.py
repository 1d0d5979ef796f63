"""Contrastive term: each query's positive among the documents of all processes, in-batch and explicit negatives."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.gather import gather_rows
from losses.scores import Scores
from losses.temperature import LearntTemperature


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """Cross-entropy of each query's positive (InfoNCE; van den Oord et al. 2018, equation 4)."""

    temperature: float | LearntTemperature
    symmetric: bool
    """Take the mean with the cross-entropy of each positive's query among all queries."""
    own_negatives: bool
    """False leaves a query the explicit negatives of others alone, as Stanford's ColBERT does."""
    mask_known_positives: bool
    """Leave out the positive where it stands again, and whatever else the data names as an answer."""
    max_negative_ratio: float | None
    """Leave out negatives above this share of the positive's score."""

    def __call__(self, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value of each of this process's queries, (Q,), in nats, and the facts: what was left out, in
        documents a query, and a learnt temperature."""
        assert scores.pool is not None
        assert scores.of_pool is not None
        positive_Q = scores.pool.columns[:, 0]
        left_out_QM, facts = self._left_out(scores, positive_Q)
        temperature = self.temperature
        if isinstance(temperature, LearntTemperature):
            temperature = temperature()
            facts["temperature"] = temperature.detach()
        logits_QM = (scores.of_pool / temperature).masked_fill(left_out_QM, -math.inf)
        loss_Q = F.cross_entropy(logits_QM, positive_Q, reduction="none")
        if self.symmetric:
            loss_Q = (loss_Q + _other_direction(logits_QM, positive_Q)) / 2
        return loss_Q, facts

    def _left_out(self, scores: Scores, positive_Q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Which documents are no negatives of which query, (Q, M), and how many a query for each reason."""
        assert scores.pool is not None
        assert scores.of_pool is not None
        ids_M, columns_QK, of_pool_QM = scores.pool.ids, scores.pool.columns, scores.of_pool.detach()
        positive_Q1 = positive_Q.unsqueeze(1)
        none_QM = torch.zeros_like(of_pool_QM, dtype=torch.bool)
        reasons: list[tuple[str | None, Tensor]] = []
        if self.mask_known_positives:
            reasons.append(("same_document_masked", ids_M == ids_M[positive_Q1]))
            reasons.append(("known_positives_masked", _is_known(ids_M, scores.batch.known_positives)))
        if not self.own_negatives:
            # Where a query has fewer documents, its positive once more, which is kept anyway.
            own_QK = columns_QK.where(columns_QK >= 0, positive_Q1)
            reasons.append((None, none_QM.scatter(1, own_QK, True)))
        if self.max_negative_ratio is not None:
            limit_Q1 = self.max_negative_ratio * of_pool_QM.gather(1, positive_Q1)
            reasons.append(("above_ratio_masked", of_pool_QM > limit_Q1))
        negative_QM, facts = none_QM.scatter(1, positive_Q1, True).logical_not(), {}
        left_out_QM = none_QM
        for name, found_QM in reasons:
            if name is not None:
                facts[name] = (found_QM & negative_QM & ~left_out_QM).sum(dim=1).float().mean()
            left_out_QM = left_out_QM | (found_QM & negative_QM)
        return left_out_QM, facts


def _is_known(ids_M: Tensor, known_QP: Tensor) -> Tensor:
    """Whether a document is among a query's known positives, (Q, M), of which one query may have thousands."""
    sorted_M = ids_M.sort().values
    # Where the first of equal ids stands in the order; a known positive that is not here is put behind all.
    first_QP = torch.searchsorted(sorted_M, known_QP)
    is_here_QP = sorted_M[first_QP.clamp(max=len(ids_M) - 1)] == known_QP
    is_known_QM = torch.zeros(len(known_QP), len(ids_M) + 1, dtype=torch.bool, device=ids_M.device)
    is_known_QM.scatter_(1, first_QP.where(is_here_QP, len(ids_M)), True)
    return is_known_QM[:, torch.searchsorted(sorted_M, ids_M)]


def _other_direction(logits_QM: Tensor, positive_Q: Tensor) -> Tensor:
    """Cross-entropy of each own positive's query among the queries of all processes, (Q,).

    The scores exist, each at the process of its query: those of the positives are exchanged, not the vectors.
    """
    (columns,), _ = gather_rows(positive_Q)
    (logits,), first = gather_rows(logits_QM[:, columns])
    own = torch.arange(first, first + len(positive_Q), device=logits.device)
    return F.cross_entropy(logits[:, own].T, own, reduction="none")
