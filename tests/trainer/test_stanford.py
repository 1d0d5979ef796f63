"""Files of Stanford's ColBERT: triples, scored examples, queries and collections, and where each error stands."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.datafiles import (
    as_example,
    error_of,
    every_example,
    json_lines,
    make_set_config,
    texts,
    train_set,
    with_scores,
)
from trainer.data import load_data
from trainer.data.tables import TrainingSet

QUERIES = "1\twhat barks\n2\twhat swims\n"
COLLECTION = "0\ta dog\n1\ta fish\n2\ta cat\n3\ta whale\n"
TRIPLES = [[1, 0, 2], [2, 1, 0, 2], [2, 3, 0]]
EXPECTED = [
    ("what barks", ["a dog", "a cat"]),
    ("what swims", ["a fish", "a dog", "a cat"]),
    ("what swims", ["a whale", "a dog"]),
]
SCORED = [[1, [0, 9.5], [2, -0.25]], [2, [1, 3], [3, 4.5], [0, 0]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without a mistake."""
    (tmp_path / "triples.jsonl").write_bytes(json_lines(*TRIPLES))
    (tmp_path / "queries.tsv").write_text(QUERIES)
    (tmp_path / "collection.tsv").write_text(COLLECTION)
    return tmp_path


def config(folder: Path, **changes: Any) -> Any:
    paths = {"path": "triples.jsonl", "queries_path": "queries.tsv", "documents_path": "collection.tsv"}
    return make_set_config("stanford", **{"root": str(folder), **paths, **changes})


def examples_of(folder: Path, **changes: Any) -> TrainingSet:
    return train_set(config(folder, **changes))


def error(folder: Path, **changes: Any) -> str:
    return error_of(config(folder, **changes))


# What is read


def test_a_triple_is_a_query_a_positive_and_any_number_of_negatives(folder: Path) -> None:
    examples = examples_of(folder)
    assert every_example(examples) == [
        as_example(f"{folder}/triples.jsonl:{line}", query, documents)
        for line, (query, documents) in enumerate(EXPECTED, start=1)
    ]
    assert not examples.has_teacher
    assert examples.warnings == ()


@pytest.mark.parametrize("name", ["triples.json", "triples", "triples.train.small"])
def test_triples_are_json_whatever_their_ending(name: str, folder: Path) -> None:
    (folder / "triples.jsonl").rename(folder / name)
    assert texts(examples_of(folder, path=name)) == EXPECTED


def test_triples_are_ids_between_tabs_in_a_tsv(folder: Path) -> None:
    (folder / "triples.tsv").write_text("1\t0\t2\n\n2\t1\t0\n")
    examples = examples_of(folder, path="triples.tsv")
    assert texts(examples) == [("what barks", ["a dog", "a cat"]), ("what swims", ["a fish", "a dog"])]
    assert examples.examples["place"][:] == [f"{folder}/triples.tsv:1", f"{folder}/triples.tsv:3"]


def test_every_file_may_be_gzipped(folder: Path) -> None:
    (folder / "triples.tsv").write_text("1\t0\t2\n")
    for name in ("triples.tsv", "triples.jsonl", "queries.tsv", "collection.tsv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    changes = {"queries_path": "queries.tsv.gz", "documents_path": "collection.tsv.gz"}
    assert texts(examples_of(folder, path="triples.jsonl.gz", **changes)) == EXPECTED
    assert texts(examples_of(folder, path="triples.tsv.gz", **changes)) == EXPECTED[:1]


def test_scored_examples_keep_the_positive_first_and_the_order_of_the_line(folder: Path) -> None:
    (folder / "examples.json").write_bytes(json_lines(*SCORED))
    examples = examples_of(folder, path="examples.json")
    assert with_scores(examples) == [
        ("what barks", ["a dog", "a cat"], [9.5, -0.25]),
        ("what swims", ["a fish", "a whale", "a dog"], [3.0, 4.5, 0.0]),
    ]
    assert examples.has_teacher
    assert examples.examples["positives"][:] == [1, 1]


def test_ids_may_be_texts(folder: Path) -> None:
    (folder / "queries.tsv").write_text("q-1\twhat barks\n")
    (folder / "collection.tsv").write_text("d 1\ta dog\nd2\ta cat\n")
    (folder / "triples.jsonl").write_bytes(json_lines(["q-1", "d2", "d 1"]))
    assert texts(examples_of(folder)) == [("what barks", ["a cat", "a dog"])]


def test_a_title_goes_before_the_text_of_a_document(folder: Path) -> None:
    (folder / "collection.tsv").write_text("0\tthey bark\tDogs\n1\tthey swim\t\n2\t they meow \tCats\n3\ta whale \n")
    assert examples_of(folder).documents["text"][:] == [
        "Dogs | they bark",
        "they swim",
        "Cats |  they meow ",
        "a whale",
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", ["id\ttext\ttitle", "id\ttext"])
def test_a_first_line_of_names_is_no_document(header: str, end: str, folder: Path) -> None:
    (folder / "collection.tsv").write_bytes(end.join([header, *COLLECTION.splitlines(), ""]).encode())
    (folder / "queries.tsv").write_bytes(end.join(["id\ttext", *QUERIES.splitlines(), ""]).encode())
    examples = examples_of(folder)
    assert texts(examples) == EXPECTED
    assert examples.documents["id"][:] == ["0", "1", "2", "3"]


def test_a_query_has_no_title(folder: Path) -> None:
    (folder / "queries.tsv").write_text("1\twhat barks\tLoTTE\n2\twhat swims\tanother\n")
    assert texts(examples_of(folder)) == EXPECTED


# Holding out


def test_queries_are_held_out_by_their_text_with_all_their_triples(folder: Path) -> None:
    (folder / "queries.tsv").write_text("".join(f"{number}\tquery {number % 60}\n" for number in range(120)))
    (folder / "triples.jsonl").write_bytes(json_lines(*([number % 120, number % 4, 0] for number in range(240))))
    data = load_data(config(folder, evaluation_fraction=0.3))
    [evaluation] = data.evaluation.values()
    trained, asked = {query for query, _ in texts(data.sets[0])}, set(evaluation.queries.values())
    assert 5 < len(asked) < 35
    assert not trained & asked
    assert trained | asked == {f"query {number}" for number in range(60)}
    assert data.size == 4 * len(trained)


def test_an_evaluation_file_is_evaluated_on_and_holds_nothing_out(folder: Path) -> None:
    (folder / "dev.jsonl").write_bytes(json_lines([1, 0, 3]))
    data = load_data(config(folder, evaluation_path="dev.jsonl", evaluation_fraction=0.9))
    assert texts(data.sets[0]) == EXPECTED
    [evaluation] = data.evaluation.values()
    assert evaluation.queries == {"q0": "what barks"}
    assert evaluation.corpus == {"d0": "a dog", "d1": "a whale"}
    assert evaluation.judgements == {"q0": {"d0": 1}}


# Empty texts


def test_triples_that_name_an_empty_text_are_left_out_and_counted(folder: Path) -> None:
    (folder / "collection.tsv").write_text("0\ta dog\n1\t \n2\ta cat\n3\ta whale\n")
    examples = examples_of(folder, max_empty=0.34)
    assert texts(examples) == [EXPECTED[0], EXPECTED[2]]
    found = f"1 of 3 examples of {folder}/triples.jsonl have an empty text, first {folder}/triples.jsonl:2"
    assert examples.warnings == (
        f"1 of 4 texts of {folder}/collection.tsv are empty, first {folder}/collection.tsv:2",
        f"{found}; left out",
    )
    text = f"1 of 4 texts of {folder}/collection.tsv are empty, first {folder}/collection.tsv:2"
    assert error(folder) == f"{found}, more than data.max_empty=0.01: fill or remove them, or raise it; {text}"


def test_an_empty_document_that_nobody_names_is_a_warning_alone(folder: Path) -> None:
    (folder / "collection.tsv").write_text(COLLECTION + "4\t\n")
    examples = examples_of(folder, max_empty=0.0)
    assert texts(examples) == EXPECTED
    assert examples.warnings == (f"1 of 5 texts of {folder}/collection.tsv are empty, first {folder}/collection.tsv:5",)


# Errors in the config


@pytest.mark.parametrize("key", ["path", "queries_path", "documents_path", "evaluation_path"])
def test_a_missing_file_is_named_with_the_places_looked_at(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert error(folder, **{key: "none.tsv"}) == (
        f"data.{key}=none.tsv: there is no {folder}/none.tsv or none.tsv: give an existing file, or set data.root"
    )
    assert error(folder, **{key: str(folder)}) == f"data.{key}={folder} is a folder: name the file in it"


# Errors in the files


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1, 0]", "[1, 0] must be [query, positive, negative, ...], or [query, [document, score], ...]"),
        ("[1, [0, 1.5]]", "[1, [0, 1.5]] must be [query, positive, negative, ...], or [query, [document, score], ...]"),
        ("[]", "[] must be [query, positive, negative, ...], or [query, [document, score], ...]"),
        ('{"query": 1}', '{"query": 1} must be [query, positive, negative, ...], or [query, [document, score], ...]'),
        ("7", "7 must be [query, positive, negative, ...], or [query, [document, score], ...]"),
        ('"1 0 2"', '"1 0 2" must be [query, positive, negative, ...], or [query, [document, score], ...]'),
        ("[1, 0, [2, 0.5]]", "some documents have a score and some have none: give all one, or none"),
        ("[1, [0, 1], [2, 0.5]]", "some documents have a score and some have none: give all one, or none"),
        ("[1, 0 2]", None),
        ("[1, 0, null]", "document=None must be a whole number, or a text that is not empty"),
        ("[1, 0, 2.0]", "document=2.0 must be a whole number, or a text that is not empty"),
        ("[true, 0, 2]", "query=True must be a whole number, or a text that is not empty"),
        ("[9, 0, 2]", "query=9 is not in {folder}/queries.tsv: add it there, or remove it here"),
        ("[1, 0, 9]", "document=9 is not in {folder}/collection.tsv: add it there, or remove it here"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_triple_is_named(line: str, problem: str | None, folder: Path) -> None:
    (folder / "triples.jsonl").write_text(f"[1, 0, 2]\n\n{line}\n")
    place = f"{folder}/triples.jsonl:3"
    if problem is None:
        expected = f"{place} is no JSON (Expecting ',' delimiter at column 7): mend or remove the line"
    else:
        expected = f"{place}: {problem.replace('{folder}', str(folder))}"
    assert error(folder) == expected


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1, [0, float("nan")], [2, 1]], "scores holds nan, which must be a finite number"),
        ([1, [0, 1], [2, float("inf")]], "scores holds inf, which must be a finite number"),
        ([1, [0, 1], [2, True]], "scores holds True, which must be a finite number"),
        ([1, [0, "1"], [2, 1]], "scores holds '1', which must be a finite number"),
        ([1, [0, 1], [2]], "[[0, 1], [2]] must be pairs of a document and its score"),
        ([1, [0, 1], [2, 1, 1]], "[[0, 1], [2, 1, 1]] must be pairs of a document and its score"),
        ([1, [0, 1], 2], "some documents have a score and some have none: give all one, or none"),
        ([1, 0, 2], "some documents have a score and some have none: give all one, or none"),
        ([1, [0, 1], [9, 1]], "document=9 is not in {folder}/collection.tsv: add it there, or remove it here"),
    ],
)
def test_a_line_that_is_no_scored_example_is_named(values: Any, problem: str, folder: Path) -> None:
    (folder / "triples.jsonl").write_text(f"{json.dumps(SCORED[0])}\n{json.dumps(values)}\n")
    assert error(folder) == f"{folder}/triples.jsonl:2: {problem.format(folder=folder)}"


def test_too_few_ids_between_tabs_are_named(folder: Path) -> None:
    (folder / "triples.tsv").write_text("1\t0\t2\n1\t0\n")
    assert error(folder, path="triples.tsv") == (
        f'{folder}/triples.tsv:2: ["1", "0"] must be [query, positive, negative, ...], '
        "or [query, [document, score], ...]"
    )


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["triples.jsonl", "triples.tsv"])
def test_a_file_without_a_triple_is_named(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    assert error(folder, path=name) == (
        f"{folder}/{name} holds no example: give [query, positive, negative] in each line"
    )


@pytest.mark.parametrize(
    ("key", "name", "kind"),
    [("queries_path", "queries.tsv", "query"), ("documents_path", "collection.tsv", "document")],
)
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("7", "1 cell, and an id and a text between tabs are needed: mend or remove the line"),
        ("7 a dog", "1 cell, and an id and a text between tabs are needed: mend or remove the line"),
        ("\ta dog", "id='' must be a whole number, or a text that is not empty"),
        ("1\tagain", "{kind}=1 stands here again: remove one of the two"),
    ],
)
def test_a_line_that_is_no_text_is_named(key: str, name: str, kind: str, line: str, problem: str, folder: Path) -> None:
    (folder / name).write_text(f"\n1\ta text\n2\tanother\n\n{line}\n")
    assert error(folder, **{key: name}) == f"{folder}/{name}:5: {problem.format(kind=kind)}"


def test_a_byte_that_is_not_utf_8_and_a_cut_gzip_are_named(folder: Path) -> None:
    (folder / "collection.tsv").write_bytes(b"0\ta dog\n1\tcaf\xe9\n")
    assert error(folder) == (
        f"{folder}/collection.tsv:2: byte 0xe9 at offset 5 of the line is not UTF-8: save the file as UTF-8"
    )
    (folder / "collection.tsv.gz").write_bytes(gzip.compress(COLLECTION.encode(), mtime=0)[:-8])
    assert error(folder, documents_path="collection.tsv.gz") == (
        f"{folder}/collection.tsv.gz: the gzip is cut or damaged behind line 4 (Compressed file ended before the "
        "end-of-stream marker was reached): fetch the file again"
    )
