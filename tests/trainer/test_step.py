"""Numbers of a step, and the gradient of the embeddings."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from configs.schema import Config
from losses.factory import build_loss
from tests.trainer.made import DISTILLATION, POSITIVES, make_data, to_examples, with_config
from trainer.data import Data
from trainer.loop import build_batches, build_model
from trainer.optim import build_optimizer
from trainer.step import Numbers, compute_gradient, embedding_gradients_by_token


def test_numbers_come_back_by_name() -> None:
    accelerator = Accelerator(cpu=True)
    parts = {"loss": torch.tensor(0.5), "contrastive": torch.tensor(0.25)}
    numbers = Numbers(accelerator, parts, {"queries": 4, "signal": 0.0}, alike={"gradient_norm": torch.tensor(2.0)})
    parts["loss"].add_(1)  # what the device does afterwards changes no number
    assert numbers.read() == {"loss": 0.5, "contrastive": 0.25, "queries": 4, "signal": 0, "gradient_norm": 2}


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_the_gradient_of_the_embeddings_is_the_same_by_token(
    cached: bool, encoder: MultiVectorEncoder, make_config: Callable[..., Config]
) -> None:
    config = make_config("data=pairs", "data.path=unused", "trainer.batch_size=4", "trainer.chunk_tokens=24")
    accelerator, data = Accelerator(cpu=True), with_config(make_data(negatives=True), config.data)
    gradients: list[dict[str, Tensor]] = []
    for by_token in (False, True):
        own = deepcopy(encoder).double().eval()
        loss = build_loss(config.loss, width=128, maxsim="reference")
        batches = build_batches(config, data.sets, own, accelerator)
        assert len(batches[0][0].documents.chunks) > 1
        model = build_model(own, loss, config)
        with embedding_gradients_by_token(own, accelerator) if by_token else nullcontext():
            for micro_batches in (batches[0], batches[1]):  # the second adds to what is there
                compute_gradient(accelerator, model, loss, micro_batches, cached=cached)
        assert not [module for module in own.modules() if getattr(module, "sparse", False)]
        gradients.append({name: value.grad for name, value in own.named_parameters() if value.grad is not None})
    plain, of_tokens = gradients
    assert list(plain) == list(of_tokens)
    [name] = [name for name in plain if name.endswith("word_embeddings.weight")]
    assert 0 < (plain[name].abs().sum(dim=1) > 0).sum() < len(plain[name])
    for each, gradient in plain.items():
        assert not of_tokens[each].is_sparse
        torch.testing.assert_close(of_tokens[each], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "keys",
    [
        (
            "data=pairs",
            "data.path=unused",
            "loss.contrastive.max_negative_ratio=0.9",
            "loss.contrastive.symmetric=true",
        ),
        (
            *DISTILLATION,
            "loss.terms.contrastive=0.5",
            "loss.terms.margin_mse=0.5",
            "loss.matryoshka={widths: [128, 64], weights: [1, 1]}",
        ),
    ],
    ids=["contrastive", "teacher"],
)
def test_nothing_waits_for_a_value_of_the_device(
    keys: tuple[str, ...],
    packed: bool,
    encoder: MultiVectorEncoder,
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device whose numbers have no values, so that whoever asks for one gets an error."""
    config = make_config("trainer.batch_size=4", "trainer.chunk_tokens=24", *keys)
    examples = to_examples([[positive, "a dog", "what"] for positive in POSITIVES], [[0.5, 0.25, 0.0]] * len(POSITIVES))
    data = with_config(Data([examples], {}), config.data)
    accelerator = Accelerator(cpu=True)
    encoder.eval()  # dropout of texts in a row is the CPU's
    batches = build_batches(config, data.sets, encoder, accelerator)
    batches.padded_because = None if packed else "it is asked for"
    micro_batches = batches[0]
    assert ("bounds" in micro_batches[0].documents.chunks[0]) == packed
    loss = build_loss(config.loss, width=128, maxsim="reference")
    model = build_model(encoder, loss, config).to("meta")
    optimizer = build_optimizer(encoder, loss.learnt, config.optimizer)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know this device
    parts = compute_gradient(accelerator, model, loss, micro_batches, cached=False)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert {value.device.type for value in (norm, *parts.values())} == {"meta"}
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="item"):
        float(norm)
