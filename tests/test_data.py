"""Each format of data as a user types it: three steps of a run, and what `mode=check` says of it."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import lines_of, tiny_overrides, type_here

pytestmark = pytest.mark.usefixtures("own_caches")

NOUNS = ("cat", "dog", "fish")
VERBS = ("barks", "meows", "swims")
QUERIES = [f"what is the {noun} that {verb}" for noun in NOUNS for verb in VERBS]
DOCUMENTS = [f"the {noun} is an animal that {verb}" for noun in NOUNS for verb in VERBS]


def write_lines(path: Path, rows: list[Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def write_tsv(path: Path, rows: list[list[Any]]) -> None:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def pairs(folder: Path) -> list[str]:
    positives = [[text, f"{text} a"] for text in DOCUMENTS]
    table: dict[str, list[Any]] = {"query": QUERIES, "positive": positives, "negative": DOCUMENTS[::-1]}
    for name, rows in (("part-1", slice(0, 5)), ("part-2", slice(5, 9))):
        pq.write_table(pa.table({column: values[rows] for column, values in table.items()}), folder / f"{name}.parquet")
    return ["data=pairs", f'data.path="{folder}/part-*.parquet"', "data.documents_per_query=2"]


def scored(folder: Path) -> list[str]:
    scores = random.Random(1)
    rows = [
        {"query": query, "documents": DOCUMENTS[row:] + DOCUMENTS[:row], "scores": [scores.random() for _ in DOCUMENTS]}
        for row, query in enumerate(QUERIES)
    ]
    write_lines(folder / "scored.jsonl", rows)
    more = ["data.documents_per_query=4", "data.draw=stratified", "loss=distillation_contrastive"]
    return ["data=scored", f"data.path={folder}/scored.jsonl", *more]


def beir(folder: Path) -> list[str]:
    write_lines(folder / "queries.jsonl.gz", [{"_id": f"q{row}", "text": text} for row, text in enumerate(QUERIES)])
    corpus = [{"_id": f"d{row}", "title": "a", "text": text} for row, text in enumerate(DOCUMENTS)]
    write_lines(folder / "corpus.jsonl.gz", corpus)
    (folder / "qrels").mkdir()
    header = ["query-id", "corpus-id", "score"]
    judged = [[f"q{row}", f"d{row}", 2] for row in range(6)] + [[f"q{row}", f"d{row + 1}", 0] for row in range(6)]
    write_tsv(folder / "qrels" / "train.tsv", [header, *judged])
    write_tsv(folder / "qrels" / "test.tsv", [header, *([f"q{row}", f"d{row}", 1] for row in range(6, 9))])
    return ["data=beir", f"data.path={folder}", "data.evaluation_split=test", "data.negatives=judged"]


def distillation_ids(folder: Path) -> list[str]:
    write_lines(folder / "queries.jsonl", [{"query_id": row, "text": text} for row, text in enumerate(QUERIES)])
    write_lines(folder / "documents.jsonl", [{"document_id": row, "text": text} for row, text in enumerate(DOCUMENTS)])
    rows = [
        {"query_id": row, "document_ids": [row, (row + 1) % 9, (row + 2) % 9], "scores": "[3.0, 2.5, 1]"}
        for row in range(9)
    ]
    write_lines(folder / "train.jsonl", rows)
    return ["data=distillation_ids", f"data.path={folder}", "loss=distillation", "data.evaluation_fraction=0.3"]


def stanford(folder: Path) -> list[str]:
    write_tsv(folder / "queries.tsv", [[row, text] for row, text in enumerate(QUERIES)])
    write_tsv(folder / "collection.tsv", [[row, text, "a"] for row, text in enumerate(DOCUMENTS)])
    write_lines(folder / "triples.jsonl", [[row, row, (row + 4) % 9] for row in range(9)])
    paths = {"path": "triples.jsonl", "queries_path": "queries.tsv", "documents_path": "collection.tsv"}
    return ["data=stanford", *(f"data.{key}={folder}/{name}" for key, name in paths.items())]


def python_functions(folder: Path) -> list[str]:
    return ["data=python_functions", "data.evaluation_fraction=0.01"]


FORMATS = (pairs, scored, beir, distillation_ids, stanford, python_functions)


@pytest.mark.parametrize("write", FORMATS)
def test_each_format_trains_three_steps(write: Callable[[Path], list[str]], tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    run = [*tiny_overrides(tiny_bert, tmp_path), *write(tmp_path / "set"), "trainer.steps=3", "trainer.batch_size=4"]
    done = type_here(*run)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    # What was drawn and tokenised once is read again, by a run of the same config: the same losses.
    again = type_here(f"rerun={tmp_path}/run", f"output_dir={tmp_path}/again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    repeated = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] for line in repeated if "train/loss" in line] == losses


def test_a_mix_trains_and_logs_each_set(tiny_bert: Path, tmp_path: Path) -> None:
    for name, texts in (("first", DOCUMENTS), ("second", [f"{text} a" for text in DOCUMENTS])):
        (tmp_path / name).mkdir()
        rows = [{"query": query, "positive": text} for query, text in zip(QUERIES, texts, strict=True)]
        write_lines(tmp_path / name / "train.jsonl", rows)
    run = [
        *tiny_overrides(tiny_bert, tmp_path),
        "data.mix={medquad: 2, squad_sentences: 1}",
        f"data.root={tmp_path}",
        "data.sets.medquad.path=first",
        "data.sets.squad_sentences.path=second",
        "data.sets.squad_sentences.document_length=5",
        "data.mix_batches=all_sets",
        *("trainer.steps=3", "trainer.batch_size=9"),
    ]
    done = type_here(*run)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    for line in steps:
        names = ("medquad", "squad_sentences")
        weighted = sum(line[f"train/{name}/loss"] * line[f"train/{name}/queries"] for name in names)
        assert weighted / 9 == pytest.approx(line["train/loss"])
    assert sum(line["train/medquad/queries"] for line in steps[:2]) == pytest.approx(12, abs=2)


@pytest.mark.parametrize("write", FORMATS)
def test_check_says_what_the_data_is(write: Callable[[Path], list[str]], tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    run = [*tiny_overrides(tiny_bert, tmp_path), *write(tmp_path / "set"), "trainer.steps=3", "trainer.batch_size=4"]
    done = type_here(*run, "mode=check")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run").exists()
    lines = lines_of(done)
    assert lines[-1].endswith("ready to train")
    names = ("examples", "documents", "query tokens", "document tokens", "evaluation", "steps", "tokens", "time")
    assert [name for name in names if not any(line.startswith(name) for line in lines)] == []


def test_check_counts_what_is_suspicious(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"query": query, "positive": text} for query, text in zip(QUERIES, DOCUMENTS, strict=True)]
    path = tmp_path / "train.jsonl"
    write_lines(path, [*rows, rows[0], {"query": " ", "positive": "a"}])
    write_lines(tmp_path / "dev.jsonl", [{"query": QUERIES[0].upper(), "positive": "a dog"}])
    paths = [f"data.path={path}", f"data.evaluation_path={tmp_path}/dev.jsonl"]
    run = [*tiny_overrides(tiny_bert, tmp_path), "data=pairs", *paths, "trainer.steps=3", "trainer.batch_size=4"]
    done = type_here(*run, "mode=check", "data.max_empty=0.1", "backbone.document_length=6")
    assert done.returncode == 0, done.stderr
    assert [line for line in lines_of(done) if "warning" in line] == [
        f"warning: 1 of 11 examples of {path} have an empty text, first {path}:11; left out",
        "warning: 1 of 10 examples of train repeat a query and its positive",
        "warning: 1 of 1 queries of the evaluation are training queries of train: what they score is no measure",
        "warning: 100% of train's query texts are longer than query_length=8 and are cut",
        "warning: 100% of train's document texts are longer than document_length=6 and are cut",
        "0 error(s), 5 warning(s): ready to train",
    ]


def test_check_names_what_is_wrong_in_each_set(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "medquad.jsonl").write_text('{"query": "a", "positive"}\n')
    (tmp_path / "lfrqa.jsonl").write_text('{"query": 7, "positive": "a"}\n')
    done = type_here(
        *tiny_overrides(tiny_bert, tmp_path),
        "data.mix={medquad: 1, lfrqa: 1}",
        *(f"data.sets.{name}.path={tmp_path}/{name}.jsonl" for name in ("medquad", "lfrqa")),
        "mode=check",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/medquad.jsonl:1 is no JSON (Expecting ':' delimiter at column 26): mend or remove the line",
        f"error: {tmp_path}/lfrqa.jsonl:1: query=7 must be a text",
    ]
    assert done.stdout.splitlines()[-1] == "2 error(s), 0 warning(s): this would not train"


def test_check_finds_a_teacher_that_cannot_teach(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"query": query, "documents": DOCUMENTS[:3], "scores": [1, 1, 1]} for query in QUERIES]
    write_lines(tmp_path / "scored.jsonl", rows)
    data = ["data=scored", f"data.path={tmp_path}/scored.jsonl", "data.evaluation_fraction=0", "loss=distillation"]
    done = type_here(*tiny_overrides(tiny_bert, tmp_path), *data, "trainer.batch_size=4", "mode=check")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the teacher's scores are all the same in 100% of 9 queries, such as {tmp_path}/scored.jsonl:1 "
        "(1, 1, 1, ...): there is nothing to learn from; check data.path\n"
    )
