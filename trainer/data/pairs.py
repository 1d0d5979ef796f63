"""Rows that bring their texts: pairs and triples, or a query with documents that a teacher has scored."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import md5
from typing import Any

from configs.schema import ConfigError, DataFormat, Positive, SetConfig
from trainer.data.files import Source, checked_text, find_evaluation, find_source
from trainer.data.scores import checked_score, listed, ranked
from trainer.data.tables import (
    NO_TEXTS,
    WITH_TEXTS,
    TrainingSet,
    cells,
    kept_table,
    normalised,
    or_left_out,
    set_of_rows,
    values,
    with_texts,
    with_warnings,
)

NEGATIVE_COLUMN = re.compile(r"negatives?|negative_\d+")


def load(name: str, config: SetConfig) -> tuple[TrainingSet, TrainingSet | None]:
    """Return training and held-out examples.

    Without examples to evaluate on, queries are held out by a hash of their text, each with all its rows. Documents may
    answer queries of both sides, as they do in the published sets.
    """
    assert config.path is not None, "parse_config asks for data.path"
    examples = _read(name, config, find_source(config, "data.path", config.path, "data.split", config.split))
    source = find_evaluation(config)
    if source is None:
        return hold_out(examples, config.evaluation_fraction or 0)
    return with_warnings(examples, held_out := _read(name, config, source)), held_out


def hold_out(examples: TrainingSet, fraction: float) -> tuple[TrainingSet, TrainingSet | None]:
    """Part by a hash of the query's text: one query, whatever its case and spaces, is on one side, in every run."""
    if not fraction:
        return examples, None
    threshold = round(fraction * 10_000)
    rows = examples.examples.select_columns("query").with_format("arrow")[:]["query"].to_pylist()
    buckets = [_bucket(normalised(text)) < threshold for text in values(examples.queries, "text")]
    held_out = [number for number, row in enumerate(rows) if buckets[row]]
    if not held_out:
        return examples, None
    return examples.select([number for number, row in enumerate(rows) if not buckets[row]]), examples.select(held_out)


def _bucket(text: str) -> int:
    return int(md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 10_000


def _read(name: str, config: SetConfig, source: Source) -> TrainingSet:
    """Read one source into a table on disk, each row of it checked."""
    rows: Callable[..., Iterator[dict[str, Any]]] = _pairs
    columns: list[Any] = [config.query_column, config.positive_column, config.negative_columns]
    if config.format is DataFormat.scored:
        rows = _scored
        columns = [config.query_column, config.documents_column, config.scores_column, config.positive]
    return set_of_rows(name, config, source, kept_table(rows, [source], columns, features=WITH_TEXTS))


def _pairs(
    source: Source, query_column: str, positive_column: str, negative_columns: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield the examples, or raise ConfigError at the first that is none."""
    empty = True
    for place, row in source.rows():
        if empty:
            named = [("query_column", query_column), ("positive_column", positive_column)]
            named += [("negative_columns", column) for column in negative_columns or ()]
            _check_columns(source, row, named)
            empty = False
        columns = negative_columns
        if columns is None:
            columns = [column for column in row if NEGATIVE_COLUMN.fullmatch(column)]
        yield or_left_out(place, partial(_pair, place, row, query_column, positive_column, columns), NO_TEXTS)
    if empty:
        raise ConfigError(f"{source} holds no example: give a file with a query and a positive in each row")


def _pair(
    place: str, row: dict[str, Any], query_column: str, positive_column: str, negative_columns: list[str]
) -> dict[str, Any]:
    query = checked_text(place, query_column, row.get(query_column))
    positives = [checked_text(place, positive_column, text) for text in _several(row.get(positive_column)) or [None]]
    negatives = [checked_text(place, column, text) for column in negative_columns for text in _several(row.get(column))]
    return with_texts(place, query, [*positives, *negatives], positives=len(positives))


def _scored(
    source: Source, query_column: str, documents_column: str, scores_column: str, positive: Positive
) -> Iterator[dict[str, Any]]:
    """Yield the examples, or raise ConfigError at the first that is none."""
    empty = True
    for place, row in source.rows():
        if empty:
            named = [("query_column", query_column), ("documents_column", documents_column)]
            _check_columns(source, row, [*named, ("scores_column", scores_column)])
            empty = False
        query, documents, scores = cells(place, row, query_column, documents_column, scores_column)
        texts = listed(place, documents_column, documents)
        numbers = [checked_score(place, score) for score in listed(place, scores_column, scores)]
        ranking = ranked(place, documents_column, texts, numbers, positive=positive)
        yield or_left_out(
            place, partial(_ranked_texts, place, query_column, query, documents_column, *ranking), NO_TEXTS
        )
    if empty:
        raise ConfigError(f"{source} holds no example: give a file with a query, documents and scores in each row")


def _ranked_texts(
    place: str, query_column: str, query: Any, documents_column: str, documents: list[Any], scores: list[float]
) -> dict[str, Any]:
    texts = [checked_text(place, documents_column, text) for text in documents]
    return with_texts(place, checked_text(place, query_column, query), texts, scores=scores)


def _check_columns(source: Source, row: dict[str, Any], named: list[tuple[str, str]]) -> None:
    for key, column in named:
        if column not in row:
            raise ConfigError(
                f"data.{key}={column}: {source} has the columns {', '.join(row)}: name one with data.{key}=..."
            )


def _several(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
