"""From examples to token batches: what each process encodes of each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from configs.schema import DataConfig, Draw, MixedBatch
from trainer.data.order import Order, Place, bounds
from trainer.data.tables import IntArray, TrainingSet, sorted_pairs
from trainer.data.tokens import TokenizedTexts, TokenTable, tokenized
from trainer.packing import is_packed, pack_texts


@dataclass(frozen=True)
class Batch:
    """What one process has of a micro-batch, whose queries meet its documents, on whatever process, and no others."""

    queries: TokenizedTexts
    documents: TokenizedTexts
    """Each query's own, one query after the other, the positive first."""
    candidates: Tensor
    """(Q, K) int64: where each query's own documents stand; -1 where it has fewer than K."""
    teacher_scores: Tensor | None
    """(Q, K) float32 in the same places; None where the data has no teacher."""
    document_ids: Tensor
    """(N,) int64"""
    known_positives: Tensor
    """(Q, P) int64: ids of all positives that the training examples give the query; 0 where there are fewer."""
    places: list[Place]
    """Which training examples these are."""
    share: float
    """These queries over those of the optimiser step, on all processes: the weight of their mean loss."""


class _TokenizedSet:
    """A training set with the tokens of its texts."""

    def __init__(self, examples: TrainingSet, encoder: MultiVectorEncoder) -> None:
        self.set, self.config = examples, examples.config
        self.table = examples.examples.select_columns(["query", "documents", "positives", "scores"])
        self.query_identities = examples.queries.select_columns("identity").with_format("numpy")
        self.document_identities = examples.documents.select_columns("identity").with_format("numpy")
        self.queries = tokenized(
            examples.queries,
            encoder,
            "query",
            rows=examples.named_queries(),
            length=self.config.query_length,
            prefix=self.config.query_prefix,
        )
        self.documents = tokenized(
            examples.documents,
            encoder,
            "document",
            rows=examples.named_documents(),
            length=self.config.document_length,
            prefix=self.config.document_prefix,
        )

    def lengths(self) -> IntArray:
        """(examples,): tokens of each example's first positive."""
        documents = self.documents.places(self.set.first_documents())
        return self.documents.lengths[documents]


class StepBatches(torch.utils.data.Dataset[list[Batch]]):
    """What one process has of the micro-batches of each optimiser step, by step from 0.

    A step is cut into micro-batches, and a micro-batch into processes, evenly: the number of processes changes no
    micro-batch.
    """

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        encoder: MultiVectorEncoder,
        *,
        config: DataConfig,
        batch_size: int,
        accumulation_steps: int,
        chunk_tokens: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.sets = sets
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.chunk_tokens = chunk_tokens
        self.seed = seed
        self.process = process
        self.processes = processes
        self.padded_because: str | None = "no encoder was asked whether it takes them otherwise"
        """Why the texts of a chunk are padded; None puts them into one row."""
        self.first_position = 0
        """What their positions are counted from there."""
        self._tokenized = [_TokenizedSet(each, encoder) for each in sets]
        self.order = Order(
            sizes=[len(each) for each in sets],
            shares=[config.mix.get(each.name, 1.0) * len(each) ** config.mix_by_size for each in sets],
            batch_size=batch_size,
            seed=seed,
            one_set=config.mix_batches is MixedBatch.one_set,
            window=config.length_window,
            lengths=[each.lengths() for each in self._tokenized] if config.length_window else (),
        )
        known = [each.known_positives() for each in sets]
        self._known_queries, self._known_documents = known[0]
        if len(known) > 1:
            self._known_queries, self._known_documents = sorted_pairs(*map(np.concatenate, zip(*known, strict=True)))

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __getitem__(self, step: int) -> list[Batch]:
        places = self.order.step(step)
        micro_batches = [part for part in cut(places, self.accumulation_steps) if part]
        own = [cut(micro_batch, self.processes)[self.process] for micro_batch in micro_batches]
        return [self._batch(part, share=len(part) / len(places)) for part in own]

    def examples(self, step: int) -> list[dict[str, Any]]:
        """The examples of a step, on all processes, with their texts."""
        return [self.sets[place.set].example(place.row) for place in self.order.step(step)]

    def _batch(self, places: list[Place], *, share: float) -> Batch:
        drawn = [_Drawn() for _ in places]
        for index, positions in _by_set(places):
            for position, example in zip(positions, self._drawn(index, [places[p] for p in positions]), strict=True):
                drawn[position] = example
        numbers = iter(range(sum(len(example.documents) for example in drawn)))
        scores = [example.scores for example in drawn]
        return Batch(
            queries=self._chunks(places, [[example.query] for example in drawn], "queries"),
            documents=self._chunks(places, [example.documents for example in drawn], "documents"),
            candidates=_table([[next(numbers) for _ in example.documents] for example in drawn], fill=-1),
            teacher_scores=_table(scores, fill=0.0) if all(scores) else None,
            document_ids=torch.tensor([identity for example in drawn for identity in example.document_identities]),
            known_positives=_table([self._known_positives(example.query_identity) for example in drawn], fill=0),
            places=places,
            share=share,
        )

    def _drawn(self, index: int, places: list[Place]) -> Iterator["_Drawn"]:
        """What the epoch draws of examples of one set."""
        own = self._tokenized[index]
        examples = own.table[[place.row for place in places]]
        queries = own.query_identities[examples["query"]]["identity"].tolist()
        chosen = [
            choose_documents(
                len(documents),
                own.config.documents_per_query,
                positives=positives,
                stratified=own.config.draw is Draw.stratified,
                seed=(self.seed, place.epoch, place.row, place.set),
            )
            for place, documents, positives in zip(places, examples["documents"], examples["positives"], strict=True)
        ]
        documents = [
            [rows[number] for number in numbers] for rows, numbers in zip(examples["documents"], chosen, strict=True)
        ]
        identities = iter(own.document_identities[[row for rows in documents for row in rows]]["identity"].tolist())
        for number, numbers in enumerate(chosen):
            scores = examples["scores"][number]
            yield _Drawn(
                query=examples["query"][number],
                query_identity=queries[number],
                documents=documents[number],
                document_identities=list(islice(identities, len(numbers))),
                scores=[scores[place] for place in numbers] if scores else [],
            )

    def _chunks(self, places: list[Place], rows: list[list[int]], side: str) -> TokenizedTexts:
        """The texts of examples, given by their rows, one example after the other; a chunk has those of one set."""
        starts = np.cumsum([0, *map(len, rows)])
        parts, orders = [], []
        for index, positions in _by_set(places):
            table: TokenTable = getattr(self._tokenized[index], side)
            taken = np.array([row for position in positions for row in rows[position]])
            given = np.concatenate([np.arange(starts[position], starts[position + 1]) for position in positions])
            packs = not self.padded_because and is_packed(table.features)
            parts.append(table.chunks(taken, chunk_tokens=self.chunk_tokens, without_padding=packs))
            orders.append(torch.from_numpy(given)[parts[-1].order])
        texts = TokenizedTexts(
            chunks=[chunk for part in parts for chunk in part.chunks],
            order=torch.cat(orders),
            tokens=sum(part.tokens for part in parts),
            padded_tokens=sum(part.padded_tokens for part in parts),
        )
        return texts if self.padded_because else pack_texts(texts, self.first_position)

    def _known_positives(self, query: int) -> list[int]:
        first, last = (np.searchsorted(self._known_queries, query, side) for side in ("left", "right"))
        found: list[int] = self._known_documents[first:last].tolist()
        return found


@dataclass(frozen=True)
class _Drawn:
    """What an epoch takes of an example."""

    query: int = 0
    query_identity: int = 0
    documents: list[int] = field(default_factory=list)
    document_identities: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def _by_set(places: list[Place]) -> Iterator[tuple[int, list[int]]]:
    """Each set that examples come from, and where these stand."""
    for index in sorted({place.set for place in places}):
        yield index, [position for position, place in enumerate(places) if place.set == index]


def choose_documents(
    documents: int, wanted: int | None, *, positives: int, stratified: bool, seed: tuple[int, ...]
) -> list[int]:
    """Which of an example's documents, positives first, an epoch takes: one of the positives, and of the others as many
    as fit; None takes all.

    stratified: one from each of as many equal ranges of the others, which then stand in the teacher's order; seed: of
    the run, the epoch, the example: no other example, and no process, changes the draw.
    """
    random = np.random.default_rng(seed)
    positive = int(random.integers(positives)) if positives > 1 else 0
    others = documents - positives
    if wanted is None or wanted > others:
        return [positive, *range(positives, documents)]
    if stratified:
        edges = [bounds(others, part, wanted - 1) for part in range(wanted - 1)]
        return [positive, *(positives + int(random.integers(start, stop)) for start, stop in edges)]
    return [positive, *sorted((random.choice(others, wanted - 1, replace=False) + positives).tolist())]


def _table(rows: list[list[Any]], *, fill: float) -> Tensor:
    """Rows of different lengths, filled up; int64 or float32."""
    width = max(map(len, rows))
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def cut(places: list[Place], parts: int) -> list[list[Place]]:
    """Examples in order, cut evenly."""
    return [places[slice(*bounds(len(places), part, parts))] for part in range(parts)]
