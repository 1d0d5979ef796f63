"""A set of training examples: texts and who answers whom, in tables on disk that are mapped, not held, in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import md5
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from configs.schema import ConfigError, SetConfig
from trainer.data.files import EmptyText, Source

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]

TEXTS = Features({"text": Value("string"), "identity": Value("int64"), "id": Value("string"), "place": Value("string")})
EXAMPLES = Features(
    {
        "query": Value("int64"),
        "documents": List(Value("int64")),
        "positives": Value("int64"),
        "scores": List(Value("float64")),
        "place": Value("string"),
    }
)
# Examples that bring their texts; which rows of the tables of texts these are follows from their number.
WITH_TEXTS = Features(
    {
        "query": Value("string"),
        "documents": List(Value("string")),
        "positives": Value("int64"),
        "scores": List(Value("float64")),
        "place": Value("string"),
        "query_identity": Value("int64"),
        "document_identities": List(Value("int64")),
    }
)


@dataclass(frozen=True)
class TrainingSet:
    """Examples of one set. Texts and rows are read from disk where they are asked for."""

    name: str
    config: SetConfig
    queries: Dataset
    """text, identity (int64 above 0: equal where two texts are the same)"""
    documents: Dataset
    """text, identity"""
    examples: Dataset
    """query (row of queries), documents (rows of documents, positives first), positives (how many of these answer the
    query), scores (a teacher's, one a document, or none), place (file:line)"""
    warnings: tuple[str, ...] = ()
    """What was left out or looks wrong, in words."""

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def document_counts(self) -> IntArray:
        """(examples,): documents of each."""
        return column(self.examples, "documents", pc.list_value_length)

    def first_documents(self) -> IntArray:
        """(examples,): the row of each example's first positive."""
        return column(self.examples, "documents", lambda lists: pc.list_element(lists, 0))

    def named_documents(self) -> IntArray:
        """The rows of the documents that any example names, rising."""
        return _named(len(self.documents), column(self.examples, "documents", pc.list_flatten))

    def named_queries(self) -> IntArray:
        """The rows of the queries that any example names, rising."""
        return _named(len(self.queries), column(self.examples, "query"))

    @cached_property
    def has_teacher(self) -> bool:
        """Whether every example has scores."""
        return len(self) > 0 and bool(column(self.examples, "scores", pc.list_value_length).all())

    def select(self, rows: Sequence[int] | IntArray) -> Self:
        """The same texts and these examples."""
        return replace(self, examples=self.examples.select(rows))

    def example(self, row: int) -> dict[str, Any]:
        """The texts of an example, the identities that stand for them, its scores and its place."""
        example = self.examples[row]
        query, documents = self.queries[example["query"]], self.documents[example["documents"]]
        return {
            "query": query["text"],
            "query_identity": query["identity"],
            "documents": documents["text"],
            "document_identities": documents["identity"],
            "positives": example["positives"],
            "scores": example["scores"],
            "place": example["place"],
        }

    def known_positives(self) -> tuple[IntArray, IntArray]:
        """(pairs,) each: identities of a query and of a document that answers it, sorted, each pair once."""
        positives = column(self.examples, "positives")
        queries, documents = column(self.examples, "query"), self.first_documents()
        if (positives != 1).any():
            starts = np.cumsum(self.document_counts) - self.document_counts
            # The first so many of each example's documents.
            within = np.arange(positives.sum()) - np.repeat(np.cumsum(positives) - positives, positives)
            documents = column(self.examples, "documents", pc.list_flatten)[np.repeat(starts, positives) + within]
            queries = np.repeat(queries, positives)
        return sorted_pairs(column(self.queries, "identity")[queries], column(self.documents, "identity")[documents])


def sorted_pairs(ones: IntArray, others: IntArray) -> tuple[IntArray, IntArray]:
    """The pairs in order, each once; two arrays and no table of them, which would be held twice."""
    order = np.lexsort((others, ones))
    # One after the other, and let go: of a million pairs each array is 8 MB.
    ones = ones[order]
    others = others[order]
    del order
    is_new = np.ones(len(ones), dtype=bool)
    is_new[1:] = (ones[1:] != ones[:-1]) | (others[1:] != others[:-1])
    return (ones, others) if is_new.all() else (ones[is_new], others[is_new])


def _named(texts: int, rows: IntArray) -> IntArray:
    is_named = np.zeros(texts, dtype=bool)
    is_named[rows] = True
    return np.flatnonzero(is_named)


def column(table: Dataset, name: str, function: Callable[[Any], Any] | None = None) -> IntArray:
    """A column of numbers as an array; function: of pyarrow's, which makes numbers of it."""
    values = table.select_columns(name).with_format("arrow")[:][name]
    array: IntArray = (function(values) if function else values).to_numpy()
    return array


def identity(text: str) -> int:
    """A whole number of 63 bits that stands for a text wherever it comes again; never 0, which stands for no text."""
    # Of 63 bits, since torch and Arrow hold signed numbers of 64; of 10 million texts two meet once in 200,000 sets.
    return int.from_bytes(md5(text.encode(), usedforsecurity=False).digest()[:8]) >> 1 or 1


def normalised(text: str) -> str:
    """A text without what asks nothing else: case, and how many spaces."""
    return " ".join(text.lower().split())


def kept_table(
    rows: Callable[..., Iterator[dict[str, Any]]],
    sources: Sequence[Source],
    options: Sequence[Any],
    *,
    features: Features,
) -> Dataset:
    """Put what `rows(*sources, *options)` yields into a table on disk, kept for as long as the sources stay.

    Raises the ConfigError that rows raises, or one that names the first source.
    """
    named = [*sources, *options][0]
    rules = sorted(Path(__file__).parent.glob("*.py"))
    # The sources as they are now, read by the rules as they are now.
    version = (
        *(source.version() for source in sources),
        *(md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in rules),
    )
    try:
        return Dataset.from_generator(
            _versioned,
            features=features,
            gen_kwargs={"rows": rows, "arguments": (*sources, *options), "version": version},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{named} cannot be kept as a table: {error.__cause__}") from error
    except OSError as error:
        raise ConfigError(f"{named} cannot be kept as a table: {error}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ConfigError(f"{named} holds no row: give one with texts") from error


def _versioned(
    rows: Callable[..., Iterator[dict[str, Any]]], arguments: tuple[Any, ...], version: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the rows; version is not read here: it keeps the tables of different versions apart."""
    yield from rows(*arguments)


def with_texts(
    place: str, query: str, documents: list[str], *, positives: int = 1, scores: Sequence[float] = ()
) -> dict[str, Any]:
    """A row of an example that brings its texts; documents: its positives first."""
    return {
        "query": query,
        "documents": documents,
        "positives": positives,
        "scores": list(scores),
        "place": place,
        "query_identity": identity(query),
        "document_identities": [identity(text) for text in documents],
    }


# What stands in a table of examples with texts for one that has none.
NO_TEXTS: dict[str, Any] = {"query": "", "query_identity": identity(""), "document_identities": []}
NO_QUERY: dict[str, Any] = {"query": 0}


def or_left_out(place: str, example: Callable[[], dict[str, Any]], left_out: dict[str, Any]) -> dict[str, Any]:
    """The example, or where one of its texts is empty, a row that answers nothing, which `without_empty` counts."""
    try:
        return example()
    except EmptyText:
        return {"documents": [], "positives": 0, "scores": [], "place": place, **left_out}


def with_warnings(examples: TrainingSet, held_out: TrainingSet) -> TrainingSet:
    """The training examples with what is to be said of both."""
    return replace(examples, warnings=tuple(dict.fromkeys([*examples.warnings, *held_out.warnings])))


def without_empty(examples: TrainingSet, source: Source) -> TrainingSet:
    """The set without examples of empty texts. Raises ConfigError, which names the first, where these are too many."""
    positives = column(examples.examples, "positives")
    empty, total = np.flatnonzero(positives == 0), len(positives)
    if not len(empty):
        return examples
    place, allowed = examples.examples[int(empty[0])]["place"], examples.config.max_empty or 0
    found = f"{len(empty):,} of {total:,} examples of {source} have an empty text, first {place}"
    if len(empty) > allowed * total:
        # Of a file of ids, the text stands elsewhere.
        texts = "".join(f"; {warning}" for warning in examples.warnings)
        raise ConfigError(f"{found}, more than data.max_empty={allowed:g}: fill or remove them, or raise it{texts}")
    return replace(examples.select(np.flatnonzero(positives)), warnings=(*examples.warnings, f"{found}; left out"))


def set_of_rows(name: str, config: SetConfig, source: Source, table: Dataset) -> TrainingSet:
    """The set of examples that bring their texts: its tables of texts are views of theirs."""
    data = table.with_format("arrow")[:]
    counts = pc.list_value_length(data["documents"]).to_numpy()
    stops = np.cumsum(counts)
    documents = pa.ListArray.from_arrays(
        np.concatenate([[0], stops]).astype(np.int32) if len(stops) and stops[-1] < 2**31 else _too_many(name),
        np.arange(stops[-1] if len(stops) else 0),
    )
    examples = {"query": pa.array(np.arange(len(table))), "documents": documents}
    examples |= {kept: data[kept] for kept in ("positives", "scores", "place")}
    fingerprint = table._fingerprint
    whole = TrainingSet(
        name,
        config,
        queries=_view({"text": data["query"], "identity": data["query_identity"]}, f"{fingerprint}q"),
        documents=_view(
            {"text": _flat(data["documents"]), "identity": _flat(data["document_identities"])}, f"{fingerprint}d"
        ),
        examples=_view(examples, f"{fingerprint}e"),
    )
    return without_empty(whole, source)


def _too_many(name: str) -> Any:
    raise ConfigError(f"{name} has more than 2,147,483,647 documents in its rows: give them by ids")


def _flat(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in lists.chunks], type=lists.type.value_type)


def _view(columns: dict[str, Any], fingerprint: str) -> Dataset:
    return Dataset(pa.table(columns), fingerprint=fingerprint)


def text_table(source: Source, id_column: str, *text_columns: str) -> Dataset:
    """The texts of a file of ids and texts; where there are several columns, a title for one, with a space between."""
    return kept_table(_texts, [source], [id_column, text_columns], features=TEXTS)


def _texts(source: Source, id_column: str, text_columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the texts, which may be empty as long as nobody trains on them."""
    for place, row in source.rows():
        cell, *_ = cells(place, row, id_column, text_columns[-1])
        texts = [_optional_text(place, name, row.get(name)) for name in text_columns]
        yield text_row(place, identifier(place, id_column, cell), " ".join(filter(None, texts)))


def _optional_text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{place}: {name}={value!r:.40} must be a text")
    return (value or "").strip()


def text_row(place: str, key: str, text: str) -> dict[str, Any]:
    return {"text": text, "identity": identity(text), "id": key, "place": place}


class Index:
    """Rows of a table of texts by id, in 16 bytes each.

    column_name: what the files that name the ids call them; own_column: what the file of the texts does, if otherwise.
    """

    def __init__(self, texts: Dataset, source: Source, column_name: str, own_column: str | None = None) -> None:
        self.texts, self.source, self.column_name = texts, source, column_name
        hashes = np.fromiter((identity(key) for key in values(texts, "id")), np.int64, len(texts))
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(twice):
            row = texts[int(self._rows[twice + 1].min())]
            own = own_column or column_name
            raise ConfigError(f"{row['place']}: {own}={row['id']} stands here again: remove one of the two")
        self._empty = set(_empty(texts).tolist())

    def get(self, key: str) -> int | None:
        """The row of an id, or None where there is none."""
        wanted = identity(key)
        place = int(np.searchsorted(self._hashes, wanted))
        return int(self._rows[place]) if place < len(self._hashes) and self._hashes[place] == wanted else None

    def row(self, place: str, key: str) -> int:
        """The row of an id. Raises ConfigError, at the place that names it, where it has none, or no text."""
        row = self.get(key)
        if row is None:
            raise ConfigError(
                f"{place}: {self.column_name}={key} is not in {self.source}: add it there, or remove it here"
            )
        if self.is_empty(row):
            raise EmptyText(f"{self.texts[row]['place']}: text is empty")
        return row

    def is_empty(self, row: int) -> bool:
        """Whether there is no text in a row."""
        return row in self._empty


def by_ids(
    place: str, queries: Index, query: str, documents: Index, keys: list[str], scores: list[float]
) -> dict[str, Any]:
    """A row of an example that names its texts, the positive first."""
    return {
        "query": queries.row(place, query),
        "documents": [documents.row(place, key) for key in keys],
        "positives": 1,
        "scores": scores,
        "place": place,
    }


def empty_texts(texts: Dataset, source: Source) -> Iterator[str]:
    """A warning where texts are empty, which no example names, or it would be none."""
    rows = _empty(texts)
    if len(rows):
        yield f"{len(rows):,} of {len(texts):,} texts of {source} are empty, first {texts[int(rows[0])]['place']}"


def _empty(texts: Dataset) -> IntArray:
    return np.flatnonzero(column(texts, "identity") == identity(""))


def values(table: Dataset, name: str) -> Iterator[Any]:
    for batch in table.select_columns(name).with_format("arrow").iter(10_000):
        yield from batch[name].to_pylist()


def cells(place: str, row: dict[str, Any], *names: str) -> list[Any]:
    """The values of these columns. Raises ConfigError where the row lacks one."""
    for name in names:
        if name not in row:
            found = ", ".join(row) or "none"
            raise ConfigError(f"{place}: there is no column {name}; the columns are {found}: rename or add it")
    return [row[name] for name in names]


def identifier(place: str, name: str, value: Any) -> str:
    """An id is a text or a whole number; 7 and "7" are the same id."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise ConfigError(f"{place}: {name}={value!r:.40} must be a whole number, or a text that is not empty")
