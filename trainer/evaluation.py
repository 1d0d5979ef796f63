"""Rank a corpus for every query, exactly, each process a part of it, and score the rankings."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.gather import gather_texts
from losses.maxsim import maxsim
from trainer.data.batches import bounds
from trainer.data.retrieval import RetrievalSet
from trainer.metrics import DEPTH, score_rankings

# Documents whose vectors are held at once.
BLOCK_DOCUMENTS = 2048


def evaluate(encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int) -> dict[str, float]:
    """Return every metric of `trainer.metrics` for the encoder on a retrieval set. Every process must call it."""
    return score_rankings(retrieval.judgements, rank(encoder, retrieval, batch_size=batch_size))


@torch.inference_mode()
def rank(encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int) -> dict[str, dict[str, float]]:
    """Return the score of the best documents of the whole corpus, by document id, by query id, to every process."""
    processes = PartialState()
    was_training = encoder.training
    # Encoding switches to evaluation; the loop goes on with dropout afterwards.
    own = list(retrieval.queries.values())
    own = own[slice(*bounds(len(own), processes.process_index, processes.num_processes))]
    queries, query_mask, _ = gather_texts(
        *_pad(encoder.encode_query(own, batch_size=batch_size, show_progress_bar=False), encoder)
    )
    document_ids = list(retrieval.corpus)
    first, last = bounds(len(document_ids), processes.process_index, processes.num_processes)
    best = torch.empty(len(queries), 0, device=queries.device)
    best_rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(first, last, BLOCK_DOCUMENTS):
        stop = min(start + BLOCK_DOCUMENTS, last)
        texts = [retrieval.corpus[identifier] for identifier in document_ids[start:stop]]
        documents, document_mask = _pad(
            encoder.encode_document(texts, batch_size=batch_size, show_progress_bar=False), encoder
        )
        scores = maxsim(queries, documents, query_mask, document_mask, backend="reference")
        rows = torch.arange(start, stop, device=scores.device).expand(len(queries), -1)
        best, best_rows = _best(torch.cat([best, scores], dim=1), torch.cat([best_rows, rows], dim=1), DEPTH)
    # Every process sends as many columns as the largest part has; those that it lacks come last.
    missing = min(DEPTH, math.ceil(len(document_ids) / processes.num_processes)) - best.shape[1]
    best, best_rows = (
        gather(F.pad(part, (0, missing), value=value).contiguous()).view(processes.num_processes, len(queries), -1)
        for part, value in ((best, -math.inf), (best_rows, -1))
    )
    best, best_rows = _best(
        best.transpose(0, 1).flatten(1), best_rows.transpose(0, 1).flatten(1), min(DEPTH, len(document_ids))
    )
    encoder.train(was_training)
    return {
        query: {document_ids[row]: score for row, score in zip(rows, scores, strict=True)}
        for query, rows, scores in zip(retrieval.queries, best_rows.tolist(), best.tolist(), strict=True)
    }


def _best(scores: Tensor, rows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The best `depth` columns of each query, best first."""
    scores, positions = scores.topk(min(depth, scores.shape[1]), dim=1)
    return scores, rows.gather(1, positions)


def _pad(vectors: Iterable[Tensor], encoder: MultiVectorEncoder) -> tuple[Tensor, Tensor]:
    """Pad (tokens, H) vectors of several texts to (N, J, H), with the mask (N, J) of what is real."""
    texts = list(vectors)
    if not texts:  # fewer texts than processes
        none = torch.empty(0, 0, encoder.get_embedding_dimension() or 0, device=encoder.device)
        return none, none.new_empty(0, 0, dtype=torch.bool)
    padded = pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in texts], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)
