"""Rank a corpus for every query, exactly, each process a part of it, and score the rankings."""

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.gather import gather_texts
from losses.matryoshka import cut
from losses.maxsim import maxsim
from trainer.data.order import bounds
from trainer.data.retrieval import RetrievalSet
from trainer.metrics import DEPTH, score_rankings

# Documents whose vectors are held at once.
BLOCK_DOCUMENTS = 2048


def evaluate(
    encoder: MultiVectorEncoder, retrieval: RetrievalSet, *, batch_size: int, widths: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return the value of each judged query, by query id, by metric, for the encoder on a retrieval set.

    widths: components, fewer than the model's own, to which the vectors are cut as well; the metrics of these are named
    `ndcg@10/64` and so on. Every process must call it, and all get the same.
    """
    rankings = rank(encoder, retrieval, batch_size=batch_size, widths=widths)
    own_width = max(rankings)
    return {
        name if width == own_width else f"{name}/{width}": values
        for width, ranking in rankings.items()
        for name, values in score_rankings(retrieval.judgements, ranking).items()
    }


@torch.inference_mode()
def rank(
    encoder: MultiVectorEncoder,
    retrieval: RetrievalSet,
    *,
    batch_size: int,
    widths: Sequence[int],
    depth: int | None = None,
    block_documents: int | None = None,
) -> dict[int, dict[str, dict[str, float]]]:
    """Return the score of each query's best documents, best first, by document id, by query id, by width.

    depth: how many documents of a query; None is as many as the metrics read. block_documents: documents whose vectors
    are held at once; None is BLOCK_DOCUMENTS. The model's own width comes first, then `widths`, all from one encoding.
    A query ranks its candidates, or the whole corpus where the set names none. Every process must call it, and all get
    the same.
    """
    processes, depth, block_documents = PartialState(), depth or DEPTH, block_documents or BLOCK_DOCUMENTS
    was_training = encoder.training
    # Encoding switches to evaluation; the loop goes on with dropout afterwards.
    own = list(retrieval.queries.values())
    own = own[slice(*bounds(len(own), processes.process_index, processes.num_processes))]
    queries, query_mask, _ = gather_texts(
        *_pad(encoder.encode_query(own, batch_size=batch_size, show_progress_bar=False), encoder)
    )
    document_ids = list(retrieval.corpus)
    first, last = bounds(len(document_ids), processes.process_index, processes.num_processes)
    rankers = _rankers(retrieval)
    # As many columns as any process can fill: they exchange tensors of one shape.
    columns = min(depth, math.ceil(len(document_ids) / processes.num_processes))
    if retrieval.candidates is not None:
        columns = min(columns, max(map(len, retrieval.candidates.values())))
    no_scores = queries.new_full((len(queries), columns), -math.inf)
    best = {
        width: (no_scores.clone(), torch.zeros_like(no_scores, dtype=torch.int64))
        for width in (queries.shape[-1], *widths)
    }
    for start in range(first, last, block_documents):
        block = document_ids[start : min(start + block_documents, last)]
        texts = [retrieval.corpus[identifier] for identifier in block]
        documents, document_mask = _pad(
            encoder.encode_document(texts, batch_size=batch_size, show_progress_bar=False), encoder
        )
        is_ranked = _is_ranked(block, rankers, queries)
        # Most queries that have candidates have none in a block: to score those would make the time quadratic.
        some = is_ranked.any(dim=1).nonzero().flatten()
        rows = torch.arange(start, start + len(block), device=queries.device).expand(len(some), -1)
        for width, (best_scores, best_rows) in best.items():
            scores = maxsim(
                cut(queries[some], width), cut(documents, width), query_mask[some], document_mask, backend="reference"
            ).masked_fill(~is_ranked[some], -math.inf)
            best_scores[some], best_rows[some] = _best(
                torch.cat([best_scores[some], scores], dim=1), torch.cat([best_rows[some], rows], dim=1), columns
            )
    encoder.train(was_training)
    return {width: _rankings(retrieval, *own_best, depth=depth) for width, own_best in best.items()}


def _rankers(retrieval: RetrievalSet) -> dict[str, list[int]] | None:
    """Rows of the queries that rank a document, by document id; None where all rank all."""
    if retrieval.candidates is None:
        return None
    rankers: dict[str, list[int]] = {identifier: [] for identifier in retrieval.corpus}
    for row, query in enumerate(retrieval.queries):
        for document in retrieval.candidates[query]:
            rankers[document].append(row)
    return rankers


def _is_ranked(block: list[str], rankers: dict[str, list[int]] | None, queries: Tensor) -> Tensor:
    """Which query ranks which document of a block, (Q, N) bool."""
    if rankers is None:
        return queries.new_ones(len(queries), len(block), dtype=torch.bool)
    pairs = [(row, column) for column, document in enumerate(block) for row in rankers[document]]
    is_ranked = queries.new_zeros(len(queries), len(block), dtype=torch.bool)
    is_ranked[*torch.tensor(pairs, dtype=torch.int64, device=queries.device).view(-1, 2).T] = True
    return is_ranked


def _best(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` columns of each query, best first."""
    scores, positions = scores.topk(count, dim=1)
    return scores, rows.gather(1, positions)


def _rankings(retrieval: RetrievalSet, scores: Tensor, rows: Tensor, *, depth: int) -> dict[str, dict[str, float]]:
    """What the best columns (Q, columns) of all processes amount to, by document id, by query id."""
    # gather puts the processes one below the other; a query's columns belong side by side.
    shape = PartialState().num_processes, *scores.shape
    scores, rows = (gather(part).view(shape).transpose(0, 1).flatten(start_dim=1) for part in (scores, rows))
    best = _best(scores, rows, min(depth, scores.shape[1]))
    document_ids = list(retrieval.corpus)
    return {
        # What a query does not rank, and the columns that a smaller part of the corpus lacks, are left out.
        query: {document_ids[row]: score for score, row in zip(*columns, strict=True) if score != -math.inf}
        for query, *columns in zip(retrieval.queries, *(part.tolist() for part in best), strict=True)
    }


def _pad(vectors: Iterable[Tensor], encoder: MultiVectorEncoder) -> tuple[Tensor, Tensor]:
    """Pad (tokens, H) vectors of several texts to (N, J, H) float32, with the mask (N, J) of what is real."""
    texts = list(vectors)
    if not texts:  # fewer texts than processes
        none = torch.empty(0, 0, encoder.get_embedding_dimension() or 0, device=encoder.device)
        return none, none.new_empty(0, 0, dtype=torch.bool)
    # Under autocast they are half as wide: cut vectors would not get unit length, and the empty would not fit.
    padded = pad_sequence(texts, batch_first=True).float()
    lengths = torch.tensor([len(tokens) for tokens in texts], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)
