"""The gradient of a batch whose activations do not fit into memory (Gao et al. 2021, section 3.2).

The texts are encoded without a graph, the loss gives the gradient of their vectors, and each chunk is encoded again,
with a graph and with the same random numbers, to carry it on to the parameters. The sum is that of one large graph.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class _Chunk:
    features: dict[str, Any]
    task: str
    random_states: tuple[Tensor, Tensor | None]
    vectors: Tensor
    """The leaf whose gradient the loss leaves."""


class GradCache:
    """Stands for the model where a batch is encoded, then replays what it was asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._chunks: list[_Chunk] = []

    def __call__(self, features: dict[str, Any], *, task: str) -> dict[str, Any]:
        """Encode a chunk without a graph; the loss may be differentiated for its token_embeddings."""
        random_states = _random_states(features)
        with torch.no_grad():
            # A copy, since modules write their outputs into the features they get.
            output = self._model(dict(features), task=task)
        vectors = output["token_embeddings"].detach().requires_grad_()
        self._chunks.append(_Chunk(features, task, random_states, vectors))
        return {**output, "token_embeddings": vectors}

    def replay(self, accelerator: Accelerator, learnt: list[nn.Parameter], *, synchronise: bool) -> None:
        """Add to the parameters' gradients what the loss left in the vectors'.

        learnt: parameters outside the encoder, which have their gradient already; synchronise: whether the processes
        exchange their gradients, once, with the last chunk.
        """
        while self._chunks:
            chunk = self._chunks.pop(0)
            synchronises = synchronise and not self._chunks
            with nullcontext() if synchronises else accelerator.no_sync(self._model):
                _set_random_states(chunk.random_states)
                with accelerator.autocast():
                    vectors = self._model(dict(chunk.features), task=chunk.task)["token_embeddings"]
                # DistributedDataParallel waits for a gradient of every parameter.
                also = [parameter for parameter in learnt if parameter.requires_grad] if synchronises else []
                torch.autograd.backward([vectors, *also], [chunk.vectors.grad, *map(torch.zeros_like, also)])


def _random_states(features: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Of the generators that dropout draws from: the CPU's and, where the features lie on one, the device's."""
    device = features["input_ids"].device.type
    return torch.get_rng_state(), None if device == "cpu" else torch.get_device_module(device).get_rng_state()


def _set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    of_cpu, of_device = states
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.get_device_module().set_rng_state(of_device)
