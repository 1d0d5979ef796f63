"""Kill runs at random moments, resume each, and compare what it leaves with a run that was left alone.

    python -m scripts.kill_and_resume --moments 20 [key=value ...]

Half of the moments are drawn from the whole run, the other half fall while a checkpoint is written. The rest of the
command line goes to train.py. The status is 1 where a run that was killed and resumed differs in one bit of its models
or of metrics.jsonl, the columns of the clock left aside, or in its result.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# Minutes on 2 cores, with dropout, so that its random states count.
SMALL = (
    "trainer.steps=20",
    "trainer.batch_size=4",
    "trainer.save_every_steps=3",
    "evaluation.every_steps=8",
    "data.evaluation_fraction=0.01",
    "backbone.dropout=0.1",
)
CLOCK = {"train/seconds", "train/queries_per_second", "train/document_tokens_per_second"}


def main() -> int:
    """Print a line for each moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("overrides", nargs="*", help="keys of the run")
    options = parser.parse_args()
    draw, different = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        straight, killed = Path(scratch, "straight"), Path(scratch, "killed")
        keys = [*SMALL, *options.overrides]
        seconds, writes = start(keys, straight)
        expected = fingerprint(straight)
        if expected is None:
            return 1  # train.py has said why
        print(f"straight: {seconds:.1f} s from config.yaml on, {writes} checkpoints", flush=True)
        number = 0
        while number < options.moments:
            shutil.rmtree(killed, ignore_errors=True)
            if number % 2 and writes:
                nth = draw.randint(1, writes)
                moment = f"while checkpoint {nth} is written"
                start(keys, killed, kill_at_write=nth)
            else:
                second = draw.uniform(0, seconds)
                moment = f"after {second:.2f} s"
                passed, _ = start(keys, killed, kill_after_seconds=second)
                seconds = min(seconds, passed) if finished(killed) else seconds
            if finished(killed):
                continue  # it had finished before its moment came: that proves nothing, so another is drawn
            number += 1
            left = describe(killed)
            subprocess.run([sys.executable, str(TRAIN), f"resume={killed}"], stdout=subprocess.DEVNULL, check=False)
            equal = fingerprint(killed) == expected
            different += not equal
            print(f"{number:3}  {moment:32} {left:70} {'equal' if equal else 'DIFFERENT'}", flush=True)
    print(f"{options.moments - different} of {options.moments} equal the straight run bit for bit")
    return int(different > 0)


def start(
    keys: list[str], folder: Path, *, kill_at_write: float = math.inf, kill_after_seconds: float = math.inf
) -> tuple[float, int]:
    """Start a run and kill it when it begins to write its n-th checkpoint, or so long after config.yaml appeared.

    Returns the seconds since then and the checkpoints begun.
    """
    process = subprocess.Popen([sys.executable, str(TRAIN), *keys, f"output_dir={folder}"], stdout=subprocess.DEVNULL)
    since, seconds = None, 0.0
    begun: set[str] = set()
    while process.poll() is None:
        if since is None and (folder / "config.yaml").exists():
            since = time.perf_counter()
        if since is not None:
            seconds = time.perf_counter() - since
            begun |= {path.name for path in (folder / "checkpoints").glob("*.unfinished")}
            if len(begun) >= kill_at_write or seconds >= kill_after_seconds:
                process.kill()
        time.sleep(0.0005)
    return seconds, len(begun)


def finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    return (folder / "result.json").exists()


def describe(folder: Path) -> str:
    """What a killed run left."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    return f"{lines} lines, {' '.join(checkpoints) or 'no checkpoint'}"


def fingerprint(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]] | None:
    """Metrics and result without what the clock and the folder say, and a hash of every file of weights; None where
    the run has not finished."""
    if not finished(folder):
        return None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    weights = sorted(folder.rglob("*.safetensors"))
    return (
        metrics,
        {key: result[key] for key in ("steps", "queries", "before", "after")} | {"best": result["best"]["step"]},
        {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    )


if __name__ == "__main__":
    sys.exit(main())
