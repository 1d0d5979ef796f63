"""Files of rows: where they lie, what stands in each row and where, and the table of examples kept of them on disk."""

import csv
import gzip
import inspect
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import md5
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from configs.schema import ConfigError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # .gz may follow the texts among them
FEATURES = Features(
    {
        "query": Value("string"),
        "query_id": Value("int64"),
        "documents": List(Value("string")),
        "document_ids": List(Value("int64")),
        "scores": List(Value("float64")),
        "place": Value("string"),
    }
)


def find(key: str, name: str, root: str) -> Path:
    """The file or folder that a path names: under data.root, else in the working folder."""
    candidates = list(dict.fromkeys([Path(root, name), Path(name)]))
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        looked = " or ".join(str(candidate) for candidate in candidates)
        raise ConfigError(f"{key}={name}: there is no {looked}: give an existing file, or set data.root")
    return path


def find_file(key: str, name: str, split_key: str, split: str | None, root: str) -> Path:
    """The file that a path names; of a folder, the file of the split."""
    path = find(key, name, root)
    if path.is_dir():
        return file_in(path, split, asked=f"{split_key}={split}")
    if not _readable(path):
        raise ConfigError(f"{key}={name}: the ending must be one of {', '.join(ENDINGS)}; .gz may follow a text")
    return path


def file_in(folder: Path, stem: str | None, *, asked: str) -> Path:
    """The one file of a folder that has this name without its ending; asked: the key and value that ask for it."""
    files = [file for file in sorted(folder.iterdir()) if file.name.split(".")[0] == stem and _readable(file)]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ConfigError(f"{asked}: {folder} must hold one file {stem}.<jsonl, csv, tsv or parquet>; found {found}")
    return files[0]


def _readable(path: Path) -> bool:
    return _ending(path) in ENDINGS and not path.name.endswith(".parquet.gz")


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def kept_table(
    examples: Callable[..., Iterator[dict[str, Any]]],
    files: Sequence[Path],
    options: Sequence[Any],
    *,
    features: Features,
) -> Dataset:
    """Put what `examples(*files, *options)` yields into a table on disk, kept for as long as the files stay.

    Raises the ConfigError that examples raises, or one that names the first file.
    """
    stamps = [path.stat() for path in files]
    rules = Path(__file__), Path(inspect.getfile(examples))
    # The files as they are now, read by the rules as they are now.
    version = (
        *((stamp.st_mtime_ns, stamp.st_size) for stamp in stamps),
        *(md5(path.read_bytes()).hexdigest() for path in rules),
    )
    try:
        return Dataset.from_generator(
            _versioned,
            features=features,
            gen_kwargs={"examples": examples, "arguments": (*files, *options), "version": version},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{files[0]} cannot be kept as a table: {error.__cause__}") from error


def _versioned(
    examples: Callable[..., Iterator[dict[str, Any]]], arguments: tuple[Any, ...], version: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the examples; version is not read here: it keeps the tables of different versions apart."""
    yield from examples(*arguments)


def identity(text: str) -> int:
    """A whole number of 63 bits that stands for a text wherever it comes again; never 0, which stands for no text."""
    # Of 63 bits, since torch and Arrow hold signed numbers of 64; of 10 million texts two meet once in 200,000 sets.
    return int.from_bytes(md5(text.encode(), usedforsecurity=False).digest()[:8]) >> 1 or 1


def checked_text(place: str, column: str, value: object) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{place}: {column}={value!r} must be a text")
    if value is None or not value.strip():
        raise ConfigError(f"{place}: {column} is empty: fill it or remove the example")
    return value


def checked_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
