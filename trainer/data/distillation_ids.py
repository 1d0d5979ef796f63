"""Distillation by ids, in PyLate's layout: queries, documents, and what a teacher says of them.

Three files of a folder, or three subsets of a data set of the Hub: of the split (query_id, document_ids, scores),
queries (query_id, text) and documents (document_id, text).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from configs.schema import ConfigError, Positive, SetConfig
from trainer.data.files import Source, file_in, find, find_source
from trainer.data.scores import checked_score, listed, ranked
from trainer.data.tables import (
    EXAMPLES,
    NO_QUERY,
    Index,
    TrainingSet,
    by_ids,
    cells,
    column,
    empty_texts,
    identifier,
    kept_table,
    normalised,
    or_left_out,
    text_table,
    with_warnings,
    without_empty,
)


def load(name: str, config: SetConfig) -> tuple[TrainingSet, TrainingSet | None]:
    """Return training and held-out examples, the positive of each first, then from the teacher's best to its worst.

    Without examples to evaluate on, the last queries by id are held out, each with all its rows.
    """
    assert config.path is not None, "parse_config asks for data.path"
    examples = _read(name, config, "data.path", config.path, "data.split", config.split)
    if config.evaluation_path is not None or config.evaluation_split is not None:
        path = config.evaluation_path or config.path
        key = "data.evaluation_path" if config.evaluation_path else "data.path"
        held_out = _read(name, config, key, path, "data.evaluation_split", config.evaluation_split)
        return with_warnings(examples, held_out), held_out
    rows = column(examples.examples, "query")
    named = examples.named_queries()
    queries = examples.queries.select(named)
    last = _last(dict(zip(queries["id"], queries["text"], strict=True)), config.evaluation_fraction or 0)
    is_held_out = np.isin(rows, named[[key in last for key in queries["id"]]])
    if not is_held_out.any():
        return examples, None
    return examples.select(np.flatnonzero(~is_held_out)), examples.select(np.flatnonzero(is_held_out))


def _last(texts: dict[str, str], fraction: float) -> set[str]:
    """This share of the ids, with all that have a text of theirs: the highest where all are whole numbers, else the
    last in the order of texts."""
    are_numbers = all(re.fullmatch(r"-?[0-9]+", key) for key in texts)
    # 7 and 07 are two ids with one number.
    in_order = sorted(texts, key=lambda key: (int(key) if are_numbers else 0, key))
    asked = {normalised(texts[key]) for key in in_order[len(texts) - round(fraction * len(texts)) :]}
    return {key for key, text in texts.items() if normalised(text) in asked}


def _read(name: str, config: SetConfig, key: str, path: str, split_key: str, split: str | None) -> TrainingSet:
    """Read the rows and their texts into tables on disk, each row of them checked."""
    rows, queries, documents = _sources(config, key, path, split_key, split)
    examples = kept_table(_examples, [rows, queries, documents], [config.positive], features=EXAMPLES)
    query_texts, document_texts = text_table(queries, "query_id", "text"), text_table(documents, "document_id", "text")
    warnings = (*empty_texts(query_texts, queries), *empty_texts(document_texts, documents))
    return without_empty(TrainingSet(name, config, query_texts, document_texts, examples, warnings), rows)


def _examples(rows: Source, queries: Source, documents: Source, positive: Positive) -> Iterator[dict[str, Any]]:
    """Yield the examples, or raise ConfigError at the first row that is none."""
    query_index = Index(text_table(queries, "query_id", "text"), queries, "query_id")
    document_index = Index(text_table(documents, "document_id", "text"), documents, "document_id")
    empty = True
    for place, row in rows.rows():
        empty = False
        query_cell, documents_cell, scores_cell = cells(place, row, "query_id", "document_ids", "scores")
        ids = [identifier(place, "document_ids", cell) for cell in listed(place, "document_ids", documents_cell)]
        scores = [checked_score(place, cell) for cell in listed(place, "scores", scores_cell)]
        if len(set(ids)) < len(ids):
            twice = next(key for key in ids if ids.count(key) > 1)
            raise ConfigError(f"{place}: document_ids holds {twice} twice: remove one of the two, and its score")
        ids, scores = ranked(place, "document_ids", ids, scores, positive=positive)
        query = identifier(place, "query_id", query_cell)
        yield or_left_out(place, partial(by_ids, place, query_index, query, document_index, ids, scores), NO_QUERY)
    if empty:
        raise ConfigError(f"{rows} holds no example: give a file with query_id, document_ids and scores in each row")


def _sources(config: SetConfig, key: str, path: str, split_key: str, split: str | None) -> tuple[Source, ...]:
    """Of the rows, the queries and the documents."""
    source = find_source(config, key, path, split_key, split) if config.subset else None
    if source is not None and source.repository is not None:
        # On the Hub each of the three is a subset, whose only split is train.
        texts = (replace(source, subset=subset, split="train") for subset in ("queries", "documents"))
        return source, *texts
    folder = find(key, path, config.root)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={path} is a file: name the folder that holds it, with the files queries and documents beside it"
        )
    return (
        Source((file_in(folder, split, asked=f"{split_key}={split}"),)),
        Source((file_in(folder, "queries", asked=f"{key}={path}"),)),
        Source((file_in(folder, "documents", asked=f"{key}={path}"),)),
    )
