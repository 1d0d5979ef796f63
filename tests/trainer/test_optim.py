"""What the optimisers do to each parameter, against torch's own, loops written here and closed forms."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import cos, pi, sqrt
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.profiler import ProfilerActivity, profile

from configs.schema import ConfigError, OptimizerConfig, OptimizerName, ParameterGroup, Schedule
from trainer.optim import (
    MuonWithAdamW,
    build_optimizer,
    build_schedule,
    describe_optimizer,
    freeze,
    learning_rates,
    named_parameters,
)

CONFIG = OptimizerConfig(
    name=OptimizerName.adamw,
    learning_rate=0.5,
    muon_learning_rate=None,
    muon_momentum=None,
    groups=[],
    weight_decay=0.1,
    betas=[0.8, 0.9],
    epsilon=1e-3,
    schedule=Schedule.linear,
    warmup_fraction=0.25,
)
MUON = replace(CONFIG, name=OptimizerName.muon, learning_rate=0.01, muon_learning_rate=0.02, muon_momentum=0.9)
NAMED = pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
NOTHING = nn.Module()
LAYER = "backbone.encoder.layer"


@pytest.fixture
def learnt() -> nn.ParameterDict:
    """What a loss might learn: a number, and a matrix that is no layer."""
    return nn.ParameterDict({"log_temperature": torch.tensor(-4.0), "weights": torch.eye(3)})


def with_groups(config: OptimizerConfig, **rates: float) -> OptimizerConfig:
    """The config with a group for each pattern, in this order."""
    return replace(config, groups=[ParameterGroup(pattern, rate) for pattern, rate in rates.items()])


def small_encoder(rows: int = 2, columns: int = 3, *, bias: bool = True) -> MultiVectorEncoder:
    """A head alone: head.0.linear of these shapes."""
    torch.manual_seed(0)
    return MultiVectorEncoder(modules=[Dense(columns, rows, bias=bias)], device="cpu")


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Gradients that depend on the step alone, to all that need one."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = gradient if parameter.requires_grad else None


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The one group that holds the parameter."""
    (group,) = [group for group in optimizer.param_groups if any(parameter is p for p in group["params"])]
    return group


# Names


def test_every_parameter_has_one_name(encoder: MultiVectorEncoder, learnt: nn.ParameterDict) -> None:
    named = [id(parameter) for parameter in named_parameters(encoder, learnt).values()]
    assert sorted(named) == sorted(id(parameter) for parameter in (*encoder.parameters(), *learnt.parameters()))


def test_names_are_those_of_the_transformers_model_the_head_and_the_loss(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict
) -> None:
    parameters = named_parameters(encoder, learnt)
    transformer, dense = encoder[0], encoder[1]
    assert isinstance(transformer, Transformer)
    assert isinstance(dense, Dense)
    query = transformer.model.encoder.layer[0].attention.self.query
    assert parameters[f"{LAYER}.0.attention.self.query.weight"] is query.weight
    assert parameters["head.0.linear.weight"] is dense.linear.weight
    assert parameters["loss.log_temperature"] is learnt["log_temperature"]


def test_layers_of_the_head_are_counted_among_themselves_whatever_their_class() -> None:
    modules = [Dense(3, 3, bias=False), nn.LayerNorm(3), Dense(3, 2, bias=False, use_residual=True)]
    parameters = named_parameters(MultiVectorEncoder(modules=modules, device="cpu"), NOTHING)
    assert list(parameters) == [
        "head.0.linear.weight",
        "head.1.weight",
        "head.1.bias",
        "head.2.linear.weight",
        "head.2.residual.weight",
    ]


# Groups


@NAMED
def test_the_groups_cover_every_parameter_once(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict, config: OptimizerConfig
) -> None:
    config = with_groups(config, **{"head.*": 0.3, f"{LAYER}.0.*": 0.2})
    optimizer = build_optimizer(encoder, learnt, config)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in (*encoder.parameters(), *learnt.parameters()))


@NAMED
def test_matrices_are_decayed_and_biases_and_norms_are_not(
    encoder: MultiVectorEncoder, config: OptimizerConfig
) -> None:
    optimizer = build_optimizer(encoder, NOTHING, with_groups(config, **{f"{LAYER}.0.*": 0.2}))
    decays = set()
    for name, parameter in named_parameters(encoder, NOTHING).items():
        undecayed = name.endswith(".bias") or "LayerNorm" in name
        decays.add(group_of(optimizer, parameter)["weight_decay"])
        assert group_of(optimizer, parameter)["weight_decay"] == (0.0 if undecayed else 0.1), name
    assert decays == {0.0, 0.1}


def test_a_frozen_parameter_is_in_no_group() -> None:
    encoder = small_encoder()
    parameters = named_parameters(encoder, NOTHING)
    parameters["head.0.linear.weight"].requires_grad_(False)
    optimizer = build_optimizer(encoder, NOTHING, CONFIG)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(parameters["head.0.linear.bias"])]
    ]


def test_muon_trains_the_matrices_of_linear_layers_and_adamw_all_else(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict
) -> None:
    optimizer = build_optimizer(encoder, learnt, MUON)
    of_layers = {id(module.weight) for module in encoder.modules() if isinstance(module, nn.Linear)}
    of_muon = set()
    for name, parameter in named_parameters(encoder, learnt).items():
        group = group_of(optimizer, parameter)
        if "momentum" in group:
            of_muon.add(id(parameter))
            assert (group["name"], group["lr"], group["momentum"]) == ("muon", 0.02, 0.9), name
        else:
            assert (group["name"], group["lr"]) == ("adamw", 0.01), name
            assert (list(group["betas"]), group["eps"], group["fused"]) == ([0.8, 0.9], 1e-3, True), name
    # Of each of the two layers: query, key, value and three of a linear map; and the head.
    assert len(of_muon) == 13
    assert of_muon == of_layers


def test_a_matrix_that_is_also_an_embedding_is_none_of_muons() -> None:
    embedding, linear = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    linear.weight = embedding.weight
    encoder = MultiVectorEncoder(modules=[nn.Sequential(linear, embedding)], device="cpu")
    assert isinstance(build_optimizer(encoder, NOTHING, MUON), AdamW)


@NAMED
def test_the_first_pattern_that_matches_gives_the_rate_and_the_name(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict, config: OptimizerConfig
) -> None:
    config = with_groups(config, **{"*.LayerNorm.*": 0.3, f"{LAYER}.[1-3].*": 0.2, "backbone.*": 0.125, "loss.*": 4.0})
    optimizer = build_optimizer(encoder, learnt, config)
    for name, parameter in named_parameters(encoder, learnt).items():
        if "LayerNorm" in name:
            expected = ("*.LayerNorm.*", 0.3)
        elif name.startswith(f"{LAYER}.1."):
            expected = (f"{LAYER}.[1-3].*", 0.2)
        elif name.startswith("backbone."):
            expected = ("backbone.*", 0.125)
        elif name.startswith("loss."):
            expected = ("loss.*", 4.0)
        else:
            expected = ("muon", 0.02) if config.name is OptimizerName.muon else ("adamw", 0.5)
        group = group_of(optimizer, parameter)
        assert (group["name"], group["lr"]) == expected, name


@NAMED
def test_groups_without_a_pattern_come_first_and_none_is_empty(
    encoder: MultiVectorEncoder, config: OptimizerConfig
) -> None:
    optimizer = build_optimizer(encoder, NOTHING, with_groups(config, **{"head.*": 0.3, "*.query.*": 0.2}))
    names = [group["name"] for group in optimizer.param_groups]
    # The two of adamw differ in decay, those of *.query.* in decay or in the optimiser.
    bases = ["adamw", "adamw", "muon"] if config.name is OptimizerName.muon else ["adamw", "adamw"]
    assert names == [*bases, "head.*", "*.query.*", "*.query.*"]
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.parametrize(("pattern", "kind"), [("*.bias", Muon), ("*.weight", AdamW)])
def test_where_one_of_the_two_has_nothing_to_train_the_other_is_alone(pattern: str, kind: type[Optimizer]) -> None:
    encoder, config = small_encoder(), with_groups(MUON, **{pattern: 0.0})
    freeze(encoder, NOTHING, config)
    optimizer = build_optimizer(encoder, NOTHING, config)
    assert type(optimizer) is kind
    ((parameter,),) = [group["params"] for group in optimizer.param_groups]
    assert parameter.requires_grad


def test_whether_adamw_is_fused_depends_on_the_parameters_that_it_gets() -> None:
    encoder = small_encoder()
    head = encoder[0]
    assert isinstance(head, Dense)
    head.linear.weight = nn.Parameter(torch.empty(2, 3, device="meta"))  # a device without the kernel
    fused = {
        config.name: [group["fused"] for group in build_optimizer(encoder, NOTHING, config).param_groups[:1]]
        for config in (CONFIG, MUON)
    }
    assert fused == {OptimizerName.adamw: [False], OptimizerName.muon: [True]}


# Freezing


def test_groups_of_rate_0_need_no_gradient_and_others_are_left_as_they_are(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict
) -> None:
    parameters = named_parameters(encoder, learnt)
    parameters[f"{LAYER}.1.output.dense.bias"].requires_grad_(False)
    config = with_groups(
        CONFIG, **{"*.LayerNorm.*": 0.1, "backbone.embeddings.*": 0.0, f"{LAYER}.0.*": 0.0, "loss.log_*": 0.0}
    )
    freeze(encoder, learnt, config)
    for name, parameter in parameters.items():
        chosen = name.startswith(("backbone.embeddings.", f"{LAYER}.0.")) and "LayerNorm" not in name
        is_frozen = chosen or name in ("loss.log_temperature", f"{LAYER}.1.output.dense.bias")
        assert parameter.requires_grad == (not is_frozen), name


@NAMED
def test_frozen_parameters_get_no_gradient_and_do_not_move(
    encoder: MultiVectorEncoder, config: OptimizerConfig
) -> None:
    config = with_groups(config, **{"backbone.embeddings.*": 0.0, f"{LAYER}.0.*": 0.0})
    freeze(encoder, NOTHING, config)
    optimizer = build_optimizer(encoder, NOTHING, config)
    parameters = named_parameters(encoder, NOTHING)
    before = copies(parameters)
    encoder.eval()
    for _ in range(2):
        optimizer.zero_grad()
        vectors_loss(encoder).backward()
        optimizer.step()
    for name, parameter in parameters.items():
        is_frozen = name.startswith(("backbone.embeddings.", f"{LAYER}.0."))
        assert (parameter.grad is None) == is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name


def vectors_loss(encoder: MultiVectorEncoder) -> Tensor:
    """A number that every parameter of the encoder changes."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    tokens = transformer.tokenizer(["what barks", "the cat meows"], return_tensors="pt", padding=True)
    vectors: Tensor = encoder(dict(tokens), task="document")["token_embeddings"]
    loss: Tensor = torch.linspace(-1, 1, vectors.numel()) @ vectors.flatten()
    return loss


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"backbone.*": 0.1, "haed.*": 0.2},
            "optimizer.groups[1].pattern=haed.* matches no parameter; the nearest is head.0.linear.weight",
        ),
        (
            {"Head.*": 0.1},
            "optimizer.groups[0].pattern=Head.* matches no parameter; the nearest is head.0.linear.weight",
        ),
        (
            {"backbone.encoder.layers.1.output.dense.bias": 0.0},
            "optimizer.groups[0].pattern=backbone.encoder.layers.1.output.dense.bias matches no parameter; the nearest "
            "is backbone.encoder.layer.1.output.dense.bias",
        ),
        (
            {"head.*": 0.1, "head.0.*": 0.2},
            "optimizer.groups[1].pattern=head.0.* matches only parameters that earlier groups have taken (head.*): "
            "put it before them, or drop it",
        ),
        (
            {"*.bias": 0.1, "*.weight": 0.0, "loss.*": 0.3, "*.query.*": 0.2},
            "optimizer.groups[3].pattern=*.query.* matches only parameters that earlier groups have taken "
            "(*.weight, *.bias): put it before them, or drop it",
        ),
        (
            {"head.*": 0.0, "backbone.*": 0.0},
            "optimizer.groups freeze every parameter of the encoder: with learning_rate=0 for head.*, backbone.* there "
            "is nothing left to train: give one a rate above 0",
        ),
        (
            {"loss.*": 0.3, "*": 0.0},
            "optimizer.groups freeze every parameter of the encoder: with learning_rate=0 for * there is nothing left "
            "to train: give one a rate above 0",
        ),
    ],
    ids=["misspelt", "capital", "deep", "taken", "taken by two", "all frozen", "all but the loss frozen"],
)
def test_groups_that_cannot_be_meant_are_refused_and_nothing_is_frozen(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict, groups: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        freeze(encoder, learnt, with_groups(CONFIG, **groups))
    assert str(refused.value) == message
    assert all(parameter.requires_grad for parameter in named_parameters(encoder, learnt).values())


def test_a_pattern_of_a_loss_that_learns_nothing_is_refused(encoder: MultiVectorEncoder) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.groups\[0\]\.pattern=loss\.\* matches no parameter; "):
        freeze(encoder, NOTHING, with_groups(CONFIG, **{"loss.*": 0.1}))


# Steps


def test_two_steps_equal_adamw_written_out() -> None:
    encoder = small_encoder(1, 1)
    weight, bias = named_parameters(encoder, NOTHING).values()
    with torch.no_grad():
        weight.fill_(2.0)
        bias.fill_(2.0)
    optimizer = build_optimizer(encoder, NOTHING, CONFIG)
    gradients = [0.3, -0.05]
    expected = {"weight": 2.0, "bias": 2.0}
    mean = square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = torch.full((1, 1), gradient)
        bias.grad = torch.full((1,), gradient)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = mean / (1 - 0.8**step) / (sqrt(square / (1 - 0.9**step)) + 1e-3)
        expected["weight"] -= 0.5 * 0.1 * expected["weight"] + 0.5 * update
        expected["bias"] -= 0.5 * update
    # A few float32 operations on numbers near 1.
    assert weight.item() == pytest.approx(expected["weight"], rel=1e-5)
    assert bias.item() == pytest.approx(expected["bias"], rel=1e-5)


@NAMED
def test_the_fused_kernel_runs_on_the_cpu(config: OptimizerConfig) -> None:
    encoder = small_encoder()
    optimizer = build_optimizer(encoder, NOTHING, config)
    give_gradients(named_parameters(encoder, NOTHING), 0)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step()
    assert "aten::_fused_adamw_" in {event.key for event in trace.key_averages()}


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (4, 6)], ids=["tall", "wide"])
def test_three_steps_of_a_matrix_equal_muon_written_out_in_float64(rows: int, columns: int) -> None:
    encoder = small_encoder(rows, columns)
    parameters = named_parameters(encoder, NOTHING)
    weight = parameters["head.0.linear.weight"]
    optimizer = build_optimizer(encoder, NOTHING, MUON)
    expected = weight.detach().double()
    mean = torch.zeros_like(expected)
    for step in range(3):
        give_gradients(parameters, step)
        assert weight.grad is not None
        gradient = weight.grad.double()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        update = orthogonalise(0.1 * gradient + 0.9 * mean)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * sqrt(max(1, rows / columns)) * update
    # torch iterates in bfloat16, of 8 bits, on entries below 1.2: three updates of 0.02, each within 2 percent of that.
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=3 * 0.02 * 0.02)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz's on the singular values, with the coefficients of Jordan et al. 2024."""
    left, singular, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    orthogonal: Tensor = left @ torch.diag(singular) @ right
    return orthogonal


def test_muon_and_adamw_do_together_what_each_does_alone(encoder: MultiVectorEncoder, learnt: nn.ParameterDict) -> None:
    alone = deepcopy((encoder, learnt))
    ours, theirs = named_parameters(encoder, learnt), named_parameters(*alone)
    optimizer = build_optimizer(encoder, learnt, MUON)
    matrices = [module.weight for module in alone[0].modules() if isinstance(module, nn.Linear)]
    rest = [p for p in theirs.values() if not any(p is matrix for matrix in matrices)]
    muon = Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1)
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-3, fused=True)
    assert isinstance(optimizer, MuonWithAdamW)
    before = copies(ours)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        muon.step()
        adamw.step()
    assert_same(copies(ours), copies(theirs))
    assert not any(torch.equal(before[name], parameter) for name, parameter in ours.items())


@NAMED
def test_a_rate_of_its_own_makes_a_groups_step_as_much_longer_and_leaves_the_rest(
    encoder: MultiVectorEncoder, config: OptimizerConfig
) -> None:
    config = replace(config, weight_decay=0.0)
    by_muon = config.muon_learning_rate or 0.0
    moved = {}
    for name, chosen in {"base": config, "group": with_groups(config, **{"*.query.*": 0.125})}.items():
        model = deepcopy(encoder).double()  # lengths of steps are differences of weights
        parameters = named_parameters(model, NOTHING)
        before = copies(parameters)
        give_gradients(parameters, 0)
        build_optimizer(model, NOTHING, chosen).step()
        moved[name] = {key: before[key] - parameter.detach() for key, parameter in parameters.items()}
    for name, base in moved["base"].items():
        rate = by_muon if by_muon and name.endswith("query.weight") else config.learning_rate
        times = 0.125 / rate if ".query." in name else 1.0
        torch.testing.assert_close(moved["group"][name], base * times, rtol=1e-9, atol=1e-12)


# Resuming


def to_disk_and_back(optimizer: Optimizer, schedule: LRScheduler) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both states as a checkpoint holds them: tensors as safetensors, all else as JSON."""
    state = optimizer.state_dict()
    tensors = load(
        save({f"{index}/{name}": value for index, values in state["state"].items() for name, value in values.items()})
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        moments.setdefault(int(index), {})[name] = value
    groups = json.loads(json.dumps(state["param_groups"]))
    return {"state": moments, "param_groups": groups}, json.loads(json.dumps(schedule.state_dict()))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        with_groups(CONFIG, **{"head.*": 0.3, "backbone.embeddings.*": 0.0, "*.query.*": 0.2, "loss.*": 0.7}),
        MUON,
        with_groups(MUON, **{"head.*": 0.3, "backbone.embeddings.*": 0.0, "*.query.*": 0.2, "loss.*": 0.7}),
    ],
    ids=["adamw", "adamw groups", "muon", "muon groups"],
)
def test_a_resumed_optimiser_goes_on_bit_for_bit(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict, config: OptimizerConfig
) -> None:
    freeze(encoder, learnt, config)

    def train(first: int, last: int, optimizer: Optimizer, schedule: LRScheduler) -> list[dict[str, float]]:
        rates = []
        for step in range(first, last):
            give_gradients(parameters, step)
            rates.append(learning_rates(optimizer))
            optimizer.step()
            schedule.step()
        return rates

    def build() -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(encoder, learnt, config)
        return optimizer, build_schedule(optimizer, config, steps=8)

    parameters = named_parameters(encoder, learnt)
    first = build()
    rates = train(0, 3, *first)
    moments, schedule = to_disk_and_back(*first)
    weights = copies(parameters)
    rates += train(3, 8, *first)
    uninterrupted = copies(parameters)

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    resumed = build()
    resumed[0].load_state_dict(moments)
    resumed[1].load_state_dict(schedule)
    assert train(3, 8, *resumed) == rates[3:]
    assert_same(copies(parameters), uninterrupted)
    assert len({tuple(rate.values()) for rate in rates}) > 4


# Accelerate


@NAMED
def test_what_accelerate_prepares_takes_the_same_clipped_and_scheduled_steps(
    encoder: MultiVectorEncoder, config: OptimizerConfig
) -> None:
    config = replace(config, learning_rate=1e-3)
    plain = deepcopy(encoder).eval()
    optimizer = build_optimizer(plain, NOTHING, config)
    schedule = build_schedule(optimizer, config, steps=4)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        vectors_loss(plain).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        optimizer.step()
        schedule.step()
    assert min(norms) > 0.5

    accelerator = Accelerator(cpu=True)
    optimizer = build_optimizer(encoder, NOTHING, config)
    schedule = build_schedule(optimizer, config, steps=4)
    model, prepared = accelerator.prepare(encoder.eval(), optimizer)
    for norm in norms:
        prepared.zero_grad()
        accelerator.backward(vectors_loss(model))
        assert accelerator.clip_grad_norm_(model.parameters(), 0.5) == norm
        prepared.step()
        schedule.step()
    assert learning_rates(prepared) == learning_rates(optimizer)
    assert_same(copies(named_parameters(encoder, NOTHING)), copies(named_parameters(plain, NOTHING)))


def test_the_scaler_of_fp16_takes_the_two_as_one_and_skips_both_where_one_overflows() -> None:
    encoder, plain = small_encoder(), small_encoder()
    parameters, expected = named_parameters(encoder, NOTHING), named_parameters(plain, NOTHING)
    optimizer, unscaled = build_optimizer(encoder, NOTHING, MUON), build_optimizer(plain, NOTHING, MUON)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes it ready
    for step in range(3):
        give_gradients(parameters, step)
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            parameter.grad *= scaler.get_scale()  # a power of two: undone without rounding
            if step == 1 and name.endswith("bias"):
                parameter.grad[0] = torch.inf
        if step != 1:
            give_gradients(expected, step)
            unscaled.step()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(copies(parameters), copies(expected))


# Schedules


def rates_of_steps(config: OptimizerConfig, steps: int) -> list[float]:
    """The rate of each step, and the one that is left after the last, of every group as a share of its highest."""
    encoder = small_encoder()
    optimizer = build_optimizer(encoder, NOTHING, config)
    schedule = build_schedule(optimizer, config, steps=steps)
    rates = []
    for _ in range(steps + 1):
        shares = {group["lr"] / group["initial_lr"] for group in optimizer.param_groups}
        assert max(shares) - min(shares) < 1e-12
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# 24 steps of which 6 warm up, so 18 are left: step 15 is the middle of those.
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(MUON, learning_rate=0.5), with_groups(CONFIG, **{"*.weight": 0.3})],
    ids=["adamw", "muon", "groups"],
)
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
    config: OptimizerConfig, schedule: Schedule, closed_form: Callable[[float], float]
) -> None:
    rates = rates_of_steps(replace(config, schedule=schedule), 24)
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
    rates = rates_of_steps(replace(CONFIG, schedule=schedule), 24)
    assert [rates[0], rates[6], rates[15], rates[24]] == pytest.approx([start, top, middle, end], abs=1e-12)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    rates = rates_of_steps(replace(CONFIG, warmup_fraction=0.0), 4)
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


# What is logged and shown


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (CONFIG, {"adamw": 0.5}),
        (
            with_groups(CONFIG, **{"head.*": 0.25, "*.query.*": 0.125}),
            {"adamw": 0.5, "head.*": 0.25, "*.query.*": 0.125},
        ),
        (with_groups(MUON, **{"*.query.*": 0.125}), {"adamw": 0.01, "muon": 0.02, "*.query.*": 0.125}),
        (with_groups(CONFIG, **{"backbone.*": 0.0}), {"adamw": 0.5}),
        (with_groups(CONFIG, **{"backbone.*": 0.25, "*": 0.125}), {"backbone.*": 0.25, "*": 0.125}),
    ],
    ids=["adamw", "groups", "muon", "frozen", "groups alone"],
)
def test_each_rate_is_logged_once_by_name(
    encoder: MultiVectorEncoder, config: OptimizerConfig, rates: dict[str, float]
) -> None:
    freeze(encoder, NOTHING, config)
    optimizer = build_optimizer(encoder, NOTHING, config)
    assert list(learning_rates(optimizer).items()) == list(rates.items())
    schedule = build_schedule(optimizer, config, steps=8)
    optimizer.step()
    schedule.step()  # half of the warm-up
    assert learning_rates(optimizer) == pytest.approx({name: rate / 2 for name, rate in rates.items()})


# The tiny BERT has 32 x (vocabulary + 64 positions + 2 segments) embeddings and 2 x 32 of their norm.
@pytest.mark.parametrize(
    ("config", "line"),
    [
        (replace(CONFIG, learning_rate=1e-4), "adamw 0.0001"),
        (
            with_groups(replace(CONFIG, learning_rate=1e-4), **{"backbone.embeddings.*": 0.0, "head.*": 1e-3}),
            "adamw 0.0001; head.* 0.001; frozen: backbone.embeddings.* ({embeddings:,} parameters)",
        ),
        (
            with_groups(CONFIG, **{"loss.weights": 0.0, "head.*": 0.25, "loss.*": 0.0}),
            "adamw 0.5; head.* 0.25; frozen: loss.weights, loss.* (10 parameters)",
        ),
        (replace(MUON, learning_rate=8e-5), "muon 0.02 for 13 matrices, adamw 8e-05 for the rest"),
        (
            with_groups(MUON, **{f"{LAYER}.0.*": 0.25, "head.*": 0.125}),
            f"muon 0.02 for 6 matrices, adamw 0.01 for the rest; {LAYER}.0.* 0.25; head.* 0.125",
        ),
        (with_groups(MUON, **{"backbone.*": 0.25, "*": 0.125}), "muon; backbone.* 0.25; * 0.125"),
    ],
    ids=["adamw", "groups", "frozen", "muon", "muon groups", "groups alone"],
)
def test_the_optimiser_is_described_in_one_line(
    encoder: MultiVectorEncoder, learnt: nn.ParameterDict, config: OptimizerConfig, line: str
) -> None:
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    embeddings = 32 * (transformer.model.get_input_embeddings().num_embeddings + 64 + 2 + 2)
    assert embeddings > 1000  # so that there is a comma
    freeze(encoder, learnt, config)
    assert describe_optimizer(encoder, learnt, config) == line.format(embeddings=embeddings)
