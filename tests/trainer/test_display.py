"""What a person reads before, during and after a run."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainer.display import ProgressDisplay, counting, print_end, print_start

MODULES = [
    ("Transformer", "BertModel, 32 wide", 22_592),
    ("Dense", "32 -> 128, Identity, no bias", 4_096),
    ("Normalize", "unit length", 0),
]
LOADING = 'from sentence_transformers import MultiVectorEncoder\nmodel = MultiVectorEncoder("[run]/model")'
RESULT: dict[str, Any] = {
    "steps": 12,
    "model": "run/model",
    "best": {"step": 8, "model": "run/best", "ndcg@10": 0.75},
    "before": {"ndcg@10": 0.25, "map": 0.5},
    "after": {"ndcg@10": 0.625, "map": 0.375},
    "change": {"metric": "ndcg@10", "change": 0.375, "low": -0.125, "high": 0.5},
}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), markup=False, highlight=False, soft_wrap=True, width=140)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_start_is_the_modules_with_their_sum_and_a_fact_a_line(console: Console) -> None:
    print_start(console, MODULES, {"queries": "prefix '[Q] '", "loss": "1 contrastive of maxsim"})
    assert printed(console) == [
        "module       what it does                  parameters",
        "Transformer  BertModel, 32 wide                22,592",
        "Dense        32 -> 128, Identity, no bias       4,096",
        "Normalize    unit length",
        "                                               26,688",
        "",
        "queries  prefix '[Q] '",
        "loss     1 contrastive of maxsim",
        "",
    ]


def test_the_end_is_the_scores_their_interval_both_models_and_the_lines_to_load_the_last(console: Console) -> None:
    print_end(console, RESULT, loading=LOADING, report=Path("run/report.html"))
    assert printed(console) == [
        "",
        "         before   after   change",
        "ndcg@10  0.2500  0.6250  +0.3750",
        "map      0.5000  0.3750  -0.1250",
        "change of ndcg@10: +0.3750, 95 % interval over the queries -0.1250 to +0.5000",
        "",
        "best model, of step 8: run/best",
        "model: run/model",
        "report: run/report.html",
        "load it with:",
        "    from sentence_transformers import MultiVectorEncoder",
        '    model = MultiVectorEncoder("[run]/model")',
    ]


def test_a_model_that_is_both_best_and_last_is_named_once(console: Console) -> None:
    print_end(console, RESULT | {"best": RESULT["best"] | {"model": "run/model"}}, loading=LOADING)
    assert [line for line in printed(console) if "run/model" in line] == ["model: run/model"]
    assert not [line for line in printed(console) if "best" in line]


def test_a_run_without_evaluation_ends_without_scores(console: Console) -> None:
    nothing = dict.fromkeys(("before", "after", "change", "best"))
    print_end(console, RESULT | nothing, loading="one line")
    assert printed(console) == ["", "model: run/model", "load it with:", "    one line"]


def test_a_profile_is_a_line_at_the_end(console: Console) -> None:
    nothing = dict.fromkeys(("before", "after", "change", "best"))
    print_end(console, RESULT | nothing | {"phases": {"data": 0.0021, "loss": 0.5}}, loading="one line")
    assert printed(console)[1] == "seconds of a step: wait for data 0.002, MaxSim and loss 0.500"


def test_without_a_terminal_a_count_is_a_line_now_and_then(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with counting(console, "documents ranked") as show:
        for done in range(1000, 6000, 1000):
            now += 20
            show(done, 5000)
    assert printed(console) == [
        "documents ranked  2,000 of 5,000  1:00 left",
        "documents ranked  4,000 of 5,000  0:20 left",
    ]


def test_on_a_terminal_a_count_is_a_bar_also_beside_that_of_the_steps() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with (
        ProgressDisplay(console, steps=10, log_every_steps=1),
        counting(console, "documents ranked", line_seconds=0) as show,
    ):
        show(3, 7)
        console.print("beside them")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "beside them" in text
    assert "documents ranked" in text
    assert "3/7" in text
