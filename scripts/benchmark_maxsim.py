"""Time MaxSim against plain PyTorch and, on a GPU, against the Triton kernels of two packages.

    python scripts/benchmark_maxsim.py device=cpu [threads=N]
    python scripts/benchmark_maxsim.py device=cuda [readme=true] [seconds=420] [resume=true]

On a GPU it writes scripts/results/maxsim_<gpu>.json after every cell; readme=true puts all results into the README, and
resume=true measures only the cells that a run of the same commit on the same GPU left out. Every contestant must first
agree with float64. It needs torch alone; rivals that are installed take part.
"""

import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from losses.maxsim import compiler, kernels
from scripts.machine import UNKNOWN, commit, processor
from scripts.maxsim_clock import event_clock, host_clock, measure
from scripts.maxsim_contestants import (
    BOTH,
    CONTESTANTS,
    FORWARD,
    PLAN,
    WALL,
    Entry,
    Workload,
    call,
    contestants,
    expect,
    first_line,
    gate,
    make_batch,
    memory,
    ours,
    plain,
)
from scripts.maxsim_table import describe, updated

RESULTS, README = ROOT / "scripts" / "results", ROOT / "README.md"
OUT_OF_TIME = "not measured: out of time"
SAVING = "forward for a backward"


class OutOfTime(BaseException):
    """The time of the run is over; no `except Exception` of a rival may swallow it."""


class BrokenDevice(BaseException):
    """A contestant left the GPU's context unusable, so this process can measure nothing more."""


def main(arguments: Sequence[str]) -> int:
    """The status is 0, 1 where our scores are wrong or a rival broke the GPU, 2 for a mistake in what was asked."""
    try:
        chosen = options(arguments, device=("cpu", "cuda"), threads=0, seconds=420, readme=False, resume=False)
        if chosen["device"] == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a GPU, and torch sees none: take device=cpu")
    except ValueError as error:
        print(f"benchmark_maxsim: {error}", file=sys.stderr)
        return 2
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    if chosen["device"] == "cpu":
        pairs, candidates = Workload("pairs", 32, 64, 32, 180), Workload("candidates", 32, 8, 32, 180, candidates=True)
        ragged = [replace(each, name=f"{each.name}, ragged", mean_length=80) for each in (pairs, candidates)]
        return run_cpu([pairs, candidates, *ragged], seconds=6.0)
    status = run_cuda(seconds=chosen["seconds"], resume=chosen["resume"], command=" ".join(arguments))
    if chosen["readme"]:
        README.write_text(updated(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return status


def options(arguments: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """Read key=value arguments; a tuple of values has no default, and a key that is not given has its default.

    Raises ValueError with key, value and rule.
    """
    chosen = dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in defaults or not equals:
            raise ValueError(f"{argument}: the arguments are {', '.join(f'{name}=' for name in defaults)}")
        default = defaults[key]
        if isinstance(default, bool):
            if value not in ("true", "false"):
                raise ValueError(f"{argument}: must be true or false")
            chosen[key] = value == "true"
        elif isinstance(default, tuple):
            if value not in default:
                raise ValueError(f"{argument}: must be one of {', '.join(default)}")
            chosen[key] = value
        else:
            if not value.isdecimal():
                raise ValueError(f"{argument}: must be a whole number")
            chosen[key] = int(value)
    for key, value in chosen.items():
        if isinstance(value, tuple):
            raise ValueError(f"{key}= is missing: one of {', '.join(value)}")
    return chosen


def options_on_gpu(program: str, arguments: Sequence[str], **defaults: Any) -> dict[str, Any] | None:
    """As `options`, for what needs a GPU: None, after one line on stderr, for a mistake or where there is none."""
    try:
        chosen = options(arguments, **defaults)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return None
    if not torch.cuda.is_available():
        print(f"{program} needs a GPU: torch sees none", file=sys.stderr)
        return None
    return chosen


def run_cpu(workloads: Sequence[Workload], *, seconds: float) -> int:
    """Print what this machine's products reach, and what MaxSim does. seconds: for each workload."""
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    # The first is the product of the first workload's vectors.
    first = workloads[0]
    columns = first.documents * first.document_tokens
    sizes = [(first.queries * first.query_tokens, first.embedding, columns), (2048, 2048, 2048)]
    products: dict[tuple[str, str], Callable[[], object]] = {
        ("product", f"{m} x {k} @ {k} x {n}"): functools.partial(torch.mm, torch.randn(m, k), torch.randn(k, n))
        for m, k, n in sizes
    }
    times, _ = measure(products, host_clock, seconds=seconds / 4, drop=math.inf)
    status, best = 0, 0.0
    for (m, k, n), ((_, name), several) in zip(sizes, times.items(), strict=True):
        median = statistics.median(several)
        rate = 2 * m * k * n / median
        best = max(best, rate)
        print(f"{name:66}{median * 1e3:9.2f} ms{rate / 1e9:7.0f} GFLOP/s")
    for workload in workloads:
        batch = make_batch(workload, torch.device("cpu"), torch.float32)
        expected, calls = expect(batch), {}
        eager = functools.partial(plain, mask=batch.document_mask if workload.mean_length else None)
        for entry in (*ours(workload, batch, "reference"), Entry("eager", "", eager)):
            failure, _ = gate(entry, batch, expected, gradients=True)
            if failure:
                print(f"{workload.name}, {entry.contestant}: {failure}", file=sys.stderr)
                status = 1
            for step in (FORWARD, BOTH):
                calls[entry.contestant, step] = call(entry, batch, gradients=step == BOTH)
            leaves = batch.leaves(packed=False, gradients=True)
            calls[entry.contestant, SAVING] = functools.partial(entry.score, *leaves)
        times, _ = measure(calls, host_clock, seconds=seconds, drop=math.inf)
        for (contestant, step), several in times.items():
            median = statistics.median(several)
            line = f"{f'{workload.name} {workload.shape}: {contestant}, {step}':66}{median * 1e3:9.2f} ms"
            rate = batch.flop / median
            line += " " * 22 if step == BOTH else f"{rate / 1e9:7.0f} GFLOP/s{rate / best:6.0%}"
            print(line + f"{statistics.median(times['eager', step]) / median:6.2f}x eager")
    return status


def run_cuda(*, seconds: int, resume: bool, command: str) -> int:
    """Measure the plan within so many seconds; results are on disk after every cell."""
    began = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    record = new_record(device, command)
    path = RESULTS / f"maxsim_{'-'.join(record['device'].lower().split())}.json"
    if resume and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[key] == record[key] for key in ("commit", "device", "versions"))
        if same and record["commit"] != UNKNOWN and not record["commit"].endswith("-dirty"):
            tried = [each for each in before["cells"] if each.get("failure") != OUT_OF_TIME]
            measured = {(each["workload"], each["pass"]): each for each in tried}
            record["cells"] = [measured.get((each["workload"], each["pass"]), each) for each in record["cells"]]

    def ring(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        record["ceilings"] = ceilings(device)
        print(f"{record['device']}: {record['ceilings']}", flush=True)
        record |= {"cold_start": cold_start(), "random_shapes": random_shapes(device)}
        print(f"cold start {record['cold_start']}, random shapes {record['random_shapes']}", flush=True)
        write(record, path)
        left = [index for index, cell in enumerate(record["cells"]) if cell.get("failure") == OUT_OF_TIME]
        for done, index in enumerate(left):
            share = (seconds - (time.monotonic() - began)) / (len(left) - done)
            record["cells"][index] = cell(*PLAN[index], device, seconds=min(1.5, max(0.2, share / 4)))
            write(record, path)
            print("\n".join(describe(record["cells"][index])), flush=True)
    except OutOfTime:
        print(f"out of time after {seconds} s: resume=true goes on", file=sys.stderr)
    except BrokenDevice as error:
        record["cells"][index]["failure"] = f"not measured: {error}"
        print(error, file=sys.stderr)
        return 1
    finally:
        signal.alarm(0)
        write(record, path)
    wrong = [each for each in record["cells"] if "failure" in each["contestants"].get("ours", {})]
    return int(bool(wrong))


def cell(workload: Workload, step: str, device: torch.device, *, seconds: float) -> dict[str, Any]:
    """Check and time every contestant on one workload."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    batch = make_batch(workload, device, torch.bfloat16)
    gradients, expected = step == BOTH, expect(batch)
    entries, absent = contestants(workload, batch, gradients=gradients)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    checks: dict[tuple[str, str], dict[str, Any]] = {}
    failures: dict[tuple[str, str], str] = {}
    for entry in entries:
        name = entry.contestant, entry.variant
        try:
            failure, checks[name] = gate(entry, batch, expected, gradients=gradients)
            if failure and entry.gated:
                failures[name] = failure
                continue
            calls[name] = call(entry, batch, gradients=gradients)
            calls[name]()
            if gradients:
                checks[name] |= memory(entry, batch)
        except Exception as error:  # whatever a rival raises is its result
            failures[name] = first_line(error)
        if name in failures:
            require_device(name, failures[name])
    clock = functools.partial(host_clock, settle=torch.cuda.synchronize) if step == WALL else event_clock
    times, failed = measure(calls, clock, seconds=seconds, drop=2.0)
    for name, failure in failed.items():
        require_device(name, failure)
    failures |= failed
    found: dict[str, dict[str, Any]] = {}
    for contestant in CONTESTANTS:
        medians = {name[1]: statistics.median(several) for name, several in times.items() if name[0] == contestant}
        why = {name[1]: text for name, text in failures.items() if name[0] == contestant}
        if medians:
            best = min(medians, key=medians.__getitem__)
            found[contestant] = {"variant": best, "seconds": medians[best], **checks[contestant, best]}
            found[contestant] |= {"variants": medians | why, "rounds": len(times[contestant, best])}
        elif why:
            found[contestant] = {"failure": next(iter(why.values())), "variants": why}
        elif contestant in absent:
            found[contestant] = {"failure": absent[contestant]}
    scored = batch.document_mask.sum().item()
    return _blank(workload, step) | {"flop": batch.flop, "scored_tokens": scored, "contestants": found}


def ceilings(device: torch.device) -> dict[str, float]:
    """What the GPU reaches at best: bf16 products, copies in memory, repeated reads of what lies in the L2 cache."""
    trials: dict[tuple[str, str], tuple[Callable[[], object], float]] = {}
    for size in (4096, 8192):
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        trials["bf16_flop_per_second", str(size)] = functools.partial(torch.mm, left, right), 2.0 * size**3
    source, target = (torch.randn(2**28, device=device) for _ in range(2))
    trials["memory_bytes_per_second", "copy"] = functools.partial(target.copy_, source), 2.0 * source.numel() * 4
    for megabytes in (20, 28):
        many = torch.randn(megabytes * 2**18, device=device).expand(64, -1)
        for reduce in (torch.sum, torch.amax):
            read = functools.partial(reduce, many, dim=1)
            trials["l2_bytes_per_second", f"{reduce.__name__} {megabytes} MiB"] = read, 4.0 * many.numel()
    times, _ = measure({name: run for name, (run, _) in trials.items()}, event_clock, seconds=2.0, drop=math.inf)
    rates: dict[str, float] = {}
    for (key, variant), several in times.items():
        rates[key] = max(rates.get(key, 0.0), trials[key, variant][1] / statistics.median(several))
    return rates


COLD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from losses import maxsim
from losses.maxsim import compiler
seconds, compile_with_log = [], compiler.compile_with_log
def timed(*arguments, **options):
    start = time.perf_counter()
    result = compile_with_log(*arguments, **options)
    seconds.append(time.perf_counter() - start)
    return result
compiler.compile_with_log = timed
q, d = (torch.randn(32, tokens, 128, device="cuda").bfloat16().requires_grad_() for tokens in (32, 300))
masks = [torch.ones(x.shape[:2], dtype=torch.bool, device="cuda") for x in (q, d)]
torch.cuda.synchronize()
start = time.perf_counter()
maxsim.maxsim(q, d, *masks, backend="cuda").sum().backward()
torch.cuda.synchronize()
first = time.perf_counter() - start
print(json.dumps({"seconds": first, "compile_seconds": sum(seconds), "compilations": len(seconds)}))
"""


def cold_start() -> dict[str, Any]:
    """Seconds of the first forward and backward of a process that has torch and the GPU, but no compiled kernel."""
    command = [sys.executable, "-c", COLD, str(ROOT)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        return {"failure": (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def random_shapes(device: torch.device, count: int = 200) -> dict[str, int]:
    """Score shapes that were never seen; how many were scored, and how often that compiled or loaded a kernel."""
    draw = torch.Generator().manual_seed(1)
    misses = []
    for number in range(count + 1):
        queries, documents, query_tokens, document_tokens = (
            int(torch.randint(1, most, (), generator=draw)) for most in (64, 128, 64, 300)
        )
        sizes = queries, documents, query_tokens, document_tokens
        workload = Workload("", *sizes, candidates=number % 4 == 3, mean_length=80)
        batch = make_batch(workload, device, torch.bfloat16)
        (entry,) = ours(workload, batch, "cuda")
        call(entry, batch, gradients=True)()
        misses.append(kernels.load.cache_info().misses)
    torch.cuda.synchronize()
    return {"shapes": count, "compilations": misses[-1] - misses[0]}


def require_device(name: tuple[str, str], failure: str) -> None:
    """Raise BrokenDevice where a contestant broke the context: whatever ran after it would fail for its mistake."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise BrokenDevice(f"{' '.join(name)} broke the GPU's context: {failure}; {first_line(error)}") from error


def _blank(workload: Workload, step: str) -> dict[str, Any]:
    return {"workload": workload.name, "shape": workload.shape, "pass": step, "contestants": {}}


def new_record(device: torch.device, command: str) -> dict[str, Any]:
    """What a results file says besides its cells, none of which is measured yet."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return {
        "command": f"python scripts/benchmark_maxsim.py {command}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device),
        "driver": driver.split()[0],
        "versions": {
            "torch": str(torch.__version__),
            **{name: _version(name) for name in ("triton", "late-interaction-kernels", "flash-maxsim")},
            "nvrtc": compiler.nvrtc_version() if compiler.unavailable() is None else "not installed",
        },
        "cells": [_blank(workload, step) | {"failure": OUT_OF_TIME} for workload, step in PLAN],
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Replace the file as a whole, so that a run that is killed leaves what it had."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
