"""The benchmark of padding: its counts against a count by hand, what a padded text is, and what is timed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from architectures.factory import build_encoder
from configs.schema import Config
from scripts import benchmark_padding as benchmark
from scripts.benchmark_padding import Way, one_chunk
from trainer.data.batches import Batch
from trainer.data.tokens import TokenizedTexts

# Words of each document. With [CLS], marker and [SEP] a document has 3 tokens more, and 12 at most.
WORDS = (1, 4, 2, 20, 6, 3, 9, 5)
LENGTHS = [min(3 + words, 12) for words in WORDS]


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(make_config: Callable[..., Config], tmp_path: Path) -> Config:
    """Four batches of two; chunks hold 20 tokens."""
    pairs = [
        {"query": f"what is {number}", "positive": " ".join(["cat"] * words)} for number, words in enumerate(WORDS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return make_config(
        "data=pairs",
        f"data.path={tmp_path}/pairs.jsonl",
        "data.evaluation_fraction=0",
        "backbone.document_length=12",
        "trainer.batch_size=2",
        "trainer.chunk_tokens=20",
    )


def rows_of(way: Way) -> list[list[int]]:
    return [[place.row for batch in way.step(step) for place in batch.places] for step in range(4)]


def test_the_ratios_are_those_of_a_count_by_hand(config: Config) -> None:
    ways = benchmark.build_ways(config, build_encoder(config.backbone, config.head))
    in_order, in_windows = ([[LENGTHS[row] for row in rows] for rows in rows_of(way)] for way in ways[2:4])
    assert sorted(map(sorted, in_windows)) == [[4, 5], [6, 7], [8, 9], [12, 12]]

    def in_chunks(lengths: list[int]) -> int:
        # Two texts share a chunk where both at the longer one's length fit, and it pads less than a chunk costs.
        padded = 2 * max(lengths)
        return padded if padded <= 20 and padded - sum(lengths) <= 20 / 16 else sum(lengths)

    expected = {
        "cap": 8 * 12,
        "longest": sum(2 * max(lengths) for lengths in in_order),
        "chunks": sum(map(in_chunks, in_order)),
        "windows": sum(map(in_chunks, in_windows)),
        "rows": sum(LENGTHS),
    }
    assert expected["cap"] > expected["longest"] > expected["chunks"]
    assert expected["windows"] == 10 + 14 + 18 + 24
    real = sum(LENGTHS)
    assert {way.name: benchmark.ratio(way, 4) for way in ways} == {
        name: padded / real for name, padded in expected.items()
    }


def test_one_chunk_has_the_same_texts_in_the_same_order() -> None:
    texts = TokenizedTexts(
        chunks=[
            {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]]), "task": "document"},
            {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1]]), "task": "document"},
        ],
        order=torch.tensor([1, 0]),
        tokens=5,
        padded_tokens=5,
    )
    longest, cap = one_chunk(texts, width=None, padding=99), one_chunk(texts, width=5, padding=99)
    assert longest.chunks[0]["input_ids"].tolist() == [[5, 6, 99], [7, 8, 9]]
    assert cap.chunks[0]["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert cap.chunks[0]["task"] == "document"
    assert (longest.padded_tokens, cap.padded_tokens, cap.tokens) == (6, 10, 5)
    assert cap.order is texts.order


def test_all_but_windows_give_a_step_the_same_loss_and_weights(config: Config) -> None:
    config = replace(config, backbone=replace(config.backbone, dropout=0.0))
    weights = []
    for number in (0, 1, 2, 4):
        torch.manual_seed(0)
        encoder = build_encoder(config.backbone, config.head)
        way = benchmark.build_ways(config, encoder)[number]
        benchmark.build_step(config, encoder, Accelerator(cpu=True))(way.step(0))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()]))
    torch.manual_seed(0)
    untrained = build_encoder(config.backbone, config.head)
    before = torch.cat([parameter.detach().flatten() for parameter in untrained.parameters()])
    assert (weights[0] - before).abs().max() > 1e-6
    # The gradients are equal but for rounding, whose sign the first step of Adam makes a step of its own.
    for other in weights[1:]:
        assert (weights[0] - other).abs().mean() < 0.01 * (weights[0] - before).abs().mean()


def test_the_rate_is_of_the_medians_without_the_first_round(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = benchmark.build_ways(config, build_encoder(config.backbone, config.head))[2:4]
    now, taken = [0.0], list[float]()
    monkeypatch.setattr("scripts.benchmark_padding.time.perf_counter", lambda: now[0])

    def step(micro_batches: list[Batch]) -> None:
        # Rounds of 4 steps: of each of two places, chunks, then windows. The first round counts for nothing.
        seconds = [100.0, 1.0, 50.0, 3.0][len(taken) // 4] * (1 if len(taken) % 2 else 2)
        taken.append(seconds)
        now[0] += seconds

    rates = benchmark.measure(step, ways, {"chunks": [0, 1], "windows": [2, 3]}, rounds=3)
    assert len(taken) == 16
    assert rates == {"chunks": 4 / (6 + 6), "windows": 4 / (3 + 3)}


def test_steps_that_are_timed_are_spread_from_short_to_long(config: Config) -> None:
    way = benchmark.build_ways(config, build_encoder(config.backbone, config.head))[3]
    tokens = [benchmark.documents_of(way.step(number))[1] for number in range(4)]
    assert [tokens[number] for number in benchmark.spread(way, 4, 2)] == [13, 24]
    assert [tokens[number] for number in benchmark.spread(way, 4, 9)] == [9, 13, 17, 24]


def test_a_table_of_a_set(config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "compose", lambda name, batch_size, document_length: config)
    assert benchmark.main(["sets=squad_sentences", "steps=100", "timed=0"]) == 0
    head, rule, cap, *others, machine = capsys.readouterr().out.splitlines()
    assert head == "| set | way | padded/real | queries/s |"
    assert rule == "|---|---|---|---|"
    assert cap == f"| squad_sentences | cap | {96 / sum(LENGTHS):.2f} | - |"
    assert [line.split(" | ")[1] for line in others] == ["longest", "chunks", "windows", "rows"]
    assert f"torch {torch.__version__}" in machine
    assert benchmark.main(["sets=squad_sentences", "timed=1", "rounds=1"]) == 0
    assert all(float(line.split()[-2]) > 0 for line in capsys.readouterr().out.splitlines()[2:6])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=0", "steps=0: must be 1 or more"),
        ("steps=x", "steps=x: must be a whole number"),
        ("window=3", "window=3: the arguments are batch_size=, document_length=, steps=, timed=, rounds="),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([argument]) == 2
    assert capsys.readouterr().err == f"benchmark_padding: {message}\n"
