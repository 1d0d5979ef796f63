"""Pairs and triples: a file with a query, a document that answers it, and any number that do not."""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from hashlib import md5
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from configs.schema import ConfigError, DataConfig

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # .gz may follow the texts among them
NEGATIVE_COLUMN = re.compile(r"negatives?|negative_\d+")
FEATURES = Features(
    {
        "query": Value("string"),
        "positive": Value("string"),
        "negatives": List(Value("string")),
        "place": Value("string"),
    }
)


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and held-out examples.

    Without an evaluation file, queries are held out by a hash of their text, each with all its positives. Documents may
    answer queries of both sides, as they do in the published sets.
    """
    assert config.path is not None, "parse_config asks for data.path"
    path = _find("data.path", config.path, "data.split", config.split, config.root)
    examples = _read(path, config)
    if config.evaluation_path is not None:
        names = ("data.evaluation_path", config.evaluation_path, "data.evaluation_split", config.evaluation_split)
        return examples, _read(_find(*names, config.root), config)
    threshold = round(config.evaluation_fraction * 10_000)
    is_held_out = [_bucket(query) < threshold for query in examples["query"]]
    return (
        examples.select(row for row, held_out in enumerate(is_held_out) if not held_out),
        examples.select(row for row, held_out in enumerate(is_held_out) if held_out),
    )


def _bucket(text: str) -> int:
    return int(md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 10_000


def _find(key: str, name: str, split_key: str, split: str | None, root: str) -> Path:
    """The file that a path names: under data.root, else in the working folder; of a folder, the file of the split."""
    candidates = list(dict.fromkeys([Path(root, name), Path(name)]))
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        looked = " or ".join(str(candidate) for candidate in candidates)
        raise ConfigError(f"{key}={name}: there is no {looked}: give an existing file, or set data.root")
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.name.split(".")[0] == split and _readable(file)]
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ConfigError(
                f"{split_key}={split}: {path} must hold one file {split}.<jsonl, csv, tsv or parquet>; found {found}"
            )
        path = files[0]
    if not _readable(path):
        raise ConfigError(f"{key}={name}: the ending must be one of {', '.join(ENDINGS)}; .gz may follow a text")
    return path


def _readable(path: Path) -> bool:
    return _ending(path) in ENDINGS and not path.name.endswith(".parquet.gz")


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _read(path: Path, config: DataConfig) -> Dataset:
    """Read one file into a table on disk, each row of it checked; the table is kept for as long as the file stays."""
    stamp = path.stat()
    try:
        return Dataset.from_generator(
            _examples,
            features=FEATURES,
            gen_kwargs={
                "path": path,
                "query_column": config.query_column,
                "positive_column": config.positive_column,
                # A list would be taken for shards, each read by itself.
                "negative_columns": None if config.negative_columns is None else tuple(config.negative_columns),
                # The file as it is now, read by the rules as they are now.
                "version": (stamp.st_mtime_ns, stamp.st_size, md5(Path(__file__).read_bytes()).hexdigest()),
            },
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{path} cannot be kept as a table: {error.__cause__}") from error


def _examples(
    path: Path,
    query_column: str,
    positive_column: str,
    negative_columns: tuple[str, ...] | None,
    version: tuple[int, int, str],
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a file, or raise ConfigError at the first that is none.

    version: not read here; it keeps the tables of different versions apart.
    """
    empty = True
    for place, row in _checked_rows(path):
        if empty:
            _check_columns(path, row, query_column, positive_column, negative_columns)
            empty = False
        columns = negative_columns
        if columns is None:
            columns = tuple(column for column in row if NEGATIVE_COLUMN.fullmatch(column))
        yield {
            "query": _text(place, query_column, row.get(query_column)),
            "positive": _text(place, positive_column, row.get(positive_column)),
            "negatives": [_text(place, column, text) for column in columns for text in _cells(row.get(column))],
            "place": place,
        }
    if empty:
        raise ConfigError(f"{path} holds no example: give a file with a query and a positive in each row")


def _check_columns(
    path: Path, row: dict[str, Any], query_column: str, positive_column: str, negative_columns: tuple[str, ...] | None
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


def _text(place: str, column: str, value: object) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{place}: {column}={value!r} must be a text")
    if value is None or not value.strip():
        raise ConfigError(f"{place}: {column} is empty: fill it or remove the example")
    return value


def _checked_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file:line and columns of each row, with one line for whatever keeps the file from being read."""
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        yield from readers[_ending(path)](path)
    except (OSError, EOFError, UnicodeError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def _open(path: Path) -> TextIO:
    # newline="" leaves line ends inside a CSV cell as they are; utf-8-sig drops the mark that Excel puts first.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(place, _parse(path, line.rstrip(), first_line=number))


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A whole array, or JSON lines under the shorter ending."""
    with _open(path) as file:
        while (character := file.read(1)).isspace():
            pass
    if character != "[":
        yield from _json_lines(path)
        return
    with _open(path) as file:
        rows = _parse(path, file.read(), first_line=1)
    for number, row in enumerate(rows, start=1):
        place = f"{path} example {number}"
        yield place, _object(place, row)


def _parse(path: Path, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise ConfigError(
            f"{place} is no JSON ({error.msg} at column {error.colno}): mend or remove the line"
        ) from error


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: an example must be a JSON object with a text by column, not {row!r:.40}")
    return row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        csv.field_size_limit(sys.maxsize)
        # In a TSV quotes are letters like any other.
        is_tsv = _ending(path) == ".tsv"
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
        reader = csv.reader(file, **dialect)
        header: list[str] = []
        for cells in filter(None, reader):
            if not header:
                header = cells
                continue
            # The reader stands behind the row, whose texts may hold line ends.
            place = f"{path}:{reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
            if len(cells) > len(header):
                raise ConfigError(f"{place}: {len(cells)} cells under {len(header)} columns: quote cells with commas")
            yield place, {column: cell or None for column, cell in zip_longest(header, cells)}


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path} example {number}", row
