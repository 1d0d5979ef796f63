"""PyLate's folders of queries, documents and scores: what is read, ranked and held out, and where each error stands."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from configs.schema import ConfigError, DataConfig, DataFormat
from trainer.data import distillation, load_data
from trainer.data.files import identity

QUERIES = [{"query_id": "q1", "text": "what barks"}, {"query_id": "q2", "text": "what swims"}]
DOCUMENTS = [
    {"document_id": "d1", "text": "a dog"},
    {"document_id": "d2", "text": "a fish"},
    {"document_id": "d3", "text": "a cat"},
]
ROWS = [
    {"query_id": "q1", "document_ids": ["d3", "d1"], "scores": [0.5, 9.0]},
    {"query_id": "q2", "document_ids": ["d1", "d2", "d3"], "scores": [-1.0, 7.5, -0.25]},
]


def write(folder: Path, **files: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines, by name."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without a mistake."""
    write(tmp_path / "set", train=ROWS, queries=QUERIES, documents=DOCUMENTS)
    return tmp_path / "set"


def make_config(folder: Path, **changes: Any) -> DataConfig:
    config = DataConfig(
        format=DataFormat.distillation,
        root=str(folder.parent),
        path=folder.name,
        split="train",
        evaluation_split=None,
        evaluation_path=None,
        evaluation_fraction=0.0,
        query_column="query",
        positive_column="positive",
        negative_columns=None,
        documents_per_query=16,
    )
    return replace(config, **changes)


def read(folder: Path) -> list[tuple[str, list[str], list[float]]]:
    """Query, documents and scores of each training example."""
    examples, held_out = distillation.load(make_config(folder))
    assert len(held_out) == 0
    return [(row["query"], row["documents"], row["scores"]) for row in examples]


def error_of(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        distillation.load(make_config(folder, **changes))
    return str(caught.value)


# What is read

EXPECTED = [
    ("what barks", ["a dog", "a cat"], [9.0, 0.5]),
    ("what swims", ["a fish", "a cat", "a dog"], [7.5, -0.25, -1.0]),
]


def test_documents_go_from_the_highest_score_to_the_lowest_each_with_its_id(folder: Path) -> None:
    examples, _ = distillation.load(make_config(folder))
    assert list(examples) == [
        {
            "query": "what barks",
            "query_id": identity("q1"),
            "documents": ["a dog", "a cat"],
            "document_ids": [identity("d1"), identity("d3")],
            "scores": [9.0, 0.5],
            "place": f"{folder}/train.jsonl:1",
        },
        {
            "query": "what swims",
            "query_id": identity("q2"),
            "documents": ["a fish", "a cat", "a dog"],
            "document_ids": [identity("d2"), identity("d3"), identity("d1")],
            "scores": [7.5, -0.25, -1.0],
            "place": f"{folder}/train.jsonl:2",
        },
    ]


def test_documents_of_one_score_stay_in_the_order_of_the_file(folder: Path) -> None:
    write(folder, train=[{"query_id": "q1", "document_ids": ["d3", "d1", "d2"], "scores": [1, 2, 1]}])
    assert read(folder) == [("what barks", ["a dog", "a cat", "a fish"], [2.0, 1.0, 1.0])]


def test_a_query_may_have_several_rows(folder: Path) -> None:
    rows = [{**ROWS[0], "document_ids": ids} for ids in (["d1", "d2"], ["d2", "d3"])]
    write(folder, train=rows)
    assert [documents for _, documents, _ in read(folder)] == [["a fish", "a dog"], ["a cat", "a fish"]]


def test_ids_may_be_whole_numbers_in_one_file_and_texts_in_another(folder: Path) -> None:
    write(
        folder,
        train=[{"query_id": 7, "document_ids": ["1", 2], "scores": [1.0, 2.0]}],
        queries=[{"query_id": "7", "text": "what swims"}],
        documents=[{"document_id": 1, "text": "a dog"}, {"document_id": "2", "text": "a fish"}],
    )
    examples, _ = distillation.load(make_config(folder))
    assert examples["documents"] == [["a fish", "a dog"]]
    assert examples["query_id"] == [identity("7")]
    assert examples["document_ids"] == [[identity("2"), identity("1")]]


def test_lists_may_be_texts_that_hold_them_as_json(folder: Path) -> None:
    rows = [
        {**row, "document_ids": json.dumps(row["document_ids"]), "scores": json.dumps(row["scores"])} for row in ROWS
    ]
    write(folder, train=rows)
    assert read(folder) == EXPECTED


def test_each_file_may_have_an_ending_of_its_own(folder: Path) -> None:
    for name in ("train", "queries", "documents"):
        (folder / f"{name}.jsonl").unlink()
    Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    (folder / "queries.tsv").write_text("query_id\ttext\nq1\twhat barks\nq2\twhat swims\n")
    content = "".join(json.dumps(row) + "\n" for row in DOCUMENTS)
    (folder / "documents.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert read(folder) == EXPECTED


def test_rows_of_a_csv_hold_their_lists_as_texts(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text('query_id,document_ids,scores\nq1,"[""d3"", ""d1""]","[0.5, 9]"\n')
    assert read(folder) == EXPECTED[:1]


def test_what_no_row_names_is_not_checked(folder: Path) -> None:
    unnamed = {"document_id": "d9", "text": ""}
    write(folder, documents=[unnamed, *DOCUMENTS, unnamed], queries=[*QUERIES, {"query_id": "q9", "text": None}])
    assert read(folder) == EXPECTED


# Holding out


@pytest.mark.parametrize(
    ("ids", "fraction", "held_out"),
    [
        (["10", "9", "100", "1"], 0.5, ["10", "100"]),
        ([10, 9, 100, 1], 0.25, [100]),
        (["10", "9", "100", "a"], 0.5, ["9", "a"]),
        (["-10", "-9", "1"], 0.6, ["-9", "1"]),
        (["07", "7"], 0.5, ["7"]),
        ([1, 2, 3, 4], 0.1, []),
        ([1, 2, 3, 4, 5], 0.3, [4, 5]),
        ([5, 3, 5, 5, 4, 3], 0.3, [5, 5, 5]),
        ([1, 2], 0.9, [1, 2]),
    ],
    ids=["numbers", "whole", "texts", "negative", "one number", "none", "two of five", "rows of one query", "all"],
)
def test_the_last_queries_by_id_are_held_out(
    ids: list[Any], fraction: float, held_out: list[Any], folder: Path
) -> None:
    unnamed = [{"query_id": f"zz{number}", "text": "no row names it"} for number in range(20)]
    queries = [{"query_id": identifier, "text": f"query {identifier}"} for identifier in dict.fromkeys(ids)]
    write(folder, train=[{**ROWS[0], "query_id": identifier} for identifier in ids], queries=[*queries, *unnamed])
    train, evaluation = distillation.load(make_config(folder, evaluation_fraction=fraction))
    assert evaluation["query"] == [f"query {identifier}" for identifier in held_out]
    assert train["query"] == [f"query {identifier}" for identifier in ids if identifier not in held_out]
    assert train.column_names == evaluation.column_names
    assert "id" not in train.column_names


def test_an_evaluation_folder_is_evaluated_on_and_holds_nothing_out(folder: Path) -> None:
    write(
        folder.parent / "other",
        dev=[{"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [1.0, 2.0]}],
        queries=[{"query_id": "q1", "text": "what flies"}],
        documents=[{"document_id": "d1", "text": "a bee"}, {"document_id": "d2", "text": "a bird"}],
    )
    changes = {"evaluation_path": "other", "evaluation_split": "dev", "evaluation_fraction": 0.9}
    train, evaluation = distillation.load(make_config(folder, **changes))
    assert train["query"] == ["what barks", "what swims"]
    assert evaluation["query"] == ["what flies"]
    assert evaluation["documents"] == [["a bird", "a bee"]]
    assert train.column_names == evaluation.column_names
    assert "id" not in train.column_names


def test_held_out_queries_rank_their_own_documents_by_the_grades_of_the_teacher(folder: Path) -> None:
    data = load_data(make_config(folder, evaluation_fraction=0.5))
    assert data.train["query"] == ["what barks"]
    assert data.evaluation is not None
    assert list(data.evaluation.queries.values()) == ["what swims"]
    [grades] = data.evaluation.judgements.values()
    best_first = sorted(grades, key=lambda identifier: -grades[identifier])
    assert [data.evaluation.corpus[identifier] for identifier in best_first] == ["a fish", "a cat", "a dog"]


def test_a_share_that_leaves_nothing_to_train_on_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=set: no example is left to train on: give more, or lower"):
        load_data(make_config(folder, evaluation_fraction=0.9))


def test_the_real_set_has_129_queries_of_which_29_are_held_out(real_data: Path) -> None:
    train, held_out = distillation.load(make_config(real_data / "trec_dl_distillation", evaluation_fraction=0.225))
    assert (len(train), len(held_out)) == (100, 29)
    lines = gzip.decompress((real_data / "trec_dl_distillation" / "train.jsonl.gz").read_bytes()).splitlines()
    rows = {identity(row["query_id"]): row for row in map(json.loads, lines)}
    assert len(rows) == 129
    for example in [*train, *held_out]:
        row = rows[example["query_id"]]
        best, score = max(zip(row["document_ids"], row["scores"], strict=True), key=lambda pair: pair[1])
        assert (example["document_ids"][0], example["scores"][0]) == (identity(best), score)
        assert len(example["documents"]) == 100
        assert example["scores"] == sorted(row["scores"], reverse=True)
    numbers = {identity(row["query_id"]): int(row["query_id"]) for row in rows.values()}
    assert max(numbers[query] for query in train["query_id"]) < min(numbers[query] for query in held_out["query_id"])


# Errors in the config


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_missing_folder_is_named_with_the_places_looked_at(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert error_of(folder, **{key: "none"}) == (
        f"data.{key}=none: there is no {folder.parent}/none or none: give an existing file, or set data.root"
    )


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_file_is_no_folder(key: str, folder: Path) -> None:
    assert error_of(folder, **{key: "set/train.jsonl"}) == (
        f"data.{key}=set/train.jsonl is a file: name the folder that holds it, "
        "with the files queries and documents beside it"
    )


@pytest.mark.parametrize(
    ("missing", "asked"), [("train", "data.split=train"), ("queries", "data.path=set"), ("documents", "data.path=set")]
)
def test_a_missing_file_of_the_three_is_named(missing: str, asked: str, folder: Path) -> None:
    (folder / f"{missing}.jsonl").rename(folder / "moved.jsonl")
    assert (
        error_of(folder) == f"{asked}: {folder} must hold one file {missing}.<jsonl, csv, tsv or parquet>; found none"
    )


def test_an_evaluation_folder_needs_a_split_of_its_own(folder: Path) -> None:
    assert error_of(folder, evaluation_path="set") == (
        f"data.evaluation_split=None: {folder} must hold one file None.<jsonl, csv, tsv or parquet>; found none"
    )


# Errors in the files


def test_a_file_without_a_row_is_named(folder: Path) -> None:
    write(folder, train=[])
    assert error_of(folder) == (
        f"{folder}/train.jsonl holds no example: give a file with query_id, document_ids and scores in each row"
    )


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("train", {"query_id": "q1", "scores": [1]}, "document_ids; the columns are query_id, scores"),
        ("train", {"query": "q", "document_ids": [], "scores": []},
         "query_id; the columns are query, document_ids, scores"),
        ("train", {"query_id": "q1", "document_ids": []}, "scores; the columns are query_id, document_ids"),
        ("train", {}, "query_id; the columns are none"),
        ("queries", {"id": "q1", "text": "what"}, "query_id; the columns are id, text"),
        ("documents", {"document_id": "d1", "document": "a"}, "text; the columns are document_id, document"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_those_that_are_there(
    name: str, row: dict[str, Any], problem: str, folder: Path
) -> None:
    write(folder, **{name: [row]})
    assert error_of(folder) == f"{folder}/{name}.jsonl:1: there is no column {problem}: rename or add it"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"query_id": "q9"}, "query_id=q9 is not in {folder}/queries.jsonl: add it there, or remove it here"),
        ({"document_ids": ["d1", 9]},
         "document_id=9 is not in {folder}/documents.jsonl: add it there, or remove it here"),
        ({"scores": [1.0]}, "1 scores of 2 document_ids: give one score a document"),
        ({"scores": [1, 2, 3]}, "3 scores of 2 document_ids: give one score a document"),
        ({"scores": [1.0, float("nan")]}, "scores holds nan, which must be a finite number"),
        ({"scores": [1.0, float("-inf")]}, "scores holds -inf, which must be a finite number"),
        ({"scores": "[1.0, NaN]"}, "scores holds nan, which must be a finite number"),
        ({"scores": [1.0, "2"]}, "scores holds '2', which must be a finite number"),
        ({"scores": [1.0, None]}, "scores holds None, which must be a finite number"),
        ({"scores": [1.0, True]}, "scores holds True, which must be a finite number"),
        ({"scores": 5}, "scores=5 must be a list, or a text that holds one as JSON"),
        ({"scores": None}, "scores=None must be a list, or a text that holds one as JSON"),
        ({"document_ids": "['d1', 'd2']"},
         "document_ids=\"['d1', 'd2']\" must be a list, or a text that holds one as JSON"),
        ({"document_ids": "7"}, "document_ids=7 must be a list, or a text that holds one as JSON"),
        ({"document_ids": ["d1"], "scores": [1]},
         "document_ids=['d1'] must name 2 documents or more: add some, or remove the row"),
        ({"document_ids": [], "scores": []},
         "document_ids=[] must name 2 documents or more: add some, or remove the row"),
        ({"document_ids": ["d1", "d2", "d1"], "scores": [1, 2, 3]},
         "document_ids holds d1 twice: remove one of the two, and its score"),
        ({"document_ids": ["d1", " "]},
         "document_ids=' ' must be a whole number, or a text that is not empty"),
        ({"document_ids": ["d1", 2.0]}, "document_ids=2.0 must be a whole number, or a text that is not empty"),
        ({"query_id": None}, "query_id=None must be a whole number, or a text that is not empty"),
        ({"query_id": True}, "query_id=True must be a whole number, or a text that is not empty"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_example_is_named_by_its_line(changes: dict[str, Any], problem: str, folder: Path) -> None:
    good = {"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [1.0, 2.0]}
    write(folder, train=[good, good | changes])
    assert error_of(folder) == f"{folder}/train.jsonl:2: {problem.format(folder=folder)}"


def test_a_score_too_large_for_a_float_is_no_finite_number(folder: Path) -> None:
    write(folder, train=[{**ROWS[0], "scores": [1, 10**309]}])
    assert error_of(folder) == (f"{folder}/train.jsonl:1: scores holds 1{'0' * 309}, which must be a finite number")


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("queries", {"query_id": "q1", "text": " "}, "text is empty: fill it or remove the example"),
        ("queries", {"query_id": "q1", "text": 5}, "text=5 must be a text"),
        ("documents", {"document_id": "d2", "text": None}, "text is empty: fill it or remove the example"),
        ("documents", {"document_id": "", "text": "a"},
         "document_id='' must be a whole number, or a text that is not empty"),
        ("documents", {"document_id": "d1", "text": "a"}, "document_id=d1 stands here again: remove one of the two"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_taken_is_named_by_its_line(
    name: str, row: dict[str, Any], problem: str, folder: Path
) -> None:
    write(folder, **{name: [{"queries": QUERIES[1], "documents": DOCUMENTS[0]}[name], row]})
    assert error_of(folder) == f"{folder}/{name}.jsonl:2: {problem}"
