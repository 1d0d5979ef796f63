"""Distillation in PyLate's layout: a folder of queries, of documents, and of what a teacher says of them.

Three files: of the split (query_id, document_ids, scores), queries (query_id, text) and documents (document_id, text).
An id is a text or a whole number; 7 and "7" are the same id.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from configs.schema import ConfigError, DataConfig
from trainer.data.files import FEATURES, checked_rows, checked_text, file_in, find, identity, kept_table

# The largest number of float32, in which losses are computed.
LARGEST = 3.4028234663852886e38


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and held-out examples, the documents of each from the teacher's best to its worst.

    Without an evaluation folder, the last queries by id are held out, each with all its rows.
    """
    assert config.path is not None, "parse_config asks for data.path"
    examples = _read("data.path", config.path, "data.split", config.split, config.root)
    if config.evaluation_path is not None:
        names = ("data.evaluation_path", config.evaluation_path, "data.evaluation_split", config.evaluation_split)
        held_out = _read(*names, config.root)
        return examples.remove_columns("id"), held_out.remove_columns("id")
    ids = examples["id"][:]
    last = _last(set(ids), config.evaluation_fraction)
    examples = examples.remove_columns("id")
    return (
        examples.select([row for row, identifier in enumerate(ids) if identifier not in last]),
        examples.select([row for row, identifier in enumerate(ids) if identifier in last]),
    )


def _last(ids: set[str], fraction: float) -> set[str]:
    """This share of the ids: the highest where all are whole numbers, else the last in the order of texts."""
    are_numbers = all(re.fullmatch(r"-?[0-9]+", identifier) for identifier in ids)
    # 7 and 07 are two ids with one number.
    in_order = sorted(ids, key=lambda identifier: (int(identifier) if are_numbers else 0, identifier))
    return set(in_order[len(ids) - round(fraction * len(ids)) :])


def _read(key: str, name: str, split_key: str, split: str | None, root: str) -> Dataset:
    """Read one folder into a table on disk, each row of it checked; column id is the query's id in the files."""
    folder = find(key, name, root)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={name} is a file: name the folder that holds it, with the files queries and documents beside it"
        )
    files = [
        file_in(folder, split, asked=f"{split_key}={split}"),
        file_in(folder, "queries", asked=f"{key}={name}"),
        file_in(folder, "documents", asked=f"{key}={name}"),
    ]
    return kept_table(_examples, files, [], features=Features(FEATURES | {"id": Value("string")}))


def _examples(rows: Path, queries: Path, documents: Path) -> Iterator[dict[str, Any]]:
    """Yield the examples of a folder, or raise ConfigError at the first row that is none."""
    # The rows are read twice: of 8.8 million passages of MS MARCO, only those that a row names are held.
    query_ids: set[str] = set()
    document_ids: set[str] = set()
    for _, query_id, ranked, _ in _taught_rows(rows):
        query_ids.add(query_id)
        document_ids.update(ranked)
    if not query_ids:
        raise ConfigError(f"{rows} holds no example: give a file with query_id, document_ids and scores in each row")
    query_texts = _texts(queries, "query_id", query_ids)
    document_texts = _texts(documents, "document_id", document_ids)
    for place, query_id, ranked, scores in _taught_rows(rows):
        yield {
            "query": _find_text(query_texts, place, "query_id", query_id, queries),
            "query_id": identity(query_id),
            "documents": [
                _find_text(document_texts, place, "document_id", identifier, documents) for identifier in ranked
            ],
            "document_ids": [identity(identifier) for identifier in ranked],
            "scores": scores,
            "place": place,
            "id": query_id,
        }


def _taught_rows(path: Path) -> Iterator[tuple[str, str, list[str], list[float]]]:
    """Yield place, query id, and document ids with their scores, from the highest to the lowest."""
    for place, row in checked_rows(path):
        query_cell, documents_cell, scores_cell = _cells(place, row, "query_id", "document_ids", "scores")
        query_id = _identifier(place, "query_id", query_cell)
        ids = [_identifier(place, "document_ids", cell) for cell in _list(place, "document_ids", documents_cell)]
        scores = [_score(place, cell) for cell in _list(place, "scores", scores_cell)]
        if len(scores) != len(ids):
            raise ConfigError(f"{place}: {len(scores)} scores of {len(ids)} document_ids: give one score a document")
        if len(ids) < 2:
            raise ConfigError(f"{place}: document_ids={ids} must name 2 documents or more: add some, or remove the row")
        if len(set(ids)) < len(ids):
            twice = next(identifier for identifier in ids if ids.count(identifier) > 1)
            raise ConfigError(f"{place}: document_ids holds {twice} twice: remove one of the two, and its score")
        # sorted keeps the order of the file among equal scores, in reverse as well.
        ranked = sorted(zip(ids, scores, strict=True), key=lambda pair: pair[1], reverse=True)
        yield place, query_id, [identifier for identifier, _ in ranked], [score for _, score in ranked]


def _texts(path: Path, column: str, wanted: set[str]) -> dict[str, str]:
    """The texts of those ids that are wanted; the others are neither held nor checked."""
    texts: dict[str, str] = {}
    for place, row in checked_rows(path):
        cell, text = _cells(place, row, column, "text")
        identifier = _identifier(place, column, cell)
        if identifier in texts:
            raise ConfigError(f"{place}: {column}={identifier} stands here again: remove one of the two")
        if identifier in wanted:
            texts[identifier] = checked_text(place, "text", text)
    return texts


def _find_text(texts: dict[str, str], place: str, column: str, identifier: str, path: Path) -> str:
    if identifier not in texts:
        raise ConfigError(f"{place}: {column}={identifier} is not in {path}: add it there, or remove it here")
    return texts[identifier]


def _cells(place: str, row: dict[str, Any], *columns: str) -> list[Any]:
    for column in columns:
        if column not in row:
            found = ", ".join(row) or "none"
            raise ConfigError(f"{place}: there is no column {column}; the columns are {found}: rename or add it")
    return [row[column] for column in columns]


def _list(place: str, column: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise ConfigError(f"{place}: {column}={value!r:.40} must be a list, or a text that holds one as JSON")
    return value


def _identifier(place: str, column: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise ConfigError(f"{place}: {column}={value!r} must be a whole number, or a text that is not empty")


def _score(place: str, value: Any) -> float:
    # No comparison holds of NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ConfigError(f"{place}: scores holds {value!r}, which must be a finite number")
    return float(value)
