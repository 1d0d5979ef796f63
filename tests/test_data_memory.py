"""The memory of data: what is drawn, what is measured, the table, and when it is too much."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import data_memory
from scripts.data_memory import AnonymousMemory, Measured, anonymous_bytes, run

SMALL = Measured(
    reading=0.5, tokens=1.25, first_batch=2, batches=0.5, peak=700 * 2**20, anonymous=400 * 2**20, before=2**28
)


def test_pairs_are_the_same_each_time_and_of_the_sizes_that_are_said(tmp_path: Path) -> None:
    for name in ("one", "two"):
        data_memory.write_pairs(tmp_path / name, 50)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    pairs = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    assert len({pair["query"] for pair in pairs}) == len({pair["positive"] for pair in pairs}) == 50
    assert {(len(pair["query"].split()), len(pair["positive"].split())) for pair in pairs} == {(8, 60)}


def test_what_a_process_measures(tiny_bert: Path, tmp_path: Path) -> None:
    data_memory.write_pairs(tmp_path / "pairs.jsonl", 70)
    measured = data_memory.measure(tmp_path, str(tiny_bert))
    assert 0 < measured.reading + measured.tokens < measured.first_batch
    assert measured.batches > 0
    assert measured.peak > measured.anonymous >= measured.before > 2**20


def test_a_peak_that_has_gone_is_seen() -> None:
    with AnonymousMemory() as memory:
        before = anonymous_bytes()
        held = bytearray(b"1" * 2**27)
        while memory.peak < before + 2**26:  # the thread looks every 20 ms
            pass
        del held
    assert memory.peak >= before + 2**26
    assert anonymous_bytes() < memory.peak - 2**25


def test_a_row_for_each_size_and_start_with_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []

    def measure_one(folder: Path) -> Measured:
        sizes.append(len((folder / "pairs.jsonl").read_text().splitlines()))
        return SMALL if sizes[-1] == 10 else replace(SMALL, peak=2 * SMALL.peak, anonymous=440 * 2**20)

    assert run([10, 30], measure_one) == 0
    assert sizes == [10, 10, 30, 30]
    head, rule, *rows, _ = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert rows[0] == "| 10 | cold | 2.00 | 0.50 | 1.25 | 0.50 | 700 MiB | 1.00 | 400 MiB | 1.00 | 256 MiB |"
    assert rows[3] == "| 30 | warm | 2.00 | 0.50 | 1.25 | 0.50 | 1,400 MiB | 2.00 | 440 MiB | 1.10 | 256 MiB |"


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (replace(SMALL, anonymous=481 * 2**20), "too much: 30 pairs, warm: more than 1.2 times the anonymous memory"),
        (replace(SMALL, first_batch=10.0), "too much: 30 pairs, warm: 10 seconds or more to the first batch"),
    ],
)
def test_too_much_is_said_and_status_1(other: Measured, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = iter([SMALL, SMALL, SMALL, other])
    assert run([10, 30], lambda folder: next(results)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == problem


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_memory.parse([]) == [10_000, 1_000_000]
    assert data_memory.parse(["sizes=300,20,300"]) == [20, 300]
    for wrong in ("sizes=", "sizes=1e6", "sizes=0", "size=3"):
        assert data_memory.main([wrong]) == 2
        assert capsys.readouterr().err.startswith(f"data_memory: {wrong}: ")
