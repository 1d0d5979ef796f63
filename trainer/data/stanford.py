"""Stanford ColBERT's files: triples and scored examples by ids, with queries.tsv and collection.tsv.

A line of triples is `[query, positive, negative, ...]`, of scored examples `[query, [document, score], ...]`, the
positive first, both as JSON, or the ids of a triple between tabs. A line of queries is an id and a text between tabs,
of a collection perhaps a title behind the text, which goes before it.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, SetConfig
from trainer.data.files import Source, find, json_values, lines
from trainer.data.pairs import hold_out
from trainer.data.scores import checked_score
from trainer.data.tables import (
    EXAMPLES,
    NO_QUERY,
    TEXTS,
    Index,
    TrainingSet,
    by_ids,
    empty_texts,
    identifier,
    kept_table,
    or_left_out,
    text_row,
    with_warnings,
    without_empty,
)


def load(name: str, config: SetConfig) -> tuple[TrainingSet, TrainingSet | None]:
    """Return training and held-out examples."""
    examples = _read(name, config, "data.path", config.path)
    if config.evaluation_path is not None:
        held_out = _read(name, config, "data.evaluation_path", config.evaluation_path)
        return with_warnings(examples, held_out), held_out
    return hold_out(examples, config.evaluation_fraction or 0)


def _read(name: str, config: SetConfig, key: str, path: str | None) -> TrainingSet:
    named = ((key, path), ("data.queries_path", config.queries_path), ("data.documents_path", config.documents_path))
    rows, queries, collection = (Source((_file(each, str(value), config.root),)) for each, value in named)
    table = kept_table(_examples, [rows, queries, collection], [], features=EXAMPLES)
    query_texts, document_texts = _texts_of(queries), _texts_of(collection, titled=True)
    warnings = (*empty_texts(query_texts, queries), *empty_texts(document_texts, collection))
    return without_empty(TrainingSet(name, config, query_texts, document_texts, table, warnings), rows)


def _file(key: str, name: str, root: str) -> Path:
    path = find(key, name, root)
    if path.is_dir():
        raise ConfigError(f"{key}={name} is a folder: name the file in it")
    return path


def _texts_of(source: Source, *, titled: bool = False) -> Any:
    return kept_table(_texts, [source], [titled], features=TEXTS)


def _texts(source: Source, titled: bool) -> Iterator[dict[str, Any]]:
    for place, line in lines(source.files[0]):
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if len(cells) < 2:
            raise ConfigError(f"{place}: 1 cell, and an id and a text between tabs are needed: mend or remove the line")
        key, text, *title = cells
        if key == "id":
            continue  # a header, which Stanford's loader allows
        yield text_row(
            place,
            identifier(place, "id", key),
            f"{title[0]} | {text}" if titled and title and title[0] else text.strip(),
        )


def _examples(rows: Source, queries: Source, collection: Source) -> Iterator[dict[str, Any]]:
    """Yield the examples, or raise ConfigError at the first line that is none."""
    query_index = Index(_texts_of(queries), queries, "query")
    document_index = Index(_texts_of(collection, titled=True), collection, "document")
    first = None
    for place, values in _lines(rows.files[0]):
        if not isinstance(values, list) or len(values) < 3:
            raise ConfigError(
                f"{place}: {json.dumps(values):.60} must be [query, positive, negative, ...], "
                "or [query, [document, score], ...]"
            )
        query, *documents = values
        scored = [isinstance(document, list) for document in documents]
        first = any(scored) if first is None else first
        if any(scored) != all(scored) or any(scored) != first:
            raise ConfigError(f"{place}: some documents have a score and some have none: give all one, or none")
        if first and any(len(document) != 2 for document in documents):
            raise ConfigError(f"{place}: {json.dumps(documents):.60} must be pairs of a document and its score")
        keys = [identifier(place, "document", document[0] if first else document) for document in documents]
        scores = [checked_score(place, document[1]) for document in documents] if first else []
        key = identifier(place, "query", query)
        yield or_left_out(place, partial(by_ids, place, query_index, key, document_index, keys, scores), NO_QUERY)
    if first is None:
        raise ConfigError(f"{rows} holds no example: give [query, positive, negative] in each line")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line: JSON, or ids between tabs."""
    if ".tsv" in path.suffixes:
        for place, line in lines(path):
            if line.strip():
                yield place, line.split()
        return
    yield from json_values(path)
