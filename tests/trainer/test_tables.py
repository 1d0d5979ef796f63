"""Tables of a set: what stands in them, what follows from them, and how long they are kept."""

import errno
import os
import pickle
import random
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from configs.schema import ConfigError
from tests.conftest import ENVIRONMENT
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
from trainer.data import files, tables
from trainer.data.files import Source
from trainer.data.tables import EXAMPLES, TEXTS, Index, TrainingSet, identifier, identity, kept_table, text_row

# Identities


def test_an_identity_is_the_first_63_bits_of_the_md5_and_never_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("a cat") == int(md5(b"a cat").hexdigest()[:16], 16) // 2
    assert identity("é") == int(md5("é".encode()).hexdigest()[:16], 16) // 2
    monkeypatch.setattr(tables, "md5", lambda *_, **__: SimpleNamespace(digest=lambda: bytes(16)))
    assert identity("a cat") == 1


@pytest.mark.parametrize(
    ("value", "expected"), [(7, "7"), ("7", "7"), ("07", "07"), (-1, "-1"), (10**30, "1" + "0" * 30)]
)
def test_an_id_is_a_whole_number_or_a_text(value: Any, expected: str) -> None:
    assert identifier("a.jsonl:1", "query_id", value) == expected


@pytest.mark.parametrize("value", [None, "", " \t", 1.0, True, ["a"], {"a": 1}])
def test_what_is_no_id_is_named(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        identifier("a.jsonl:1", "query_id", value)
    assert str(caught.value) == (f"a.jsonl:1: query_id={value!r} must be a whole number, or a text that is not empty")


# Sets of random tables


def random_set(seed: int) -> TrainingSet:
    """Queries and documents of which some have one text, and examples with one to four positives."""
    draw = random.Random(seed)
    queries, documents = ([text_row("", f"{row}", f"{name}{draw.randrange(12)}") for row in range(20)] for name in "qd")
    examples = []
    for row in range(50):
        named = draw.sample(range(20), draw.randrange(1, 9))
        examples.append(
            {
                "query": draw.randrange(20),
                "documents": named,
                "positives": draw.randrange(1, min(5, len(named) + 1)),
                "scores": [draw.random() for _ in named],
                "place": f"made:{row}",
            }
        )
    return TrainingSet(
        "made",
        make_set_config("pairs"),
        Dataset.from_list(queries, features=TEXTS),
        Dataset.from_list(documents, features=TEXTS),
        Dataset.from_list(examples, features=EXAMPLES),
    )


def pairs_of(examples: TrainingSet) -> list[list[int]]:
    return [list(pair) for pair in zip(*(array.tolist() for array in examples.known_positives()), strict=True)]


def known_by_loop(examples: TrainingSet) -> list[list[int]]:
    pairs = set()
    for example in every_example(examples):
        for document in example["document_identities"][: example["positives"]]:
            pairs.add((example["query_identity"], document))
    return [list(pair) for pair in sorted(pairs)]


@pytest.mark.parametrize("seed", range(8))
def test_known_positives_are_those_of_a_double_loop(seed: int) -> None:
    examples = random_set(seed)
    assert pairs_of(examples) == known_by_loop(examples)
    assert {array.dtype for array in examples.known_positives()} == {np.dtype(np.int64)}
    some = random.Random(seed).sample(range(50), 11)
    assert pairs_of(examples.select(some)) == known_by_loop(examples.select(some))


def test_known_positives_of_rows_that_bring_their_texts_meet_across_rows(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": ["p", "o"], "negatives": ["n", "m"]},
        {"query": "r", "positive": "n", "negatives": ["p"]},
        {"query": "q", "positive": "m", "negatives": ["o"]},
        {"query": "q", "positive": "p"},
    ]
    write(tmp_path, a=rows)
    examples = train_set(make_set_config("pairs", root=str(tmp_path), path="a.jsonl"))
    assert pairs_of(examples) == sorted(
        [identity(query), identity(document)] for query, document in ("qp", "qo", "qm", "rn")
    )
    assert pairs_of(examples.select([1])) == [[identity("r"), identity("n")]]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_documents_is_what_a_loop_finds_of_any_selection(seed: int) -> None:
    whole = random_set(seed)
    for rows in (range(50), [7, 3, 3, 49, 0], np.array([12, 30, 31])):
        chosen = whole.select(rows)
        own = [whole.examples[int(row)] for row in rows]
        assert len(chosen) == len(own)
        assert chosen.document_counts.tolist() == [len(example["documents"]) for example in own]
        assert chosen.first_documents().tolist() == [example["documents"][0] for example in own]
        named = sorted({document for example in own for document in example["documents"]})
        assert chosen.named_documents().tolist() == named


def test_an_example_of_a_selection_is_the_one_of_its_row() -> None:
    whole = random_set(0)
    rows = [41, 7, 7, 0]
    chosen = whole.select(rows).select([3, 0, 1])
    for place, row in enumerate([0, 41, 7]):
        stated, query = whole.examples[row], whole.queries[whole.examples[row]["query"]]
        documents = [whole.documents[document] for document in stated["documents"]]
        assert chosen.example(place) == {
            "query": query["text"],
            "query_identity": identity(query["text"]),
            "documents": [document["text"] for document in documents],
            "document_identities": [identity(document["text"]) for document in documents],
            "positives": stated["positives"],
            "scores": stated["scores"],
            "place": f"made:{row}",
        }


def test_a_set_has_a_teacher_where_every_example_has_scores() -> None:
    whole = random_set(0)
    assert whole.has_teacher
    rows = [*whole.examples.select(range(3))]
    mixed = replace(whole, examples=Dataset.from_list([*rows[:2], {**rows[2], "scores": []}], features=EXAMPLES))
    assert not mixed.has_teacher
    assert mixed.select([1, 0]).has_teacher
    assert not whole.select([]).has_teacher


def test_an_index_gives_the_row_of_each_id(tmp_path: Path) -> None:
    keys = [f"{number * 7919 % 1000}" for number in range(1000)]
    rows = [text_row(f"a:{row}", key, "" if row == 5 else f"text {key}") for row, key in enumerate(keys)]
    index = Index(Dataset.from_list(rows, features=TEXTS), Source((tmp_path / "a.jsonl",)), "query_id")
    assert [index.get(key) for key in keys] == list(range(1000))
    assert [index.get(key) for key in ("1000", "", "-1", "00")] == [None] * 4
    assert [row for row in range(1000) if index.is_empty(row)] == [5]


@pytest.mark.parametrize("name", ["queries", "documents"])
def test_a_file_without_a_text_is_named(name: str, tmp_path: Path) -> None:
    write_ids(tmp_path)
    write(tmp_path / "set", **{name: []})
    assert error_of(make_set_config("distillation_ids", root=str(tmp_path), path="set")) == (
        f"{tmp_path}/set/{name}.jsonl holds no row: give one with texts"
    )


# What is kept


def load(folder: Path, **changes: Any) -> list[tuple[str, list[str]]]:
    return texts(train_set(make_set_config("pairs", root=str(folder), path="a.jsonl", **changes)))


ONE = json_lines({"query": "q", "positive": "p"})
OTHER = json_lines({"query": "r", "positive": "s"})


def by_ids(folder: Path) -> list[tuple[str, list[str], list[float]]]:
    return with_scores(train_set(make_set_config("distillation_ids", root=str(folder), path="set")))


def test_a_table_is_not_read_again_where_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(ONE)
    write_ids(tmp_path)
    first = by_ids(tmp_path)
    assert load(tmp_path) == [("q", ["p"])]
    monkeypatch.setattr(files, "checked_rows", lambda path: pytest.fail(f"{path} is read again"))
    assert load(tmp_path) == [("q", ["p"])]
    assert by_ids(tmp_path) == first


def write_ids(folder: Path) -> None:
    write(
        folder / "set",
        train=[{"query_id": 1, "document_ids": [1, 2], "scores": [1, 2]}],
        queries=[{"query_id": 1, "text": "q"}],
        documents=[{"document_id": 1, "text": "a"}, {"document_id": 2, "text": "b"}],
    )


def test_a_file_with_other_content_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ONE)
    assert load(tmp_path) == [("q", ["p"])]
    path.write_bytes(ONE + OTHER)
    assert load(tmp_path) == [("q", ["p"]), ("r", ["s"])]
    # As large as before, a second later.
    path.write_bytes(OTHER + ONE)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    assert load(tmp_path) == [("r", ["s"]), ("q", ["p"])]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("queries", [{"query_id": 1, "text": "another"}], [("another", ["b", "a"], [2.0, 1.0])]),
        ("documents", [{"document_id": 2, "text": "b"}, {"document_id": 1, "text": "another"}],
         [("q", ["b", "another"], [2.0, 1.0])]),
        ("train", [{"query_id": 1, "document_ids": [1, 2], "scores": [20, 1]}], [("q", ["a", "b"], [20.0, 1.0])]),
    ],
)  # fmt: skip
def test_each_of_several_files_is_read_anew_where_it_changes(
    name: str, rows: list[dict[str, Any]], expected: Any, tmp_path: Path
) -> None:
    write_ids(tmp_path)
    assert by_ids(tmp_path) == [("q", ["b", "a"], [2.0, 1.0])]
    write(tmp_path / "set", **{name: rows})
    assert by_ids(tmp_path) == expected


def test_a_file_that_joins_a_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_bytes(ONE)
    config = make_set_config("pairs", root=str(tmp_path), path="part-*")
    assert texts(train_set(config)) == [("q", ["p"])]
    (tmp_path / "part-2.jsonl").write_bytes(OTHER)
    assert texts(train_set(config)) == [("q", ["p"]), ("r", ["s"])]


def test_one_file_has_a_table_for_each_way_to_read_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"query": "q", "positive": "p", "negative": "n"}))
    assert load(tmp_path) == [("q", ["p", "n"])]
    assert load(tmp_path, negative_columns=[]) == [("q", ["p"])]
    assert load(tmp_path, positive_column="negative", negative_columns=[]) == [("q", ["n"])]


def test_a_file_that_could_not_be_read_is_read_anew_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ONE + b"{}}\n")
    config = make_set_config("pairs", root=str(tmp_path), path="a.jsonl")
    message = f"{path}:2 is no JSON (Extra data at column 3): mend or remove the line"
    assert [error_of(config), error_of(config)] == [message, message]
    path.write_bytes(ONE + OTHER)
    assert texts(train_set(config)) == [("q", ["p"]), ("r", ["s"])]


def disk_is_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("method", ["write", "write_table", "finalize"])
def test_a_disk_that_is_full_is_named_and_the_next_load_works(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(ONE * 3)

    config = make_set_config("pairs", root=str(tmp_path), path="a.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(ArrowWriter, method, disk_is_full)
        assert error_of(config) == (f"{tmp_path}/a.jsonl cannot be kept as a table: [Errno 28] No space left on device")
    assert texts(train_set(config)) == [("q", ["p"])] * 3


@pytest.mark.parametrize("member", ["pairs", "python_functions"])
def test_a_cache_that_cannot_be_written_is_named(member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(ONE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a.jsonl" / "cache")
    changes = {"path": "a.jsonl"} if member == "pairs" else {}
    message = error_of(make_set_config(member, root=str(tmp_path), **changes))
    assert "cannot be kept as a table: [Errno 20] Not a directory: " in message


def test_a_disk_that_is_full_is_named_where_there_is_no_file_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"stdlib": str(tmp_path)})
    monkeypatch.setattr(ArrowWriter, "finalize", disk_is_full)
    message = error_of(make_set_config("python_functions"))
    assert message.endswith(" cannot be kept as a table: [Errno 28] No space left on device")


def counted_rows(source: Source, calls: str) -> Any:
    with Path(calls).open("a") as file:
        file.write("read\n")
    yield from (text_row(place, row["query"], row["positive"]) for place, row in source.rows())


def test_a_table_is_written_once_for_what_asks_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ONE)
    calls = tmp_path / "calls"
    for _ in range(3):
        table = kept_table(counted_rows, [Source((tmp_path / "a.jsonl",))], [str(calls)], features=TEXTS)
        assert table[:] == {
            "text": ["p"],
            "identity": [identity("p")],
            "id": ["q"],
            "place": [f"{tmp_path}/a.jsonl:1"],
        }
    assert calls.read_text() == "read\n"


PROGRAM = """
import pickle, sys, time
from pathlib import Path
from trainer.data import load_data
folder, name = Path(sys.argv[1]), sys.argv[2]
config = pickle.loads((folder / "config").read_bytes())
(folder / f"{name}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
[examples] = load_data(config).sets
for row in range(len(examples)):
    example = examples.example(row)
    print(example["query"], *example["documents"], *example["scores"])
"""


def test_processes_that_load_a_new_file_at_once_all_get_it_whole(tmp_path: Path) -> None:
    count = 1000
    write(
        tmp_path / "set",
        train=[{"query_id": row, "document_ids": [row, row + 1], "scores": [1, 2]} for row in range(count)],
        queries=[{"query_id": row, "text": f"q{row}"} for row in range(count)],
        documents=[{"document_id": row, "text": f"d{row}"} for row in range(count + 1)],
    )
    config = make_set_config("distillation_ids", root=str(tmp_path), path="set")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    environment = os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.ready"))) < 2 and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)
    (tmp_path / "go").touch()
    expected = "".join(f"q{row} d{row + 1} d{row} 2.0 1.0\n" for row in range(count))
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, expected), errors
