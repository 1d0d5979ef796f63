"""BEIR's layout: a corpus, queries and graded judgements (Thakur et al. 2021), in a folder or on the Hub.

corpus and queries are JSON lines (_id, text, of a document perhaps a title), qrels/<split>.tsv is query-id, corpus-id
and score under a header; all may be gzipped. On the Hub corpus and queries are subsets, and the judgements the subset
qrels (NanoBEIR) or a data set of their own, <name>-qrels (BEIR). Judgements without a score have grade 1. A run in
TREC's format brings further negatives.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, Value, get_dataset_config_names, get_dataset_split_names
from datasets.exceptions import DatasetsError

from configs.schema import ConfigError, Negatives, SetConfig
from trainer.data.files import HUB_NAME, Source, file_in, find, is_repository
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
from trainer.data.trec import read_run

# Of the judgements, the share that may name texts that are not there: published sets have a few.
UNKNOWN = 0.05
UNKNOWN_JUDGEMENTS = Features(
    {"count": Value("int64"), "total": Value("int64"), "place": Value("string"), "what": Value("string")}
)


def load(name: str, config: SetConfig) -> tuple[TrainingSet, RetrievalSet | None]:
    """Return training examples, one a query, and queries to rank the whole corpus for: those of the evaluation split,
    or a share of the training queries."""
    qrels, queries, corpus = _sources(config, "data.split", config.split)
    run = None
    if config.run_path is not None:
        run = find("data.run_path", config.run_path, config.root)
    sources = [qrels, queries, corpus, *([Source((run,))] if run else [])]
    unknown = _left_out(qrels, queries, corpus)
    assert config.positive_grade is not None, "parse_config asks for data.positive_grade"
    table = kept_table(_examples, sources, [config.positive_grade, config.negatives], features=EXAMPLES)
    query_texts, document_texts = _queries(queries), _corpus(corpus)
    warnings = [*empty_texts(query_texts, queries), *empty_texts(document_texts, corpus), *unknown]
    examples = TrainingSet(name, config, query_texts, document_texts, table, tuple(warnings))
    examples = without_empty(examples, qrels)
    if config.evaluation_split is not None:
        evaluation, unknown = load_evaluation(config)
        return replace(examples, warnings=(*examples.warnings, *unknown)), evaluation
    examples, held_out = hold_out(examples, config.evaluation_fraction or 0)
    if held_out is None:
        return examples, None
    rows = set(held_out.examples["query"])
    grades = {query: own for query, own in _judgements(qrels, queries, corpus).items() if query in rows}
    return examples, _retrieval(config, grades, query_texts, document_texts)


def load_evaluation(config: SetConfig) -> tuple[RetrievalSet, list[str]]:
    """Return the queries of the evaluation split, which rank the whole corpus, and what is left out, in words; what is
    trained on is not read."""
    qrels, queries, corpus = _sources(config, "data.evaluation_split", config.evaluation_split)
    unknown = _left_out(qrels, queries, corpus)
    grades = _judgements(qrels, queries, corpus)
    if not grades:
        raise ConfigError(f"{qrels} has no query with a text and a document of grade 1 or more to be scored on")
    return _retrieval(config, grades, _queries(queries), _corpus(corpus)), unknown


def _sources(config: SetConfig, key: str, split: str | None) -> tuple[Source, Source, Source]:
    """Of the judgements of a split, the queries and the corpus; key: the one that names the split."""
    assert config.path is not None, "parse_config asks for data.path"
    assert split is not None, "parse_config asks for data.split"
    try:
        folder = find("data.path", config.path, config.root)
    except ConfigError:
        if not HUB_NAME.fullmatch(config.path):
            raise
        return _subsets(config.path, split)
    if not folder.is_dir():
        raise ConfigError(f"data.path={config.path} is a file: name the BEIR folder that holds it")
    if is_repository(folder, "corpus", None):
        return _subsets(str(folder), split)
    queries, corpus = (
        Source((file_in(folder, stem, asked=f"data.path={config.path}"),)) for stem in ("queries", "corpus")
    )
    if not (folder / "qrels").is_dir():
        raise ConfigError(f"{key}={split}: {folder} has no folder qrels with the judgements: add it")
    return Source((file_in(folder / "qrels", split, asked=f"{key}={split}"),)), queries, corpus


def _subsets(repository: str, split: str) -> tuple[Source, Source, Source]:
    """The same on the Hub, or in a folder that is laid out as there."""
    own = "qrels" in _asked(repository, get_dataset_config_names, repository)
    qrels = Source((), repository, "qrels", split) if own else Source((), f"{repository}-qrels", None, split)
    # Texts have one split, train or named as the subset.
    queries, corpus = (
        Source((), repository, subset, _asked(repository, get_dataset_split_names, repository, subset)[0])
        for subset in ("queries", "corpus")
    )
    return qrels, queries, corpus


def _asked(repository: str, ask: Callable[..., list[str]], *arguments: str) -> list[str]:
    try:
        return ask(*arguments)
    except (ValueError, OSError, KeyError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.path={repository} cannot be loaded: {reason}; it must have the subsets queries and corpus, or be a "
            "BEIR folder"
        ) from error


def _queries(source: Source) -> Any:
    return text_table(source, "_id", "text")


def _corpus(source: Source) -> Any:
    return text_table(source, "_id", "title", "text")


def _retrieval(config: SetConfig, grades: dict[int, dict[int, int]], queries: Any, corpus: Any) -> RetrievalSet:
    ids = dict(enumerate(values(corpus, "id")))
    chosen = queries.select(list(grades))
    names = dict(zip(grades, chosen["id"], strict=True))
    return RetrievalSet(
        queries=dict(zip(chosen["id"], chosen["text"], strict=True)),
        corpus=dict(zip(ids.values(), values(corpus, "text"), strict=True)),
        judgements={names[query]: {ids[row]: grade for row, grade in own.items()} for query, own in grades.items()},
        ignore_identical_ids=bool(config.ignore_identical_ids),
        unjudged=frozenset(values(queries, "id")) - frozenset(names.values()),
    )


def _indexes(queries: Source, corpus: Source) -> tuple[Index, Index]:
    return (
        Index(_queries(queries), queries, "query-id", "_id"),
        Index(_corpus(corpus), corpus, "corpus-id", "_id"),
    )


def _judgements(qrels: Source, queries: Source, corpus: Source) -> dict[int, dict[int, int]]:
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


def _known(qrels: Source, queries: Index, corpus: Index) -> Iterator[tuple[str, int, int, int]]:
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


def _left_out(qrels: Source, queries: Source, corpus: Source) -> list[str]:
    """A warning where judgements are of texts that are not there. Raises ConfigError where these are too many."""
    [unknown] = kept_table(_unknown, [qrels, queries, corpus], [], features=UNKNOWN_JUDGEMENTS)
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
    for place, query, document, _ in _rows(qrels):
        total += 1
        row = query_index.get(query)
        if row is not None and document_index.get(document) is not None:
            continue
        name, key, index = ("query-id", query, query_index) if row is None else ("corpus-id", document, document_index)
        first = first if count else {"place": place, "what": f"{name}={key} is not in {index.source}"}
        count += 1
    yield {"count": count, "total": total, **first}


def _rows(qrels: Source) -> Iterator[tuple[str, str, str, int]]:
    """Yield place, ids and grade of each judgement."""
    for place, row in qrels.rows():
        if not {"query-id", "corpus-id"} <= set(row):
            raise ConfigError(
                f"{place}: the columns are {', '.join(row)}: the first line must be query-id, corpus-id, score"
            )
        query, document = (identifier(place, name, row[name]) for name in ("query-id", "corpus-id"))
        score = row.get("score", 1)
        if not re.fullmatch(r"-?[0-9]+(\.0+)?", str(score)) or isinstance(score, bool):
            raise ConfigError(f"{place}: score={score!r:.40} must be a whole number")
        yield place, query, document, int(float(score))


def _examples(qrels: Source, queries: Source, corpus: Source, *rest: Any) -> Iterator[dict[str, Any]]:
    """Yield an example of each query that a document answers; of an empty text, none."""
    *run, positive_grade, negatives = rest
    query_index, document_index = _indexes(queries, corpus)
    judged: dict[int, dict[int, int]] = {}
    places: dict[int, str] = {}
    for place, query, document, grade in _known(qrels, query_index, document_index):
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
    for place, query_id, document_id in read_run(path):
        query = queries.get(query_id)
        if query is None:
            continue  # a run may rank for more queries than are trained on
        document = corpus.get(document_id)
        if document is None:
            corpus.row(place, document_id)
        elif not corpus.is_empty(document):
            ranked.setdefault(query, []).append(document)
    return ranked
