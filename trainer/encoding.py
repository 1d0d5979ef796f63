"""Encode a token batch into the vectors and masks that losses take."""

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from losses.batch import EncodedBatch
from trainer.data.batches import Batch
from trainer.data.tokens import TokenizedTexts
from trainer.packing import TextBounds
from trainer.phases import Phases
from trainer.transfer import send

Encode = Callable[..., dict[str, Any]]
"""Takes the features of a chunk and its task; returns token_embeddings and attention_mask, which tokens are scored."""


class TrainedModel(nn.Module):
    """The encoder and what the loss learns, as the one module that DistributedDataParallel synchronises."""

    def __init__(self, encoder: MultiVectorEncoder, learnt: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = learnt

    def forward(self, features: dict[str, Any], *, task: str) -> dict[str, Any]:
        """Encode a chunk of texts of one side."""
        output: dict[str, Any] = self.encoder(features, task=task)
        return output


def encode_batch(encoder: Encode, batch: Batch, device: torch.device, phases: Phases | None = None) -> EncodedBatch:
    """Encode the queries and the documents of a micro-batch."""
    phases = phases or Phases()
    with phases("queries"):
        queries, query_mask = encode_texts(encoder, batch.queries, device, task="query")
    with phases("documents"):
        documents, document_mask = encode_texts(encoder, batch.documents, device, task="document")
    return EncodedBatch(
        queries=queries,
        query_mask=query_mask,
        documents=documents,
        document_mask=document_mask,
        candidates=send(batch.candidates, device),
        teacher_scores=None if batch.teacher_scores is None else send(batch.teacher_scores, device),
        document_ids=send(batch.document_ids, device),
        known_positives=send(batch.known_positives, device),
    )


def encode_texts(encoder: Encode, texts: TokenizedTexts, device: torch.device, *, task: str) -> tuple[Tensor, Tensor]:
    """Return vectors (N, J, H) and scoring mask (N, J) in the order in which the texts were given."""
    outputs = [encoder(_to(chunk, device), task=task) for chunk in texts.chunks]
    vectors = [output["token_embeddings"] for output in outputs]
    rows = texts.order.split([_count(chunk) for chunk in texts.chunks])
    places = [_places(part, chunk, device) for part, chunk in zip(rows, texts.chunks, strict=True)]
    shape = len(texts.order), max(_longest(chunk) for chunk in texts.chunks)
    joined: Tensor = _Join.apply(places, shape, *vectors)
    masks = (output["attention_mask"].bool().view(own.shape[:2]) for output, own in zip(outputs, vectors, strict=True))
    mask: Tensor = _Join.apply(places, shape, *masks)
    return joined, mask


def _count(chunk: dict[str, Any]) -> int:
    return len(chunk["bounds"].lengths) if "bounds" in chunk else len(chunk["input_ids"])


def _longest(chunk: dict[str, Any]) -> int:
    return int(chunk["bounds"].longest if "bounds" in chunk else chunk["input_ids"].shape[1])


def _places(texts: Tensor, chunk: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which text, of those given, each token of a chunk is of, and its place there; both broadcast to the tokens."""
    if "bounds" in chunk:
        rows = texts.repeat_interleave(torch.tensor(chunk["bounds"].lengths))[None]
        columns = chunk["bounds"].positions[None]
    else:
        rows, columns = texts[:, None], torch.arange(_longest(chunk))[None]
    return send(rows, device), send(columns, device)


class _Join(torch.autograd.Function):
    """Put the texts of all chunks where they were given, each filled up with zeros to the longest.

    In one copy; pad, concatenate and index would hold three of all vectors, which is most of what a cached step holds.
    """

    @staticmethod
    def forward(ctx: Any, places: list[tuple[Tensor, Tensor]], shape: tuple[int, int], *chunks: Tensor) -> Tensor:
        ctx.places = places
        joined = chunks[0].new_zeros(*shape, *chunks[0].shape[2:])
        for chunk, (rows, columns) in zip(chunks, places, strict=True):
            joined[rows, columns] = chunk
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient[rows, columns] for rows, columns in ctx.places)


def _to(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy, since modules write their outputs into the features they get."""

    def sent(value: Any) -> Any:
        if isinstance(value, Tensor):
            return send(value, device)
        return value.to(device) if isinstance(value, TextBounds) else value

    return {name: sent(value) for name, value in features.items()}
