"""One optimiser step: its gradient, and its numbers, which are read without making the device wait."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn

from architectures.heads import backbone_of
from losses.factory import Loss
from trainer.data.batches import Batch
from trainer.encoding import TrainedModel, encode_batch
from trainer.grad_cache import GradCache
from trainer.phases import Phases
from trainer.transfer import send


def compute_gradient(
    accelerator: Accelerator,
    model: TrainedModel,
    loss: Loss,
    micro_batches: list[Batch],
    *,
    cached: bool,
    sets: int = 1,
    phases: Phases | None = None,
) -> dict[str, Tensor]:
    """Leave in the parameters the gradient of the mean loss over all queries of the step, on all processes, which
    synchronise once; return what this process adds to the means of that loss and of all that it logs and, where data
    has several sets, to the sum of the loss and the number of queries of each, as `loss of set 0`, `queries of set 0`.

    cached: encode twice and hold the activations of one chunk at a time.
    """
    phases = phases or Phases()
    logged: dict[str, Tensor] = {}
    of_sets = torch.zeros(2, sets, device=accelerator.device)
    for batch in micro_batches:
        last = batch is micro_batches[-1]
        encoder = GradCache(model) if cached else model
        with nullcontext() if last and not cached else accelerator.no_sync(model):
            with accelerator.autocast():
                encoded = encode_batch(encoder, batch, accelerator.device, phases)
                with phases("loss"):
                    values, parts = loss(encoded)
            with phases("backward"):
                # DistributedDataParallel takes the mean over processes, and the shares make a sum of it.
                accelerator.backward(values.mean() * (batch.share * accelerator.num_processes))
        if isinstance(encoder, GradCache):
            with phases("backward"):
                encoder.replay(accelerator, list(loss.learnt.parameters()), synchronise=last)
        values = values.detach()
        if sets > 1:
            places = send(torch.tensor([place.set for place in batch.places]), values.device)
            of_sets.index_add_(1, places, torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)]))
        for name, part in {"loss": values.mean(), **parts}.items():
            logged[name] = logged.get(name, 0.0) + part * batch.share
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    if sets > 1:
        for what, row in zip(("loss", "queries"), of_sets, strict=True):
            logged |= {f"{what} of set {index}": value for index, value in enumerate(row)}
    return logged


@contextmanager
def embedding_gradients_by_token(encoder: MultiVectorEncoder, accelerator: Accelerator) -> Iterator[None]:
    """Keep the gradient of the token embeddings by token until `compute_gradient` has seen a step's last chunk, in one
    process on a CPU: as a matrix of the whole vocabulary, each chunk of a thousand tokens would write and add 50 MB."""
    embedding = backbone_of(encoder).model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or accelerator.device.type != "cpu" or accelerator.num_processes > 1:
        yield
        return
    was_sparse, embedding.sparse = embedding.sparse, True
    try:
        yield
    finally:
        embedding.sparse = was_sparse


class Numbers:
    """Numbers of a step, on their way from the device to the host."""

    def __init__(
        self,
        accelerator: Accelerator,
        parts: Mapping[str, Tensor],
        counts: Mapping[str, float],
        *,
        alike: Mapping[str, Tensor],
    ) -> None:
        """parts and counts: what this process adds, on the device and on the host; alike: what all processes have
        alike, on the device. Every process must call it."""
        self._names = [*parts, *counts, *alike]
        device = accelerator.device
        on_host = torch.tensor(list(counts.values()))
        values = torch.cat([torch.stack(list(parts.values())), send(on_host, device)])
        if accelerator.num_processes > 1:
            # One exchange a step; float32 holds every count below 16 million.
            values = accelerator.reduce(values, reduction="sum")
        values = torch.cat([values, torch.stack(list(alike.values())).to(values)])
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._values = values.to("cpu", non_blocking=self._arrived is not None)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """Sums over the processes, and what they have alike, by name. Waits until the device has come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
