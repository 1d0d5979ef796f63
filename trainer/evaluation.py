"""Rank a corpus for every query, exactly, each process a part of it, and score the rankings.

What is encoded together is the same on any number of processes, and so is, to the last bit, what is found.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configs.schema import ConfigError
from losses.gather import gather_texts
from losses.matryoshka import cut
from losses.maxsim import maxsim
from trainer.data.retrieval import RetrievalSet
from trainer.data.tokens import Task, at_length
from trainer.metrics import DEPTH, QueryScores, score_rankings

# Texts of documents whose vectors are held at once.
BLOCK_DOCUMENTS = 512
# Queries whose best documents the processes exchange at once.
EXCHANGED_QUERIES = 1024
# The key of no document, below that of any score.
NOTHING = torch.iinfo(torch.int64).min

Progress = Callable[[int, int], None]
"""Told how many texts of documents this process has ranked, of how many."""


@dataclass(frozen=True, eq=False)
class Ranking(Mapping[str, dict[str, float]]):
    """Score of each query's best documents, best first, by document id, by query id.

    A query becomes a dictionary when it is asked for: all of them would take 100 bytes a score.
    """

    query_rows: dict[str, int]
    """By query id."""
    document_ids: Sequence[str]
    """Of all documents that were ranked."""
    best: Tensor
    """(Q, K) int64, falling: score and row of a document, as `_keys` makes them."""

    def __getitem__(self, query: str) -> dict[str, float]:
        keys = self.best[self.query_rows[query]]
        scores, rows = _scores_and_rows(keys[keys != NOTHING])
        return {self.document_ids[row]: score for score, row in zip(scores.tolist(), rows.tolist(), strict=True)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.query_rows)

    def __len__(self) -> int:
        return len(self.query_rows)


def evaluate(
    encoder: MultiVectorEncoder,
    sets: Mapping[str, RetrievalSet],
    *,
    batch_size: int,
    widths: Sequence[int],
    progress: Progress | None = None,
) -> dict[str, QueryScores]:
    """Return the value of each judged query, by query id, by metric, by set, for the encoder on retrieval sets.

    widths: components, fewer than the model's own, to which the vectors are cut as well; the metrics of these are named
    `ndcg@10/64` and so on. Every process must call it, and all get the same.
    """
    scores = dict[str, QueryScores]()
    for name, retrieval in sets.items():
        rankings = rank(encoder, retrieval, batch_size=batch_size, widths=widths, progress=progress)
        own_width = max(rankings)
        scores[name] = {
            metric if width == own_width else f"{metric}/{width}": values
            for width, ranking in rankings.items()
            for metric, values in score_rankings(retrieval.judgements, ranking).items()
        }
    return scores


@torch.inference_mode()
def rank(
    encoder: MultiVectorEncoder,
    retrieval: RetrievalSet,
    *,
    batch_size: int,
    widths: Sequence[int],
    depth: int | None = None,
    block_documents: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Ranking]:
    """Return each query's best documents by width: the model's own first, then `widths`, all from one encoding.

    depth: how many documents of a query; None is as many as the metrics read. block_documents: texts of documents whose
    vectors are held at once; None is BLOCK_DOCUMENTS. What grows with the queries is held whole: their vectors and the
    keys of their best documents.
    A query ranks its candidates, or the whole corpus where the set names none. Documents with the same text are encoded
    once and tie, and where scores tie the higher id is first, as trec_eval has it. Every process must call it, and all
    get the same. Raises ConfigError where a score is not a number.
    """
    processes, depth, block_documents = PartialState(), depth or DEPTH, block_documents or BLOCK_DOCUMENTS
    was_training = encoder.training
    # Encoding switches to evaluation; the loop goes on with dropout afterwards.
    queries, query_mask = _encode_queries(encoder, retrieval, batch_size)
    # In this order the higher of two rows is the higher id.
    document_ids, rankers = _ranked_documents(retrieval)
    rows_of: dict[str, list[int]] = {}
    for row, identifier in enumerate(document_ids):
        rows_of.setdefault(retrieval.corpus[identifier], []).append(row)
    # By length, so that little is padded, and the block that takes the most memory is the first.
    texts = sorted(rows_of, key=len, reverse=True)
    starts = range(0, len(texts), block_documents)[processes.process_index :: processes.num_processes]
    columns = min(depth, len(document_ids))
    if retrieval.candidates is not None:
        columns = min(columns, max(map(len, retrieval.candidates.values()), default=0))
    best = {
        width: torch.full((len(queries), columns), NOTHING, device=queries.device)
        for width in (queries.shape[-1], *widths)
    }
    ranked, own_texts = 0, sum(len(texts[start : start + block_documents]) for start in starts)
    not_a_number: tuple[int, str, str] | None = None
    for start in starts:
        block = texts[start : start + block_documents]
        documents, document_mask = _pad(encode(encoder, block, retrieval, "document", batch_size=batch_size), encoder)
        places = [(column, row) for column, text in enumerate(block) for row in rows_of[text]]
        of_block, rows = torch.tensor(places, device=queries.device).T
        is_ranked = _is_ranked([document_ids[row] for _, row in places], retrieval, rankers, queries)
        # Most queries that have candidates have none in a block: to score those would make the time quadratic.
        some = is_ranked.any(dim=1).nonzero().flatten()
        is_ranked = is_ranked[some]
        for width, keys in best.items():
            scores = maxsim(
                cut(queries[some], width), cut(documents, width), query_mask[some], document_mask, backend="reference"
            )[:, of_block]
            if not_a_number is None and (found := (scores.isnan() & is_ranked).nonzero()).numel():
                query, column = found[0].tolist()
                names = list(retrieval.queries)[some[query]], document_ids[rows[column]]
                not_a_number = start, *names
            found = torch.cat([keys[some], _keys(scores, rows).masked_fill(~is_ranked, NOTHING)], dim=1)
            keys[some] = found.topk(columns, dim=1).values
        if not_a_number is not None:
            break
        del documents, document_mask  # before the next block is encoded
        ranked += len(block)
        if progress is not None:
            progress(ranked, own_texts)
    encoder.train(was_training)
    if broken := [each for each in gather_object([not_a_number]) if each is not None]:
        _, query, document = min(broken)
        raise ConfigError(
            f"the score of query {query} and document {document} is not a number: the model's weights are broken, or "
            "too large for its precision: take an earlier checkpoint, or float32"
        )
    query_rows = {query: row for row, query in enumerate(retrieval.queries)}
    return {width: Ranking(query_rows, document_ids, _of_all_processes(keys)) for width, keys in best.items()}


def encode(
    encoder: MultiVectorEncoder, texts: list[str], retrieval: RetrievalSet, task: Task, **options: Any
) -> list[Any]:
    """Return what sentence-transformers returns for each text of a side, by default its vectors (tokens, H), with the
    prefix and the length of the set; options: of its `encode_query` and `encode_document`."""
    is_query = task == "query"
    method: Any = encoder.encode_query if is_query else encoder.encode_document
    prefix, length = (
        (retrieval.query_prefix, retrieval.query_length)
        if is_query
        else (retrieval.document_prefix, retrieval.document_length)
    )
    with at_length(encoder, task, length):
        encoded: list[Any] = method(texts, prompt=prefix, show_progress_bar=False, **options)
    return encoded


def _encode_queries(encoder: MultiVectorEncoder, retrieval: RetrievalSet, batch_size: int) -> tuple[Tensor, Tensor]:
    """Vectors (Q, I, H) float32 and mask (Q, I), on every process; each encodes some of the batches."""
    processes, texts = PartialState(), list(retrieval.queries.values())
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shares = [batches[process :: processes.num_processes] for process in range(processes.num_processes)]
    own = [
        vectors
        for batch in shares[processes.process_index]
        for vectors in encode(encoder, [texts[row] for row in batch], retrieval, "query", batch_size=batch_size)
    ]
    vectors, mask, _ = gather_texts(*_pad(own, encoder))
    gathered = [row for share in shares for batch in share for row in batch]
    places = torch.tensor(gathered, dtype=torch.int64, device=vectors.device).argsort()
    return vectors[places], mask[places]


def _ranked_documents(retrieval: RetrievalSet) -> tuple[list[str], dict[str, list[int]] | None]:
    """Ids of the documents that any query ranks, rising, and for each the rows of these queries; None for all rows."""
    if retrieval.candidates is None:
        return sorted(retrieval.corpus), None
    rankers: dict[str, list[int]] = {}
    for row, query in enumerate(retrieval.queries):
        for document in retrieval.candidates[query]:
            rankers.setdefault(document, []).append(row)
    return sorted(rankers), rankers


def _is_ranked(
    document_ids: list[str], retrieval: RetrievalSet, rankers: dict[str, list[int]] | None, queries: Tensor
) -> Tensor:
    """Which query ranks which of these documents, (Q, N) bool."""
    shape = len(queries), len(document_ids)
    is_ranked = torch.full(shape, rankers is None, device=queries.device)
    if rankers is not None:
        pairs = [(row, column) for column, document in enumerate(document_ids) for row in rankers[document]]
        is_ranked[*torch.tensor(pairs, dtype=torch.int64, device=queries.device).view(-1, 2).T] = True
    if retrieval.ignore_identical_ids:
        columns = {document: column for column, document in enumerate(document_ids)}
        pairs = [(row, columns[query]) for row, query in enumerate(retrieval.queries) if query in columns]
        is_ranked[*torch.tensor(pairs, dtype=torch.int64, device=queries.device).view(-1, 2).T] = False
    return is_ranked


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """One int64 for a score (Q, N) float32 and a row (N,), in the order of the scores and, where these tie, of the
    rows: no two are equal, so that the best are the same in whatever order they are looked for."""
    # The bits of a float are in its order, those of one below 0 in the reverse; -0.0 + 0.0 is 0.0.
    bits = (scores + 0.0).view(torch.int32).long()
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + rows


def _scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `_keys` was given."""
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32), keys & 0xFFFFFFFF


def _of_all_processes(keys: Tensor) -> Tensor:
    """The best of the best keys (Q, K) of all processes, on the CPU."""
    merged = []
    for part in keys.split(EXCHANGED_QUERIES):
        # gather puts the processes one below the other; a query's keys belong side by side.
        parts = gather(part).view(PartialState().num_processes, *part.shape).transpose(0, 1)
        merged.append(parts.flatten(start_dim=1).topk(part.shape[1], dim=1).values.cpu())
    return torch.cat(merged) if merged else keys.cpu()


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
