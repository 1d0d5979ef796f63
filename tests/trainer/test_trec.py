"""TREC's run files: candidates, and each mistake by its line."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import ConfigError
from trainer.data.retrieval import RetrievalSet
from trainer.data.trec import read_run, unfit_id, with_candidates, write_run

RETRIEVAL = RetrievalSet(
    queries={"q1": "what barks", "q2": "what swims"},
    corpus={"d1": "a dog", "d2": "a fish", "d3": "a whale"},
    judgements={"q1": {"d1": 1}, "q2": {"d2": 1}},
    unjudged=frozenset({"q3"}),
)


def run_file(folder: Path, *rows: str) -> Path:
    path = folder / "run.trec"
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_each_query_ranks_what_the_run_has_for_it(packed: bool, tmp_path: Path) -> None:
    rows = ["q1 Q0 d2 1 9.5 bm25", "q1 Q0 d1 2 9.0 bm25", "", "q3\tQ0\td3\t1\t1\tbm25"]
    path = run_file(tmp_path, *rows)
    if packed:
        path = tmp_path / "run.trec.gz"
        path.write_bytes(gzip.compress((tmp_path / "run.trec").read_bytes()))
    # q2 stands in no line, and q3 is not judged.
    assert with_candidates(RETRIEVAL, path) == replace(RETRIEVAL, candidates={"q1": ["d2", "d1"], "q2": []})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["q1 Q0 d1 1 2 b", "q1 Q0 d9 2 1 b", "q9 Q0 d1 1 1 b"],
            "{path}:2: document=d9 is not in the set that is ranked, and so in 2 of 3 lines: is this a run of these "
            "queries over this corpus?",
        ),
        (
            ["q1 Q0 d1 1 2 b", "q9 Q0 d1 1 1 b"],
            "{path}:2: query=q9 is not in the set that is ranked, and so in 1 of 2 lines: is this a run of these "
            "queries over this corpus?",
        ),
        (["q1 Q0 d1 1 2 b"] * 2, "{path}:2: document=d1 stands here again for query=q1: remove one"),
        (["q3 Q0 d1 1 2 b"], "{path} ranks no document for any of the 2 judged queries"),
        ([], "{path} ranks no document for any of the 2 judged queries"),
        (
            ["q1 Q0 d1 1 2"],
            "{path}:1: 5 cells, and TREC's runs have 6: query, Q0, document, rank, score, name",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_named_by_its_line(rows: list[str], message: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, *rows)
    with pytest.raises(ConfigError) as caught:
        with_candidates(RETRIEVAL, path)
    assert str(caught.value) == message.format(path=path)


def test_a_run_that_is_written_reads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    # Two neighbours in float32, whose order nine digits keep.
    rankings = {"q1": {"d2": 16.000001907348633, "d1": 16.0}, "q2": {}, "q3": {"d1": -0.5}}
    write_run(path, rankings, name="made")
    assert path.read_text().splitlines() == [
        "q1 Q0 d2 1 16.0000019 made",
        "q1 Q0 d1 2 16 made",
        "q3 Q0 d1 1 -0.5 made",
    ]
    assert list(read_run(path)) == [
        (f"{path}:1", "q1", "d2"), (f"{path}:2", "q1", "d1"), (f"{path}:3", "q3", "d1"),
    ]  # fmt: skip


def test_an_id_with_a_space_is_named() -> None:
    assert unfit_id(RETRIEVAL) is None
    assert unfit_id(replace(RETRIEVAL, corpus={"d1": "a", "d 2": "b"})) == (
        "document id 'd 2' has a space in it, which no line of a TREC run can hold: rename it"
    )
    assert unfit_id(replace(RETRIEVAL, queries={"q\t1": "a"})) == (
        "query id 'q\\t1' has a space in it, which no line of a TREC run can hold: rename it"
    )
