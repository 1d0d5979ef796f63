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
from tests.trainer.made import make_data, with_config
from trainer.loop import build_batches, build_model
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
