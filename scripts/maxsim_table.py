"""What was measured, for readers: the README's table of scripts/results, and one cell for the terminal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.maxsim_contestants import CONTESTANTS, FORWARD, GRADIENTS_LIMIT, SCORES_LIMIT
from scripts.regions import with_region

BEGIN, END = "<!-- maxsim table -->\n", "<!-- end of maxsim table -->\n"
NOT_YET = "Not yet measured: no GPU has run it. The command: make gpu.\n"


def updated(readme: str, results_folder: Path) -> str:
    """The README with its region replaced; unchanged where it has none."""
    return with_region(readme, BEGIN, END, table(results_folder))


def table(results_folder: Path) -> str:
    """The README's region: one table for each results file."""
    files = sorted(results_folder.glob("maxsim_*.json"))
    return "\n".join(_table(json.loads(path.read_text(encoding="utf-8"))) for path in files) if files else NOT_YET


def _table(record: dict[str, Any]) -> str:
    versions = record["versions"]
    lines = [
        f"**{record['device']}**, driver {record['driver']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"NVRTC {versions['nvrtc']}, commit {record['commit'][:7]}, {record['date']}: `{record['command']}`"
    ]
    if found := record.get("ceilings"):
        lines[0] += (
            f"; in the same run {found['bf16_flop_per_second'] / 1e12:.0f} TFLOP/s in bf16 products, "
            f"{found['memory_bytes_per_second'] / 1e12:.2f} TB/s in copies, "
            f"{found['l2_bytes_per_second'] / 1e12:.2f} TB/s from the L2 cache"
        )
    heads = [f"{name} {versions[package]}" if package in versions else name for name, package in CONTESTANTS.items()]
    lines += ["", f"| bf16, H = 128 | pass | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for each in record["cells"]:
        figures = [_figure(record, each, name) for name in CONTESTANTS]
        lines.append(f"| {each['workload']}: {each['shape']} | {each['pass']} | {' | '.join(figures)} |")
    lines += [
        "",
        "Median times; `2.00x` is twice our time. All in turn, each after the L2 cache was emptied; of a rival's "
        "settings the fastest, which is named. MiB: peak above the inputs, and in brackets what is kept for the "
        "backward pass. "
        f"† off by more than {SCORES_LIMIT:g} (scores) or {GRADIENTS_LIMIT:g} (gradients) from float64.",
    ]
    if "seconds" in (cold := record.get("cold_start", {})):
        lines[-1] += (
            f" First forward and backward without compiled kernels: {cold['seconds']:.2f} s, of which "
            f"{cold['compile_seconds']:.2f} s compiling."
        )
    if shapes := record.get("random_shapes"):
        lines[-1] += f" {shapes['shapes']} random shapes after it: {shapes['compilations']} compilations."
    return "\n".join(lines) + "\n"


def _figure(record: dict[str, Any], each: dict[str, Any], name: str) -> str:
    """One contestant in one cell."""
    own = each["contestants"].get(name, {"failure": each.get("failure", "-")})
    if "failure" in own:
        return str(own["failure"]).replace("|", "/")
    parts = [f"{own['seconds'] * 1e3:.3g} ms"]
    ours = each["contestants"].get("ours", {})
    if name != "ours" and "seconds" in ours:
        parts.append(f"{own['seconds'] / ours['seconds']:.2f}x")
    if name == "ours" and each["pass"] == FORWARD:
        rate = each["flop"] / own["seconds"]
        share = f" ({rate / record['ceilings']['bf16_flop_per_second']:.0%})" if "ceilings" in record else ""
        parts.append(f"{rate / 1e12:.0f} TFLOP/s{share}")
    if "peak_bytes" in own:
        parts.append(f"{own['peak_bytes'] / 2**20:.0f} ({own['saved_bytes'] / 2**20:.0f}) MiB")
    if own["variant"]:
        parts.append(own["variant"])
    wrong = own.get("scores_error", 0) > SCORES_LIMIT or own.get("gradients_error", 0) > GRADIENTS_LIMIT
    return ", ".join(parts) + (" †" if wrong else "")


def describe(each: dict[str, Any]) -> Iterator[str]:
    """Lines for the terminal: every variant of every contestant."""
    yield f"{each['workload']} {each['shape']}, {each['pass']}"
    for name, own in each["contestants"].items():
        for variant, result in own.get("variants", {"": own.get("failure")}).items():
            figure = f"{result * 1e3:10.3f} ms" if isinstance(result, float) else str(result)
            yield f"    {f'{name} {variant}':28}{figure}"
