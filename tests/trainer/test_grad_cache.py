"""The cached step against the plain one: one gradient for every parameter, and the graph of one chunk at a time."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.bert.modeling_bert import BertAttention

from configs.schema import Config
from tests.gradients_worker import ALL_TERMS, FROZEN, LOSSES, STEP, Case, Step, largest_error, take_step
from trainer import grad_cache
from trainer.encoding import TrainedModel

MakeConfig = Callable[..., Config]
DROPOUT = "backbone.dropout=0.1"
CHECKPOINTING = "trainer.gradient_checkpointing=true"
ONE_TEXT, A_FEW_TEXTS, ALL_TEXTS = BUDGETS = (1, 40, 9999)
# Some hundred thousand roundings of float64 (1e-16), some hundred of float32 (6e-8): small differences of scores, such
# as those that min_max divides by, have the scores' roundings.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def step(config: Config, *, dtype: torch.dtype = torch.float64, cache_tokens: int | None = None) -> Step:
    return take_step(Accelerator(cpu=True), Case(config, dtype), cache_tokens=cache_tokens)


def with_chunks(config: Config, tokens: int) -> Config:
    return replace(config, trainer=replace(config.trainer, chunk_tokens=tokens))


def assert_same(found: Step, expected: Step, *, tolerance: float = TOLERANCES[torch.float64]) -> None:
    error, name = largest_error(found, expected)
    assert error <= tolerance, f"{name}: {error}"
    assert found.logged == pytest.approx(expected.logged, rel=tolerance)


# One gradient


@pytest.mark.parametrize(
    ("loss", "dtype"), [*((loss, torch.float64) for loss in LOSSES), ("all_terms", torch.float32)], ids=str
)
def test_steps_of_any_chunks_plain_or_cached_have_one_gradient_and_log_the_same(
    loss: str, dtype: torch.dtype, make_config: MakeConfig
) -> None:
    config = make_config(*STEP, *LOSSES[loss])
    plain = step(config, dtype=dtype)
    if config.loss.terms.contrastive:
        assert plain.logged["same_document_masked"] > 0
        assert plain.logged["known_positives_masked"] > 0
    others = [step(with_chunks(config, ALL_TEXTS), dtype=dtype)]
    others += [step(config, dtype=dtype, cache_tokens=tokens) for tokens in BUDGETS]
    for other in others:
        assert_same(other, plain, tolerance=TOLERANCES[dtype])


def test_frozen_parameters_have_no_gradient_and_the_others_the_one_that_they_had(make_config: MakeConfig) -> None:
    config, whole = make_config(*STEP, *ALL_TERMS, FROZEN), step(make_config(*STEP, *ALL_TERMS))
    frozen: dict[str, Tensor | None] = {
        name: None for name in whole.gradients if ".embeddings." in name or ".layer.0." in name
    }
    assert len(frozen) == 5 + 16
    expected = replace(whole, gradients=whole.gradients | frozen)
    for tokens in (None, *BUDGETS):
        assert_same(step(config, cache_tokens=tokens), expected)


def test_a_frozen_temperature_has_no_gradient(make_config: MakeConfig) -> None:
    config = make_config(*STEP, *ALL_TERMS, "optimizer.groups=[{pattern:loss.*,learning_rate:0}]")
    plain = step(config)
    assert plain.gradients["loss.temperature.log_temperature"] is None
    assert_same(step(config, cache_tokens=A_FEW_TEXTS), plain)


def test_under_bf16_a_cached_step_scores_the_same_and_is_as_near_to_float64_as_the_plain_one(
    make_config: MakeConfig,
) -> None:
    config = make_config(*STEP, *ALL_TERMS)
    exact = step(config)
    for tokens in BUDGETS:
        plain, cached = both_under_bf16(with_chunks(config, tokens))
        assert cached.logged == plain.logged
        for name in exact.gradients:
            # The plain one adds up its chunks in bfloat16, the cached one in float32; a tenth is the noise of both.
            assert distance(cached, exact, name) <= 1.1 * distance(plain, exact, name), (tokens, name)


def test_under_bf16_the_sum_over_chunks_is_all_that_is_rounded_differently(make_config: MakeConfig) -> None:
    config = make_config(*STEP, *ALL_TERMS)
    torch.set_autocast_cache_enabled(False)
    try:
        for tokens in BUDGETS:
            # Weights that are cast for each chunk have their gradients added up in float32.
            plain, cached = both_under_bf16(with_chunks(config, tokens))
            assert_same(cached, plain, tolerance=TOLERANCES[torch.float32])
    finally:
        torch.set_autocast_cache_enabled(True)


def both_under_bf16(config: Config) -> tuple[Step, Step]:
    """The plain and the cached step, of the same chunks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    case = Case(config, torch.float32)
    plain = take_step(accelerator, case)
    cached = take_step(accelerator, case, cache_tokens=config.trainer.chunk_tokens)
    AcceleratorState._reset_state(reset_partial_state=True)
    return plain, cached


def distance(ours: Step, exact: Step, name: str) -> float:
    gradient, expected = ours.gradients[name], exact.gradients[name]
    assert gradient is not None
    assert expected is not None
    return float(torch.linalg.vector_norm(gradient.double() - expected))


# Dropout


def test_a_cached_step_drops_what_the_plain_one_of_the_same_chunks_drops(make_config: MakeConfig) -> None:
    config = make_config(*STEP, *ALL_TERMS, DROPOUT)
    for tokens in BUDGETS:
        plain = step(with_chunks(config, tokens))
        random_state = torch.get_rng_state()
        assert_same(step(config, cache_tokens=tokens), plain)
        assert torch.equal(torch.get_rng_state(), random_state)


def test_without_the_same_random_numbers_the_gradient_would_be_another(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In one micro-batch, or the second would begin with other random numbers.
    config = make_config(*STEP, *ALL_TERMS, DROPOUT, "trainer.accumulation_steps=1")
    plain = step(config)
    monkeypatch.setattr(grad_cache, "_set_random_states", lambda states: None)
    other = step(config, cache_tokens=A_FEW_TEXTS)
    assert other.logged == plain.logged
    assert largest_error(other, plain)[0] > 0.1


# Gradient checkpointing


@pytest.mark.parametrize("dropout", ["backbone.dropout=0", DROPOUT])
def test_gradient_checkpointing_computes_again_and_changes_nothing(dropout: str, make_config: MakeConfig) -> None:
    overrides = [*STEP, *ALL_TERMS, dropout]
    steps, passes = {}, {}
    for checkpointing in ("false", "true"):
        config = make_config(*overrides, f"trainer.gradient_checkpointing={checkpointing}")
        for kind, cache_tokens in (("plain", None), ("cached", A_FEW_TEXTS)):
            with count_passes(BertAttention) as count:
                steps[kind, checkpointing] = step(config, cache_tokens=cache_tokens)
            passes[kind, checkpointing] = count.total()
    for other in steps.values():
        assert_same(other, steps["plain", "false"])
    checked = 2 * 2  # layers, padded and in one row: whether texts can be packed
    once = passes["plain", "false"] - checked
    assert {kind: count - checked for kind, count in passes.items()} == {
        ("plain", "false"): once,
        ("cached", "false"): 2 * once,
        ("plain", "true"): 2 * once,
        ("cached", "true"): 3 * once,
    }


def test_frozen_layers_gradient_checkpointing_and_dropout_together_have_the_gradient_of_the_plain_step(
    make_config: MakeConfig,
) -> None:
    plain = step(make_config(*STEP, *ALL_TERMS, DROPOUT, FROZEN))
    config = make_config(*STEP, *ALL_TERMS, DROPOUT, FROZEN, CHECKPOINTING)
    for cache_tokens in (None, A_FEW_TEXTS):
        assert_same(step(config, cache_tokens=cache_tokens), plain)


@contextmanager
def count_passes(kind: type[nn.Module]) -> Iterator[Counter[type[nn.Module]]]:
    """How often modules of this class compute."""
    count: Counter[type[nn.Module]] = Counter()

    def add(module: nn.Module, _: object) -> None:
        count[kind] += isinstance(module, kind)

    handle = register_module_forward_pre_hook(add)
    yield count
    handle.remove()


# Memory


def test_a_cached_step_holds_the_graph_of_one_chunk_at_a_time(make_config: MakeConfig) -> None:
    config = make_config(*STEP, *ALL_TERMS)
    with watch_graphs() as plain:
        step(config)
    cached = {}
    for tokens in (ONE_TEXT, A_FEW_TEXTS):
        with watch_graphs() as cached[tokens]:
            step(config, cache_tokens=tokens)
    # Of its 8 and 11 chunks, those of a micro-batch; and the loss.
    assert (plain.chunks, plain.most) == (19, 12)
    assert cached[A_FEW_TEXTS].chunks == 2 * 19
    assert cached[A_FEW_TEXTS].most == cached[ONE_TEXT].most == 1
    assert 5 * cached[A_FEW_TEXTS].most_bytes < plain.most_bytes
    assert 2 * cached[ONE_TEXT].most_bytes < cached[A_FEW_TEXTS].most_bytes


@dataclass
class Graphs:
    """Tensors saved for backward passes, parameters aside, by graph: 0 is that of the loss, the others the chunks'."""

    chunks: int = 0
    current: int = 0
    held_bytes: Counter[int] = field(default_factory=Counter)
    most: int = 0
    """Graphs that were held at once."""
    most_bytes: int = 0
    """Held by chunks at once."""

    def hold(self, size: int) -> None:
        self.held_bytes[self.current] += size
        self.most = max(self.most, sum(size > 0 for size in self.held_bytes.values()))
        self.most_bytes = max(self.most_bytes, self.held_bytes.total() - self.held_bytes[0])


class Saved:
    """A tensor that a graph holds for as long as this lives."""

    def __init__(self, tensor: Tensor, graphs: Graphs) -> None:
        self.tensor, self.graphs, self.graph = tensor, graphs, graphs.current
        graphs.hold(tensor.nbytes)

    def __del__(self) -> None:
        self.graphs.held_bytes[self.graph] -= self.tensor.nbytes


@contextmanager
def watch_graphs() -> Iterator[Graphs]:
    """Of all models that are trained."""
    graphs = Graphs()
    parameters: set[int] = set()

    def begin(module: nn.Module, _: object) -> None:
        if isinstance(module, TrainedModel):
            graphs.chunks += 1
            graphs.current = graphs.chunks
            parameters.update(parameter.untyped_storage().data_ptr() for parameter in module.parameters())

    def end(module: nn.Module, *_: object) -> None:
        if isinstance(module, TrainedModel):
            graphs.current = 0

    def pack(tensor: Tensor) -> Tensor | Saved:
        return tensor if tensor.untyped_storage().data_ptr() in parameters else Saved(tensor, graphs)

    def unpack(saved: Tensor | Saved) -> Tensor:
        return saved.tensor if isinstance(saved, Saved) else saved

    handles = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield graphs
    for handle in handles:
        handle.remove()
