"""The benchmark of MaxSim: what is counted as right, how times become a table, and what a mistake gets."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts import benchmark_maxsim as benchmark
from scripts import check_maxsim, compare_maxsim_training
from scripts.compare_maxsim_training import differences
from scripts.maxsim_clock import measure
from scripts.maxsim_contestants import (
    BOTH,
    FORWARD,
    Entry,
    Workload,
    expect,
    gate,
    make_batch,
    ours,
    plain,
    similarities,
)
from scripts.maxsim_table import BEGIN, END, NOT_YET, table, updated
from tests.conftest import ROOT

CPU = torch.device("cpu")
SMALL = Workload("small", 5, 6, 4, 20, mean_length=12, embedding=16)
TIMES = {"ours": 0.0005, "LIK": 0.0017, "FM": 0.001, "eager": 0.02}


def results(tmp_path: Path, cells: list[dict[str, Any]]) -> Path:
    record = {
        "command": "python scripts/benchmark_maxsim.py device=cuda",
        "commit": "0123456789abcdef",
        "date": "2026-01-02",
        "device": "Some GPU",
        "driver": "580.1",
        "versions": {
            "torch": "2.11.0",
            "triton": "3.6.0",
            "late-interaction-kernels": "0.4.5",
            "flash-maxsim": "0.3.0",
            "nvrtc": "13.0",
        },
        "ceilings": {
            "bf16_flop_per_second": 8e14,
            "memory_bytes_per_second": 3e12,
            "l2_bytes_per_second": 5.5e12,
        },
        "cold_start": {"seconds": 1.9, "compile_seconds": 1.25, "compilations": 1},
        "random_shapes": {"shapes": 200, "compilations": 0},
        "cells": cells,
    }
    (tmp_path / "maxsim_some-gpu.json").write_text(json.dumps(record))
    return tmp_path


def cell(step: str, **contestants: dict[str, Any]) -> dict[str, Any]:
    return {"workload": "training", "shape": "2 x 3 x 4 x 5", "pass": step, "flop": 2e11, "contestants": contestants}


def test_the_table_has_medians_and_ratios_with_their_machine(tmp_path: Path) -> None:
    forward: dict[str, dict[str, Any]] = {name: {"seconds": seconds, "variant": ""} for name, seconds in TIMES.items()}
    forward["LIK"]["variant"] = "auto"
    forward["torch.compile"] = {"failure": "OutOfMemoryError: a | b"}
    text = table(results(tmp_path, [cell(FORWARD, **forward)]))
    row = "| training: 2 x 3 x 4 x 5 | forward | 0.5 ms, 400 TFLOP/s (50%) | 1.7 ms, 3.40x, auto | 1 ms, 2.00x "
    assert row + "| OutOfMemoryError: a / b | 20 ms, 40.00x |" in text
    assert "| ours | LIK 0.4.5 | FM 0.3.0 | torch.compile | eager |" in text
    for words in ("Some GPU", "commit 0123456", "torch 2.11.0", "NVRTC 13.0", "800 TFLOP/s", "5.50 TB/s", "1.25 s"):
        assert words in text
    assert "200 random shapes after it: 0 compilations" in text


def test_the_table_has_memory_and_marks_what_failed_the_gate_or_the_time(tmp_path: Path) -> None:
    both: dict[str, dict[str, Any]] = {
        "ours": {"seconds": 0.001, "variant": "", "peak_bytes": 2**26, "saved_bytes": 2**24, "gradients_error": 1e-3},
        "eager": {"seconds": 0.01, "variant": "", "gradients_error": 0.09},
        "FM": {"failure": "wrong: scores off by 1.0e-01"},
    }
    late = {"workload": "long", "shape": "1 x 2", "pass": BOTH, "contestants": {}, "failure": benchmark.OUT_OF_TIME}
    text = table(results(tmp_path, [cell(BOTH, **both), late]))
    expected = "1 ms, 64 (16) MiB | - | wrong: scores off by 1.0e-01 | - | 10 ms, 10.00x † |"
    assert expected in text
    assert f"| long: 1 x 2 | {BOTH} |" + f" {benchmark.OUT_OF_TIME} |" * 5 in text


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    assert table(tmp_path) == NOT_YET
    assert table(tmp_path / "none") == NOT_YET
    readme = f"above\n{BEGIN}old\n{END}below\n"
    assert updated(readme, tmp_path) == f"above\n{BEGIN}{NOT_YET}{END}below\n"


def test_the_readme_has_the_table_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BEGIN in readme
    assert updated(readme, benchmark.RESULTS) == readme


def wrong_scores(queries: Tensor, documents: Tensor, *, mask: Tensor) -> Tensor:
    return plain(queries, documents, mask) * 1.01


def wrong_gradient(queries: Tensor, documents: Tensor, *, mask: Tensor) -> Tensor:
    scores = plain(queries, documents, mask)
    return scores + 0.01 * (scores - scores.detach())


def all_nan(queries: Tensor, documents: Tensor, *, mask: Tensor) -> Tensor:
    return plain(queries, documents, mask) * math.nan


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize(
    ("score", "expected"),
    [(plain, None), (wrong_scores, "scores off"), (wrong_gradient, "gradients off"), (all_nan, "scores off")],
)
def test_the_gate_lets_through_what_agrees_with_float64(
    candidates: bool, score: Callable[..., Tensor], expected: str | None
) -> None:
    batch = make_batch(replace(SMALL, candidates=candidates), CPU, torch.float32)
    entry = Entry("someone", "", lambda queries, documents: score(queries, documents, mask=batch.document_mask))
    failure, errors = gate(entry, batch, expect(batch), gradients=True)
    assert (failure is None) if expected is None else (failure is not None and expected in failure)
    assert set(errors) == {"scores_error", "gradients_error"}


@pytest.mark.parametrize("changes", [{}, {"candidates": True}, {"packed": True}, {"holes": 0.3}, {"skewed": True}])
def test_the_reference_passes_the_gate_in_every_layout(changes: dict[str, Any]) -> None:
    workload = replace(SMALL, **changes)
    batch = make_batch(workload, CPU, torch.float32)
    (entry,) = ours(workload, batch, "reference")
    failure, errors = gate(entry, batch, expect(batch), gradients=True)
    assert failure is None
    assert errors["scores_error"] < 1e-5
    assert errors["gradients_error"] < 1e-5


def test_skewed_winners_are_one_token_of_each_document() -> None:
    batch = make_batch(Workload("", 8, 6, 32, 50, skewed=True), CPU, torch.float32)
    winners = similarities(batch.queries, batch.documents, None).argmax(dim=-1)
    most = winners.mode(dim=-1).values[..., None]
    assert (winners == most).float().mean() > 0.7


def test_calls_are_timed_in_turn_and_a_slow_variant_is_dropped_while_a_failure_is_kept() -> None:
    order: list[str] = []
    seconds = {"fast": 1.0, "slow": 5.0, "broken": 1.0}

    def clock(run: Callable[[], object]) -> Callable[[], float]:
        name = str(run())
        return lambda: seconds[name]

    def call(name: str) -> Callable[[], object]:
        def run() -> str:
            order.append(name)
            if name == "broken" and order.count(name) == 2:
                raise RuntimeError("CUDA out of memory\nmore")
            return name

        return run

    calls = {("a", "fast"): call("fast"), ("a", "slow"): call("slow"), ("b", "broken"): call("broken")}
    times, failures = measure(calls, clock, seconds=0, drop=2.0)
    # The first round is warm-up.
    assert order[:6] == ["fast", "slow", "broken"] * 2
    assert times == {("a", "fast"): [1.0, 1.0, 1.0], ("a", "slow"): [5.0]}
    assert failures == {("b", "broken"): "RuntimeError: CUDA out of memory"}


def test_the_cpu_run_prints_rates_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    workloads = [Workload("pairs", 4, 5, 6, 7), Workload("candidates", 4, 3, 6, 7, candidates=True)]
    assert benchmark.run_cpu(workloads, seconds=0.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 2 * 6
    assert sum("GFLOP/s" in line for line in lines) == 2 + 2 * 4
    assert sum("1.00x eager" in line for line in lines) >= 2 * 3


@pytest.mark.parametrize("script", ["benchmark_maxsim", "check_maxsim", "compare_maxsim_training"])
def test_a_wrong_argument_is_one_line_and_status_2(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "sed=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: sed=1: the arguments are ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "device= is missing: one of cpu, cuda"),
        (["device=tpu"], "device=tpu: must be one of cpu, cuda"),
        (["device=cpu", "readme=yes"], "readme=yes: must be true or false"),
        (["device=cpu", "threads=-1"], "threads=-1: must be a whole number"),
        (["device=cpu", "readme"], "readme: the arguments are device=, threads="),
    ],
)
def test_a_wrong_value_names_its_key_and_rule(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("script", [check_maxsim, compare_maxsim_training], ids=lambda script: script.__name__)
def test_without_a_gpu_the_checks_are_one_line_and_status_2(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([]) == 2
    assert capsys.readouterr().err == f"{script.__name__.removeprefix('scripts.')} needs a GPU: torch sees none\n"


def test_the_scripts_need_torch_alone() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'datasets', 'wandb', 'transformers']));"
        "import scripts.benchmark_maxsim, scripts.check_maxsim"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def losses(*values: float, ndcg: float = 0.5) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "eval/ndcg@10": 0.3}]
    lines += [{"step": step, "train/loss": value} for step, value in enumerate(values, start=1)]
    lines[-1]["eval/ndcg@10"] = ndcg
    return lines


def test_two_trainings_may_differ_by_rounding_and_no_more() -> None:
    def shown(_: str) -> None: ...

    early, late = [1.0] * 11, [1.0] * 10 + [1.09]
    assert differences(losses(*early), losses(*late), show=shown) == []
    late[9] = 1.03
    assert differences(losses(*early), losses(*late), show=shown) == ["step 10: losses 2.91% apart, allowed 2%"]
    (metric,) = differences(losses(1.0, ndcg=0.53), losses(1.0), show=shown)
    assert metric.startswith("eval/ndcg@10: 0.5300 against 0.5000")
    assert differences(losses(math.nan), losses(math.nan), show=shown)
    assert differences(losses(1.0), losses(1.0, 1.0), show=shown)
