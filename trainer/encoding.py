"""Encode a token batch into the vectors and masks that losses take."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.batch import EncodedBatch
from trainer.data.batches import Batch, TokenizedTexts


def encode_batch(encoder: nn.Module, batch: Batch, device: torch.device) -> EncodedBatch:
    """Encode the queries and the documents of a micro-batch, with gradients."""
    queries, query_mask = encode_texts(encoder, batch.queries, device, task="query")
    documents, document_mask = encode_texts(encoder, batch.documents, device, task="document")
    return EncodedBatch(
        queries=queries,
        query_mask=query_mask,
        documents=documents,
        document_mask=document_mask,
        positive_index=torch.arange(len(queries), device=device),
    )


def encode_texts(
    encoder: nn.Module, texts: TokenizedTexts, device: torch.device, *, task: str
) -> tuple[Tensor, Tensor]:
    """Return vectors (N, J, H) and scoring mask (N, J) in the order in which the texts were given."""
    outputs = [encoder(_to(chunk, device), task=task) for chunk in texts.chunks]
    longest = max(output["token_embeddings"].shape[1] for output in outputs)
    # Padded here and not before: the backbone computes each chunk at its own length.
    vectors = [
        F.pad(output["token_embeddings"], (0, 0, 0, longest - output["token_embeddings"].shape[1]))
        for output in outputs
    ]
    masks = [
        F.pad(output["attention_mask"].bool(), (0, longest - output["attention_mask"].shape[1])) for output in outputs
    ]
    restore = texts.restore.to(device)
    return torch.cat(vectors)[restore], torch.cat(masks)[restore]


def _to(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy, since modules write their outputs into the features they get."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }
