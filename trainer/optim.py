"""Optimisers and learning-rate schedules by name."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from configs.schema import OptimizerConfig, OptimizerName


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimiser over all parameters that need a gradient; biases and norms are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    match config.name:
        case OptimizerName.adamw:
            return torch.optim.AdamW(
                groups,
                lr=config.learning_rate,
                betas=(config.betas[0], config.betas[1]),
                eps=config.epsilon,
                fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters),
            )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, *, steps: int) -> LRScheduler:
    """Warm-up from 0 over its share of all steps, then the schedule down to 0 at the last step."""
    name = "constant_with_warmup" if config.schedule.name == "constant" else config.schedule.name
    schedule: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(config.warmup_fraction * steps), num_training_steps=steps
    )
    return schedule
