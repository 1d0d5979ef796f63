"""Time to the first batch, and peak memory, of data sets of different sizes.

    python -m scripts.data_memory [sizes=10000,1000000]

So many pairs are drawn, a query of 8 words and a document of 60, and read as a run with the minilm preset reads them:
first with no cache (cold), when all texts are read and tokenised, then again in a new process (warm). No model runs.
Each row is a process of its own that ends with its 20th batch; its seconds leave out imports and weights, which the
memory has. Peak memory counts pages of mapped files, which the system takes back where it needs them; anonymous memory
is what the process holds itself. Everything lies in a temporary folder, about 2 KB a pair.

The status is 1 where the largest size has more than 1.2 times the anonymous memory of the smallest, or its warm start
takes 10 seconds or more, 2 for a mistake in the arguments.
"""

import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

# Torch and all that brings it are imported by the measured process: the peak of a process begins at its parent's.

LARGEST_RATIO, LONGEST_WARM_START = 1.2, 10.0
BATCHES = 20
QUERY_WORDS, DOCUMENT_WORDS = 8, 60
VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body information"
)
COLUMNS = (
    "pairs",
    "start",
    "seconds to the first batch",
    "of it reading",
    "of it tokens",
    f"{BATCHES} batches",
    "peak memory",
    "ratio",
    "anonymous",
    "ratio",
    "of it before the data",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process took, in seconds and bytes."""

    reading: float
    tokens: float
    first_batch: float
    """From the beginning to the end of the first batch."""
    batches: float
    peak: int
    anonymous: int
    before: int
    """The peak of anonymous memory with libraries and weights alone."""


def main(arguments: Sequence[str]) -> int:
    """Print a row for each size and start, and return the status."""
    try:
        sizes = parse(arguments)
    except ValueError as error:
        print(f"data_memory: {error}", file=sys.stderr)
        return 2
    return run(sizes, measure_alone)


def parse(arguments: Sequence[str]) -> list[int]:
    """The sizes, rising. Raises ValueError for an argument that there is not."""
    sizes = [10_000, 1_000_000]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "sizes":
            raise ValueError(f"{argument}: the only argument is sizes=, as in sizes=10000,1000000")
        if not all(size.isdecimal() and int(size) > 0 for size in value.split(",")):
            raise ValueError(f"{argument}: must be whole numbers above 0 with commas between")
        sizes = sorted({int(size) for size in value.split(",")})
    return sizes


def run(sizes: Sequence[int], measure_one: Callable[[Path], Measured]) -> int:
    """Measure each size, cold and then warm."""
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    smallest: dict[str, Measured] = {}
    problems = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            write_pairs(Path(scratch, "pairs.jsonl"), size)
            for start in ("cold", "warm"):
                measured = measure_one(Path(scratch))
                base = smallest.setdefault(start, measured)
                print(row(size, start, measured, base), flush=True)
                if measured.anonymous > LARGEST_RATIO * base.anonymous:
                    problems.append(f"{size:,} pairs, {start}: more than {LARGEST_RATIO} times the anonymous memory")
                if start == "warm" and measured.first_batch >= LONGEST_WARM_START:
                    problems.append(f"{size:,} pairs, warm: {LONGEST_WARM_START:g} seconds or more to the first batch")
    packages = [f"{name} {version(name)}" for name in ("datasets", "pyarrow", "tokenizers", "torch")]
    print(", ".join([f"{os.cpu_count()} cores", *packages]))
    for problem in problems:
        print(f"too much: {problem}")
    return int(bool(problems))


def row(size: int, start: str, measured: Measured, base: Measured) -> str:
    """A line of the table; base: the same start of the smallest size."""
    seconds = (measured.first_batch, measured.reading, measured.tokens, measured.batches)
    cells = [f"{size:,}", start, *(f"{each:.2f}" for each in seconds)]
    for here, there in ((measured.peak, base.peak), (measured.anonymous, base.anonymous)):
        cells += [mebibytes(here), f"{here / there:.2f}"]
    return f"| {' | '.join([*cells, mebibytes(measured.before)])} |"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def write_pairs(path: Path, size: int) -> None:
    """The same pairs for the same size, whose texts all differ."""
    draw, vocabulary = random.Random(size), VOCABULARY.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(size):
            words = draw.choices(vocabulary, k=QUERY_WORDS + DOCUMENT_WORDS)
            pair = {"query": " ".join(words[:QUERY_WORDS]), "positive": " ".join(words[QUERY_WORDS:])}
            file.write(json.dumps(pair) + "\n")


def measure_alone(folder: Path) -> Measured:
    """Measure in a new process, which keeps its tables in the folder."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=keep_in, initargs=(folder,)) as pool:
        return pool.submit(measure, folder).result()


def keep_in(folder: Path) -> None:
    """Called before `datasets` is imported, which reads it then."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def measure(folder: Path, backbone: str = "minilm") -> Measured:
    """Read pairs.jsonl of the folder as a run does, and build its first batches."""
    import datasets

    from configs.schema import assignment
    from scripts.models import compose_config, load_model
    from trainer.data import load_data
    from trainer.loop import build_batches
    from trainer.plan import build_accelerator

    datasets.disable_progress_bars()
    path = assignment("data.path", str((folder / "pairs.jsonl").resolve()))
    config = compose_config(backbone, "data=pairs", path, "data.evaluation_fraction=0")
    encoder, accelerator = load_model(backbone), build_accelerator(config)
    before = anonymous_bytes()
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        data = load_data(config.data)
        read = time.perf_counter()
        batches = build_batches(config, data.sets, encoder, accelerator)
        tokenised = time.perf_counter()
        batches[0]
        first = time.perf_counter()
        for step in range(1, min(BATCHES, batches.steps_per_epoch)):
            batches[step]
        last = time.perf_counter()
    return Measured(
        reading=read - started,
        tokens=tokenised - read,
        first_batch=first - started,
        batches=last - tokenised,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        anonymous=memory.peak,
        before=before,
    )


class AnonymousMemory:
    """The most anonymous memory that this process has inside the block, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "AnonymousMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """What Linux calls RssAnon."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
