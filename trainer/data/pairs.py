"""Pairs and triples: a file with a query, a document that answers it, and any number that do not."""

import re
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

from datasets import Dataset

from configs.schema import ConfigError, DataConfig
from trainer.data.files import FEATURES, checked_rows, checked_text, find_file, identity, kept_table

NEGATIVE_COLUMN = re.compile(r"negatives?|negative_\d+")


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and held-out examples.

    Without an evaluation file, queries are held out by a hash of their text, each with all its positives. Documents may
    answer queries of both sides, as they do in the published sets.
    """
    assert config.path is not None, "parse_config asks for data.path"
    path = find_file("data.path", config.path, "data.split", config.split, config.root)
    examples = _read(path, config)
    if config.evaluation_path is not None:
        names = ("data.evaluation_path", config.evaluation_path, "data.evaluation_split", config.evaluation_split)
        return examples, _read(find_file(*names, config.root), config)
    threshold = round(config.evaluation_fraction * 10_000)
    is_held_out = [_bucket(query) < threshold for query in examples["query"]]
    return (
        examples.select([row for row, held_out in enumerate(is_held_out) if not held_out]),
        examples.select([row for row, held_out in enumerate(is_held_out) if held_out]),
    )


def _bucket(text: str) -> int:
    return int(md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 10_000


def _read(path: Path, config: DataConfig) -> Dataset:
    """Read one file into a table on disk, each row of it checked."""
    columns = (config.query_column, config.positive_column, config.negative_columns)
    return kept_table(_examples, [path], columns, features=FEATURES)


def _examples(
    path: Path, query_column: str, positive_column: str, negative_columns: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a file, or raise ConfigError at the first that is none."""
    empty = True
    for place, row in checked_rows(path):
        if empty:
            _check_columns(path, row, query_column, positive_column, negative_columns)
            empty = False
        columns = negative_columns
        if columns is None:
            columns = [column for column in row if NEGATIVE_COLUMN.fullmatch(column)]
        query = checked_text(place, query_column, row.get(query_column))
        documents = [checked_text(place, positive_column, row.get(positive_column))]
        documents += [checked_text(place, column, text) for column in columns for text in _cells(row.get(column))]
        yield {
            "query": query,
            "query_id": identity(query),
            "documents": documents,
            "document_ids": [identity(document) for document in documents],
            "scores": [],
            "place": place,
        }
    if empty:
        raise ConfigError(f"{path} holds no example: give a file with a query and a positive in each row")


def _check_columns(
    path: Path, row: dict[str, Any], query_column: str, positive_column: str, negative_columns: list[str] | None
) -> None:
    named = [("query_column", query_column), ("positive_column", positive_column)]
    named += [("negative_columns", column) for column in negative_columns or ()]
    for key, column in named:
        if column not in row:
            raise ConfigError(
                f"data.{key}={column}: {path} has the columns {', '.join(row)}: name the right one with data.{key}=..."
            )


def _cells(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
