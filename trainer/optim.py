"""Optimisers and learning-rate schedules by name, and which parameter has which learning rate."""

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from configs.schema import ConfigError, OptimizerConfig, OptimizerName


def named_parameters(encoder: MultiVectorEncoder, learnt: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, by the name that patterns match.

    learnt: what the loss learns. Names are `backbone.<name inside the transformers model>`, `head.<index of the
    layer>.<name>` and `loss.<name>`.
    """
    modules: dict[str, nn.Module] = {}
    layers = 0
    for module in encoder:
        if isinstance(module, Transformer):
            modules["backbone"] = module.model
        elif next(module.parameters(), None) is not None:
            modules[f"head.{layers}"] = module
            layers += 1
    modules["loss"] = learnt
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def freeze(encoder: MultiVectorEncoder, learnt: nn.Module, config: OptimizerConfig) -> None:
    """Let the parameters of groups with a learning rate of 0 need no gradient.

    Raises ConfigError, and then has frozen nothing, where a group has no parameter or the encoder none left to train.
    """
    parameters = named_parameters(encoder, learnt)
    for problem in _problems(parameters, config):
        raise ConfigError(problem)
    for name in _frozen(parameters, config):
        parameters[name].requires_grad_(False)


def build_optimizer(encoder: MultiVectorEncoder, learnt: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimiser over all parameters that need a gradient; biases and norms are not decayed.

    Each of its groups has a `name`: adamw, muon, or the pattern that gives it a learning rate of its own.
    """
    groups = _parameter_groups(encoder, learnt, config)
    of_muon = [group for group in groups if _is_of_muon(group)]
    of_adamw = [group for group in groups if not _is_of_muon(group)]
    assert groups, "freeze leaves something to train"
    if not of_adamw:
        return Muon(of_muon)  # its groups bring their rate, decay and momentum
    adamw = AdamW(
        of_adamw,
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for group in of_adamw for parameter in group["params"]),
    )
    return MuonWithAdamW(groups, muon=Muon(of_muon), adamw=adamw) if of_muon else adamw


class MuonWithAdamW(Optimizer):
    """Muon and AdamW as the one optimiser that GradScaler, schedules, accelerate and checkpoints take."""

    def __init__(self, groups: list[dict[str, Any]], *, muon: Muon, adamw: AdamW) -> None:
        """groups: the very dictionaries that the two have, into which each has written its settings."""
        super().__init__(groups, defaults={})
        self.muon, self.adamw = muon, adamw

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let each of the two take a step with its groups; accelerate passes the closure, which is always None."""
        # Shared anew each time: load_state_dict puts other dictionaries in the place of both.
        self.muon.param_groups = [group for group in self.param_groups if _is_of_muon(group)]
        self.adamw.param_groups = [group for group in self.param_groups if not _is_of_muon(group)]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, *, steps: int) -> LRScheduler:
    """Warm-up from 0 over its share of all steps, then the schedule down to 0 at the last step."""
    name = "constant_with_warmup" if config.schedule.name == "constant" else config.schedule.name
    schedule: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(config.warmup_fraction * steps), num_training_steps=steps
    )
    return schedule


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate of the next step by the name of its groups, those without a pattern first."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def describe_optimizer(encoder: MultiVectorEncoder, learnt: nn.Module, config: OptimizerConfig) -> str:
    """One line: the highest learning rates, and what is frozen."""
    parameters = named_parameters(encoder, learnt)
    without_group = parameters.keys() - _group_indices(parameters, config).keys()
    matrices = without_group & _names_of_muon(encoder, parameters, config)
    if not without_group:
        parts = [config.name.value]
    elif config.name is OptimizerName.muon:
        parts = [
            f"muon {config.muon_learning_rate} for {len(matrices)} matrices, adamw {config.learning_rate} for the rest"
        ]
    else:
        parts = [f"adamw {config.learning_rate}"]
    parts += [f"{group.pattern} {group.learning_rate}" for group in config.groups if group.learning_rate > 0]
    if patterns := _freezing_patterns(config):
        count = sum(parameters[name].numel() for name in _frozen(parameters, config))
        parts.append(f"frozen: {patterns} ({count:,} parameters)")
    return "; ".join(parts)


def _problems(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> Iterator[str]:
    """What is wrong with the groups, each as one line."""
    index_of = _group_indices(parameters, config)
    for index, group in enumerate(config.groups):
        key = f"optimizer.groups[{index}].pattern={group.pattern}"
        matched = [name for name in parameters if fnmatchcase(name, group.pattern)]
        if not matched:
            nearest = get_close_matches(group.pattern, parameters, n=1, cutoff=0.0)
            yield f"{key} matches no parameter; the nearest is {nearest[0]}"
        elif all(index_of[name] < index for name in matched):
            takers = dict.fromkeys(config.groups[index_of[name]].pattern for name in matched)
            yield (
                f"{key} matches only parameters that earlier groups have taken ({', '.join(takers)}): "
                "put it before them, or drop it"
            )
    frozen = _frozen(parameters, config)
    if all(name in frozen or name.startswith("loss.") for name in parameters):
        yield (
            f"optimizer.groups freeze every parameter of the encoder: with learning_rate=0 for "
            f"{_freezing_patterns(config)} there is nothing left to train: give one a rate above 0"
        )


def _parameter_groups(encoder: MultiVectorEncoder, learnt: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters that need a gradient by learning rate, optimiser and decay, as torch takes them."""
    parameters = named_parameters(encoder, learnt)
    index_of, names_of_muon = _group_indices(parameters, config), _names_of_muon(encoder, parameters, config)
    members: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            # -1: parameters without a group of their own come first.
            key = (index_of.get(name, -1), name in names_of_muon, parameter.dim() < 2)
            members.setdefault(key, []).append(parameter)
    groups = []
    for key in sorted(members):
        index, of_muon, undecayed = key
        group: dict[str, Any] = {"params": members[key], "weight_decay": 0.0 if undecayed else config.weight_decay}
        group |= {"name": "adamw", "lr": config.learning_rate}
        if of_muon:
            group |= {"name": "muon", "lr": config.muon_learning_rate, "momentum": config.muon_momentum}
        if index >= 0:
            group |= {"name": config.groups[index].pattern, "lr": config.groups[index].learning_rate}
        groups.append(group)
    return groups


def _is_of_muon(group: dict[str, Any]) -> bool:
    return "momentum" in group


def _group_indices(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> dict[str, int]:
    """Index of the first group whose pattern matches a name; names that none matches are left out."""
    indices: dict[str, int] = {}
    for index, group in enumerate(config.groups):
        for name in parameters:
            if fnmatchcase(name, group.pattern):
                indices.setdefault(name, index)
    return indices


def _frozen(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> set[str]:
    """Names of the parameters whose group has a learning rate of 0."""
    indices = _group_indices(parameters, config)
    return {name for name, index in indices.items() if config.groups[index].learning_rate == 0}


def _freezing_patterns(config: OptimizerConfig) -> str:
    return ", ".join(group.pattern for group in config.groups if group.learning_rate == 0)


def _names_of_muon(
    encoder: MultiVectorEncoder, parameters: dict[str, nn.Parameter], config: OptimizerConfig
) -> set[str]:
    """Names of the matrices that Muon trains: a row of an embedding is a vector of its own, not part of a map."""
    if config.name is not OptimizerName.muon:
        return set()
    embeddings = {id(module.weight) for module in encoder.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in parameters.items()
        if parameter.dim() == 2 and id(parameter) not in embeddings and not name.startswith("loss.")
    }
