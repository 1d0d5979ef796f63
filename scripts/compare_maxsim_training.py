"""Train twice on a GPU, with the kernels and with the reference, and compare what metrics.jsonl says.

    python scripts/compare_maxsim_training.py [steps=30]

Both runs have the quickstart's model and data, bf16, one seed and no dropout. The status is 1 where they drift apart by
more than rounding explains: 2 % of the loss in the first 10 steps, 10 % later, 0.02 in an evaluation metric.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.benchmark_maxsim import options_on_gpu

KEYS = (
    "experiment=quickstart",
    "data=python_functions",
    "backbone.dropout=0",
    "trainer.precision=bf16",
    "trainer.save_every_steps=null",
)
EARLY_STEPS, EARLY_DRIFT, LATER_DRIFT, METRIC_DRIFT = 10, 0.02, 0.10, 0.02


def main(arguments: Sequence[str]) -> int:
    chosen = options_on_gpu("compare_maxsim_training", arguments, steps=30)
    if chosen is None:
        return 2
    return compare([*KEYS, f"trainer.steps={chosen['steps']}"], backends=("cuda", "reference"))


def compare(keys: Sequence[str], *, backends: tuple[str, str]) -> int:
    """Train once with each backend, print the losses side by side, and return the status."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for number, backend in enumerate(backends):
            folder = Path(scratch, f"{number}-{backend}")
            command = [
                sys.executable,
                str(ROOT / "train.py"),
                *keys,
                f"trainer.maxsim={backend}",
                f"output_dir={folder}",
            ]
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                print(f"trainer.maxsim={backend}: the run failed", file=sys.stderr)
                return 1  # train.py has said why
            runs.append(read(folder))
        print(f"{'step':>5}{backends[0]:>12}{backends[1]:>12}{'apart':>9}")
        wrong = list(differences(*runs, show=print))
    for line in wrong:
        print(line)
    print("too far apart" if wrong else "alike")
    return int(bool(wrong))


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(left: list[dict[str, Any]], right: list[dict[str, Any]], *, show: Any) -> list[str]:
    """Show each step's losses and the last evaluation, and return what is too far apart, NaN included."""
    wrong = []
    if [line["step"] for line in left] != [line["step"] for line in right]:
        wrong.append(f"{len(left)} lines of metrics against {len(right)}")
    last: dict[str, tuple[float, float]] = {}
    for one, other in zip(left, right, strict=False):
        step, (loss, other_loss) = one["step"], (line.get("train/loss", math.nan) for line in (one, other))
        last |= {key: (one[key], other[key]) for key in one if key.startswith("eval/") and key in other}
        if "train/loss" not in one and "train/loss" not in other:
            continue  # step 0 is an evaluation alone
        apart = abs(loss - other_loss) / abs(other_loss) if other_loss else abs(loss)
        show(f"{step:5}{loss:12.5f}{other_loss:12.5f}{apart:9.2%}")
        limit = EARLY_DRIFT if step <= EARLY_STEPS else LATER_DRIFT
        if not apart <= limit:  # so that NaN is wrong
            wrong.append(f"step {step}: losses {apart:.2%} apart, allowed {limit:.0%}")
    for key, (value, other_value) in last.items():
        show(f"{key:16}{value:8.4f}{other_value:9.4f}")
        if not abs(value - other_value) <= METRIC_DRIFT:
            wrong.append(f"{key}: {value:.4f} against {other_value:.4f}, allowed {METRIC_DRIFT}")
    if not last:
        wrong.append("no evaluation was logged")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
