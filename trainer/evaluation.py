"""Rank a corpus for every query, exactly, and score the rankings."""

from collections.abc import Iterable

import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.maxsim import maxsim
from trainer.data.retrieval import RetrievalSet
from trainer.metrics import DEPTH, score_rankings

# Documents whose vectors are held at once.
BLOCK_DOCUMENTS = 2048


def evaluate(encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int) -> dict[str, float]:
    """Return every metric of `trainer.metrics` for the encoder on a retrieval set."""
    return score_rankings(retrieval.judgements, rank(encoder, retrieval, batch_size=batch_size))


@torch.inference_mode()
def rank(encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int) -> dict[str, dict[str, float]]:
    """Return the score of the best documents of the whole corpus, by document id, by query id."""
    was_training = encoder.training
    # Encoding switches to evaluation; the loop goes on with dropout afterwards.
    queries, query_mask = _pad(
        encoder.encode_query(list(retrieval.queries.values()), batch_size=batch_size, show_progress_bar=False)
    )
    document_ids = list(retrieval.corpus)
    best = torch.empty(len(retrieval.queries), 0, device=queries.device)
    best_rows = torch.empty(len(retrieval.queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(document_ids), BLOCK_DOCUMENTS):
        texts = [retrieval.corpus[identifier] for identifier in document_ids[start : start + BLOCK_DOCUMENTS]]
        documents, document_mask = _pad(encoder.encode_document(texts, batch_size=batch_size, show_progress_bar=False))
        scores = maxsim(queries, documents, query_mask, document_mask)
        rows = torch.arange(start, start + len(texts), device=scores.device).expand(len(queries), -1)
        best, best_rows = torch.cat([best, scores], dim=1), torch.cat([best_rows, rows], dim=1)
        best, positions = best.topk(min(DEPTH, best.shape[1]), dim=1)
        best_rows = best_rows.gather(1, positions)
    encoder.train(was_training)
    return {
        query: {document_ids[row]: score for row, score in zip(rows, scores, strict=True)}
        for query, rows, scores in zip(retrieval.queries, best_rows.tolist(), best.tolist(), strict=True)
    }


def _pad(vectors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad (tokens, H) vectors of several texts to (N, J, H), with the mask (N, J) of what is real."""
    texts = list(vectors)
    padded = pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in texts], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)
