"""From the config to the loss: a weighted sum of terms, at one width or several."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import LossConfig, Normalization, Score
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.distillation import DistillationLoss
from losses.margin_mse import MarginMSELoss
from losses.scores import Scores, gather_pool, mean_over_tokens, score
from losses.temperature import LearntTemperature

Term = Callable[[Scores], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The sum over widths and terms of each query of this process."""

    terms: dict[str, Term]
    weights: dict[str, float]
    """Of each term."""
    reads: dict[str, Score]
    """Which scores each term reads."""
    widths: dict[int, float]
    """Weight by width, the model's own first."""
    learnt: nn.ModuleDict
    """What the terms train beside the encoder."""
    maxsim: str
    """The MaxSim backend that scores."""

    def __call__(self, batch: EncodedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each query, (Q,) float32, whose mean is minimised, and what is logged, detached: each
        term's value before its weight, at several widths with `@<width>` behind its name, and its facts, all of them
        means over this process's queries.

        Every process must call it.
        """
        total = torch.zeros(len(batch.queries), device=batch.queries.device)
        logged: dict[str, Tensor] = {}
        pool = gather_pool(batch) if "contrastive" in self.terms else None
        for width, width_weight in self.widths.items():
            place = f"@{width}" if len(self.widths) > 1 else ""
            scores = score(batch, pool, width=width, maxsim_backend=self.maxsim)
            for name, term in self.terms.items():
                value, facts = term(scores if self.reads[name] is Score.maxsim else mean_over_tokens(scores))
                total = total + width_weight * self.weights[name] * value
                logged[name + place] = value.detach().mean()
                # The facts of the widest alone: those of the narrower differ little, or not at all.
                if width == max(self.widths):
                    logged |= facts
        return total, logged


def build_loss(config: LossConfig, *, width: int, maxsim: str) -> Loss:
    """Return the loss that the config describes; a new term gets its line here.

    width: of the model's vectors; maxsim: the backend that scores.
    """
    contrastive, distillation, margin_mse = config.contrastive, config.distillation, config.margin_mse
    learnt = nn.ModuleDict()
    temperature: float | LearntTemperature = contrastive.temperature
    if config.terms.contrastive and contrastive.learn_temperature:
        low, high = contrastive.temperature_bounds
        learnt["temperature"] = temperature = LearntTemperature(contrastive.temperature, (low, high))
    terms: dict[str, Term] = {
        "contrastive": ContrastiveLoss(
            temperature=temperature,
            symmetric=contrastive.symmetric,
            own_negatives=contrastive.own_negatives,
            mask_known_positives=contrastive.mask_known_positives,
            max_negative_ratio=contrastive.max_negative_ratio,
        ),
        "distillation": DistillationLoss(
            student_temperature=distillation.student_temperature,
            teacher_temperature=distillation.teacher_temperature,
            min_max=distillation.normalization is Normalization.min_max,
        ),
        "margin_mse": MarginMSELoss(teacher_temperature=margin_mse.teacher_temperature),
    }
    weights = {name: weight for name, weight in vars(config.terms).items() if weight}
    widths = dict(zip(config.matryoshka.widths, config.matryoshka.weights, strict=True))
    return Loss(
        terms={name: terms[name] for name in weights},
        weights=weights,
        reads={name: getattr(config, name).score for name in weights},
        widths=widths or {width: 1.0},
        learnt=learnt,
        maxsim=maxsim,
    )
