"""The learnt temperature: its gradient, its scale and its bounds."""

import cmath
import math

import pytest
import torch

from losses.contrastive import ContrastiveLoss
from losses.temperature import LearntTemperature
from tests.losses.batches import STEP, assert_equal, averaged, contrastive, loop, loop_scores, make_batch, make_scores


@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "symmetric"])
def test_the_loss_and_its_gradients_for_the_temperature_and_the_vectors_equal_the_loop(symmetric: bool) -> None:
    batch = make_batch([3, 1, 2])
    temperature = LearntTemperature(0.25, (0.01, 10.0)).double()
    # float64 from here on: the first value was rounded to float32.
    logarithm = temperature.log_temperature.item()
    term = ContrastiveLoss(
        temperature=temperature,
        symmetric=symmetric,
        own_negatives=True,
        mask_known_positives=False,
        max_negative_ratio=None,
    )
    loss, facts = averaged(term)(make_scores(batch))

    assert_equal(loss, batch, loop(batch, contrastive(batch, temperature=math.exp(logarithm), symmetric=symmetric)))
    stepped = contrastive(batch, temperature=cmath.exp(complex(logarithm, STEP)), symmetric=symmetric)
    [gradient] = torch.autograd.grad(loss, [temperature.log_temperature])
    assert gradient.item() == pytest.approx(stepped(loop_scores(batch)).imag / STEP, rel=1e-10)
    assert facts["temperature"].item() == pytest.approx(math.exp(logarithm), rel=1e-15)
    assert not facts["temperature"].requires_grad


@pytest.mark.parametrize("start", [0.02, 1.0, 5.0])
def test_it_starts_where_it_is_told_and_a_step_multiplies_it(start: float) -> None:
    temperature = LearntTemperature(start, (0.01, 10.0))
    assert temperature().item() == pytest.approx(start, rel=1e-6)  # float32
    with torch.no_grad():
        temperature.log_temperature.add_(0.1)
    assert temperature().item() == pytest.approx(start * math.exp(0.1), rel=1e-6)


@pytest.mark.parametrize(("bound", "direction"), [(0.1, -1), (2.0, 1)], ids=["lowest", "highest"])
def test_it_is_held_at_a_bound_and_comes_back_with_the_first_step_away_from_it(bound: float, direction: int) -> None:
    temperature = LearntTemperature(0.5, (0.1, 2.0))
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)

    def step(size: float) -> None:
        """Move the logarithm by so much, through the gradient of what forward returns."""
        optimizer.zero_grad()
        value = temperature()
        (-size * value / value.detach()).backward()
        optimizer.step()

    for _ in range(3):
        step(direction * 10.0)
    assert temperature().item() == pytest.approx(bound, rel=1e-6)
    step(-direction * 0.1)
    # However far past the bound the steps before led, this one leads away from the bound itself.
    assert temperature().item() == pytest.approx(bound * math.exp(-direction * 0.1), rel=1e-6)
