"""A temperature that is trained, held within bounds."""

import math

import torch
from torch import Tensor, nn


class LearntTemperature(nn.Module):
    """exp of a parameter, as the scale of CLIP (Radford et al. 2021, section 2.5), so that steps are relative."""

    def __init__(self, start: float, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.bounds = bounds
        self.log_temperature = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        """Return the temperature, a scalar."""
        # Held here and not in the graph: at a bound it would have no gradient and never come back.
        with torch.no_grad():
            self.log_temperature.clamp_(*map(math.log, self.bounds))
        return self.log_temperature.exp()
