"""Distillation term: a teacher's distribution over each query's own documents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.scores import Scores


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """KL divergence of the student's softmax from the teacher's, times the student's temperature squared, which
    keeps the gradient's size (Hinton et al. 2015, section 2)."""

    student_temperature: float
    teacher_temperature: float
    min_max: bool
    """Bring the student's scores of a query to between 0 and 1 first, gradient through both ends, as PyLate does."""

    def __call__(self, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value of each of this process's queries, (Q,), in nats."""
        student_QK, exists_QK = scores.own, scores.exists
        if self.min_max:
            student_QK = _min_max(student_QK, exists_QK)
        student_QK = _log_softmax(student_QK / self.student_temperature, exists_QK)
        teacher_QK = _log_softmax(scores.teacher / self.teacher_temperature, exists_QK)
        divergence_Q = F.kl_div(student_QK, teacher_QK, reduction="none", log_target=True).sum(dim=1)
        return divergence_Q * self.student_temperature**2, {}


def _min_max(scores_QK: Tensor, exists_QK: Tensor) -> Tensor:
    limit = torch.finfo(scores_QK.dtype).max
    lowest = scores_QK.masked_fill(~exists_QK, limit).amin(dim=1, keepdim=True)
    highest = scores_QK.masked_fill(~exists_QK, -limit).amax(dim=1, keepdim=True)
    return (scores_QK - lowest) / (highest - lowest + 1e-8)


def _log_softmax(scores_QK: Tensor, exists_QK: Tensor) -> Tensor:
    # The lowest number and not -inf: of a document that is none, the divergence is 0 x a number, not 0 x (inf - inf).
    return scores_QK.masked_fill(~exists_QK, torch.finfo(scores_QK.dtype).min / 2).log_softmax(dim=1)
