"""A state written, read back into objects that know nothing of it, and compared bit for bit."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense
from torch import Tensor, nn

from configs.schema import Config, OptimizerConfig, OptimizerName
from losses.temperature import LearntTemperature
from trainer.checkpoint import (
    Progress,
    TrainState,
    UnreadableCheckpoint,
    gather_random_states,
    random_state,
    set_random_state,
)
from trainer.encoding import TrainedModel
from trainer.optim import build_optimizer, build_schedule

MakeConfig = Callable[..., Config]
Random = Callable[[], list[float]]

STEPS = 10
FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]
PROGRESS = Progress(
    step=4,
    totals={"queries": 15, "tokens": 301, "padded_tokens": 420, "seconds": 0.1 + 0.2},
    before={"map": 1 / 3},
    after={"map": 2 / 3},
    best=2 / 3,
    best_step=2,
    seconds=7.25,
)


@pytest.fixture
def settings(request: pytest.FixtureRequest, make_config: MakeConfig) -> OptimizerConfig:
    """Two steps of warm-up, then down: every step has a rate of its own. Of AdamW, where a test names none."""
    name = getattr(request, "param", "adamw")
    return make_config(f"optimizer={name}", "optimizer.learning_rate=0.1", "optimizer.warmup_fraction=0.2").optimizer


OF_BOTH = pytest.mark.parametrize("settings", ["adamw", "muon"], indirect=True)


def make_state(
    settings: OptimizerConfig,
    *,
    seed: int,
    steps: int = STEPS,
    scaler: torch.amp.GradScaler | None = None,
    tied: bool = False,
) -> TrainState:
    """Two layers, with matrices that are decayed and biases that are not, and a temperature."""
    torch.manual_seed(seed)
    first, second = Dense(3, 4), Dense(4, 3)
    layers: list[nn.Module] = [first, second]
    if tied:
        second = Dense(3, 4)
        second.linear.weight = first.linear.weight
        layers = [nn.ModuleDict({"first": first, "second": second})]
    encoder = MultiVectorEncoder(modules=layers, device="cpu")
    learnt = nn.ModuleDict({"temperature": LearntTemperature(0.1 * seed, (0.01, 10.0))})
    optimizer = build_optimizer(encoder, learnt, settings)
    schedule = build_schedule(optimizer, settings, steps=steps)
    return TrainState(TrainedModel(encoder, learnt), optimizer, schedule, scaler)


def train(state: TrainState, *, first: int, steps: int) -> list[float]:
    """Take steps whose gradients depend on weights and number alone; return the rates they had."""
    rates = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for parameter in state.model.parameters():
            loss = loss + (parameter * torch.randn(parameter.shape, generator=generator)).sin().sum()
        if state.scaler is not None:
            loss = state.scaler.scale(loss)
        loss.backward()
        rates.append(float(state.optimizer.param_groups[0]["lr"]))
        if state.scaler is None:
            state.optimizer.step()
        else:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.schedule.step()
        state.optimizer.zero_grad()
    return rates


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of the weights and of the moments."""
    moments = {
        f"{parameter}/{name}": value
        for parameter, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return deepcopy(dict(state.model.state_dict()) | moments)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def groups(state: TrainState) -> list[dict[str, Any]]:
    """The optimiser's settings; JSON makes a list of a tuple."""
    groups: list[dict[str, Any]] = json.loads(json.dumps(state.optimizer.state_dict()["param_groups"]))
    return groups


def saved(settings: OptimizerConfig, folder: Path) -> TrainState:
    """A state after four steps, written to the folder."""
    state = make_state(settings, seed=1)
    train(state, first=0, steps=4)
    state.progress = deepcopy(PROGRESS)
    state.save(folder, [random_state()])
    return state


# Written and read


@OF_BOTH
def test_a_state_that_is_read_has_the_weights_moments_rate_and_progress_of_the_one_written(
    settings: OptimizerConfig, tmp_path: Path
) -> None:
    written = saved(settings, tmp_path / "state")
    read = make_state(settings, seed=2)
    assert not torch.equal(next(read.model.parameters()), next(written.model.parameters()))
    read.load(tmp_path / "state")
    assert_equal(tensors(read), tensors(written))
    # Two moments and a count for each of two matrices, two biases and the temperature; Muon has one for a matrix.
    assert len(tensors(read)) == 5 + (5 * 3 if settings.name is OptimizerName.adamw else 3 * 3 + 2)
    assert groups(read) == groups(written)
    assert read.schedule.get_last_lr() == written.schedule.get_last_lr()
    assert read.progress == PROGRESS


@OF_BOTH
def test_the_steps_after_reading_are_those_of_a_state_that_was_never_written(
    settings: OptimizerConfig, tmp_path: Path
) -> None:
    straight = make_state(settings, seed=1)
    rates = train(straight, first=0, steps=STEPS)
    saved(settings, tmp_path / "state")
    read = make_state(settings, seed=2)
    read.load(tmp_path / "state")
    assert train(read, first=4, steps=STEPS - 4) == rates[4:]
    assert len(set(rates)) > STEPS / 2
    assert_equal(tensors(read), tensors(straight))


def test_a_state_that_was_read_is_written_with_the_same_tensors_and_progress(
    settings: OptimizerConfig, tmp_path: Path
) -> None:
    saved(settings, tmp_path / "first")
    read = make_state(settings, seed=2)
    states = read.load(tmp_path / "first")
    read.save(tmp_path / "second", states)
    for name in FILES[:2]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    first, second = (json.loads((tmp_path / name / "state.json").read_text()) for name in ("first", "second"))
    for key in ("progress", "parameter_groups", "scaler", "random_states"):
        assert first[key] == second[key]
    assert first["schedule"]["last_epoch"] == second["schedule"]["last_epoch"] == 4


def test_weights_that_two_layers_share_are_shared_after_reading(settings: OptimizerConfig, tmp_path: Path) -> None:
    written, read = (make_state(settings, seed=seed, tied=True) for seed in (1, 2))
    train(written, first=0, steps=2)
    written.save(tmp_path / "state", [])
    read.load(tmp_path / "state")
    assert_equal(tensors(read), tensors(written))
    assert isinstance(read.model, TrainedModel)
    layers = read.model.encoder[0]
    assert isinstance(layers, nn.ModuleDict)
    first, second = layers.values()
    assert isinstance(first, Dense)
    assert isinstance(second, Dense)
    assert second.linear.weight is first.linear.weight


def test_a_schedule_of_another_length_sets_its_own_rate_at_once(settings: OptimizerConfig, tmp_path: Path) -> None:
    short = saved(settings, tmp_path / "state").schedule.get_last_lr()
    straight = make_state(settings, seed=1, steps=2 * STEPS)
    rates = train(straight, first=0, steps=2 * STEPS)
    read = make_state(settings, seed=2, steps=2 * STEPS)
    read.load(tmp_path / "state")
    # Of the groups that are decayed and that are not.
    assert read.schedule.get_last_lr() == [rates[4]] * 2
    assert rates[4] not in short
    assert [group["lr"] for group in read.optimizer.param_groups] == [rates[4]] * 2
    assert train(read, first=4, steps=2 * STEPS - 4) == rates[4:]


def test_the_scale_of_half_precision_goes_on(settings: OptimizerConfig, tmp_path: Path) -> None:
    def scaler(scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    written = make_state(settings, seed=1, scaler=scaler(2.0**127))
    train(written, first=0, steps=1)  # overflows, which halves the scale
    assert written.scaler is not None
    assert written.scaler.get_scale() < 2.0**127
    written.scaler.update(8.0)
    train(written, first=1, steps=2)  # two of the three steps after which it grows
    written.save(tmp_path / "state", [])

    read = make_state(settings, seed=2, scaler=scaler(2.0**16))
    read.load(tmp_path / "state")
    assert read.scaler is not None
    assert read.scaler.state_dict() == written.scaler.state_dict()
    assert read.scaler.get_scale() == 8.0
    for state in (written, read):
        train(state, first=3, steps=1)
    assert written.scaler.get_scale() == read.scaler.get_scale() == 16.0
    assert_equal(tensors(read), tensors(written))


# The files


def test_a_checkpoint_is_two_files_of_tensors_and_one_of_json(settings: OptimizerConfig, tmp_path: Path) -> None:
    saved(settings, tmp_path / "state")
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == FILES
    for name in FILES[:2]:
        content = (tmp_path / "state" / name).read_bytes()
        # A length, a header of JSON, and the numbers that it describes: no byte is left that could be a pickle.
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        ends = sorted(entry["data_offsets"] for entry in header.values())
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert 8 + length + ends[-1][1] == len(content)
        assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert isinstance(json.loads((tmp_path / "state" / "state.json").read_text()), dict)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [None, 0.0, 0.5, 0.999], ids=["missing", "empty", "half", "short of its end"])
def test_a_file_that_is_not_whole_makes_the_checkpoint_unreadable_and_changes_nothing(
    kept: float | None, name: str, settings: OptimizerConfig, tmp_path: Path
) -> None:
    saved(settings, tmp_path / "state")
    path = tmp_path / "state" / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(kept * len(content))])

    read = make_state(settings, seed=2)
    train(read, first=7, steps=1)
    before, before_groups, rate = tensors(read), deepcopy(groups(read)), read.schedule.get_last_lr()
    draw = torch.get_rng_state()
    with pytest.raises(UnreadableCheckpoint) as caught:
        read.load(tmp_path / "state")
    assert str(caught.value).startswith(f"{tmp_path / 'state'} is not whole (")
    assert_equal(tensors(read), before)
    assert groups(read) == before_groups
    assert read.schedule.get_last_lr() == rate
    assert read.progress == Progress()
    assert torch.equal(torch.get_rng_state(), draw)


def test_a_file_of_no_tensors_in_place_of_the_weights_is_unreadable(settings: OptimizerConfig, tmp_path: Path) -> None:
    saved(settings, tmp_path / "state")
    # As a disk that lost its power leaves a file: the length is right, the content is not.
    size = (tmp_path / "state" / "model.safetensors").stat().st_size
    (tmp_path / "state" / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(UnreadableCheckpoint):
        make_state(settings, seed=2).load(tmp_path / "state")


def test_an_existing_folder_is_not_written_over(settings: OptimizerConfig, tmp_path: Path) -> None:
    saved(settings, tmp_path / "state")
    content = (tmp_path / "state" / "state.json").read_bytes()
    with pytest.raises(FileExistsError):
        make_state(settings, seed=2).save(tmp_path / "state", [])
    assert (tmp_path / "state" / "state.json").read_bytes() == content


# Random states


def draw_torch() -> list[float]:
    return torch.rand(5).tolist() + torch.nn.functional.dropout(torch.ones(9)).tolist()


def draw_numpy() -> list[float]:
    return [float(value) for value in np.random.standard_normal(5)]


def draw_python() -> list[float]:
    return [random.gauss(0, 1), random.random(), random.gauss(0, 1)]


@pytest.mark.parametrize("draw", [draw_torch, draw_numpy, draw_python])
def test_a_generator_that_was_put_back_draws_the_same_again(draw: Random) -> None:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    # NumPy and Python draw normal numbers in pairs: after an odd number of them, one is kept for the next call.
    torch.randn(3), np.random.standard_normal(3), random.gauss(0, 1)
    state = random_state()
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected
    set_random_state(json.loads(json.dumps(state)))
    assert draw() == expected


def test_random_states_are_read_as_they_were_written(settings: OptimizerConfig, tmp_path: Path) -> None:
    state = saved(settings, tmp_path / "first")
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(random_state())
    state.save(tmp_path / "second", states)
    first, second = make_state(settings, seed=2).load(tmp_path / "second")
    for seed, read in ((3, first), (4, second)):
        set_random_state(read)
        drawn = torch.rand(4)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(4), drawn)


def test_one_process_gathers_its_own_state_alone() -> None:
    torch.manual_seed(6)
    assert gather_random_states() == [random_state()]


def test_saving_draws_no_random_number(settings: OptimizerConfig, tmp_path: Path) -> None:
    state = make_state(settings, seed=1)
    before = random_state()
    state.save(tmp_path / "state", gather_random_states())
    assert random_state() == before
