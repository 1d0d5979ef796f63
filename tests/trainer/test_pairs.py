"""Rows that bring their texts: what is read of pairs, triples and scored lists, what is held out, what is left out, and
where each error stands."""

import gzip
import json
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from configs.schema import Positive
from tests.trainer.datafiles import (
    error_of,
    every_example,
    json_lines,
    make_set_config,
    texts,
    train_set,
    with_scores,
    write,
)
from trainer.data import Data, load_data
from trainer.data.tables import TrainingSet, identity

EXAMPLES = [
    {"query": "what is a cat", "positive": "an animal that meows"},
    {"query": "what barks, and why", "positive": 'a "dog"'},
]
EXPECTED = [(example["query"], [example["positive"]]) for example in EXAMPLES]
GOOD = json_lines({"query": "q", "positive": "p"})


def load(folder: Path, name: str, content: bytes, **changes: Any) -> TrainingSet:
    """Write the file, and read it as the training set."""
    (folder / name).write_bytes(content)
    return train_set(make_set_config("pairs", root=str(folder), path=name, **changes))


def error(folder: Path, content: bytes, name: str = "a.jsonl", **changes: Any) -> str:
    """The message that reading the file ends in."""
    (folder / name).write_bytes(content)
    return error_of(make_set_config("pairs", root=str(folder), path=name, **changes))


# The tables


def test_an_example_has_the_identities_of_its_texts_and_no_scores(tmp_path: Path) -> None:
    content = json_lines(*EXAMPLES, {"query": "q", "positive": "p", "negatives": ["n", "q"]})
    assert load(tmp_path, "a.jsonl", content).example(2) == {
        "query": "q",
        "query_identity": identity("q"),
        "documents": ["p", "n", "q"],
        "document_identities": [identity("p"), identity("n"), identity("q")],
        "positives": 1,
        "scores": [],
        "place": f"{tmp_path}/a.jsonl:3",
    }


def test_the_texts_of_each_row_are_rows_of_the_tables_of_texts(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": ["p", "o"], "negatives": ["n"]}, {"query": "q", "positive": "p"})
    examples = load(tmp_path, "a.jsonl", content)
    assert examples.queries[:] == {"text": ["q", "q"], "identity": [identity("q")] * 2}
    assert examples.documents[:] == {
        "text": ["p", "o", "n", "p"],
        "identity": [identity(text) for text in ("p", "o", "n", "p")],
    }
    assert examples.examples[:] == {
        "query": [0, 1],
        "documents": [[0, 1, 2], [3]],
        "positives": [2, 1],
        "scores": [[], []],
        "place": [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"],
    }


def test_more_rows_than_a_batch_of_the_writer_keep_their_documents(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{row}", "positive": f"p{row}", "negatives": [f"n{row}.{each}" for each in range(row % 4)]}
        for row in range(2500)
    ]
    examples = load(tmp_path, "a.jsonl", json_lines(*rows))
    assert texts(examples) == [(row["query"], [row["positive"], *row["negatives"]]) for row in rows]


# Columns


def test_columns_have_the_names_that_the_config_gives(tmp_path: Path) -> None:
    content = json_lines({"question": "q", "answer": "p", "wrong": "n", "negative": "not asked for", "id": 7})
    changes = {"query_column": "question", "positive_column": "answer", "negative_columns": ["wrong"]}
    assert texts(load(tmp_path, "a.jsonl", content, **changes)) == [("q", ["p", "n"])]


def test_query_and_positive_may_change_places(tmp_path: Path) -> None:
    changes = {"query_column": "positive", "positive_column": "query"}
    content = json_lines({"query": "a", "positive": "b"})
    assert texts(load(tmp_path, "a.jsonl", content, **changes)) == [("b", ["a"])]


def test_several_positives_are_a_list_and_go_before_the_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": ["p", "o"], "negative": "n"},
        {"query": "r", "positive": "s", "negative": ["m", "l"]},
        {"query": "t", "positive": ["u"], "negative": None},
    ]
    examples = load(tmp_path, "a.jsonl", json_lines(*rows))
    assert texts(examples) == [("q", ["p", "o", "n"]), ("r", ["s", "m", "l"]), ("t", ["u"])]
    assert examples.examples["positives"][:] == [2, 1, 1]


def test_several_positives_are_read_from_a_parquet_file(tmp_path: Path) -> None:
    Dataset.from_dict({"query": ["q"], "positive": [["p", "o"]], "negatives": [["n"]]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    [example] = every_example(train_set(make_set_config("pairs", root=str(tmp_path), path="a.parquet")))
    assert (example["documents"], example["positives"]) == (["p", "o", "n"], 2)


@pytest.mark.parametrize(
    ("columns", "negatives"),
    [
        ({"negative": "n"}, ["n"]),
        ({"negatives": ["n", "m"]}, ["n", "m"]),
        ({"negatives": []}, []),
        ({"negative": None}, []),
        ({"negative_1": "n", "negative_2": None, "negative_10": "m"}, ["n", "m"]),
        ({"negative": "n", "negatives": ["m", "o"], "negative_7": "p"}, ["n", "m", "o", "p"]),
        ({"my_negative": "n", "negative_id": "m", "negative_": "o"}, []),
    ],
)
def test_negatives_are_a_text_a_list_or_null_in_every_column_named_for_them(
    columns: dict[str, Any], negatives: list[str], tmp_path: Path
) -> None:
    content = json_lines({"query": "q", "positive": "p"} | columns)
    assert texts(load(tmp_path, "a.jsonl", content)) == [("q", ["p", *negatives])]


def test_several_negative_columns_that_are_named_give_each_example_once(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "na": "n", "nb": ["m", "o"], "negative": "not asked for"})
    examples = load(tmp_path, "a.jsonl", content, negative_columns=["nb", "na"])
    assert texts(examples) == [("q", ["p", "m", "o", "n"])]


def test_no_negative_column_is_read_where_none_is_named(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "negative": "n"})
    assert texts(load(tmp_path, "a.jsonl", content, negative_columns=[])) == [("q", ["p"])]


def test_texts_lists_and_nulls_may_mix_in_a_negative_column(tmp_path: Path) -> None:
    rows = [{**EXAMPLES[0], "negatives": cell} for cell in (["n", "m"], "o", None, [])]
    examples = load(tmp_path, "a.jsonl", json_lines(*rows, EXAMPLES[0]))
    assert [documents[1:] for _, documents in texts(examples)] == [["n", "m"], ["o"], [], [], []]


def test_an_empty_cell_of_a_csv_is_no_negative(tmp_path: Path) -> None:
    content = b"query,positive,negative_1,negative_2\nq,p,,n\nr,s,m,\n"
    assert [documents[1:] for _, documents in texts(load(tmp_path, "a.csv", content))] == [["n"], ["m"]]


def test_negatives_may_begin_far_into_a_large_file(tmp_path: Path) -> None:
    # Two of these are more than the 10 MiB of which `datasets` infers the type of a column.
    long = {"query": "q", "positive": "word " * 1_200_000, "negatives": None}
    examples = load(tmp_path, "a.jsonl", json_lines(long, long, {**EXAMPLES[0], "negatives": ["n"]}))
    assert [documents[1:] for _, documents in texts(examples)] == [[], [], ["n"]]


# Scored documents


def scored(folder: Path, *rows: dict[str, Any], **changes: Any) -> list[tuple[str, list[str], list[float]]]:
    """Query, documents and scores of each example."""
    write(folder, scored=rows)
    return with_scores(train_set(make_set_config("scored", root=str(folder), path="scored.jsonl", **changes)))


def scored_error(folder: Path, *rows: dict[str, Any], **changes: Any) -> str:
    write(folder, scored=rows)
    return error_of(make_set_config("scored", root=str(folder), path="scored.jsonl", **changes))


SCORED: dict[str, Any] = {"query": "q", "documents": ["a", "b", "c", "d"], "scores": [0.5, 9, 0.5, -2.25]}


def test_documents_go_from_the_best_to_the_worst_in_the_order_of_the_row_among_equal_scores(tmp_path: Path) -> None:
    assert scored(tmp_path, SCORED) == [("q", ["b", "a", "c", "d"], [9.0, 0.5, 0.5, -2.25])]


def test_the_first_document_of_the_row_may_be_the_positive(tmp_path: Path) -> None:
    row = {**SCORED, "documents": ["c", "a", "b", "d"], "scores": [0.5, 0.5, 9, 10]}
    expected = [("q", ["c", "d", "b", "a"], [0.5, 10.0, 9.0, 0.5])]
    assert scored(tmp_path, row, positive=Positive.first) == expected


def test_a_scored_example_has_one_positive_and_the_identities_of_its_texts(tmp_path: Path) -> None:
    write(tmp_path, a=[SCORED])
    examples = train_set(make_set_config("scored", root=str(tmp_path), path="a.jsonl"))
    assert examples.example(0) == {
        "query": "q",
        "query_identity": identity("q"),
        "documents": ["b", "a", "c", "d"],
        "document_identities": [identity(text) for text in "bacd"],
        "positives": 1,
        "scores": [9.0, 0.5, 0.5, -2.25],
        "place": f"{tmp_path}/a.jsonl:1",
    }
    assert examples.has_teacher


def test_columns_of_scored_documents_have_the_names_that_the_config_gives(tmp_path: Path) -> None:
    row = {"question": "q", "texts": ["a", "b"], "labels": [1, 2]}
    changes = {"query_column": "question", "documents_column": "texts", "scores_column": "labels"}
    assert scored(tmp_path, row, **changes) == [("q", ["b", "a"], [2.0, 1.0])]


@pytest.mark.parametrize(
    ("documents", "scores"),
    [
        (["it's", 'a "dog"'], [1, 2]),
        (json.dumps(["it's", 'a "dog"']), "[1, 2]"),
        (str(["it's", 'a "dog"']), "[1.0, 2.0]"),
        ('["it\'s", \'a "dog"\']', [1, 2]),
    ],
    ids=["lists", "JSON", "Python", "mixed"],
)
def test_lists_may_be_texts_that_hold_them(documents: Any, scores: Any, tmp_path: Path) -> None:
    assert scored(tmp_path, {"query": "q", "documents": documents, "scores": scores}) == [
        ("q", ['a "dog"', "it's"], [2.0, 1.0])
    ]


def test_scored_documents_are_read_from_a_csv_and_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,documents,scores\nq,\"['a', 'b']\",\"[1, 2]\"\n")
    Dataset.from_list([{"query": "q", "documents": ["a", "b"], "scores": [1.0, 2.0]}]).to_parquet(
        str(tmp_path / "a.parquet")
    )
    for name in ("a.csv", "a.parquet"):
        examples = train_set(make_set_config("scored", root=str(tmp_path), path=name))
        assert with_scores(examples) == [("q", ["b", "a"], [2.0, 1.0])]


def test_held_out_queries_rank_their_own_documents_by_the_grades_of_the_teacher(tmp_path: Path) -> None:
    write(tmp_path, a=[SCORED], dev=[{**SCORED, "query": "r", "documents": ["e", "f"], "scores": [1, 3]}])
    data = load_data(make_set_config("scored", root=str(tmp_path), path="a.jsonl", evaluation_path="dev.jsonl"))
    [evaluation] = data.evaluation.values()
    query, e, f = (str(identity(text)) for text in "ref")
    assert evaluation.queries == {query: "r"}
    assert evaluation.corpus == {e: "e", f: "f"}
    assert evaluation.judgements == {query: {f: 10, e: 9}}
    assert evaluation.candidates == {query: [f, e]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scores": [1, 2, 3]}, "3 scores of 4 documents: give one score a document"),
        ({"scores": "[1, 2, 3, 4, 5]"}, "5 scores of 4 documents: give one score a document"),
        ({"scores": []}, "0 scores of 4 documents: give one score a document"),
        ({"documents": ["a"], "scores": [1]},
         "documents has 1, and 2 or more can be compared: add some, or remove the row"),
        ({"documents": [], "scores": []},
         "documents has 0, and 2 or more can be compared: add some, or remove the row"),
        ({"documents": "a dog"}, "documents='a dog' must be a list, or a text that holds one as JSON"),
        ({"documents": "7"}, "documents=7 must be a list, or a text that holds one as JSON"),
        ({"documents": None}, "documents=None must be a list, or a text that holds one as JSON"),
        ({"documents": {"a": 1}}, "documents={'a': 1} must be a list, or a text that holds one as JSON"),
        ({"scores": 0.5}, "scores=0.5 must be a list, or a text that holds one as JSON"),
        ({"documents": ["a", "b", 3, "d"]}, "documents=3 must be a text"),
        ({"documents": ["a", "b", ["c"], "d"]}, "documents=['c'] must be a text"),
        ({"query": 5}, "query=5 must be a text"),
    ],
)  # fmt: skip
def test_a_row_of_scored_documents_that_is_none_is_named_by_its_line(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    assert scored_error(tmp_path, SCORED, SCORED | changes) == f"{tmp_path}/scored.jsonl:2: {problem}"


@pytest.mark.parametrize(("key", "column"), [("query", "query"), ("documents", "documents"), ("scores", "scores")])
def test_a_missing_column_of_scored_documents_is_named(key: str, column: str, tmp_path: Path) -> None:
    assert scored_error(tmp_path, SCORED, **{f"{key}_column": "none"}) == (
        f"data.{key}_column=none: {tmp_path}/scored.jsonl has the columns query, documents, scores: "
        f"name one with data.{key}_column=..."
    )
    later = {name: cell for name, cell in SCORED.items() if name != column}
    found = ", ".join(later)
    assert scored_error(tmp_path, SCORED, later) == (
        f"{tmp_path}/scored.jsonl:2: there is no column {column}; the columns are {found}: rename or add it"
    )


def test_a_file_without_scored_documents_is_named(tmp_path: Path) -> None:
    assert scored_error(tmp_path) == (
        f"{tmp_path}/scored.jsonl holds no example: give a file with a query, documents and scores in each row"
    )


# Holding out


def hold_out(folder: Path, fraction: float) -> tuple[list[dict[str, Any]], Data]:
    """A few hundred examples whose queries and documents repeat, split by the hash of the query."""
    rows: list[dict[str, Any]] = [
        {"query": f"query {number % 150}", "positive": f"document {number % 170}"} for number in range(300)
    ]
    write(folder, a=rows)
    return rows, load_data(make_set_config("pairs", root=str(folder), path="a.jsonl", evaluation_fraction=fraction))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_queries_are_held_out_by_the_md5_of_their_text_with_all_their_documents(
    fraction: float, tmp_path: Path
) -> None:
    rows, data = hold_out(tmp_path, fraction)
    threshold = round(fraction * 10_000)
    queries = {row["query"] for row in rows if int(md5(row["query"].encode()).hexdigest(), 16) % 10_000 < threshold}
    [evaluation] = data.evaluation.values()
    assert queries
    assert set(evaluation.queries.values()) == queries
    documents = {row["positive"] for row in rows if row["query"] in queries}
    assert set(evaluation.corpus.values()) == documents


def test_every_example_is_trained_on_or_held_out(tmp_path: Path) -> None:
    rows, data = hold_out(tmp_path, 0.2)
    [evaluation] = data.evaluation.values()
    queries = set(evaluation.queries.values())
    rest = [row for row in rows if row["query"] not in queries]
    assert 0 < len(rest) < len(rows)
    assert data.size == len(rest)
    assert texts(data.sets[0]) == [(row["query"], [row["positive"]]) for row in rest]


def test_a_query_in_other_cases_and_spaces_is_on_the_same_side(tmp_path: Path) -> None:
    rows = [
        {"query": spelling, "positive": "p"}
        for number in range(60)
        for spelling in (f"query {number}", f"Query  {number}", f" QUERY {number}\n")
    ]
    write(tmp_path, a=rows)
    data = load_data(make_set_config("pairs", root=str(tmp_path), path="a.jsonl", evaluation_fraction=0.3))
    [evaluation] = data.evaluation.values()
    held_out = {" ".join(text.lower().split()) for text in evaluation.queries.values()}
    assert 0 < len(held_out) < 60
    assert len(evaluation.queries) == 3 * len(held_out)
    assert not held_out & {" ".join(text.lower().split()) for text, _ in texts(data.sets[0])}


def test_a_share_of_zero_trains_on_all_and_evaluates_on_nothing(tmp_path: Path) -> None:
    rows, data = hold_out(tmp_path, 0.0)
    assert not data.evaluation
    assert data.size == len(rows)


def test_a_share_that_leaves_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    assert error(tmp_path, GOOD, evaluation_fraction=0.9999) == (
        "data.path=a.jsonl: no example is left to train on: give more, or lower data.evaluation_fraction or "
        "data.max_empty"
    )


def test_an_evaluation_file_is_evaluated_on_and_holds_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_bytes(b"query,positive,negative\nwhat swims,a fish,a dog\n")
    write(tmp_path, a=EXAMPLES)
    changes = {"evaluation_path": "dev.csv", "evaluation_fraction": 0.9}
    data = load_data(make_set_config("pairs", root=str(tmp_path), path="a.jsonl", **changes))
    assert texts(data.sets[0]) == EXPECTED
    [evaluation] = data.evaluation.values()
    assert evaluation.queries == {"q0": "what swims"}
    assert evaluation.corpus == {"d0": "a fish", "d1": "a dog"}
    assert evaluation.judgements == {"q0": {"d0": 1}}


def test_a_split_to_evaluate_on_is_of_the_same_folder_or_of_another(tmp_path: Path) -> None:
    write(tmp_path / "set", train=[{"query": "q", "positive": "p"}], dev=[{"query": "r", "positive": "s"}])
    write(tmp_path / "other", dev=[{"query": "t", "positive": "u"}])
    for path, query in ((None, "r"), ("set", "r"), ("other", "t")):
        changes = {"evaluation_path": path, "evaluation_split": "dev", "evaluation_fraction": 0.9}
        data = load_data(make_set_config("pairs", root=str(tmp_path), path="set", **changes))
        assert texts(data.sets[0]) == [("q", ["p"])]
        [evaluation] = data.evaluation.values()
        assert list(evaluation.queries.values()) == [query]


def test_a_folder_to_evaluate_on_needs_a_split_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "set", train=EXAMPLES)
    message = error_of(make_set_config("pairs", root=str(tmp_path), path="set", evaluation_path="set"))
    assert message.startswith("data.evaluation_split=null: ")


# Errors in the config


@pytest.mark.parametrize("key", ["query_column", "positive_column"])
def test_a_missing_column_is_named_with_those_that_are_there(key: str, tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "id": "1"})
    assert error(tmp_path, content, **{key: "text"}) == (
        f"data.{key}=text: {tmp_path}/a.jsonl has the columns query, positive, id: name one with data.{key}=..."
    )


def test_a_missing_negative_column_is_named(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "no": "n"})
    assert error(tmp_path, content, negative_columns=["no", "never", "nil"]) == (
        f"data.negative_columns=never: {tmp_path}/a.jsonl has the columns query, positive, no: "
        "name one with data.negative_columns=..."
    )


# Errors in the file


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"query": 5}, "query=5"),
        ({"positive": 2.5}, "positive=2.5"),
        ({"query": True}, "query=True"),
        ({"positive": ["p", 7]}, "positive=7"),
        ({"positive": {"text": "p"}}, "positive={'text': 'p'}"),
        ({"negatives": ["n", 3]}, "negatives=3"),
        ({"negative": {"text": "n"}}, "negative={'text': 'n'}"),
        ({"query": ["x" * 100]}, "query=['" + "x" * 38),
    ],
)
def test_what_is_no_text_is_named_by_its_line(cells: dict[str, Any], problem: str, tmp_path: Path) -> None:
    content = GOOD + b"\n" + json_lines({"query": "q", "positive": "p"} | cells)
    assert error(tmp_path, content) == f"{tmp_path}/a.jsonl:3: {problem} must be a text"
    assert error(tmp_path, gzip.compress(content), "a.jsonl.gz") == (
        f"{tmp_path}/a.jsonl.gz:3: {problem} must be a text"
    )


def test_what_is_no_text_is_named_by_its_number_in_a_parquet_file(tmp_path: Path) -> None:
    Dataset.from_dict({"query": ["q", "r"], "positive": [4, 5]}).to_parquet(str(tmp_path / "a.parquet"))
    assert error_of(make_set_config("pairs", root=str(tmp_path), path="a.parquet")) == (
        f"{tmp_path}/a.parquet example 1: positive=4 must be a text"
    )


# Empty texts

BLANK = [
    {"query": ""},
    {"query": "  "},
    {"query": None},
    {"positive": "\t\n"},
    {"positive": None},
    {"positive": []},
    {"positive": ["p", ""]},
    {"negatives": ["n", " "]},
    {"negatives": ["n", None]},
]


@pytest.mark.parametrize("cells", BLANK, ids=str)
def test_an_example_with_an_empty_text_is_left_out_and_counted_up_to_the_share_of_the_config(
    cells: dict[str, Any], tmp_path: Path
) -> None:
    row = {"query": "q", "positive": "p"}
    content = json_lines(row, *EXAMPLES, row | cells)
    examples = load(tmp_path, "a.jsonl", content, max_empty=0.25)
    assert texts(examples) == [("q", ["p"]), *EXPECTED]
    found = f"1 of 4 examples of {tmp_path}/a.jsonl have an empty text, first {tmp_path}/a.jsonl:4"
    assert examples.warnings == (f"{found}; left out",)
    assert error_of(make_set_config("pairs", root=str(tmp_path), path="a.jsonl", max_empty=0.24)) == (
        f"{found}, more than data.max_empty=0.24: fill or remove them, or raise it"
    )


def test_the_share_of_empty_texts_is_1_in_100_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "positive": "p"} for number in range(100)]
    rows[57]["positive"] = rows[20]["query"] = ""
    assert error(tmp_path, json_lines(*rows)) == (
        f"2 of 100 examples of {tmp_path}/a.jsonl have an empty text, first {tmp_path}/a.jsonl:21, "
        "more than data.max_empty=0.01: fill or remove them, or raise it"
    )
    rows[20]["query"] = "q20"
    examples = load(tmp_path, "a.jsonl", json_lines(*rows))
    assert [query for query, _ in texts(examples)] == [f"q{number}" for number in range(100) if number != 57]
    assert examples.document_counts.tolist() == [1] * 99


def test_a_column_that_a_later_row_lacks_is_empty_there(tmp_path: Path) -> None:
    examples = load(tmp_path, "a.jsonl", GOOD + json_lines({"query": "r"}), max_empty=0.5)
    assert texts(examples) == [("q", ["p"])]


def test_an_empty_text_of_a_csv_is_named_by_its_line_after_blank_ones(tmp_path: Path) -> None:
    assert error(tmp_path, b"query,positive\n\nq,p\n\n\nr,\n", "a.csv", max_empty=0.0) == (
        f"1 of 2 examples of {tmp_path}/a.csv have an empty text, first {tmp_path}/a.csv:6, "
        "more than data.max_empty=0: fill or remove them, or raise it"
    )


@pytest.mark.parametrize(
    "cells", [{"query": " "}, {"documents": ["a", "", "c", "d"]}, {"documents": ["a", "b", None, "d"]}]
)
def test_scored_documents_of_which_one_is_empty_are_left_out_and_counted(cells: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, a=[SCORED | cells, SCORED])
    examples = train_set(make_set_config("scored", root=str(tmp_path), path="a.jsonl", max_empty=0.5))
    assert [example["place"] for example in every_example(examples)] == [f"{tmp_path}/a.jsonl:2"]
    assert examples.has_teacher
    assert examples.warnings == (
        f"1 of 2 examples of {tmp_path}/a.jsonl have an empty text, first {tmp_path}/a.jsonl:1; left out",
    )


def test_a_file_of_empty_texts_alone_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    assert error(tmp_path, json_lines({"query": "", "positive": "p"}), max_empty=1.0) == (
        "data.path=a.jsonl: no example is left to train on: give more, or lower data.evaluation_fraction or "
        "data.max_empty"
    )


def test_examples_to_evaluate_on_that_are_left_out_are_counted_as_well(tmp_path: Path) -> None:
    write(tmp_path, a=EXAMPLES, dev=[*EXAMPLES, {"query": "q", "positive": ""}])
    changes = {"evaluation_path": "dev.jsonl", "max_empty": 0.5}
    data = load_data(make_set_config("pairs", root=str(tmp_path), path="a.jsonl", **changes))
    [evaluation] = data.evaluation.values()
    assert len(evaluation.queries) == 2
    assert data.sets[0].warnings == (
        f"1 of 3 examples of {tmp_path}/dev.jsonl have an empty text, first {tmp_path}/dev.jsonl:3; left out",
    )
