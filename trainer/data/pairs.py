"""Pairs and triples: a file with a query, a document that answers it, and any number that do not."""

import gzip
import json
import re
from hashlib import md5
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from configs.schema import ConfigError, DataConfig

# What `datasets` reads, by the file's ending; .gz may follow each.
READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
NEGATIVE_COLUMN = re.compile(r"negatives?|negative_\d+")


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and held-out examples.

    Without an evaluation file, documents are held out by a hash of their text, so none is on both sides; a query that
    is held out is not trained on either.
    """
    assert config.path is not None, "parse_config asks for data.path"
    examples = _read("data.path", config.path, config)
    if config.evaluation_path is not None:
        return examples, _read("data.evaluation_path", config.evaluation_path, config)
    threshold = round(config.evaluation_fraction * 10_000)
    is_held_out = [_bucket(document) < threshold for document in examples["positive"]]
    held_out_queries = {query for query, held_out in zip(examples["query"], is_held_out, strict=True) if held_out}
    train = [
        row
        for row, (query, held_out) in enumerate(zip(examples["query"], is_held_out, strict=True))
        if not held_out and query not in held_out_queries
    ]
    return examples.select(train), examples.select([row for row, held_out in enumerate(is_held_out) if held_out])


def _bucket(text: str) -> int:
    return int(md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 10_000


def _read(key: str, name: str, config: DataConfig) -> Dataset:
    """Read one file and check every row of it."""
    path = _find(key, name, config)
    builder, options = READERS[_ending(path)]
    try:
        lines = _lines(path)
        if lines == []:
            raise ConfigError(f"{key}={name}: {path} holds no example")
        table = load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise ConfigError(_why_unreadable(path, error)) from error
    if not len(table):
        raise ConfigError(f"{key}={name}: {path} holds no example")
    columns = table.column_names
    for column_key, column in (("query_column", config.query_column), ("positive_column", config.positive_column)):
        if column not in columns:
            raise ConfigError(
                f"data.{column_key}={column}: {path} has the columns {', '.join(columns)}: "
                f"name the right one with data.{column_key}=..."
            )
    negatives = config.negative_columns
    if negatives is None:
        negatives = [column for column in columns if NEGATIVE_COLUMN.fullmatch(column)]
    elif missing := [column for column in negatives if column not in columns]:
        raise ConfigError(
            f"data.negative_columns: {path} has no {', '.join(missing)}; its columns are {', '.join(columns)}"
        )

    def normalise(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        by_line = lines if lines is not None and len(lines) == len(table) else None
        places = [f"{path}:{by_line[row]}" if by_line else f"{path} example {row + 1}" for row in rows]
        documents = [batch[column] for column in negatives]
        return {
            "query": [
                _text(*cell, column=config.query_column)
                for cell in zip(batch[config.query_column], places, strict=True)
            ],
            "positive": [
                _text(*cell, column=config.positive_column)
                for cell in zip(batch[config.positive_column], places, strict=True)
            ],
            "negatives": [
                [
                    _text(text, place, column=column)
                    for column, cell in zip(negatives, cells, strict=True)
                    for text in (cell if isinstance(cell, list) else [] if cell is None else [cell])
                ]
                for place, *cells in zip(places, *documents, strict=True)
            ],
            "place": places,
        }

    return table.map(normalise, batched=True, with_indices=True, remove_columns=columns)


def _find(key: str, name: str, config: DataConfig) -> Path:
    """The file that a path names: under data.root, else in the working folder; of a folder, the file of the split."""
    candidates = [Path(config.root, name), Path(name)]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        looked = " nor ".join(dict.fromkeys(str(candidate) for candidate in candidates))
        raise ConfigError(f"{key}={name}: found neither {looked}: give an existing file, or set data.root")
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.name.split(".")[0] == config.split and _ending(file) in READERS
        )
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ConfigError(
                f"data.split={config.split}: {path} must hold one file {config.split}.<jsonl, csv, tsv or parquet>; "
                f"found {found}"
            )
        path = files[0]
    if _ending(path) not in READERS:
        raise ConfigError(f"{key}={name}: the ending must be one of {', '.join(READERS)}, also with .gz")
    return path


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _text(value: object, place: str, *, column: str) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{place}: {column}={value!r} must be a text")
    if value is None or not value.strip():
        raise ConfigError(f"{place}: {column} is empty: fill it or remove the example")
    return value


def _lines(path: Path) -> list[int] | None:
    """Number of the line that each example stands on; None where the format has no lines."""
    builder, _ = READERS[_ending(path)]
    if builder == "parquet":
        return None
    with _open(path) as file:
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    return numbers[1:] if builder == "csv" else numbers


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _why_unreadable(path: Path, error: Exception) -> str:
    """The line that is no JSON, where there is one; else the library's own reason."""
    if READERS[_ending(path)][0] == "json":
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        json.loads(line)
                except json.JSONDecodeError as malformed:
                    reason = f"{malformed.msg} at column {malformed.colno}"
                    return f"{path}:{number} is no JSON ({reason}): mend or remove the line"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{path} cannot be read: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}"
