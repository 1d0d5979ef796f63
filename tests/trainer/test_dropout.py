"""Dropout on a CPU: the share that it drops, its gradient, and when an encoder has it."""

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from torch import nn

from trainer.dropout import FastDropout, drop, fast_dropout

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_mean_stays(share: float) -> None:
    torch.manual_seed(1)
    dropped = drop(torch.ones(1001, 999), share)
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=2e-3)
    kept = dropped[dropped != 0]
    assert kept.unique().tolist() == pytest.approx([1 / (1 - share)], rel=1e-4)
    # No column, row or place within a random number is dropped more than others.
    for means in (dropped.mean(dim=0), dropped.mean(dim=1), dropped.flatten()[: 4 * 249_999].view(-1, 4).mean(dim=0)):
        assert float((means - 1).abs().max()) < 6 * float(dropped.std()) / (dropped.numel() / len(means)) ** 0.5
    neighbours = dropped.flatten()
    assert abs(float(torch.corrcoef(torch.stack([neighbours[:-1], neighbours[1:]]))[0, 1])) < 0.005


def test_nothing_and_all_can_be_dropped() -> None:
    values = torch.randn(5, 3)
    assert torch.equal(drop(values, 0.0), values)
    assert torch.equal(drop(values, 1.0), torch.zeros(5, 3))


def test_the_draw_is_that_of_torchs_generator_and_the_gradient_is_the_mask() -> None:
    values = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    first = drop(values, 0.3)
    assert not torch.equal(first, drop(values, 0.3))
    torch.set_rng_state(state)
    assert torch.equal(first, drop(values, 0.3))
    [gradient] = torch.autograd.grad(first.sum(), values)
    assert torch.equal(gradient * values, first)


def dropouts(encoder: MultiVectorEncoder) -> set[type]:
    return {type(module) for module in encoder.modules() if isinstance(module, nn.Dropout)}


def test_an_encoder_has_it_while_it_trains_alone(encoder: MultiVectorEncoder) -> None:
    before = encoder.encode_document(["a cat, a dog."])[0]
    with fast_dropout(encoder, CPU):
        assert dropouts(encoder) == {FastDropout}
        assert torch.equal(encoder.encode_document(["a cat, a dog."])[0], before)
        features = encoder.preprocess(["a cat", "a dog that barks"], task="document")
        encoder.train()
        drawn = [encoder(dict(features), task="document")["token_embeddings"] for _ in range(2)]
        assert not torch.equal(*drawn)
    assert dropouts(encoder) == {nn.Dropout}


def test_an_encoder_is_as_it_was_where_training_fails(encoder: MultiVectorEncoder) -> None:
    def fail() -> None:
        with fast_dropout(encoder, CPU):
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert dropouts(encoder) == {nn.Dropout}


def test_an_encoder_that_drops_nothing_stays_as_it_is(encoder: MultiVectorEncoder) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with fast_dropout(encoder, CPU):
        assert dropouts(encoder) == {nn.Dropout}
