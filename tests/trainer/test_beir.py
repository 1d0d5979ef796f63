"""BEIR folders: what is trained on, what is ranked, and where each error stands."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from configs.schema import Negatives
from tests.trainer.datafiles import (
    as_example,
    error_of,
    every_example,
    json_lines,
    make_set_config,
    texts,
    train_set,
    write,
)
from trainer.data import load_data, load_evaluation
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import TrainingSet

QUERIES = [
    {"_id": "q1", "text": "what barks"},
    {"_id": "q2", "text": "what swims", "metadata": {}},
    {"_id": "q3", "text": "what meows"},
]
CORPUS = [
    {"_id": "d1", "title": "Dogs", "text": "They bark."},
    {"_id": "d2", "title": "", "text": "A fish swims."},
    {"_id": "d3", "text": "A whale swims."},
    {"_id": "d4", "title": "Cats", "text": ""},
    {"_id": "d5", "title": None, "text": "A stone."},
]
TEXTS = {"d1": "Dogs They bark.", "d2": "A fish swims.", "d3": "A whale swims.", "d4": "Cats", "d5": "A stone."}
TRAIN = [("q2", "d2", 1), ("q1", "d1", 2), ("q2", "d5", 0), ("q2", "d3", 2), ("q3", "d1", 0)]
DEV = [("q3", "d4", 2), ("q3", "d1", 0), ("q1", "d1", 1), ("q2", "d1", 0)]


def judgements(rows: list[tuple[Any, ...]], header: str = "query-id\tcorpus-id\tscore\n") -> bytes:
    return (header + "".join("\t".join(map(str, row)) + "\n" for row in rows)).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without a mistake."""
    folder = tmp_path / "set"
    write(folder, queries=QUERIES, corpus=CORPUS)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_bytes(judgements(TRAIN))
    (folder / "qrels" / "dev.tsv").write_bytes(judgements(DEV))
    return folder


def examples_of(folder: Path, **changes: Any) -> TrainingSet:
    return train_set(make_set_config("beir", root=str(folder.parent), path="set", **changes))


def evaluation_of(folder: Path, **changes: Any) -> RetrievalSet:
    data = load_data(make_set_config("beir", root=str(folder.parent), path="set", **changes))
    return data.evaluation["set"]


def error(folder: Path, **changes: Any) -> str:
    return error_of(make_set_config("beir", **{"root": str(folder.parent), "path": "set", **changes}))


# What is trained on

EXPECTED = [("what swims", ["A fish swims.", "A whale swims."]), ("what barks", ["Dogs They bark."])]


def test_a_query_has_all_its_answers_where_its_first_judgement_stands(folder: Path) -> None:
    examples = examples_of(folder)
    assert every_example(examples) == [
        as_example(f"{folder}/qrels/train.tsv:{line}", query, documents, positives=len(documents))
        for line, (query, documents) in zip((2, 3), EXPECTED, strict=True)
    ]
    assert examples.warnings == ()
    assert not examples.has_teacher


def test_every_file_may_be_gzipped(folder: Path) -> None:
    for path in (folder / "queries.jsonl", folder / "corpus.jsonl", folder / "qrels" / "train.tsv"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    examples = examples_of(folder)
    assert texts(examples) == EXPECTED
    assert examples.examples["place"][0] == f"{folder}/qrels/train.tsv.gz:2"


def test_a_title_goes_before_the_text_of_a_document(folder: Path) -> None:
    assert examples_of(folder).documents["text"][:] == list(TEXTS.values())
    assert examples_of(folder).documents["id"][:] == list(TEXTS)


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        (1, ("what swims", ["A fish swims.", "A whale swims.", "A stone."], 2)),
        (2, ("what swims", ["A whale swims.", "A fish swims.", "A stone."], 1)),
    ],
)
def test_documents_judged_below_the_grade_may_be_negatives(grade: int, expected: Any, folder: Path) -> None:
    examples = examples_of(folder, negatives=Negatives.judged, positive_grade=grade)
    found = [(example["query"], example["documents"], example["positives"]) for example in every_example(examples)]
    assert found == [expected, ("what barks", ["Dogs They bark."], 1)]


def test_without_negatives_a_document_below_the_grade_is_left_out(folder: Path) -> None:
    assert texts(examples_of(folder, positive_grade=2)) == [
        ("what swims", ["A whale swims."]),
        ("what barks", ["Dogs They bark."]),
    ]


RUN = """
q2 Q0 d3 1 9.5 bm25
q2 Q0 d5 2 9.0 bm25
q9 Q0 d7 1 8.0 bm25
q2\tQ0\td2\t3\t7.0\tbm25
q2 Q0 d1 4 6.0 bm25
q3 Q0 d1 1 5.0 bm25
"""


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        (1, ("what swims", ["A fish swims.", "A whale swims.", "A stone.", "Dogs They bark."], 2)),
        (2, ("what swims", ["A whale swims.", "A stone.", "A fish swims.", "Dogs They bark."], 1)),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_a_run_gives_negatives_in_its_order_without_the_answers(
    packed: bool, grade: int, expected: Any, folder: Path
) -> None:
    name = "run.trec.gz" if packed else "run.trec"
    (folder / name).write_bytes(gzip.compress(RUN.encode()) if packed else RUN.encode())
    examples = examples_of(folder, negatives=Negatives.run, run_path=f"set/{name}", positive_grade=grade)
    found = [(example["query"], example["documents"], example["positives"]) for example in every_example(examples)]
    assert found == [expected, ("what barks", ["Dogs They bark."], 1)]


def test_a_run_that_ranks_an_empty_document_gives_the_others(folder: Path) -> None:
    write(folder, corpus=[*CORPUS, {"_id": "d6", "title": "", "text": " "}])
    (folder / "run.trec").write_text(RUN + "q2 Q0 d6 5 1.0 bm25\n")
    examples = examples_of(folder, negatives=Negatives.run, run_path="set/run.trec")
    assert texts(examples)[0] == ("what swims", ["A fish swims.", "A whale swims.", "A stone.", "Dogs They bark."])


def test_ids_may_be_whole_numbers_in_the_lines_of_json(folder: Path) -> None:
    write(folder, queries=[{"_id": 7, "text": "q"}], corpus=[{"_id": 8, "text": "d"}])
    (folder / "qrels" / "train.tsv").write_bytes(judgements([(7, 8, 1)]))
    assert texts(examples_of(folder)) == [("q", ["d"])]


def test_a_judgement_that_stands_again_must_have_the_same_grade(folder: Path) -> None:
    path = folder / "qrels" / "train.tsv"
    path.write_bytes(judgements([("q1", "d1", 1), ("q1", "d1", 1)]))
    assert texts(examples_of(folder)) == [("what barks", ["Dogs They bark."])]
    path.write_bytes(judgements([("q1", "d1", 1), ("q1", "d2", 1), ("q1", "d2", 0)]))
    assert error(folder) == f"{path}:4: query-id=q1 corpus-id=d2 has grade 0 here and 1 before: remove one"


@pytest.mark.parametrize("judged", [[("q1", "d1", 0)], [("q4", "d1", 1)]], ids=["no grade", "no text"])
def test_a_split_without_a_query_to_score_on_is_refused(judged: list[tuple[str, str, int]], folder: Path) -> None:
    write(folder, queries=[*QUERIES, {"_id": "q4", "text": ""}])
    path = folder / "qrels" / "dev.tsv"
    path.write_bytes(judgements(judged))
    assert error(folder, evaluation_split="dev") == (
        f"{path} has no query with a text and a document of grade 1 or more to be scored on"
    )


# What is ranked


def test_an_evaluation_split_ranks_the_whole_corpus_by_its_grades(folder: Path) -> None:
    data = load_data(make_set_config("beir", root=str(folder.parent), path="set", evaluation_split="dev"))
    assert texts(data.sets[0]) == EXPECTED
    # q2 has no answer in this split.
    assert data.evaluation["set"] == RetrievalSet(
        queries={"q3": "what meows", "q1": "what barks"},
        corpus=TEXTS,
        judgements={"q3": {"d4": 2, "d1": 0}, "q1": {"d1": 1}},
        candidates=None,
        ignore_identical_ids=False,
        unjudged=frozenset({"q2"}),
    )
    # The same without what is trained on.
    (folder / "qrels" / "train.tsv").unlink()
    config = make_set_config("beir", root=str(folder.parent), path="set", evaluation_split="dev")
    assert load_evaluation("set", config) == (data.evaluation["set"], [])


def test_a_set_may_ignore_identical_ids(folder: Path) -> None:
    assert evaluation_of(folder, evaluation_split="dev", ignore_identical_ids=True).ignore_identical_ids


# As on the Hub


def on_the_hub(folder: Path, subsets: dict[str, tuple[str, list[dict[str, Any]]]]) -> None:
    """A folder laid out as a data set of the Hub: rows and their split, by subset."""
    configs = []
    for subset, (split, rows) in subsets.items():
        (folder / subset).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / subset / f"{split}.parquet")
        configs.append({"config_name": subset, "data_files": [{"split": split, "path": f"{subset}/{split}.parquet"}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


HUB_CORPUS = [{"_id": key, "title": "", "text": text} for key, text in TEXTS.items()]
HUB_QUERIES: list[dict[str, Any]] = [
    {"_id": f"q{number}", "text": f"what {verb}"} for number, verb in enumerate(("barks", "swims", "meows"), start=1)
]


def test_judgements_may_be_a_subset_and_have_no_grades_as_in_nanobeir(tmp_path: Path) -> None:
    rows = [{"query-id": query, "corpus-id": document} for query, document in (("q1", "d1"), ("q2", "d3"))]
    on_the_hub(
        tmp_path / "zeta-alpha-ai" / "NanoSet",
        {"corpus": ("train", HUB_CORPUS), "queries": ("train", HUB_QUERIES), "qrels": ("train", rows)},
    )
    config = make_set_config("beir", root=str(tmp_path), path="zeta-alpha-ai/NanoSet", evaluation_split="train")
    evaluation, warnings = load_evaluation("NanoSet", config)
    assert evaluation == RetrievalSet(
        queries={"q1": "what barks", "q2": "what swims"},
        corpus=TEXTS,
        judgements={"q1": {"d1": 1}, "q2": {"d3": 1}},
        unjudged=frozenset({"q3"}),
    )
    assert warnings == []


def test_judgements_may_be_a_data_set_of_their_own_as_those_of_beir(tmp_path: Path) -> None:
    ids = {"corpus": HUB_CORPUS, "queries": HUB_QUERIES}
    on_the_hub(tmp_path / "BeIR" / "set", {subset: (subset, rows) for subset, rows in ids.items()})
    (tmp_path / "BeIR" / "set-qrels").mkdir()
    (tmp_path / "BeIR" / "set-qrels" / "README.md").write_text("---\nlicense: mit\n---\n")
    for split, rows in (("train", TRAIN), ("test", DEV)):
        (tmp_path / "BeIR" / "set-qrels" / f"{split}.tsv").write_bytes(judgements(list(rows)))
    config = make_set_config("beir", root=str(tmp_path), path="BeIR/set", evaluation_split="test")
    data = load_data(config)
    assert texts(data.sets[0]) == EXPECTED
    [evaluation] = data.evaluation.values()
    assert evaluation.judgements == {"q3": {"d4": 2, "d1": 0}, "q1": {"d1": 1}}
    (tmp_path / "BeIR" / "set-qrels" / "test.tsv").write_bytes(judgements([*DEV, ("q7", "d1", 1)]))
    assert error_of(config).startswith(
        f"{tmp_path}/BeIR/set-qrels test row 5: query-id=q7 is not in {tmp_path}/BeIR/set queries queries, and so in 1 "
    )


def test_a_data_set_of_the_hub_that_cannot_be_had_is_named(unreachable_hub: None) -> None:
    assert error_of(make_set_config("beir", path="BeIR/nothing", evaluation_split="test")).startswith(
        "data.path=BeIR/nothing cannot be loaded: "
    )


def test_grades_of_the_evaluation_do_not_depend_on_what_is_trained_on(folder: Path) -> None:
    evaluation = evaluation_of(folder, evaluation_split="dev", positive_grade=2, negatives=Negatives.judged)
    assert evaluation == evaluation_of(folder, evaluation_split="dev")


def test_a_share_of_the_queries_is_held_out_with_all_its_judgements(folder: Path) -> None:
    numbers = range(200)
    write(folder, queries=[{"_id": f"q{number}", "text": f"query {number}"} for number in numbers])
    rows = [(f"q{number}", key, grade) for key, grade in (("d1", 2), ("d2", 0), ("d3", 1)) for number in numbers]
    (folder / "qrels" / "train.tsv").write_bytes(judgements(rows))
    data = load_data(make_set_config("beir", root=str(folder.parent), path="set", evaluation_fraction=0.2))
    [evaluation] = data.evaluation.values()
    trained = [query for query, _ in texts(data.sets[0])]
    asked = evaluation.queries
    assert 20 < len(asked) < 60
    assert len(trained) == len(set(trained)) == 200 - len(asked)
    assert not set(trained) & set(asked.values())
    assert {f"query {key[1:]}" for key in asked} == set(asked.values())
    assert evaluation.corpus == TEXTS
    assert evaluation.judgements == {key: {"d1": 2, "d2": 0, "d3": 1} for key in asked}
    assert evaluation.candidates is None


def test_nothing_is_held_out_of_a_share_of_zero(folder: Path) -> None:
    assert not load_data(make_set_config("beir", root=str(folder.parent), path="set")).evaluation


# What is left out


def test_judgements_of_texts_that_are_not_there_are_left_out_and_counted(folder: Path) -> None:
    rows = [("q1", "d1", 1), ("q1", "d9", 1), *[("q2", key, 1) for key in ("d2", "d3", "d5")] * 12, ("q8", "d1", 1)]
    rows += [("q1", "d2", 0)]
    (folder / "qrels" / "train.tsv").write_bytes(judgements(rows))
    examples = examples_of(folder)
    assert texts(examples) == [
        ("what barks", ["Dogs They bark."]),
        ("what swims", ["A fish swims.", "A whale swims.", "A stone."]),
    ]
    assert examples.warnings == (
        f"2 judgements of {folder}/qrels/train.tsv are of no text, first {folder}/qrels/train.tsv:3: corpus-id=d9 is "
        f"not in {folder}/corpus.jsonl; left out",
    )


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("q9", "d1", 1), "query-id=q9 is not in {folder}/queries.jsonl"),
        (("q1", "d9", 1), "corpus-id=d9 is not in {folder}/corpus.jsonl"),
        (("q9", "d9", 1), "query-id=q9 is not in {folder}/queries.jsonl"),
    ],
)
def test_more_than_1_in_20_judgements_of_unknown_texts_are_an_error(
    row: tuple[Any, ...], problem: str, split: str, folder: Path
) -> None:
    (folder / "qrels" / f"{split}.tsv").write_bytes(judgements([*[("q1", "d1", 1)] * 18, row]))
    assert error(folder, evaluation_split="dev") == (
        f"{folder}/qrels/{split}.tsv:20: {problem.format(folder=folder)}, and so in 1 of 19 judgements, more than 5%: "
        "are these the judgements of this corpus?"
    )
    (folder / "qrels" / f"{split}.tsv").write_bytes(judgements([*[("q1", "d1", 1)] * 19, row]))
    assert load_data(make_set_config("beir", root=str(folder.parent), path="set", evaluation_split="dev")).size


def test_judgements_of_the_evaluation_that_are_left_out_are_counted_as_well(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").write_bytes(judgements([*[("q1", "d1", 1)] * 19, ("q1", "d9", 1)]))
    assert examples_of(folder, evaluation_split="dev").warnings == (
        f"1 judgements of {folder}/qrels/dev.tsv are of no text, first {folder}/qrels/dev.tsv:21: corpus-id=d9 is not "
        f"in {folder}/corpus.jsonl; left out",
    )


def test_an_empty_document_that_nobody_names_is_a_warning_alone(folder: Path) -> None:
    write(folder, corpus=[*CORPUS, {"_id": "d6", "title": " ", "text": ""}, {"_id": "d7", "text": None}])
    examples = examples_of(folder, max_empty=0.0)
    assert texts(examples) == EXPECTED
    assert examples.warnings == (f"2 of 7 texts of {folder}/corpus.jsonl are empty, first {folder}/corpus.jsonl:6",)


def test_an_empty_document_is_no_answer_and_no_negative(folder: Path) -> None:
    write(folder, corpus=[*CORPUS[:1], {"_id": "d2", "text": ""}, *CORPUS[2:4], {"_id": "d5", "text": " "}])
    examples = examples_of(folder, max_empty=0.0, negatives=Negatives.judged)
    assert texts(examples) == [("what swims", ["A whale swims."]), ("what barks", ["Dogs They bark."])]
    assert examples.examples["positives"][:] == [1, 1]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("queries", [{"_id": "q1", "text": " "}, *QUERIES[1:]]),
        ("corpus", [{"_id": "d1", "title": "", "text": ""}, *CORPUS[1:]]),
    ],
)
def test_a_query_without_text_or_whose_answers_have_none_is_left_out_and_counted(
    name: str, rows: list[dict[str, Any]], folder: Path
) -> None:
    write(folder, **{name: rows})
    examples = examples_of(folder, max_empty=0.5)
    assert texts(examples) == EXPECTED[:1]
    found = f"1 of 2 examples of {folder}/qrels/train.tsv have an empty text, first {folder}/qrels/train.tsv:3"
    assert examples.warnings[-1] == f"{found}; left out"
    text = f"1 of {len(rows)} texts of {folder}/{name}.jsonl are empty, first {folder}/{name}.jsonl:1"
    assert error(folder) == f"{found}, more than data.max_empty=0.01: fill or remove them, or raise it; {text}"


# Errors in the config


def test_a_file_is_no_folder(folder: Path) -> None:
    assert error(folder, path="set/corpus.jsonl") == (
        "data.path=set/corpus.jsonl is a file: name the BEIR folder that holds it"
    )


@pytest.mark.parametrize("name", ["queries", "corpus"])
def test_a_missing_file_of_texts_is_named(name: str, folder: Path) -> None:
    (folder / f"{name}.jsonl").unlink()
    assert error(folder) == (
        f"data.path=set: {folder} must hold one file {name}.<jsonl, csv, tsv or parquet>; found none"
    )


@pytest.mark.parametrize("key", ["split", "evaluation_split"])
def test_judgements_that_are_not_there_are_named(key: str, folder: Path) -> None:
    assert error(folder, **{key: "test"}) == (
        f"data.{key}=test: {folder}/qrels must hold one file test.<jsonl, csv, tsv or parquet>; found none"
    )


def test_a_folder_without_judgements_is_named(folder: Path) -> None:
    (folder / "qrels").rename(folder / "other")
    assert error(folder) == f"data.split=train: {folder} has no folder qrels with the judgements: add it"


def test_a_run_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert error(folder, negatives=Negatives.run, run_path="none.trec") == (
        f"data.run_path=none.trec: there is no {folder.parent}/none.trec or none.trec: "
        "give an existing file, or set data.root"
    )


def test_a_grade_that_no_document_has_is_named(folder: Path) -> None:
    assert error(folder, positive_grade=3) == (
        f"{folder}/qrels/train.tsv has no query with a document of grade 3 or more: lower data.positive_grade"
    )


# Errors in the files


@pytest.mark.parametrize(
    ("header", "found"),
    [("", "q2, d2, 1"), ("query\tcorpus-id\tscore\n", "query, corpus-id, score")],
    ids=["none", "another"],
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_judgements_without_their_header_are_named(split: str, header: str, found: str, folder: Path) -> None:
    (folder / "qrels" / f"{split}.tsv").write_bytes(judgements(TRAIN, header))
    assert error(folder, evaluation_split="dev") == (
        f"{folder}/qrels/{split}.tsv:2: the columns are {found}: the first line must be query-id, corpus-id, score"
    )


def test_judgements_as_trec_writes_them_are_named(folder: Path) -> None:
    (folder / "qrels" / "train.tsv").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    assert error(folder) == (
        f"{folder}/qrels/train.tsv:2: the columns are q1 0 d1 1: the first line must be query-id, corpus-id, score"
    )


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_file_without_a_judgement_is_named(split: str, folder: Path) -> None:
    (folder / "qrels" / f"{split}.tsv").write_bytes(judgements([]))
    assert error(folder, evaluation_split="dev") == (
        f"{folder}/qrels/{split}.tsv holds no judgement: give query-id, corpus-id and score in each row"
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("q1", "d1", "x"), "score='x' must be a whole number"),
        (("q1", "d1", "1.5"), "score='1.5' must be a whole number"),
        (("q1", "d1", ""), "score=None must be a whole number"),
        (("", "d1", "1"), "query-id=None must be a whole number, or a text that is not empty"),
        (("q1", " ", "1"), "corpus-id=' ' must be a whole number, or a text that is not empty"),
        (("q1", "d1"), "2 cells under 3 columns: fill the row, if with empty cells"),
        (("q1", "0", "d1", "1"), "4 cells under 3 columns: quote cells with commas"),
    ],
)
def test_a_line_that_is_no_judgement_is_named(row: tuple[Any, ...], problem: str, folder: Path) -> None:
    (folder / "qrels" / "train.tsv").write_bytes(judgements([*TRAIN, row]))
    assert error(folder) == f"{folder}/qrels/train.tsv:7: {problem}"


@pytest.mark.parametrize("grade", [0.5, float("inf"), float("nan"), None, [1]])
def test_a_grade_of_json_that_is_no_whole_number_is_named(grade: Any, folder: Path) -> None:
    (folder / "qrels" / "train.tsv").unlink()
    write(folder / "qrels", train=[{"query-id": "q1", "corpus-id": "d1", "score": each} for each in (1, grade)])
    assert error(folder) == f"{folder}/qrels/train.jsonl:2: score={grade!r} must be a whole number"


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("queries", {"_id": "q1", "text": "again"}, "_id=q1 stands here again: remove one of the two"),
        ("corpus", {"_id": "d5", "text": "again"}, "_id=d5 stands here again: remove one of the two"),
        ("queries", {"_id": "q4", "text": 5}, "text=5 must be a text"),
        ("corpus", {"_id": "d9", "title": 7, "text": "a"}, "title=7 must be a text"),
        ("corpus", {"_id": None, "text": "a"}, "_id=None must be a whole number, or a text that is not empty"),
        ("corpus", {"id": "d9", "text": "a"}, "there is no column _id; the columns are id, text: rename or add it"),
        ("corpus", {"_id": "d9"}, "there is no column text; the columns are _id: rename or add it"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_taken_is_named_by_its_line(
    name: str, row: dict[str, Any], problem: str, folder: Path
) -> None:
    rows = {"queries": QUERIES, "corpus": CORPUS}[name]
    write(folder, **{name: [*rows, row]})
    assert error(folder) == f"{folder}/{name}.jsonl:{len(rows) + 1}: {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q1 Q0 d2 1 9.5", "5 cells, and TREC's runs have 6: query, Q0, document, rank, score, name"),
        ("q1 Q0 d2 1 9.5 my name", "7 cells, and TREC's runs have 6: query, Q0, document, rank, score, name"),
        ("q1 Q0 d9 1 9.5 bm25", "corpus-id=d9 is not in {folder}/corpus.jsonl: add it there, or remove it here"),
    ],
)
def test_a_line_that_is_none_of_a_run_is_named(line: str, problem: str, folder: Path) -> None:
    (folder / "run.trec").write_text("q1 Q0 d2 1 9.5 bm25\n\n" + line + "\n")
    assert error(folder, negatives=Negatives.run, run_path="set/run.trec") == (
        f"{folder}/run.trec:3: {problem.format(folder=folder)}"
    )


def test_malformed_json_and_a_cut_gzip_are_named(folder: Path) -> None:
    (folder / "corpus.jsonl").write_bytes(json_lines(*CORPUS) + b'{"_id" "d9"}\n')
    assert error(folder) == (
        f"{folder}/corpus.jsonl:6 is no JSON (Expecting ':' delimiter at column 8): mend or remove the line"
    )
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(json_lines(*CORPUS), mtime=0)[:-8])
    assert error(folder) == (
        f"{folder}/corpus.jsonl.gz: the gzip is cut or damaged behind line 5 (Compressed file ended before the "
        "end-of-stream marker was reached): fetch the file again"
    )
