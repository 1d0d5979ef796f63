"""The backbone's layers compiled by torch (trainer.compile), with lengths that vary from chunk to chunk."""

import time
from collections.abc import Callable
from statistics import median

import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import nn
from torch._dynamo.utils import counters

from architectures.heads import backbone_of
from configs.schema import ConfigError
from trainer.data.batches import Batch
from trainer.encoding import encode_texts

# How often a batch is encoded with either kind of layers, of which the median counts.
ROUNDS = 3
# Below, compiled layers are not worth the time that compiling takes.
PAYS = 1.03


def layers_of(encoder: MultiVectorEncoder) -> nn.ModuleList:
    """The layers of the backbone: of its lists of modules the one with most parameters.

    Raises ConfigError where it has none.
    """
    lists = [module for module in backbone_of(encoder).model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        name = type(backbone_of(encoder).model).__name__
        raise ConfigError(f"trainer.compile=true: {name} has no list of layers: set it to false")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def compilations() -> int:
    """Graphs that torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def compile_layers(encoder: MultiVectorEncoder, batch: Batch, accelerator: Accelerator) -> str:
    """Compile the layers in place, and say in a line what that took and gained for the first step's texts, there and
    back."""
    layers = layers_of(encoder)

    def encode() -> None:
        with accelerator.autocast():
            for task, texts in (("query", batch.queries), ("document", batch.documents)):
                vectors, _ = encode_texts(encoder, texts, accelerator.device, task=task)
                vectors.sum().backward()

    encoder.train()
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        without = _seconds(encode, accelerator.device)
        started = time.perf_counter()
        for layer in layers:
            layer.compile(dynamic=True)
        encode()
        took = time.perf_counter() - started
        ratio = without / _seconds(encode, accelerator.device)
    encoder.zero_grad()
    words = f"{len(layers)} layers, compiled in {took:.0f} seconds, encode {ratio:.2f} times as fast"
    return words if ratio >= PAYS else f"{words}, which does not pay: trainer.compile=false"


def _seconds(encode: Callable[[], None], device: torch.device) -> float:
    """Of the median round, after one that does not count."""
    rounds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        encode()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter() - started)
    return median(rounds[1:])
