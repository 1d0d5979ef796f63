"""BEIR's layout: a folder with a corpus, queries and graded judgements (Thakur et al. 2021).

corpus and queries are JSON lines (_id, text, of a document perhaps a title), qrels/<split>.tsv is query-id, corpus-id
and score under a header; all may be gzipped. A run in TREC's format brings further negatives.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, Value

from configs.schema import ConfigError, Negatives, SetConfig
from trainer.data.files import Source, checked_rows, file_in, find, lines
from trainer.data.pairs import hold_out
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import (
    EXAMPLES,
    Index,
    TrainingSet,
    empty_texts,
    identifier,
    kept_table,
    text_table,
    values,
    without_empty,
)

# Of the judgements, the share that may name texts that are not there: published sets have a few.
UNKNOWN = 0.05
UNKNOWN_JUDGEMENTS = Features(
    {"count": Value("int64"), "total": Value("int64"), "place": Value("string"), "what": Value("string")}
)


def load(name: str, config: SetConfig) -> tuple[TrainingSet, RetrievalSet | None]:
    """Return training examples, one a query, and queries to rank the whole corpus for: those of the evaluation split,
    or a share of the training queries."""
    assert config.path is not None, "parse_config asks for data.path"
    folder = find("data.path", config.path, config.root)
    if not folder.is_dir():
        raise ConfigError(f"data.path={config.path} is a file: name the BEIR folder that holds it")
    queries, corpus = (
        Source((file_in(folder, stem, asked=f"data.path={config.path}"),)) for stem in ("queries", "corpus")
    )
    qrels = _qrels(folder, "data.split", config.split)
    run = None
    if config.run_path is not None:
        run = find("data.run_path", config.run_path, config.root)
    sources = [Source((qrels,)), queries, corpus, *([Source((run,))] if run else [])]
    unknown = _left_out(qrels, queries, corpus)
    assert config.positive_grade is not None, "parse_config asks for data.positive_grade"
    table = kept_table(_examples, sources, [config.positive_grade, config.negatives], features=EXAMPLES)
    query_texts, document_texts = _queries(queries), _corpus(corpus)
    warnings = [*empty_texts(query_texts, queries), *empty_texts(document_texts, corpus), *unknown]
    examples = TrainingSet(name, config, query_texts, document_texts, table, tuple(warnings))
    examples = without_empty(examples, Source((qrels,)))
    if config.evaluation_split is not None:
        asked = _qrels(folder, "data.evaluation_split", config.evaluation_split)
        unknown = _left_out(asked, queries, corpus)
        grades = _judgements(asked, queries, corpus)
        if not grades:
            raise ConfigError(f"{asked} has no query with a text and a document of grade 1 or more to be scored on")
        return replace(examples, warnings=(*examples.warnings, *unknown)), _retrieval(
            grades, query_texts, document_texts
        )
    examples, held_out = hold_out(examples, config.evaluation_fraction or 0)
    if held_out is None:
        return examples, None
    rows = set(held_out.examples["query"])
    grades = {query: own for query, own in _judgements(qrels, queries, corpus).items() if query in rows}
    return examples, _retrieval(grades, query_texts, document_texts)


def _qrels(folder: Path, key: str, split: str | None) -> Path:
    if not (folder / "qrels").is_dir():
        raise ConfigError(f"{key}={split}: {folder} has no folder qrels with the judgements: add it")
    return file_in(folder / "qrels", split, asked=f"{key}={split}")


def _queries(source: Source) -> Any:
    return text_table(source, "_id", "text")


def _corpus(source: Source) -> Any:
    return text_table(source, "_id", "title", "text")


def _retrieval(grades: dict[int, dict[int, int]], queries: Any, corpus: Any) -> RetrievalSet:
    ids = dict(enumerate(values(corpus, "id")))
    chosen = queries.select(list(grades))
    names = dict(zip(grades, chosen["id"], strict=True))
    return RetrievalSet(
        queries=dict(zip(chosen["id"], chosen["text"], strict=True)),
        corpus=dict(zip(ids.values(), values(corpus, "text"), strict=True)),
        judgements={names[query]: {ids[row]: grade for row, grade in own.items()} for query, own in grades.items()},
    )


def _indexes(queries: Source, corpus: Source) -> tuple[Index, Index]:
    return (
        Index(_queries(queries), queries, "query-id", "_id"),
        Index(_corpus(corpus), corpus, "corpus-id", "_id"),
    )


def _judgements(qrels: Path, queries: Source, corpus: Source) -> dict[int, dict[int, int]]:
    """Grade by row of the corpus by row of the queries, of queries that have a text and an answer."""
    grades: dict[int, dict[int, int]] = {}
    query_index, document_index = _indexes(queries, corpus)
    for _, query, document, grade in _known(qrels, query_index, document_index):
        grades.setdefault(query, {})[document] = grade
    return {
        query: own
        for query, own in grades.items()
        if any(grade > 0 for grade in own.values()) and not query_index.is_empty(query)
    }


def _known(qrels: Path, queries: Index, corpus: Index) -> Iterator[tuple[str, int, int, int]]:
    """Yield the judgements of texts that are there, as place, rows and grade."""
    judged: dict[tuple[str, str], int] = {}
    for place, query, document, grade in _rows(qrels):
        before = judged.setdefault((query, document), grade)
        if before != grade:
            raise ConfigError(
                f"{place}: query-id={query} corpus-id={document} has grade {grade} here and {before} before: remove one"
            )
        rows = queries.get(query), corpus.get(document)
        if rows[0] is not None and rows[1] is not None:
            yield place, rows[0], rows[1], grade


def _left_out(qrels: Path, queries: Source, corpus: Source) -> list[str]:
    """A warning where judgements are of texts that are not there. Raises ConfigError where these are too many."""
    sources = [Source((qrels,)), queries, corpus]
    [unknown] = kept_table(_unknown, sources, [], features=UNKNOWN_JUDGEMENTS)
    if not unknown["total"]:
        raise ConfigError(f"{qrels} holds no judgement: give query-id, corpus-id and score in each row")
    if unknown["count"] > UNKNOWN * unknown["total"]:
        raise ConfigError(
            f"{unknown['place']}: {unknown['what']}, and so in {unknown['count']:,} of {unknown['total']:,} "
            f"judgements, more than {UNKNOWN:.0%}: are these the judgements of this corpus?"
        )
    if not unknown["count"]:
        return []
    return [
        f"{unknown['count']:,} judgements of {qrels} are of no text, first {unknown['place']}: {unknown['what']}; "
        "left out"
    ]


def _unknown(qrels: Source, queries: Source, corpus: Source) -> Iterator[dict[str, Any]]:
    """Yield one row: how many judgements there are, how many of a text that is not there, and of the first of these,
    where it stands and why."""
    query_index, document_index = _indexes(queries, corpus)
    count, total, first = 0, 0, {"place": "", "what": ""}
    for place, query, document, _ in _rows(qrels.files[0]):
        total += 1
        row = query_index.get(query)
        if row is not None and document_index.get(document) is not None:
            continue
        name, key, index = ("query-id", query, query_index) if row is None else ("corpus-id", document, document_index)
        first = first if count else {"place": place, "what": f"{name}={key} is not in {index.source}"}
        count += 1
    yield {"count": count, "total": total, **first}


def _rows(qrels: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield place, ids and grade of each judgement."""
    for place, row in checked_rows(qrels):
        if not {"query-id", "corpus-id", "score"} <= set(row):
            raise ConfigError(
                f"{place}: the columns are {', '.join(row)}: the first line must be query-id, corpus-id, score"
            )
        query, document = (identifier(place, name, row[name]) for name in ("query-id", "corpus-id"))
        score = row["score"]
        if not re.fullmatch(r"-?[0-9]+(\.0+)?", str(score)) or isinstance(score, bool):
            raise ConfigError(f"{place}: score={score!r:.40} must be a whole number")
        yield place, query, document, int(float(score))


def _examples(qrels: Source, queries: Source, corpus: Source, *rest: Any) -> Iterator[dict[str, Any]]:
    """Yield an example of each query that a document answers; of an empty text, none."""
    *run, positive_grade, negatives = rest
    query_index, document_index = _indexes(queries, corpus)
    judged: dict[int, dict[int, int]] = {}
    places: dict[int, str] = {}
    for place, query, document, grade in _known(qrels.files[0], query_index, document_index):
        judged.setdefault(query, {})[document] = grade
        places.setdefault(query, place)
    ranked = _ranking(run[0].files[0], query_index, document_index) if run else {}
    empty = True
    for query, grades in judged.items():
        others = [document for document, grade in grades.items() if grade < positive_grade]
        positives = [document for document, grade in grades.items() if grade >= positive_grade]
        if not positives:
            continue
        if negatives is Negatives.none:
            others = []
        if negatives is Negatives.run:
            others = [document for document in ranked.get(query, ()) if grades.get(document, 0) < positive_grade]
        empty = False
        # An empty text answers nothing, and is told apart too easily.
        positives, others = ([row for row in rows if not document_index.is_empty(row)] for rows in (positives, others))
        has_texts = bool(positives) and not query_index.is_empty(query)
        yield {
            "query": query,
            "documents": [*positives, *others] if has_texts else [],
            "positives": len(positives) if has_texts else 0,
            "scores": [],
            "place": places[query],
        }
    if empty:
        raise ConfigError(
            f"{qrels} has no query with a document of grade {positive_grade} or more: lower data.positive_grade"
        )


def _ranking(path: Path, queries: Index, corpus: Index) -> dict[int, list[int]]:
    """Rows of the documents of each query, in the order of the run."""
    ranked: dict[int, list[int]] = {}
    for place, line in lines(path):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 6:
            raise ConfigError(
                f"{place}: {len(cells)} cells, and TREC's runs have 6: query, Q0, document, rank, score, name"
            )
        query = queries.get(cells[0])
        if query is None:
            continue  # a run may rank for more queries than are trained on
        document = corpus.get(cells[2])
        if document is None:
            corpus.row(place, cells[2])
        elif not corpus.is_empty(document):
            ranked.setdefault(query, []).append(document)
    return ranked
