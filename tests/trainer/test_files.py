"""Files of rows and data sets of the Hub: what is read from each, where a path leads, and what keeps one from being
read, with its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from configs.schema import ConfigError
from tests.trainer.datafiles import error_of, json_lines, make_set_config, texts, train_set
from trainer.data.files import Source, checked_rows

EXAMPLES = [
    {"query": "what is a cat", "positive": "an animal that meows"},
    {"query": "what barks, and why", "positive": 'a "dog"'},
]
EXPECTED = [(example["query"], [example["positive"]]) for example in EXAMPLES]
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


def pairs(folder: Path, path: str, **changes: Any) -> list[tuple[str, list[str]]]:
    """The query and the documents of each example that a path under the folder gives."""
    return texts(train_set(make_set_config("pairs", root=str(folder), path=path, **changes)))


def load(folder: Path, name: str, content: bytes, **changes: Any) -> list[tuple[str, list[str]]]:
    """Write the file, and read it as the training set."""
    (folder / name).write_bytes(content)
    return pairs(folder, name, **changes)


def error(folder: Path, path: str, content: bytes | None = None, **changes: Any) -> str:
    """The message that reading the path ends in, once the file is written."""
    if content is not None:
        (folder / path).write_bytes(content)
    return error_of(make_set_config("pairs", root=str(folder), path=path, **changes))


def rows_of(path: Path, content: bytes | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Place, without the folder, and columns of each row."""
    if content is not None:
        path.write_bytes(content)
    return [(place.removeprefix(f"{path.parent}/"), row) for place, row in checked_rows(path)]


def row_error(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(checked_rows(path))
    return str(caught.value)


# Formats


@pytest.mark.parametrize("name", CONTENTS)
def test_every_text_format_gives_the_same_examples_plain_and_gzipped(name: str, tmp_path: Path) -> None:
    assert load(tmp_path, name, CONTENTS[name]) == EXPECTED
    assert load(tmp_path, f"{name}.gz", gzip.compress(CONTENTS[name])) == EXPECTED


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    Dataset.from_list(EXAMPLES).to_parquet(str(tmp_path / "a.parquet"))
    assert pairs(tmp_path, "a.parquet") == EXPECTED


def test_arrow_is_read_as_datasets_saves_it(tmp_path: Path) -> None:
    Dataset.from_list(EXAMPLES).save_to_disk(tmp_path / "saved")
    assert pairs(tmp_path, "saved/data-00000-of-00001.arrow") == EXPECTED


def test_an_arrow_file_gives_the_same_examples_as_a_stream(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(EXAMPLES)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    assert pairs(tmp_path, "a.arrow") == EXPECTED


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_text_is_not_read_gzipped(name: str, tmp_path: Path) -> None:
    assert error(tmp_path, f"{name}.gz", gzip.compress(b"whatever it holds")) == (
        f"data.path={name}.gz: the ending must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow; "
        ".gz may follow a text"
    )


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", b"\n" + json_lines(EXAMPLES[0]) + b"\n \n" + json_lines(EXAMPLES[1]), ["a.jsonl:2", "a.jsonl:5"]),
        ("a.csv", b"\nquery,positive\n\nq,p\nr,s\n", ["a.csv:4", "a.csv:5"]),
        ("a.csv", b'query,positive\n"q\nq",p\nr,s\n', ["a.csv:2", "a.csv:4"]),
        ("a.csv", b'query,positive\r\n"q\r\nq",p\r\nr,s\r\n', ["a.csv:2", "a.csv:4"]),
        ("a.tsv", b"query\tpositive\n\nq\tp\n", ["a.tsv:3"]),
        ("a.json", json.dumps(EXAMPLES).encode(), ["a.json example 1", "a.json example 2"]),
        ("a.jsonl.gz", gzip.compress(json_lines(*EXAMPLES), mtime=0), ["a.jsonl.gz:1", "a.jsonl.gz:2"]),
    ],
    ids=["JSON lines", "CSV", "CSV with a text over two lines", "CSV of Windows", "TSV", "JSON array", "gzipped"],
)
def test_the_place_is_the_line_where_rows_are_lines(
    name: str, content: bytes, places: list[str], tmp_path: Path
) -> None:
    assert [place for place, _ in rows_of(tmp_path / name, content)] == places


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_the_place_is_the_number_where_rows_are_no_lines(name: str, tmp_path: Path) -> None:
    many = Dataset.from_dict({"number": range(2500)})
    many.to_parquet(str(tmp_path / "a.parquet"))
    many.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "a.arrow")
    assert rows_of(tmp_path / name) == [(f"{name} example {number + 1}", {"number": number}) for number in range(2500)]


def test_a_csv_holds_texts_alone_whatever_they_mean_elsewhere(tmp_path: Path) -> None:
    content = b"query,positive\nNA,null\nnan,None\n1984,2020-01-01\n007,True\n"
    assert [tuple(row.values()) for _, row in rows_of(tmp_path / "a.csv", content)] == [
        ("NA", "null"),
        ("nan", "None"),
        ("1984", "2020-01-01"),
        ("007", "True"),
    ]


def test_an_empty_cell_of_a_csv_is_null(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", b'a,b,c\n,"",x\n') == [("a.csv:2", {"a": None, "b": None, "c": "x"})]


def test_json_keeps_its_types(tmp_path: Path) -> None:
    row = {"text": "2020-01-01", "number": 7, "float": 0.5, "null": None, "list": ["a", 1], "object": {"a": 1}}
    assert rows_of(tmp_path / "a.jsonl", json_lines(row)) == [("a.jsonl:1", row)]


def test_quotes_are_letters_in_a_tsv(tmp_path: Path) -> None:
    content = b'query\tpositive\n"unbalanced\tp\nr\tends with a quote"\n'
    assert [row for _, row in rows_of(tmp_path / "a.tsv", content)] == [
        {"query": '"unbalanced', "positive": "p"},
        {"query": "r", "positive": 'ends with a quote"'},
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_the_mark_that_excel_puts_first_is_no_text(name: str, tmp_path: Path) -> None:
    content = {"a.csv": b"query,positive\nq,p\n", "a.jsonl": GOOD, "a.json": b"[" + GOOD + b"]"}[name]
    [(_, row)] = rows_of(tmp_path / name, b"\xef\xbb\xbf" + content)
    assert row == {"query": "q", "positive": "p"}


def test_a_text_may_be_longer_than_the_csv_module_allows_at_first(tmp_path: Path) -> None:
    [(_, row)] = rows_of(tmp_path / "a.csv", b"query,positive\nq," + b"p" * 200_000 + b"\n")
    assert row["positive"] == "p" * 200_000


def test_line_ends_of_unicode_end_no_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0cfour"
    content = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" + json_lines({"text": "five"})
    assert rows_of(tmp_path / "a.jsonl", content) == [("a.jsonl:1", {"text": text}), ("a.jsonl:2", {"text": "five"})]


# Where the rows lie


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(json_lines(EXAMPLES[0])))
    (tmp_path / "set" / "dev.csv").write_bytes(b"query,positive\nq,p\n")
    (tmp_path / "set" / "train.md").write_bytes(b"about it")
    (tmp_path / "set" / "README.md").write_bytes(b"about it, too")
    assert pairs(tmp_path, "set") == EXPECTED[:1]
    assert pairs(tmp_path, "set", split="dev") == [("q", ["p"])]


def test_a_path_is_sought_under_the_root_first_then_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("root", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.jsonl").write_bytes(json_lines({"query": folder, "positive": "p"}))
    (tmp_path / "work" / "one.jsonl").write_bytes(json_lines({"query": "one", "positive": "p"}))
    monkeypatch.chdir(tmp_path / "work")
    root = tmp_path / "root"
    assert pairs(root, "both.jsonl") == [("root", ["p"])]
    assert pairs(root, "one.jsonl") == [("one", ["p"])]
    assert pairs(root, "both*.jsonl") == [("root", ["p"])]
    assert pairs(root, "on?.jsonl") == [("one", ["p"])]
    assert pairs(root, str(tmp_path / "work" / "both.jsonl")) == [("work", ["p"])]


def test_a_pattern_gives_all_files_that_match_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        (tmp_path / f"part-{name}.jsonl").write_bytes(json_lines({"query": name, "positive": "p"}))
    (tmp_path / "part-d.csv.gz").write_bytes(gzip.compress(b"query,positive\nd,p\n"))
    (tmp_path / "other.jsonl").write_bytes(GOOD)
    config = make_set_config("pairs", root=str(tmp_path), path="part-*")
    examples = train_set(config)
    assert texts(examples) == [(name, ["p"]) for name in "abcd"]
    places = ["part-a.jsonl:1", "part-b.jsonl:1", "part-c.jsonl:1", "part-d.csv.gz:2"]
    assert examples.examples["place"][:] == [f"{tmp_path}/{place}" for place in places]
    assert pairs(tmp_path, "part-[ac].jsonl") == [("a", ["p"]), ("c", ["p"])]


def test_a_source_says_where_it_lies() -> None:
    assert str(Source((Path("a.csv"),))) == "a.csv"
    assert str(Source((Path("a.csv"), Path("b.csv"), Path("c.csv")))) == "a.csv and 2 more"
    assert str(Source((), "owner/name", "triplet", "train")) == "owner/name triplet train"
    assert str(Source((), "owner/name", None, "train")) == "owner/name train"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder laid out as a data set of the Hub, with Parquet files under data and a card without a word on them."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Pairs\n")
    for number, example in enumerate(EXAMPLES):
        Dataset.from_list([example]).to_parquet(str(folder / "data" / f"train-{number:05}-of-00002.parquet"))
    Dataset.from_list([{"query": "q", "positive": "p"}]).to_parquet(str(folder / "data" / "dev-00000-of-00001.parquet"))
    return folder


def test_a_folder_laid_out_as_on_the_hub_gives_the_files_of_the_split(repository: Path) -> None:
    examples = train_set(make_set_config("pairs", root=str(repository.parent), path=repository.name))
    assert texts(examples) == EXPECTED
    assert examples.examples["place"][:] == [f"{repository} train row 1", f"{repository} train row 2"]
    assert pairs(repository.parent, repository.name, split="dev") == [("q", ["p"])]
    assert pairs(repository.parent, repository.name, split="train[1:]") == EXPECTED[1:]


def test_a_subset_is_one_that_the_card_names(repository: Path) -> None:
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: held\n  data_files: [{split: train, path: data/dev-*}]\n"
        "- config_name: all\n  data_files: [{split: train, path: data/*}]\n---\n"
    )
    assert pairs(repository.parent, repository.name, subset="held") == [("q", ["p"])]
    assert len(pairs(repository.parent, repository.name, subset="all")) == 3
    message = error(repository.parent, repository.name, subset="none")
    assert message == (
        f"{repository} none train cannot be loaded: BuilderConfig 'none' not found. Available: ['held', 'all']; "
        "check data.path, data.subset, data.split and data.revision"
    )


def test_a_file_of_such_a_folder_that_changes_is_read_anew(repository: Path) -> None:
    assert pairs(repository.parent, repository.name, split="dev") == [("q", ["p"])]
    Dataset.from_list([{"query": "r", "positive": "s"}]).to_parquet(
        str(repository / "data" / "dev-00000-of-00001.parquet")
    )
    assert pairs(repository.parent, repository.name, split="dev") == [("r", ["s"])]


def test_a_split_that_is_not_there_is_named_with_those_that_are(repository: Path) -> None:
    message = (
        f"{repository} none cannot be loaded: Unknown split \"none\". Should be one of ['train', 'dev'].; "
        "check data.path, data.subset, data.split and data.revision"
    )
    assert error(repository.parent, repository.name, split="none") == message
    assert error(repository.parent, repository.name, evaluation_split="none") == message


@pytest.mark.parametrize("changes", [{"split": None}, {"evaluation_path": "repository"}], ids=["train", "evaluation"])
def test_of_a_data_set_with_splits_one_must_be_named(changes: dict[str, Any], repository: Path) -> None:
    key = "data.split" if "split" in changes else "data.evaluation_split"
    assert error(repository.parent, repository.name, **changes).startswith(f"{key}=null: {repository}")


def test_a_data_set_that_the_hub_does_not_give_is_named(tmp_path: Path, unreachable_hub: None) -> None:
    assert error(tmp_path, "nobody/nothing") == (
        "nobody/nothing train cannot be loaded: Couldn't reach 'nobody/nothing' on the Hub (LocalEntryNotFoundError); "
        "check data.path, data.subset, data.split and data.revision"
    )


# Errors in the config


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
@pytest.mark.parametrize("name", ["none.jsonl", "none", "/nowhere/none", "sets/none.jsonl", "sets/none.csv.gz"])
def test_a_missing_file_is_named_with_the_places_looked_at(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreachable_hub: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    paths = {"path": str(tmp_path / "a.jsonl"), key: name}
    looked = name if name.startswith("/") else f"{tmp_path}/folder/{name} or {name}"
    assert error_of(make_set_config("pairs", root=str(tmp_path / "folder"), **paths)) == (
        f"data.{key}={name}: there is no {looked}: give an existing file, or set data.root"
    )


def test_another_ending_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "jsonl", "a.jsonl.zst"):
        assert error(tmp_path, name, b"q\tp\n") == (
            f"data.path={name}: the ending must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow; "
            ".gz may follow a text"
        )


def test_every_file_of_a_pattern_needs_an_ending_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_bytes(GOOD)
    (tmp_path / "part-2.txt").write_bytes(GOOD)
    assert error(tmp_path, "part-*") == (
        "data.path=part-*: the ending must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow; .gz may follow a text"
    )


@pytest.mark.parametrize("key", ["path", "evaluation_path"])
def test_a_pattern_that_no_file_matches_is_named(key: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    paths = {"path": "a.jsonl", key: "part-*.jsonl"}
    assert error_of(make_set_config("pairs", root=str(tmp_path), **paths)) == (
        f"data.{key}=part-*.jsonl: no file matches, in {tmp_path} or the working folder"
    )


def test_signs_of_a_pattern_in_a_name_that_exists_are_letters(tmp_path: Path) -> None:
    folder = tmp_path / "sets [old]"
    folder.mkdir()
    assert load(folder, "a[1].jsonl", GOOD) == [("q", ["p"])]
    assert load(folder, "b.jsonl", GOOD) == [("q", ["p"])]
    assert pairs(folder, "b*.jsonl") == [("q", ["p"])]


@pytest.mark.parametrize(
    ("files", "found"),
    [([], "none"), (["dev.csv", "train.txt"], "none"), (["train.csv", "train.jsonl"], "train.csv, train.jsonl")],
)
def test_a_folder_must_hold_one_file_of_the_split(files: list[str], found: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in files:
        (tmp_path / "set" / name).write_text("query,positive\nq,p\n")
    assert error(tmp_path, "set") == (
        f"data.split=train: {tmp_path}/set must hold one file train.<jsonl, csv, tsv or parquet>; found {found}"
    )


def test_a_split_to_evaluate_on_that_a_folder_does_not_hold_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(GOOD)
    assert error(tmp_path, "set", evaluation_split="dev") == (
        f"data.evaluation_split=dev: {tmp_path}/set must hold one file dev.<jsonl, csv, tsv or parquet>; found none"
    )


@pytest.mark.parametrize("path", ["a.jsonl", "a*.jsonl"])
def test_a_file_has_no_other_split_to_evaluate_on(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert error(tmp_path, path, evaluation_split="dev").startswith("data.evaluation_split=dev")


# Errors in the files


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "q", "positive" "p"}', "Expecting ':' delimiter at column 27"),
        (b'{"query": "q"', "Expecting ',' delimiter at column 14"),
        (b"{'query': 'q'}", "Expecting property name enclosed in double quotes at column 2"),
        (b'{"query": "q"} {}', "Extra data at column 16"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=["colon", "cut", "quotes", "two on a line", "deep"],
)  # fmt: skip
def test_malformed_json_is_named_by_its_line_and_column(line: bytes, reason: str, packed: bool, tmp_path: Path) -> None:
    content = GOOD + b"\n\n" + line + b"\n" + GOOD
    name = "a.jsonl.gz" if packed else "a.jsonl"
    assert error(tmp_path, name, gzip.compress(content) if packed else content) == (
        f"{tmp_path}/{name}:4 is no JSON ({reason}): mend or remove the line"
    )


def test_a_malformed_array_is_named_by_the_line_that_is_wrong(tmp_path: Path) -> None:
    content = b'[\n{"query": "q", "positive": "p"},\n{"query": "q", "positive" "p"}\n]\n'
    assert row_error(tmp_path / "a.json", content) == (
        f"{tmp_path}/a.json:3 is no JSON (Expecting ':' delimiter at column 27): mend or remove the line"
    )


@pytest.mark.parametrize(
    ("line", "found"), [(b"[1, 2]", "[1, 2]"), (b'"text"', "'text'"), (b"7", "7"), (b"null", "None")]
)
def test_a_line_that_is_no_object_is_named(line: bytes, found: str, tmp_path: Path) -> None:
    rule = f"an example must be a JSON object with a text by column, not {found}"
    assert row_error(tmp_path / "a.jsonl", GOOD + line) == f"{tmp_path}/a.jsonl:2: {rule}"
    assert row_error(tmp_path / "a.json", b"[{},\n" + line + b"]") == f"{tmp_path}/a.json example 2: {rule}"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("a.csv", b"r,s,t", "3 cells under 2 columns: quote cells with commas"),
        ("a.csv", b"r", "1 cells under 2 columns: fill the row, if with empty cells"),
        ("a.tsv", b"r\ts\tt", "3 cells under 2 columns: quote cells with commas"),
        ("a.tsv", b"r, s", "1 cells under 2 columns: fill the row, if with empty cells"),
    ],
)
def test_a_row_with_too_many_or_too_few_cells_is_named_by_its_line(
    name: str, row: bytes, problem: str, packed: bool, tmp_path: Path
) -> None:
    separator = b"\t" if name == "a.tsv" else b","
    content = separator.join([b"query", b"positive"]) + b"\n\n" + separator.join([b"q", b"p"]) + b"\n" + row + b"\n"
    name = f"{name}.gz" if packed else name
    assert (
        row_error(tmp_path / name, gzip.compress(content) if packed else content) == f"{tmp_path}/{name}:4: {problem}"
    )


def test_a_quote_that_is_not_closed_is_an_error(tmp_path: Path) -> None:
    assert row_error(tmp_path / "a.csv", b'query,positive\nq,"p\nr,s\n') == (
        f"{tmp_path}/a.csv cannot be read: unexpected end of data"
    )


@pytest.mark.parametrize(
    ("name", "content", "line", "byte", "offset"),
    [
        ("a.csv", "query,positive\nq,p\nwhy é,p\n".encode("latin-1"), 3, "e9", 4),
        ("a.jsonl", b'{"query": "\xff", "positive": "p"}\n', 1, "ff", 11),
        ("a.json", b'[\n{"query": "\xff", "positive": "p"}]\n', 2, "ff", 11),
        ("a.tsv", b"query\tpositive\nq\t\xc3\n", 2, "c3", 2),
        ("a.jsonl", GOOD.decode().encode("utf-16"), 1, "ff", 0),
    ],
    ids=["CSV in Latin-1", "JSON lines", "JSON", "cut letter", "UTF-16"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_a_byte_that_is_not_utf_8_is_named_by_its_line_and_offset(
    name: str, content: bytes, line: int, byte: str, offset: int, packed: bool, tmp_path: Path
) -> None:
    name = f"{name}.gz" if packed else name
    assert row_error(tmp_path / name, gzip.compress(content) if packed else content) == (
        f"{tmp_path}/{name}:{line}: byte 0x{byte} at offset {offset} of the line is not UTF-8: save the file as UTF-8"
    )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_gzip_that_is_cut_or_damaged_or_none_is_named(name: str, tmp_path: Path) -> None:
    content = b"query,positive\n" + b"q,p\n" * 99 if name == "a.csv.gz" else GOOD * 100
    packed = gzip.compress(content, mtime=0)
    behind = f"{tmp_path}/{name}: the gzip is cut or damaged behind line"
    # The eight bytes at the end, of checksum and length, stand behind all lines.
    assert row_error(tmp_path / name, packed[:-8]) == (
        f"{behind} 100 (Compressed file ended before the end-of-stream marker was reached): fetch the file again"
    )
    assert row_error(tmp_path / name, packed[:10]) == (
        f"{behind} 0 (Compressed file ended before the end-of-stream marker was reached): fetch the file again"
    )
    changed = packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]
    assert row_error(tmp_path / name, changed).startswith(f"{behind} 100 (CRC check failed 0x")
    assert row_error(tmp_path / name, b"no gzip") == (f"{behind} 0 (Not a gzipped file (b'no')): fetch the file again")


def test_a_parquet_or_arrow_file_that_is_cut_is_named(tmp_path: Path) -> None:
    Dataset.from_list(EXAMPLES).to_parquet(str(tmp_path / "whole.parquet"))
    content = (tmp_path / "whole.parquet").read_bytes()
    assert row_error(tmp_path / "a.parquet", content[:-30]) == (
        f"{tmp_path}/a.parquet cannot be read: Parquet magic bytes not found in footer. Either the file is corrupted "
        "or this is not a parquet file."
    )
    assert row_error(tmp_path / "a.parquet", b"") == (
        f"{tmp_path}/a.parquet cannot be read: Parquet file size is 0 bytes"
    )
    Dataset.from_list(EXAMPLES * 1000).save_to_disk(tmp_path / "saved")
    content = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    message = row_error(tmp_path / "a.arrow", content[: len(content) // 2])
    assert message.startswith(f"{tmp_path}/a.arrow cannot be read: ")
    assert "\n" not in message
    assert row_error(tmp_path / "a.arrow", b"none") == f"{tmp_path}/a.arrow cannot be read: File is too small: 4"


def test_half_a_letter_of_utf_16_in_json_is_named_by_its_line(tmp_path: Path) -> None:
    content = GOOD + b'{"query": "q", "positive": "cut off: \\ud83d"}\n'
    assert error(tmp_path, "a.jsonl", content).startswith(f"{tmp_path}/a.jsonl:2")


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
    ids=["empty", "blank lines", "empty array", "empty CSV", "header alone", "empty gzip"],
)
def test_a_file_without_an_example_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    assert error(tmp_path, name, content) == (
        f"{tmp_path}/{name} holds no example: give a file with a query and a positive in each row"
    )


def test_a_split_without_an_example_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"query": [], "positive": []}).to_parquet(str(tmp_path / "a.parquet"))
    assert error(tmp_path, "a.parquet") == (
        f"{tmp_path}/a.parquet holds no example: give a file with a query and a positive in each row"
    )
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "a.parquet").rename(tmp_path / "hub" / "train-00000-of-00001.parquet")
    assert error(tmp_path, "hub") == (
        f'{tmp_path}/hub train cannot be loaded: Instruction "train" corresponds to no data!; '
        "check data.path, data.subset, data.split and data.revision"
    )
