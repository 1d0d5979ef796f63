"""Compiled layers: the same training, no compilation after the first steps, and a word where they do not pay."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import nn

from configs.schema import Config, ConfigError
from tests.trainer.test_loop import OVERRIDES, make_batches, make_data, run, without_dropout
from trainer import compiling
from trainer.compiling import compile_layers, layers_of
from trainer.plan import check_encoder


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, guarded and differentiated as ever; what torch makes of them is torch's."""
    compile_as_ever = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compile_as_ever(module, backend="aot_eager", **options)
    )


def test_training_is_the_same_and_compiles_nothing_after_its_first_step(
    encoder: MultiVectorEncoder, make_config: Callable[..., Config], tmp_path: Any
) -> None:
    config = make_config(*OVERRIDES, "trainer.steps=4")
    compiled = replace(
        config, output_dir=str(tmp_path / "compiled"), trainer=replace(config.trainer, compile=True, pack=True)
    )
    plain = run(without_dropout(deepcopy(encoder)), config)
    ours = run(without_dropout(encoder), compiled)
    for name in ("train/loss", "train/gradient_norm"):
        expected = [line[name] for line in plain.metrics[1:]]
        assert [line[name] for line in ours.metrics[1:]] == pytest.approx(expected, rel=1e-4)
    assert "compile  2 layers, compiled in " in ours.said
    graphs = [line["train/compilations"] for line in ours.metrics[1:]]
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:1] * 3
    assert "train/compilations" not in plain.metrics[1]


@pytest.mark.parametrize(("rate", "pays"), [(1.02, False), (1.04, True)])
def test_a_line_says_what_it_gained(
    rate: float, pays: bool, encoder: MultiVectorEncoder, make_config: Callable[..., Config], monkeypatch: Any
) -> None:
    compiled = list[nn.Module]()
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: compiled.append(module))
    seconds = iter([rate, 1.0])
    monkeypatch.setattr(compiling, "_seconds", lambda encode, device: next(seconds))
    batches = make_batches(encoder, make_config(*OVERRIDES), make_data())
    state = torch.get_rng_state()
    words = compile_layers(encoder, batches[0][0], Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert compiled == list(layers_of(encoder))
    assert words.startswith("2 layers, compiled in ")
    assert words.endswith(
        f"encode {rate:.2f} times as fast" + ("" if pays else ", which does not pay: trainer.compile=false")
    )
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_layers_are_those_of_the_backbone(encoder: MultiVectorEncoder, make_config: Callable[..., Config]) -> None:
    transformer: Any = encoder[0]
    assert layers_of(encoder) is transformer.model.encoder.layer
    transformer.model.encoder.layer = nn.Sequential(*transformer.model.encoder.layer)
    with pytest.raises(ConfigError, match=r"^trainer\.compile=true: BertModel has no list of layers: set it to false$"):
        check_encoder(make_config(*OVERRIDES, "trainer.compile=true"), encoder)
