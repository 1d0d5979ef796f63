"""Seconds by phase, and the trace of a few steps."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from trainer.phases import PHASES, TRACED_STEPS, Phases, describe, tracing

CPU = torch.device("cpu")


def test_without_a_device_nothing_is_measured() -> None:
    phases = Phases()
    with phases("loss"):
        time.sleep(0.001)
    assert phases.take()() == {}


def test_the_blocks_of_a_phase_add_up_by_step() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        with phases("queries"):
            time.sleep(0.02)
    with phases("backward", on_host=True):
        time.sleep(0.05)
    first = phases.take()
    with phases("queries"):
        pass
    seconds = first()
    assert list(seconds) == ["queries", "backward"]
    assert seconds["queries"] >= 0.04
    assert seconds["backward"] >= 0.05
    assert list(phases.take()()) == ["queries"]
    assert phases.take()() == {}


def test_a_block_that_fails_is_no_time_of_a_phase() -> None:
    phases = Phases(CPU)
    with pytest.raises(ZeroDivisionError), phases("loss"):
        1 / 0  # noqa: B018
    assert phases.take()() == {}


def test_a_line_names_the_phases() -> None:
    assert describe({"queries": 0.25, "loss": 1.0}) == "encode queries 0.250, MaxSim and loss 1.000"


def test_a_trace_has_the_phases_of_its_steps(tmp_path: Path) -> None:
    path, phases = tmp_path / "trace.json.gz", Phases(CPU)
    with tracing(path) as step:
        for _ in range(2 + TRACED_STEPS + 1):
            with phases("loss"):
                torch.ones(3).sum()
            step()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("name") == PHASES["loss"]]
    assert len(named) == TRACED_STEPS
    with tracing(None) as step:
        step()
    assert list(tmp_path.iterdir()) == [path]
