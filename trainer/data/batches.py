"""From examples to token batches, in an order that is a pure function of seed, epoch and step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from torch import Tensor


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts of one side as chunks of similar length, so that little is padded."""

    chunks: list[dict[str, Any]]
    """Features for the encoder, shortest texts first."""
    order: Tensor
    """(number of texts,) int64: which of the given texts each row of the concatenated chunks is."""
    tokens: int
    """Tokens that stand for text, markers and expansion."""
    padded_tokens: int
    """Tokens that are computed."""


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
    rows: list[int]
    """Which training examples these are."""
    share: float
    """These queries over those of the optimiser step, on all processes: the weight of their mean loss."""


class StepBatches(torch.utils.data.Dataset[list[Batch]]):
    """What one process has of the micro-batches of each optimiser step, by step from 0.

    An epoch is a permutation of all examples, cut into steps of sizes that differ by one at most: none is lost or
    repeated, and no last step is left with a query and nothing to tell its document from. A step is cut into
    micro-batches, and a micro-batch into processes, in the same way: the number of processes changes no micro-batch.
    """

    def __init__(
        self,
        examples: Dataset,
        encoder: MultiVectorEncoder,
        *,
        batch_size: int,
        accumulation_steps: int,
        chunk_tokens: int,
        documents_per_query: int | None,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.examples = examples
        self.encoder = encoder
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.chunk_tokens = chunk_tokens
        self.documents_per_query = documents_per_query
        self.seed = seed
        self.process = process
        self.processes = processes
        self.steps_per_epoch = count_steps_per_epoch(len(examples), batch_size)
        self._positives = _positives_by_query(examples)

    def __getitem__(self, step: int) -> list[Batch]:
        rows = self.rows(step)
        micro_batches = [part for part in cut(rows, self.accumulation_steps) if part]
        own = [cut(micro_batch, self.processes)[self.process] for micro_batch in micro_batches]
        epoch = step // self.steps_per_epoch
        return [self._batch(part, epoch, share=len(part) / len(rows)) for part in own]

    def rows(self, step: int) -> list[int]:
        """Rows of the examples of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.seed, epoch, len(self.examples))
        start, stop = bounds(len(order), step_in_epoch, self.steps_per_epoch)
        return order[start:stop].tolist()

    def _batch(self, rows: list[int], epoch: int, *, share: float) -> Batch:
        examples = self.examples[rows]
        chosen = [
            choose_documents(len(texts), self.documents_per_query, seed=(self.seed, epoch, row))
            for row, texts in zip(rows, examples["documents"], strict=True)
        ]

        def take(column: str) -> list[list[Any]]:
            """The chosen of each query, where the column has any."""
            return [
                [values[place] for place in places] if values else []
                for values, places in zip(examples[column], chosen, strict=True)
            ]

        places = iter(range(sum(map(len, chosen))))
        documents = [text for texts in take("documents") for text in texts]
        scores = take("scores")
        return Batch(
            queries=tokenize(self.encoder, examples["query"], task="query", chunk_tokens=self.chunk_tokens),
            documents=tokenize(self.encoder, documents, task="document", chunk_tokens=self.chunk_tokens),
            candidates=_table([[next(places) for _ in part] for part in chosen], fill=-1),
            teacher_scores=_table(scores, fill=0.0) if any(scores) else None,
            document_ids=torch.tensor([identity for part in take("document_ids") for identity in part]),
            known_positives=_table([self._known_positives(query) for query in examples["query_id"]], fill=0),
            rows=rows,
            share=share,
        )

    def _known_positives(self, query_id: int) -> list[int]:
        first, last = (np.searchsorted(self._positives[:, 0], query_id, side) for side in ("left", "right"))
        return [int(identity) for identity in self._positives[first:last, 1]]


def choose_documents(documents: int, wanted: int | None, *, seed: tuple[int, int, int]) -> list[int]:
    """Which of an example's documents an epoch takes: the positive, and of the others as many as fit; None takes all.

    seed: of the run, the epoch, the example's row: no other example, and no process, changes the draw.
    """
    if wanted is None or wanted >= documents:
        return list(range(documents))
    others = np.random.default_rng(seed).choice(documents - 1, wanted - 1, replace=False)
    return [0, *sorted((others + 1).tolist())]


def _positives_by_query(examples: Dataset) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Query id and document id of each different pair of a query and its positive, sorted."""
    table = examples.select_columns(["query_id", "document_ids"]).with_format("arrow")[:]
    pairs = [table["query_id"], pc.list_element(table["document_ids"], 0)]
    return np.unique(np.stack([column.to_numpy() for column in pairs], axis=1), axis=0)


def _table(rows: list[list[Any]], *, fill: float) -> Tensor:
    """Rows of different lengths, filled up; int64 or float32."""
    width = max(map(len, rows))
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def count_steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimiser steps that take every example once, none with more than batch_size."""
    return math.ceil(examples / batch_size)


def bounds(items: int, part: int, parts: int) -> tuple[int, int]:
    """Where one part begins and ends when items are cut evenly: sizes differ by one at most."""
    return items * part // parts, items * (part + 1) // parts


def cut(rows: list[int], parts: int) -> list[list[int]]:
    """Rows in order, cut evenly."""
    return [rows[slice(*bounds(len(rows), part, parts))] for part in range(parts)]


@lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, examples: int) -> Tensor:
    # One generator an epoch; the odd factor keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(examples, generator=generator)


def tokenize(encoder: MultiVectorEncoder, texts: Sequence[str], *, task: str, chunk_tokens: int) -> TokenizedTexts:
    """Tokenise texts of one side ("query" or "document"), sort them by length and cut them into chunks.

    A chunk has at most chunk_tokens tokens, padding included, and one text at least.
    """
    features = encoder.preprocess(list(texts), prompt=encoder.prompts.get(task) or None, task=task)
    used = features["attention_mask"].bool()
    if "query_expansion_positions" in features:
        used = used | features["query_expansion_positions"]
    lengths, order = used.sum(dim=1).sort(stable=True)
    chunks, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and int(lengths[stop]) * (stop + 1 - start) <= chunk_tokens:
            stop += 1
        rows = order[start:stop]
        # Columns that any text of the chunk uses, whichever side the tokenizer pads.
        columns = used[rows].any(dim=0)
        chunks.append(
            {
                name: value[rows][:, columns] if isinstance(value, Tensor) and value.shape[:2] == used.shape else value
                for name, value in features.items()
            }
        )
        start = stop
    return TokenizedTexts(
        chunks=chunks,
        order=order,
        tokens=int(lengths.sum()),
        padded_tokens=sum(chunk["attention_mask"].numel() for chunk in chunks),
    )
