"""Where the time of a step goes: seconds by phase, and a trace of a few steps (trainer.profile)."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

# By the name under which each is logged, in the order of a step.
PHASES = {
    "data": "wait for data",
    "queries": "encode queries",
    "documents": "encode documents",
    "loss": "MaxSim and loss",
    "backward": "backward",
    "optimizer": "optimiser",
    "numbers": "wait for the numbers",
}
# The steps that a trace holds, after one that warms up and one that the profiler warms up with.
TRACED_STEPS = 2

Mark = float | torch.cuda.Event


class Phases:
    """Times what stands in a phase's block. Of a GPU it is the time there, by events that a step does not wait for."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: where the work is done; None measures nothing."""
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []

    def __call__(self, name: str, *, on_host: bool = False) -> AbstractContextManager[None]:
        """A block of a phase; on_host: of what the host does, or waits for."""
        return nullcontext() if self._device is None else self._block(name, on_host=on_host)

    @contextmanager
    def _block(self, name: str, *, on_host: bool) -> Iterator[None]:
        start = self._mark(on_host=on_host)
        with record_function(PHASES[name]):
            yield
        self._spans.append((name, start, self._mark(on_host=on_host)))

    def _mark(self, *, on_host: bool) -> Mark:
        if on_host or self._device is None or self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> Callable[[], dict[str, float]]:
        """End a step; what is returned gives its seconds by phase, and waits for the GPU to have done them."""
        spans, self._spans = self._spans, []

        def seconds() -> dict[str, float]:
            found = dict[str, float]()
            for name, start, stop in spans:
                found[name] = found.get(name, 0.0) + _between(start, stop)
            return found

        return seconds


def describe(seconds: Mapping[str, float]) -> str:
    """Seconds by phase as one line."""
    return ", ".join(f"{PHASES[name]} {value:.3f}" for name, value in seconds.items())


def _between(start: Mark, stop: Mark) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float), "both marks of a block are of one kind"
        assert isinstance(stop, float)
        return stop - start
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000


@contextmanager
def tracing(path: Path | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step, which writes a trace of a few steps, for chrome://tracing or Perfetto.

    path: ends in .json.gz; None traces nothing.
    """
    if path is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(path))

    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=TRACED_STEPS, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
