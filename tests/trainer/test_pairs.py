"""Files of pairs and triples: what is read from each format, what is held out, and where each error stands."""

import gzip
import json
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from configs.schema import ConfigError, DataConfig, DataFormat
from trainer.data import Data, files, load_data, pairs
from trainer.data.files import identity

EXAMPLES = [
    {"query": "what is a cat", "positive": "an animal that meows"},
    {"query": "what barks, and why", "positive": 'a "dog"'},
]
EXPECTED = [(example["query"], [example["positive"]]) for example in EXAMPLES]


def make_config(folder: Path, name: str, **changes: Any) -> DataConfig:
    config = DataConfig(
        format=DataFormat.pairs,
        root=str(folder),
        path=name,
        split="train",
        evaluation_split=None,
        evaluation_path=None,
        evaluation_fraction=0.0,
        query_column="query",
        positive_column="positive",
        negative_columns=None,
        documents_per_query=None,
    )
    return replace(config, **changes)


def json_lines(*examples: dict[str, Any]) -> bytes:
    return "".join(json.dumps(example) + "\n" for example in examples).encode()


def load(folder: Path, name: str, content: bytes, **changes: Any) -> list[tuple[str, list[str]]]:
    """Write the file, read it as the training set, and return the query and the documents of each example."""
    (folder / name).write_bytes(content)
    return texts(load_data(make_config(folder, name, **changes)).train)


def texts(examples: Dataset) -> list[tuple[str, list[str]]]:
    return [(row["query"], row["documents"]) for row in examples]


def error_of(folder: Path, name: str, content: bytes | None = None, **changes: Any) -> str:
    """The message of the ConfigError that reading the file ends in."""
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_data(make_config(folder, name, **changes))
    return str(caught.value)


# Formats

GOOD = json_lines({"query": "q", "positive": "p"})
CSV = b'query,positive\nwhat is a cat,an animal that meows\n"what barks, and why","a ""dog"""\n'
TSV = b'query\tpositive\nwhat is a cat\tan animal that meows\nwhat barks, and why\ta "dog"\n'
CONTENTS = {
    "a.jsonl": json_lines(*EXAMPLES),
    "a.json": json_lines(*EXAMPLES),
    "array.json": json.dumps(EXAMPLES).encode(),
    "indented.json": json.dumps(EXAMPLES, indent=2).encode(),
    "a.csv": CSV,
    "a.tsv": TSV,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_text_format_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    assert load(tmp_path, name, CONTENTS[name]) == EXPECTED


@pytest.mark.parametrize("name", CONTENTS)
def test_every_text_format_is_read_gzipped(name: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"{name}.gz", gzip.compress(CONTENTS[name])) == EXPECTED


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    Dataset.from_list(EXAMPLES).to_parquet(str(tmp_path / "a.parquet"))
    assert texts(load_data(make_config(tmp_path, "a.parquet")).train) == EXPECTED


def test_parquet_is_not_read_gzipped(tmp_path: Path) -> None:
    message = error_of(tmp_path, "a.parquet.gz", gzip.compress(b"whatever it holds"))
    assert message.startswith("data.path=a.parquet.gz: the ending must be one of ")


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", b"\n" + json_lines(EXAMPLES[0]) + b"\n \n" + json_lines(EXAMPLES[1]), ["a.jsonl:2", "a.jsonl:5"]),
        ("a.csv", b"\nquery,positive\n\nq,p\nr,s\n", ["a.csv:4", "a.csv:5"]),
        ("a.csv", b'query,positive\n"q\nq",p\nr,s\n', ["a.csv:2", "a.csv:4"]),
        ("a.json", json.dumps(EXAMPLES).encode(), ["a.json example 1", "a.json example 2"]),
        ("a.jsonl.gz", gzip.compress(json_lines(*EXAMPLES), mtime=0), ["a.jsonl.gz:1", "a.jsonl.gz:2"]),
    ],
    ids=["JSON lines", "CSV", "CSV with a text over two lines", "JSON array", "gzipped"],
)
def test_the_place_is_the_line_where_examples_are_lines(
    name: str, content: bytes, places: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    examples = load_data(make_config(tmp_path, name)).train
    assert examples["place"] == [f"{tmp_path}/{place}" for place in places]


def test_words_that_mean_nothing_elsewhere_are_texts_in_a_csv(tmp_path: Path) -> None:
    content = b"query,positive\nNA,null\nnan,None\n"
    assert load(tmp_path, "a.csv", content) == [
        ("NA", ["null"]),
        ("nan", ["None"]),
    ]


def test_digits_and_dates_are_texts_in_a_csv(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", b"query,positive\n1984,2020-01-01\n007,2020-01-02\n") == [
        ("1984", ["2020-01-01"]),
        ("007", ["2020-01-02"]),
    ]


def test_a_column_of_dates_is_a_column_of_texts(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "2020-01-01"}, {"query": "r", "positive": "2020-01-02"})
    assert load(tmp_path, "a.jsonl", content) == [("q", ["2020-01-01"]), ("r", ["2020-01-02"])]


# Two of these are more than the 10 MiB of which `datasets` infers the type of a column.
LONG = {"query": "q", "positive": "word " * 1_200_000}


def test_negatives_may_begin_far_into_a_large_file(tmp_path: Path) -> None:
    content = json_lines(*[{**LONG, "negatives": None}] * 2, {**EXAMPLES[0], "negatives": ["n"]})
    assert [documents[1:] for _, documents in load(tmp_path, "a.jsonl", content)] == [[], [], ["n"]]


def test_negatives_may_begin_far_into_a_csv(tmp_path: Path) -> None:
    # pandas infers the type of a column from 10,000 rows at a time.
    content = b"query,positive,negative\n" + b"q,p,\n" * 10_000 + b"r,s,n\n"
    assert [documents[1:] for _, documents in load(tmp_path, "a.csv", content)] == [[]] * 10_000 + [["n"]]


# The table


def test_an_example_has_the_ids_of_its_texts_and_no_scores(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"query": "q", "positive": "p", "negatives": ["n", "q"]}))
    [example] = load_data(make_config(tmp_path, "a.jsonl")).train
    assert example == {
        "query": "q",
        "query_id": identity("q"),
        "documents": ["p", "n", "q"],
        "document_ids": [identity("p"), identity("n"), identity("q")],
        "scores": [],
        "place": f"{tmp_path}/a.jsonl:1",
    }


def test_an_identity_is_the_first_63_bits_of_the_md5_and_never_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("a cat") == int(md5(b"a cat").hexdigest()[:16], 16) // 2
    assert identity("é") == int(md5("é".encode()).hexdigest()[:16], 16) // 2
    monkeypatch.setattr(files, "md5", lambda *_, **__: SimpleNamespace(digest=lambda: bytes(16)))
    assert identity("a cat") == 1


def test_a_table_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, "a.jsonl", GOOD) == [("q", ["p"])]
    with monkeypatch.context() as patched:
        patched.setattr(pairs, "checked_rows", lambda path: pytest.fail(f"{path} is read again"))
        assert texts(load_data(make_config(tmp_path, "a.jsonl")).train) == [("q", ["p"])]
    assert load(tmp_path, "a.jsonl", GOOD + json_lines({"query": "r", "positive": "s"})) == [("q", ["p"]), ("r", ["s"])]


# Where the file lies


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(json_lines(EXAMPLES[0])))
    (tmp_path / "set" / "dev.csv").write_bytes(b"query,positive\nq,p\n")
    (tmp_path / "set" / "train.md").write_bytes(b"about it")
    assert texts(load_data(make_config(tmp_path, "set")).train) == EXPECTED[:1]
    assert texts(load_data(make_config(tmp_path, "set", split="dev")).train) == [("q", ["p"])]


def test_a_path_is_sought_under_the_root_first_then_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("root", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.jsonl").write_bytes(json_lines({"query": folder, "positive": "p"}))
    (tmp_path / "work" / "one.jsonl").write_bytes(json_lines({"query": "one", "positive": "p"}))
    monkeypatch.chdir(tmp_path / "work")
    root = tmp_path / "root"
    assert load_data(make_config(root, "both.jsonl")).train["query"] == ["root"]
    assert load_data(make_config(root, "one.jsonl")).train["query"] == ["one"]


def test_an_evaluation_file_is_evaluated_on_and_holds_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_bytes(b"query,positive,negative\nwhat swims,a fish,a dog\n")
    (tmp_path / "a.jsonl").write_bytes(json_lines(*EXAMPLES))
    config = make_config(tmp_path, "a.jsonl", evaluation_path="dev.csv", evaluation_fraction=0.9)
    data = load_data(config)
    assert texts(data.train) == EXPECTED
    assert data.evaluation is not None
    assert data.evaluation.queries == {"q0": "what swims"}
    assert data.evaluation.corpus == {"d0": "a fish", "d1": "a dog"}
    assert data.evaluation.judgements == {"q0": {"d0": 1}}


# Columns


def test_columns_have_the_names_that_the_config_gives(tmp_path: Path) -> None:
    content = json_lines({"question": "q", "answer": "p", "wrong": "n", "negative": "not asked for", "id": 7})
    changes = {"query_column": "question", "positive_column": "answer", "negative_columns": ["wrong"]}
    assert load(tmp_path, "a.jsonl", content, **changes) == [("q", ["p", "n"])]


def test_query_and_positive_may_change_places(tmp_path: Path) -> None:
    changes = {"query_column": "positive", "positive_column": "query"}
    assert load(tmp_path, "a.jsonl", json_lines({"query": "a", "positive": "b"}), **changes) == [("b", ["a"])]


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
    first = {"query": "q", "positive": "p"} | columns
    # A second example gives the columns of nulls and of empty lists a type.
    full = {name: ["x"] if isinstance(cell, list) else "x" for name, cell in columns.items()}
    content = json_lines(first, {"query": "r", "positive": "s"} | full)
    assert load(tmp_path, "a.jsonl", content)[0] == ("q", ["p", *negatives])


def test_a_negative_column_that_is_null_throughout_gives_none(tmp_path: Path) -> None:
    content = json_lines(*({**example, "negatives": None} for example in EXAMPLES))
    assert load(tmp_path, "a.jsonl", content) == EXPECTED


def test_texts_and_lists_may_mix_in_a_negative_column(tmp_path: Path) -> None:
    content = json_lines({**EXAMPLES[0], "negatives": ["n", "m"]}, {**EXAMPLES[1], "negatives": "o"})
    assert [documents[1:] for _, documents in load(tmp_path, "a.jsonl", content)] == [["n", "m"], ["o"]]


def test_an_empty_cell_of_a_csv_is_no_negative(tmp_path: Path) -> None:
    content = b"query,positive,negative_1,negative_2\nq,p,,n\nr,s,m,\n"
    assert [documents[1:] for _, documents in load(tmp_path, "a.csv", content)] == [["n"], ["m"]]


# Holding out


def hold_out(folder: Path, fraction: float) -> tuple[list[dict[str, Any]], Data]:
    """A few hundred examples whose queries and documents repeat, split by the hash of the query."""
    examples: list[dict[str, Any]] = [
        {"query": f"query {number % 150}", "positive": f"document {number % 170}"} for number in range(300)
    ]
    (folder / "a.jsonl").write_bytes(json_lines(*examples))
    return examples, load_data(make_config(folder, "a.jsonl", evaluation_fraction=fraction))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_queries_are_held_out_by_the_md5_of_their_text_with_all_their_documents(
    fraction: float, tmp_path: Path
) -> None:
    examples, data = hold_out(tmp_path, fraction)
    threshold = round(fraction * 10_000)
    queries = {row["query"] for row in examples if int(md5(row["query"].encode()).hexdigest(), 16) % 10_000 < threshold}
    assert data.evaluation is not None
    assert queries
    assert set(data.evaluation.queries.values()) == queries
    documents = {row["positive"] for row in examples if row["query"] in queries}
    assert set(data.evaluation.corpus.values()) == documents


def test_every_example_is_trained_on_or_held_out(tmp_path: Path) -> None:
    examples, data = hold_out(tmp_path, 0.2)
    assert data.evaluation is not None
    queries = set(data.evaluation.queries.values())
    rest = [row for row in examples if row["query"] not in queries]
    assert texts(data.train) == [(row["query"], [row["positive"]]) for row in rest]


def test_a_folder_to_evaluate_on_needs_a_split_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"^data\.evaluation_split=None: .* must hold one file None"):
        load_data(make_config(tmp_path, ".", evaluation_path="."))


def test_evaluation_has_a_split_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json_lines({"query": "q", "positive": "p"}))
    (tmp_path / "dev.jsonl").write_bytes(json_lines({"query": "r", "positive": "s"}))
    data = load_data(make_config(tmp_path, ".", evaluation_path=".", evaluation_split="dev"))
    assert data.train["query"] == ["q"]
    assert data.evaluation is not None
    assert list(data.evaluation.queries.values()) == ["r"]


def test_several_negative_columns_that_are_named_give_each_example_once(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "na": "n", "nb": ["m", "o"], "negative": "not asked for"})
    assert load(tmp_path, "a.jsonl", content, negative_columns=["na", "nb"]) == [("q", ["p", "n", "m", "o"])]


def test_quotes_are_letters_in_a_tsv(tmp_path: Path) -> None:
    content = b'query\tpositive\n"unbalanced\tp\nr\tends with a quote"\n'
    assert load(tmp_path, "a.tsv", content) == [
        ('"unbalanced', ["p"]),
        ("r", ['ends with a quote"']),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_the_mark_that_excel_puts_first_is_no_text(name: str, tmp_path: Path) -> None:
    content = b"query,positive\nq,p\n" if name == "a.csv" else GOOD
    assert load(tmp_path, name, b"\xef\xbb\xbf" + content) == [("q", ["p"])]


def test_a_text_may_be_longer_than_the_csv_module_allows_at_first(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", b"query,positive\nq," + b"p" * 200_000 + b"\n") == [("q", ["p" * 200_000])]


def test_a_share_of_zero_trains_on_all_and_evaluates_on_nothing(tmp_path: Path) -> None:
    examples, data = hold_out(tmp_path, 0.0)
    assert data.evaluation is None
    assert len(data.train) == len(examples)


def test_a_share_that_leaves_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p"})
    assert error_of(tmp_path, "a.jsonl", content, evaluation_fraction=0.9999) == (
        "data.path=a.jsonl: no example is left to train on: give more, or lower data.evaluation_fraction"
    )


# Errors in the config


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_missing_file_is_named_with_the_places_looked_at(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json_lines(*EXAMPLES))
    paths: dict[str, Any] = {"path": str(tmp_path / "a.jsonl"), key: "none.jsonl"}
    config = replace(make_config(tmp_path / "sets", ""), **paths)
    with pytest.raises(ConfigError) as caught:
        load_data(config)
    assert str(caught.value) == (
        f"data.{key}=none.jsonl: there is no {tmp_path}/sets/none.jsonl or none.jsonl: "
        "give an existing file, or set data.root"
    )


def test_another_ending_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "jsonl"):
        assert error_of(tmp_path, name, b"q\tp\n") == (
            f"data.path={name}: the ending must be one of .jsonl, .json, .csv, .tsv, .parquet; .gz may follow a text"
        )


@pytest.mark.parametrize(
    ("files", "found"),
    [([], "none"), (["dev.csv", "train.txt"], "none"), (["train.csv", "train.jsonl"], "train.csv, train.jsonl")],
)
def test_a_folder_must_hold_one_file_of_the_split(files: list[str], found: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in files:
        (tmp_path / "set" / name).write_text("query,positive\nq,p\n")
    assert error_of(tmp_path, "set") == (
        f"data.split=train: {tmp_path}/set must hold one file train.<jsonl, csv, tsv or parquet>; found {found}"
    )


@pytest.mark.parametrize("key", ["query_column", "positive_column"])
def test_a_missing_column_is_named_with_those_that_are_there(key: str, tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "id": "1"})
    assert error_of(tmp_path, "a.jsonl", content, **{key: "text"}) == (
        f"data.{key}=text: {tmp_path}/a.jsonl has the columns query, positive, id: "
        f"name the right one with data.{key}=..."
    )


def test_a_missing_negative_column_is_named(tmp_path: Path) -> None:
    content = json_lines({"query": "q", "positive": "p", "no": "n"})
    assert error_of(tmp_path, "a.jsonl", content, negative_columns=["no", "never", "nil"]) == (
        f"data.negative_columns=never: {tmp_path}/a.jsonl has the columns query, positive, no: "
        "name the right one with data.negative_columns=..."
    )


# Errors in the file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"query,positive\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_a_file_without_an_example_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    assert error_of(tmp_path, name, content).startswith(f"{tmp_path}/{name} holds no example: give a file")


def test_a_parquet_file_without_an_example_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"query": [], "positive": []}).to_parquet(str(tmp_path / "a.parquet"))
    assert error_of(tmp_path, "a.parquet").startswith(f"{tmp_path}/a.parquet holds no example: give a file")


@pytest.mark.parametrize("blank", ["", "  ", None], ids=["empty", "spaces", "null"])
@pytest.mark.parametrize("column", ["query", "positive"])
def test_a_blank_text_is_named_by_its_line(column: str, blank: str | None, tmp_path: Path) -> None:
    content = GOOD + b"\n\n" + json_lines({"query": "q", "positive": "p", column: blank})
    assert error_of(tmp_path, "a.jsonl", content) == (
        f"{tmp_path}/a.jsonl:4: {column} is empty: fill it or remove the example"
    )


def test_an_example_without_its_document_is_named_by_its_line(tmp_path: Path) -> None:
    assert error_of(tmp_path, "a.jsonl", GOOD + json_lines({"query": "q"})) == (
        f"{tmp_path}/a.jsonl:2: positive is empty: fill it or remove the example"
    )


@pytest.mark.parametrize("negatives", [["n", " "], ["n", None]])
def test_a_blank_negative_in_a_list_is_named_by_its_line(negatives: list[str | None], tmp_path: Path) -> None:
    content = GOOD + json_lines({"query": "q", "positive": "p", "negatives": negatives})
    assert error_of(tmp_path, "a.jsonl", content) == (
        f"{tmp_path}/a.jsonl:2: negatives is empty: fill it or remove the example"
    )


def test_a_blank_text_of_a_csv_is_named_by_its_line_after_blank_ones(tmp_path: Path) -> None:
    assert error_of(tmp_path, "a.csv", b"query,positive\n\nq,p\n\n\nr,\n") == (
        f"{tmp_path}/a.csv:6: positive is empty: fill it or remove the example"
    )


def test_a_blank_text_of_a_parquet_file_is_named_by_its_example(tmp_path: Path) -> None:
    Dataset.from_dict({"query": ["q", "r"], "positive": ["p", ""]}).to_parquet(str(tmp_path / "a.parquet"))
    assert error_of(tmp_path, "a.parquet") == (
        f"{tmp_path}/a.parquet example 2: positive is empty: fill it or remove the example"
    )


def test_an_example_of_an_array_is_never_named_by_a_wrong_line(tmp_path: Path) -> None:
    # As many lines as examples, yet the second example stands on the first line.
    content = b'[{"query": "q", "positive": "p"}, {"query": "", "positive": "p"},\n{"query": "r", "positive": "p"}\n]'
    assert error_of(tmp_path, "a.json", content) == (
        f"{tmp_path}/a.json example 2: query is empty: fill it or remove the example"
    )


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"query": 5}, "query=5"),
        ({"positive": 2.5}, "positive=2.5"),
        ({"query": True}, "query=True"),
        ({"negatives": ["n", 3]}, "negatives=3"),
        ({"negative": {"text": "n"}}, "negative={'text': 'n'}"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(cells: dict[str, Any], problem: str, tmp_path: Path) -> None:
    content = GOOD + b"\n" + json_lines({"query": "q", "positive": "p"} | cells)
    assert error_of(tmp_path, "a.jsonl", content) == f"{tmp_path}/a.jsonl:3: {problem} must be a text"


def test_what_is_no_text_far_into_a_large_file_is_named_by_its_line(tmp_path: Path) -> None:
    content = json_lines(LONG, LONG, EXAMPLES[0], {"query": 5, "positive": "p"})
    assert error_of(tmp_path, "a.jsonl", content) == f"{tmp_path}/a.jsonl:4: query=5 must be a text"


def test_a_column_of_numbers_is_named_by_its_first_line(tmp_path: Path) -> None:
    content = json_lines({"query": 4, "positive": "p"}, {"query": 5, "positive": "p"})
    assert error_of(tmp_path, "a.jsonl", content) == f"{tmp_path}/a.jsonl:1: query=4 must be a text"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_malformed_json_is_named_by_its_line(packed: bool, tmp_path: Path) -> None:
    content = GOOD + b"\n\n" + b'{"query": "q", "positive" "p"}\n' + GOOD
    name = "a.jsonl.gz" if packed else "a.jsonl"
    assert error_of(tmp_path, name, gzip.compress(content) if packed else content) == (
        f"{tmp_path}/{name}:4 is no JSON (Expecting ':' delimiter at column 27): mend or remove the line"
    )


def test_a_malformed_array_is_named_by_the_line_that_is_wrong(tmp_path: Path) -> None:
    content = b'[\n{"query": "q", "positive": "p"},\n{"query": "q", "positive" "p"}\n]\n'
    message = error_of(tmp_path, "a.json", content)
    assert message.startswith(f"{tmp_path}/a.json:3 is no JSON (Expecting ':' delimiter at column 27)")


def test_a_row_with_too_many_cells_is_named_by_its_line(tmp_path: Path) -> None:
    assert error_of(tmp_path, "a.csv", b"query,positive\nq,p\nr,s,t\n") == (
        f"{tmp_path}/a.csv:3: 3 cells under 2 columns: quote cells with commas"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"no Parquet"),
        ("a.csv", "query,positive\né,p\n".encode("latin-1")),
        ("a.jsonl", '{"query": "é", "positive": "p"}\n'.encode("latin-1")),
        ("a.csv.gz", b"no gzip"),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-12]),
    ],
    ids=["no Parquet", "CSV in Latin-1", "JSON in Latin-1", "CSV not gzipped", "JSON not gzipped", "cut gzip"],
)
def test_a_file_that_is_not_what_its_ending_says_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    assert error_of(tmp_path, name, content).startswith(f"{tmp_path}/{name} cannot be read: ")
