"""Time calls side by side, by the host's clock or the GPU's."""

import functools
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scripts.maxsim_contestants import first_line

# Starts a call and returns a function that waits for its end and says its seconds.
Clock = Callable[[Callable[[], object]], Callable[[], float]]


def measure(
    calls: Mapping[tuple[str, str], Callable[[], object]], clock: Clock, *, seconds: float, drop: float
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], str]]:
    """Time the calls in turn, round by round, so that a change of clock rates meets all; three rounds at least.

    calls: by contestant and variant; drop: a variant so many times slower than its contestant's best is left out.
    Returns the seconds of each round, and for what raised, why.
    """
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    failures: dict[tuple[str, str], str] = {}
    active, end = dict(calls), time.perf_counter() + seconds
    rounds = -1  # the first is warm-up
    while active and (rounds < 3 or time.perf_counter() < end):
        waiting = {}
        for name, run in list(active.items()):
            try:
                waiting[name] = clock(run)
            except Exception as error:  # such as no memory left for one of the rivals
                failures[name] = first_line(error)
                del active[name], times[name]
        elapsed: dict[tuple[str, str], float] = {}
        for name, wait in waiting.items():
            try:
                elapsed[name] = wait()
            except RuntimeError as error:  # what went wrong on the GPU is heard of here
                failures[name] = first_line(error)
                del active[name], times[name]
        rounds += 1
        if not rounds:
            continue
        for name in elapsed:
            times[name].append(elapsed[name])
        best: dict[str, float] = {}
        for name in active:
            best[name[0]] = min(best.get(name[0], math.inf), *times[name])
        active = {name: run for name, run in active.items() if min(times[name]) <= drop * best[name[0]]}
    return times, failures


def host_clock(run: Callable[[], object], *, settle: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """By the host's clock; settle: waits until a device is idle."""
    settle()
    start = time.perf_counter()
    run()
    settle()
    elapsed = time.perf_counter() - start
    return lambda: elapsed


def event_clock(run: Callable[[], object]) -> Callable[[], float]:
    """By CUDA events, after the L2 cache was emptied, which also gives the host time to queue the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _scratch().zero_()
    start.record()
    run()
    end.record()

    def wait() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return wait


@functools.cache
def _scratch() -> Tensor:
    """Memory of several L2 caches."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")
