"""AdamW's groups and numbers, and the learning rate of every kind of schedule, against closed forms."""

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi, sqrt

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from configs.schema import OptimizerConfig, OptimizerName, Schedule
from trainer.optim import build_optimizer, build_schedule

CONFIG = OptimizerConfig(
    name=OptimizerName.adamw,
    learning_rate=0.5,
    weight_decay=0.1,
    betas=[0.8, 0.9],
    epsilon=1e-3,
    schedule=Schedule.linear,
    warmup_fraction=0.25,
)


def test_the_groups_cover_every_parameter_once(encoder: MultiVectorEncoder) -> None:
    optimizer = build_optimizer(encoder, CONFIG)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in encoder.parameters())


def test_matrices_are_decayed_and_biases_and_norms_are_not(encoder: MultiVectorEncoder) -> None:
    optimizer = build_optimizer(encoder, CONFIG)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in encoder.named_parameters():
        undecayed = name.endswith(".bias") or "LayerNorm" in name
        assert decay[id(parameter)] == (0.0 if undecayed else 0.1), name
    assert set(decay.values()) == {0.0, 0.1}


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, CONFIG)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[], [id(model.bias)]]


def test_two_steps_equal_adamw_written_out() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = build_optimizer(model, CONFIG)
    gradients = [0.3, -0.05]
    expected = {"weight": 2.0, "bias": 2.0}
    mean = square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        model.bias.grad = torch.full((1,), gradient)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = mean / (1 - 0.8**step) / (sqrt(square / (1 - 0.9**step)) + 1e-3)
        expected["weight"] -= 0.5 * 0.1 * expected["weight"] + 0.5 * update
        expected["bias"] -= 0.5 * update
    # A few float32 operations on numbers near 1.
    assert model.weight.item() == pytest.approx(expected["weight"], rel=1e-5)
    assert model.bias.item() == pytest.approx(expected["bias"], rel=1e-5)


def test_the_fused_kernel_runs_on_the_cpu() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, CONFIG)
    model(torch.ones(1, 3)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step()
    assert "aten::_fused_adamw_" in {event.key for event in trace.key_averages()}


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """The rate of each step, and the one that is left after the last."""
    optimizer: Optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, steps=steps)
    rates = []
    for _ in range(steps + 1):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# 24 steps of which 6 warm up, so 18 are left: step 15 is the middle of those.
@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        (Schedule.linear, lambda progress: 1 - progress),
        (Schedule.cosine, lambda progress: (1 + cos(pi * progress)) / 2),
        (Schedule.constant, lambda progress: 1.0),
    ],
    ids=["linear", "cosine", "constant"],
)
def test_the_rate_rises_from_zero_then_follows_the_schedule(
    schedule: Schedule, closed_form: Callable[[float], float]
) -> None:
    rates = learning_rates(replace(CONFIG, schedule=schedule), 24)
    expected = [0.5 * step / 6 for step in range(6)] + [0.5 * closed_form((step - 6) / 18) for step in range(6, 25)]
    assert rates == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "start", "top", "middle", "end"),
    [
        (Schedule.linear, 0.0, 0.5, 0.25, 0.0),
        (Schedule.cosine, 0.0, 0.5, 0.25, 0.0),
        (Schedule.constant, 0.0, 0.5, 0.5, 0.5),
    ],
)
def test_the_rate_at_the_start_the_end_of_the_warmup_the_middle_and_the_end(
    schedule: Schedule, start: float, top: float, middle: float, end: float
) -> None:
    rates = learning_rates(replace(CONFIG, schedule=schedule), 24)
    assert [rates[0], rates[6], rates[15], rates[24]] == pytest.approx([start, top, middle, end], abs=1e-12)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rates(replace(CONFIG, warmup_fraction=0.0), 4) == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])
