"""Margin-MSE term: a teacher's margins between each query's positive and its other documents."""

from dataclasses import dataclass

from torch import Tensor

from losses.scores import Scores


@dataclass(frozen=True, kw_only=True)
class MarginMSELoss:
    """Squared error of the margins (Hofstätter et al. 2020, equation 2)."""

    teacher_temperature: float

    def __call__(self, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the margins of each of this process's queries, (Q,), in squared scores."""
        difference_QK = scores.own - scores.teacher / self.teacher_temperature
        # The margins' difference is the difference of two differences.
        error_QN = (difference_QK[:, :1] - difference_QK[:, 1:]).square()
        is_margin_QN = scores.exists[:, 1:]
        error_Q = error_QN.where(is_margin_QN, 0.0).sum(dim=1) / is_margin_QN.sum(dim=1).clamp_min(1)
        return error_Q, {}
