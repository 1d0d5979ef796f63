"""PyLate's queries, documents and scores: what is read, ranked and held out, and where each error stands."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from configs.schema import Positive
from tests.trainer.datafiles import (
    as_example,
    error_of,
    every_example,
    json_lines,
    make_set_config,
    texts,
    train_set,
    with_scores,
    write,
)
from trainer.data import load_data
from trainer.data.tables import TrainingSet, identity

QUERIES = [{"query_id": "q1", "text": "what barks"}, {"query_id": "q2", "text": "what swims"}]
DOCUMENTS = [
    {"document_id": "d1", "text": "a dog"},
    {"document_id": "d2", "text": "a fish"},
    {"document_id": "d3", "text": "a cat"},
]
ROWS: list[dict[str, Any]] = [
    {"query_id": "q1", "document_ids": ["d3", "d1"], "scores": [0.5, 9.0]},
    {"query_id": "q2", "document_ids": ["d1", "d2", "d3"], "scores": [-1.0, 7.5, -0.25]},
]
EXPECTED = [
    ("what barks", ["a dog", "a cat"], [9.0, 0.5]),
    ("what swims", ["a fish", "a cat", "a dog"], [7.5, -0.25, -1.0]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without a mistake."""
    write(tmp_path / "set", train=ROWS, queries=QUERIES, documents=DOCUMENTS)
    return tmp_path / "set"


def examples_of(folder: Path, **changes: Any) -> TrainingSet:
    return train_set(make_set_config("distillation_ids", root=str(folder.parent), path=folder.name, **changes))


def read(folder: Path, **changes: Any) -> list[tuple[str, list[str], list[float]]]:
    """Query, documents and scores of each training example."""
    return with_scores(examples_of(folder, **changes))


def error(folder: Path, **changes: Any) -> str:
    return error_of(make_set_config("distillation_ids", **{"root": str(folder.parent), "path": folder.name, **changes}))


# What is read


def test_documents_go_from_the_highest_score_to_the_lowest_each_with_its_identity(folder: Path) -> None:
    examples = examples_of(folder)
    assert every_example(examples) == [
        as_example(f"{folder}/train.jsonl:{line}", query, documents, scores=scores)
        for line, (query, documents, scores) in enumerate(EXPECTED, start=1)
    ]
    assert examples.has_teacher
    assert examples.warnings == ()


def test_documents_of_one_score_stay_in_the_order_of_the_file(folder: Path) -> None:
    write(folder, train=[{"query_id": "q1", "document_ids": ["d3", "d1", "d2"], "scores": [1, 2, 1]}])
    assert read(folder) == [("what barks", ["a dog", "a cat", "a fish"], [2.0, 1.0, 1.0])]


def test_the_first_document_of_the_row_may_be_the_positive(folder: Path) -> None:
    assert read(folder, positive=Positive.first) == [
        ("what barks", ["a cat", "a dog"], [0.5, 9.0]),
        ("what swims", ["a dog", "a fish", "a cat"], [-1.0, 7.5, -0.25]),
    ]


def test_a_query_may_have_several_rows(folder: Path) -> None:
    write(folder, train=[{**ROWS[0], "document_ids": ids} for ids in (["d1", "d2"], ["d2", "d3"])])
    assert [documents for _, documents, _ in read(folder)] == [["a fish", "a dog"], ["a cat", "a fish"]]


def test_ids_may_be_whole_numbers_in_one_file_and_texts_in_another(folder: Path) -> None:
    write(
        folder,
        train=[{"query_id": 7, "document_ids": ["1", 2], "scores": [1.0, 2.0]}],
        queries=[{"query_id": "7", "text": "what swims"}],
        documents=[{"document_id": 1, "text": "a dog"}, {"document_id": "2", "text": "a fish"}],
    )
    assert read(folder) == [("what swims", ["a fish", "a dog"], [2.0, 1.0])]


@pytest.mark.parametrize("written", [json.dumps, str], ids=["JSON", "Python"])
def test_lists_may_be_texts_that_hold_them(written: Any, folder: Path) -> None:
    rows = [{**row, "document_ids": written(row["document_ids"]), "scores": written(row["scores"])} for row in ROWS]
    write(folder, train=rows)
    assert read(folder) == EXPECTED


def test_each_file_may_have_an_ending_of_its_own(folder: Path) -> None:
    for name in ("train", "queries", "documents"):
        (folder / f"{name}.jsonl").unlink()
    Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    (folder / "queries.tsv").write_text("query_id\ttext\nq1\twhat barks\nq2\twhat swims\n")
    (folder / "documents.jsonl.gz").write_bytes(gzip.compress(json_lines(*DOCUMENTS)))
    assert read(folder) == EXPECTED


def test_rows_of_a_csv_hold_their_lists_as_texts(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text('query_id,document_ids,scores\nq1,"[""d3"", ""d1""]","[0.5, 9]"\n')
    assert read(folder) == EXPECTED[:1]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder laid out as lightonai/ms-marco-en-bge on the Hub: three subsets, each with a split train."""
    folder = tmp_path / "ms-marco"
    rows = {"queries": QUERIES, "documents": DOCUMENTS, "train": ROWS}
    card = "---\nlanguage: [en]\nconfigs:\n"
    for subset, own in rows.items():
        (folder / subset).mkdir(parents=True)
        Dataset.from_list(own).to_parquet(str(folder / subset / "train-00000-of-00001.parquet"))
        card += f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/train-*\n"
    (folder / "README.md").write_text(f"{card}---\n# ms-marco-en-bge\n")
    return folder


def test_a_data_set_of_the_hub_has_queries_and_documents_as_subsets(repository: Path) -> None:
    examples = examples_of(repository, subset="train")
    assert with_scores(examples) == EXPECTED
    assert examples.examples["place"][:] == [f"{repository} train train row {row}" for row in (1, 2)]


def test_an_id_that_such_a_data_set_lacks_is_named_by_its_row(repository: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "document_ids": ["d1", "d9"]}]
    Dataset.from_list(rows).to_parquet(str(repository / "train" / "train-00000-of-00001.parquet"))
    assert error(repository, subset="train") == (
        f"{repository} train train row 3: document_id=d9 is not in {repository} documents train: "
        "add it there, or remove it here"
    )


def test_queries_of_such_a_data_set_are_held_out_as_well(repository: Path) -> None:
    config = make_set_config(
        "distillation_ids", root=str(repository.parent), path="ms-marco", subset="train", evaluation_fraction=0.5
    )
    data = load_data(config)
    assert with_scores(data.sets[0]) == EXPECTED[:1]
    [evaluation] = data.evaluation.values()
    assert list(evaluation.queries.values()) == ["what swims"]


def test_a_subset_that_is_not_there_is_named(repository: Path) -> None:
    assert error(repository, subset="none") == (
        f"{repository} none train cannot be loaded: BuilderConfig 'none' not found. "
        "Available: ['queries', 'documents', 'train']; check data.path, data.subset, data.split and data.revision"
    )


def test_a_data_set_that_the_hub_does_not_give_is_named(tmp_path: Path, unreachable_hub: None) -> None:
    assert error(tmp_path, path="nobody/nothing", subset="train") == (
        "nobody/nothing train train cannot be loaded: Couldn't reach 'nobody/nothing' on the Hub "
        "(LocalEntryNotFoundError); check data.path, data.subset, data.split and data.revision"
    )


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
    ],
    ids=["numbers", "whole", "texts", "negative", "one number", "none", "two of five", "rows of one query"],
)
def test_the_last_queries_by_id_are_held_out(
    ids: list[Any], fraction: float, held_out: list[Any], folder: Path
) -> None:
    unnamed = [{"query_id": f"zz{number}", "text": "no row names it"} for number in range(20)]
    queries = [{"query_id": key, "text": f"query {key}"} for key in dict.fromkeys(ids)]
    write(folder, train=[{**ROWS[0], "query_id": key} for key in ids], queries=[*queries, *unnamed])
    data = load_data(
        make_set_config("distillation_ids", root=str(folder.parent), path="set", evaluation_fraction=fraction)
    )
    assert [query for query, _ in texts(data.sets[0])] == [f"query {key}" for key in ids if key not in held_out]
    asked = [text for each in data.evaluation.values() for text in each.queries.values()]
    assert asked == [f"query {key}" for key in dict.fromkeys(held_out)]


def test_a_query_text_is_never_on_both_sides(folder: Path) -> None:
    queries = [{"query_id": number, "text": f"what is {number % 5}"} for number in range(10)]
    write(folder, train=[{**ROWS[0], "query_id": number} for number in range(10)], queries=queries)
    data = load_data(make_set_config("distillation_ids", root=str(folder.parent), path="set", evaluation_fraction=0.2))
    [evaluation] = data.evaluation.values()
    assert not {query for query, _ in texts(data.sets[0])} & set(evaluation.queries.values())


def test_an_evaluation_folder_is_evaluated_on_and_holds_nothing_out(folder: Path) -> None:
    write(
        folder.parent / "other",
        dev=[{"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [1.0, 2.0]}],
        queries=[{"query_id": "q1", "text": "what flies"}],
        documents=[{"document_id": "d1", "text": "a bee"}, {"document_id": "d2", "text": "a bird"}],
    )
    changes = {"evaluation_path": "other", "evaluation_split": "dev", "evaluation_fraction": 0.9}
    data = load_data(make_set_config("distillation_ids", root=str(folder.parent), path="set", **changes))
    assert with_scores(data.sets[0]) == EXPECTED
    [evaluation] = data.evaluation.values()
    query, bird, bee = (str(identity(text)) for text in ("what flies", "a bird", "a bee"))
    assert evaluation.queries == {query: "what flies"}
    assert evaluation.candidates == {query: [bird, bee]}
    assert evaluation.judgements == {query: {bird: 10, bee: 9}}


def test_a_split_to_evaluate_on_shares_the_texts_of_the_folder(folder: Path) -> None:
    write(folder, dev=[{"query_id": "q2", "document_ids": ["d3", "d2"], "scores": [1, 2]}])
    data = load_data(make_set_config("distillation_ids", root=str(folder.parent), path="set", evaluation_split="dev"))
    assert with_scores(data.sets[0]) == EXPECTED
    [evaluation] = data.evaluation.values()
    assert list(evaluation.queries.values()) == ["what swims"]
    assert list(evaluation.corpus.values()) == ["a fish", "a cat"]


def test_held_out_queries_rank_their_own_documents_by_the_grades_of_the_teacher(folder: Path) -> None:
    data = load_data(make_set_config("distillation_ids", root=str(folder.parent), path="set", evaluation_fraction=0.5))
    assert with_scores(data.sets[0]) == EXPECTED[:1]
    [evaluation] = data.evaluation.values()
    query, *ranking = (str(identity(text)) for text in ("what swims", "a fish", "a cat", "a dog"))
    assert evaluation.queries == {query: "what swims"}
    assert evaluation.judgements == {query: dict(zip(ranking, (10, 9, 8), strict=True))}
    assert evaluation.candidates == {query: ranking}


def test_a_share_that_leaves_nothing_to_train_on_is_an_error(folder: Path) -> None:
    assert error(folder, evaluation_fraction=0.9) == (
        "data.path=set: no example is left to train on: give more, or lower data.evaluation_fraction or data.max_empty"
    )


def test_the_real_set_has_129_queries_of_which_29_are_held_out(real_data: Path) -> None:
    data = load_data(
        make_set_config("distillation_ids", root=str(real_data), path="trec_dl_distillation", evaluation_fraction=0.225)
    )
    [evaluation] = data.evaluation.values()
    assert (data.size, len(evaluation.queries)) == (100, 29)
    folder = real_data / "trec_dl_distillation"
    rows, queries = (
        [json.loads(line) for line in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).splitlines()]
        for name in ("train", "queries")
    )
    names = {row["text"].strip(): int(row["query_id"]) for row in queries}
    by_query = {int(row["query_id"]): row for row in rows}
    trained = every_example(data.sets[0])
    for example in trained:
        row = by_query[names[example["query"]]]
        assert len(example["documents"]) == 100
        assert example["scores"] == sorted(row["scores"], reverse=True)
    assert max(names[example["query"]] for example in trained) < min(
        names[text] for text in evaluation.queries.values()
    )


# Empty texts


@pytest.mark.parametrize("blank", ["", " \n", None], ids=["empty", "spaces", "null"])
@pytest.mark.parametrize(("name", "key"), [("queries", "q1"), ("documents", "d1")])
def test_examples_that_name_an_empty_text_are_left_out_and_counted(
    name: str, key: str, blank: str | None, folder: Path
) -> None:
    rows = {"queries": QUERIES, "documents": DOCUMENTS}[name]
    train = [ROWS[0], {**ROWS[1], "document_ids": ["d2", "d3"], "scores": [1, 2]}]
    write(folder, train=train, **{name: [rows[0] | {"text": blank}, *rows[1:]]})
    examples = examples_of(folder, max_empty=0.5)
    assert with_scores(examples) == [("what swims", ["a cat", "a fish"], [2.0, 1.0])]
    found = f"1 of 2 examples of {folder}/train.jsonl have an empty text, first {folder}/train.jsonl:1"
    text = f"1 of {len(rows)} texts of {folder}/{name}.jsonl are empty, first {folder}/{name}.jsonl:1"
    assert examples.warnings == (text, f"{found}; left out")
    limit = "more than data.max_empty=0.4: fill or remove them, or raise it"
    assert error(folder, max_empty=0.4) == f"{found}, {limit}; {text}"


def test_an_empty_document_that_no_row_names_is_a_warning_alone(folder: Path) -> None:
    unnamed = [{"document_id": "d8", "text": ""}, {"document_id": "d9", "text": None}]
    write(folder, documents=[*DOCUMENTS, *unnamed], queries=[*QUERIES, {"query_id": "q9", "text": None}])
    examples = examples_of(folder, max_empty=0.0)
    assert with_scores(examples) == EXPECTED
    assert examples.warnings == (
        f"1 of {len(QUERIES) + 1} texts of {folder}/queries.jsonl are empty, first {folder}/queries.jsonl:"
        f"{len(QUERIES) + 1}",
        f"2 of 5 texts of {folder}/documents.jsonl are empty, first {folder}/documents.jsonl:4",
    )


# Errors in the config


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_missing_folder_is_named_with_the_places_looked_at(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert error(folder, **{key: "none"}) == (
        f"data.{key}=none: there is no {folder.parent}/none or none: give an existing file, or set data.root"
    )


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_file_is_no_folder(key: str, folder: Path) -> None:
    assert error(folder, **{key: "set/train.jsonl"}) == (
        f"data.{key}=set/train.jsonl is a file: name the folder that holds it, "
        "with the files queries and documents beside it"
    )


@pytest.mark.parametrize(
    ("missing", "asked"), [("train", "data.split=train"), ("queries", "data.path=set"), ("documents", "data.path=set")]
)
def test_a_missing_file_of_the_three_is_named(missing: str, asked: str, folder: Path) -> None:
    (folder / f"{missing}.jsonl").rename(folder / "moved.jsonl")
    assert error(folder) == f"{asked}: {folder} must hold one file {missing}.<jsonl, csv, tsv or parquet>; found none"


def test_a_split_to_evaluate_on_that_is_not_there_is_named(folder: Path) -> None:
    assert error(folder, evaluation_split="dev") == (
        f"data.evaluation_split=dev: {folder} must hold one file dev.<jsonl, csv, tsv or parquet>; found none"
    )


# Errors in the files


def test_a_file_without_a_row_is_named(folder: Path) -> None:
    write(folder, train=[])
    assert error(folder) == (
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
    assert error(folder) == f"{folder}/{name}.jsonl:1: there is no column {problem}: rename or add it"


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
        ({"scores": [1.0, 1e39]}, "scores holds 1e+39, which must be a finite number"),
        ({"scores": 5}, "scores=5 must be a list, or a text that holds one as JSON"),
        ({"scores": None}, "scores=None must be a list, or a text that holds one as JSON"),
        ({"document_ids": "d1, d2"}, "document_ids='d1, d2' must be a list, or a text that holds one as JSON"),
        ({"document_ids": "7"}, "document_ids=7 must be a list, or a text that holds one as JSON"),
        ({"document_ids": ["d1"], "scores": [1]},
         "document_ids has 1, and 2 or more can be compared: add some, or remove the row"),
        ({"document_ids": [], "scores": []},
         "document_ids has 0, and 2 or more can be compared: add some, or remove the row"),
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
    assert error(folder) == f"{folder}/train.jsonl:2: {problem.format(folder=folder)}"


def test_a_missing_id_is_named_by_its_line_in_gzipped_files(folder: Path) -> None:
    for name, rows in (("train", [*ROWS * 8, {**ROWS[0], "document_ids": ["d1", 123]}]), ("documents", DOCUMENTS)):
        (folder / f"{name}.jsonl").unlink()
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(json_lines(*rows)))
    assert error(folder) == (
        f"{folder}/train.jsonl.gz:17: document_id=123 is not in {folder}/documents.jsonl.gz: "
        "add it there, or remove it here"
    )


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("queries", {"query_id": "q1", "text": 5}, "text=5 must be a text"),
        ("queries", {"query_id": "q2", "text": "a"}, "query_id=q2 stands here again: remove one of the two"),
        ("documents", {"document_id": "", "text": "a"},
         "document_id='' must be a whole number, or a text that is not empty"),
        ("documents", {"document_id": "d1", "text": "a"}, "document_id=d1 stands here again: remove one of the two"),
        ("documents", {"document_id": "d4", "text": ["a"]}, "text=['a'] must be a text"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_taken_is_named_by_its_line(
    name: str, row: dict[str, Any], problem: str, folder: Path
) -> None:
    write(folder, **{name: [{"queries": QUERIES[1], "documents": DOCUMENTS[0]}[name], row]})
    assert error(folder) == f"{folder}/{name}.jsonl:2: {problem}"


def test_of_several_ids_that_stand_again_the_first_in_the_file_is_named(folder: Path) -> None:
    keys = [f"d{number}" for number in range(1, 30)]
    rows = [{"document_id": key, "text": "a"} for key in [*keys, *keys]]
    write(folder, documents=rows)
    assert error(folder) == f"{folder}/documents.jsonl:30: document_id=d1 stands here again: remove one of the two"
