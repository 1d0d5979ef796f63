"""Files of rows, and data sets of the Hub: where they lie, what stands in each row, and at which file and line."""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from configs.schema import ConfigError, SetConfig

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # .gz may follow the texts among them
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
BATCH = 1000


class EmptyText(ConfigError):
    """A text that is empty, where one is needed."""


@dataclass(frozen=True)
class Source:
    """Where rows lie: in files, or in a split of a data set that `datasets` loads, from the Hub or from a folder laid
    out as there."""

    files: tuple[Path, ...] = ()
    repository: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.repository is not None:
            return " ".join(filter(None, (self.repository, self.subset, self.split)))
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def version(self) -> tuple[Any, ...]:
        """What differs where the rows do."""
        if self.repository is not None:
            return (self._open()._fingerprint,)
        return tuple(
            (stamp.st_mtime_ns, stamp.st_ctime_ns, stamp.st_size) for stamp in (path.stat() for path in self.files)
        )

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield file:line and columns of each row. Raises ConfigError where a row cannot be read."""
        for path in self.files:
            yield from checked_rows(path)
        if self.repository is not None:
            for number, row in enumerate(_rows_of(self._open().with_format("arrow").iter(BATCH)), start=1):
                yield f"{self} row {number}", row

    def _open(self) -> datasets.Dataset:
        assert self.repository is not None
        try:
            found = datasets.load_dataset(self.repository, self.subset, split=self.split, revision=self.revision)
        except (ValueError, OSError, KeyError, DatasetsError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{self} cannot be loaded: {reason}; check data.path, data.subset, data.split and data.revision"
            ) from error
        assert isinstance(found, datasets.Dataset), "split names one"
        return found


def find(key: str, name: str, root: str) -> Path:
    """The file or folder that a path names: under data.root, else in the working folder."""
    candidates = list(dict.fromkeys([Path(root, name), Path(name)]))
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        looked = " or ".join(str(candidate) for candidate in candidates)
        raise ConfigError(f"{key}={name}: there is no {looked}: give an existing file, or set data.root")
    return path


def find_source(config: SetConfig, key: str, name: str, split_key: str, split: str | None) -> Source:
    """What a path names: a file, the files of a pattern, of a folder the file of the split, or a data set of the Hub.

    key and split_key: the keys that gave the path and the split.
    """
    try:
        path = find(key, name, config.root)
    except ConfigError as error:
        if files := _matching(name, config.root):
            return Source(tuple(_checked(Path(file), f"{key}={name}") for file in files))
        if any(sign in name for sign in "*?["):
            raise ConfigError(f"{key}={name}: no file matches, in {config.root} or the working folder") from None
        if not HUB_NAME.fullmatch(name) or _ending(Path(name)) in ENDINGS:
            raise error from None
        if split is None:
            raise ConfigError(f"{split_key}=null: {name} on the Hub has several splits: name one") from None
        return Source((), name, config.subset, split, config.revision)
    if not path.is_dir():
        return Source((_checked(path, f"{key}={name}"),))
    if split is None:
        raise ConfigError(f"{split_key}=null: {path} is a folder: name the file in it, without its ending")
    if is_repository(path, split, config.subset):
        return Source((), str(path), config.subset, split, config.revision)
    return Source((file_in(path, split, asked=f"{split_key}={split}"),))


def find_evaluation(config: SetConfig) -> Source | None:
    """What `data.evaluation_path` and `data.evaluation_split` name, or None where both are null: a split alone is one
    of the folder, or of the data set of the Hub, that is trained on."""
    split, key = config.evaluation_split, "data.evaluation_split"
    if config.evaluation_path is not None:
        return find_source(config, "data.evaluation_path", config.evaluation_path, key, split)
    if split is None:
        return None
    assert config.path is not None, "parse_config asks for data.path"
    source = find_source(config, "data.path", config.path, key, split)
    if source == find_source(config, "data.path", config.path, "data.split", config.split):
        raise ConfigError(
            f"{key}={split}: {source} is what is trained on: name another split, or a file with data.evaluation_path"
        )
    return source


def _matching(pattern: str, root: str) -> list[str]:
    """The files of a pattern, under data.root, else in the working folder."""
    # Path.glob takes no absolute pattern, and the root is none.
    under = [str(Path(root, file)) for file in sorted(glob(pattern, root_dir=root))]  # noqa: PTH207
    return under or sorted(glob(pattern))  # noqa: PTH207


def is_repository(folder: Path, split: str | None, subset: str | None) -> bool:
    """Whether a folder is laid out as on the Hub, so that `datasets` knows which files are meant."""
    return subset is not None or ((folder / "README.md").is_file() and not _named(folder, split))


def file_in(folder: Path, stem: str | None, *, asked: str) -> Path:
    """The one file of a folder that has this name without its ending; asked: the key and value that ask for it."""
    files = _named(folder, stem)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ConfigError(f"{asked}: {folder} must hold one file {stem}.<jsonl, csv, tsv or parquet>; found {found}")
    return files[0]


def _named(folder: Path, stem: str | None) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.name.split(".")[0] == stem and _readable(file)]


def _checked(path: Path, asked: str) -> Path:
    if not _readable(path):
        raise ConfigError(f"{asked}: the ending must be one of {', '.join(ENDINGS)}; .gz may follow a text")
    return path


def _readable(path: Path) -> bool:
    return _ending(path) in ENDINGS and not path.name.endswith((".parquet.gz", ".arrow.gz"))


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def checked_text(place: str, column: str, value: object) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{place}: {column}={value!r:.40} must be a text")
    if value is None or not value.strip():
        raise EmptyText(f"{place}: {column} is empty")
    return value


def checked_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file:line and columns of each row, with one line for whatever keeps the file from being read."""
    readers = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    try:
        yield from readers[_ending(path)](path)
    except (OSError, csv.Error, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield file:line and text, line end included, of each line of a plain or gzipped file.

    Raises ConfigError where the gzip is cut, or a byte is not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    # Excel puts a mark first.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"{path}:{number}: byte 0x{line[error.start]:02x} at offset {error.start} of the line is not "
                        "UTF-8: save the file as UTF-8"
                    ) from error
                yield f"{path}:{number}", text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: the gzip is cut or damaged behind line {number} ({error}): fetch the file again"
        ) from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, value in json_values(path):
        yield place, _object(place, value)


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield file:line and value of each line of JSON."""
    for place, line in lines(path):
        if line.strip():
            try:
                value = json.loads(line.rstrip("\r\n"))
                if "\\ud" in line.lower():  # half a surrogate, which no table of UTF-8 holds
                    json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{place} has half of a character ({error.reason}): mend or remove the line"
                ) from error
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{place} is no JSON ({error.msg} at column {error.colno}): mend or remove the line"
                ) from error
            except RecursionError as error:
                raise ConfigError(f"{place} is no JSON (nested too deeply): mend or remove the line") from error
            yield place, value


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A whole array, or JSON lines under the shorter ending."""
    first = next((line.lstrip() for _, line in lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads("".join(line for _, line in lines(path)))
    except RecursionError as error:
        raise ConfigError(f"{path} is no JSON (nested too deeply): mend it") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno} is no JSON ({error.msg} at column {error.colno}): mend or remove the line"
        ) from error
    for number, row in enumerate(rows, start=1):
        place = f"{path} example {number}"
        yield place, _object(place, row)


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: an example must be a JSON object with a text by column, not {row!r:.40}")
    return row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    # In a TSV quotes are letters like any other.
    is_tsv = _ending(path) == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    reader = csv.reader((line for _, line in lines(path)), **dialect)
    header: list[str] = []
    for cells in filter(None, reader):
        if not header:
            header = cells
            continue
        # The reader stands behind the row, whose texts may hold line ends.
        place = f"{path}:{reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
        if len(cells) != len(header):
            raise ConfigError(
                f"{place}: {len(cells)} cells under {len(header)} columns: "
                + ("fill the row, if with empty cells" if len(cells) < len(header) else "quote cells with commas")
            )
        yield place, {column: cell or None for column, cell in zip_longest(header, cells)}


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_rows_of(pq.ParquetFile(path).iter_batches(BATCH)), start=1):
        yield f"{path} example {number}", row


def _arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A stream, as `datasets` writes it, or a file of Arrow's."""
    with pa.memory_map(str(path)) as file:
        try:
            batches: Any = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for number, row in enumerate(_rows_of(batches), start=1):
            yield f"{path} example {number}", row


def _rows_of(batches: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()
