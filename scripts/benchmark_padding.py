"""How much of a batch is padding, and what that costs: five ways to lay the same texts side by side.

    python -m scripts.benchmark_padding [sets=lfrqa,medquad,squad_sentences,python_functions] [batch_size=32]
                                        [document_length=180] [steps=100] [timed=6] [rounds=3]

The ways are: every document padded to document_length (cap), to the longest of its batch (longest), to the longest of
its chunk of trainer.chunk_tokens (chunks, trainer.pack=false), chunks of batches of like lengths (windows,
data.length_window=50), and one behind the other without padding (rows, the default). All but the windows have the same
examples. `padded/real` is computed tokens of documents over real ones, of the first steps of the first epoch.
`queries/s` is the rate of the training step with all-MiniLM-L6-v2 on the CPU: of timed= batches, in the middle of as
many equal ranges of the steps from the shortest to the longest, each way in turn, the median of the rounds; timed=0
leaves it out.

LATEFORGE_DATA names the folder of the sets. The status is 2 for a mistake in the arguments.
"""

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from transformers.utils import logging as transformers_logging

from architectures.factory import build_encoder
from configs.schema import Config, ConfigError
from losses.factory import build_loss
from scripts.benchmark_maxsim import options
from scripts.machine import processor
from scripts.models import compose_config
from trainer.data import load_data
from trainer.data.batches import Batch, StepBatches
from trainer.data.order import bounds
from trainer.data.tokens import TokenizedTexts
from trainer.dropout import fast_dropout
from trainer.loop import build_batches, build_model
from trainer.optim import build_optimizer, freeze
from trainer.plan import build_accelerator, check_batch, choose_maxsim
from trainer.step import compute_gradient, embedding_gradients_by_token

WINDOW = 50
SETS = ("lfrqa", "medquad", "squad_sentences", "python_functions")
COLUMNS = ("set", "way", "padded/real", "queries/s")
# Takes the micro-batches of a step, and trains on them.
Step = Callable[[list[Batch]], None]


@dataclass(frozen=True)
class Way:
    """The batches of one way; of the same step as those of the others, but for windows."""

    name: str
    batches: StepBatches
    lay: Callable[[TokenizedTexts], TokenizedTexts] = field(default=lambda texts: texts)
    """What becomes of the chunks of documents."""

    def step(self, number: int) -> list[Batch]:
        return [replace(batch, documents=self.lay(batch.documents)) for batch in self.batches[number]]


def main(arguments: Sequence[str]) -> int:
    """Print a row for each set and way, and at the end the machine."""
    try:
        sets, numbers = parse(arguments)
        configs = {name: compose(name, numbers["batch_size"], numbers["document_length"]) for name in sets}
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        for name, config in configs.items():
            for line in rows(name, config, steps=numbers["steps"], timed=numbers["timed"], rounds=numbers["rounds"]):
                print(line, flush=True)
    except (ValueError, ConfigError) as error:
        print(f"benchmark_padding: {error}", file=sys.stderr)
        return 2
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "sentence-transformers")]
    print(", ".join([processor(), f"{torch.get_num_threads()} threads", *packages]))
    return 0


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """The sets, and the numbers by name. Raises ValueError for an argument that there is not."""
    sets = [argument.removeprefix("sets=").split(",") for argument in arguments if argument.startswith("sets=")]
    rest = [argument for argument in arguments if not argument.startswith("sets=")]
    numbers = options(rest, batch_size=32, document_length=180, steps=100, timed=6, rounds=3)
    for key, value in numbers.items():
        if value == 0 and key != "timed":
            raise ValueError(f"{key}=0: must be 1 or more")
    return sets[-1] if sets else list(SETS), numbers


def compose(name: str, batch_size: int, document_length: int) -> Config:
    """The default config for this set. Raises ConfigError where there is none."""
    keys = (f"data={name}", f"trainer.batch_size={batch_size}", f"backbone.document_length={document_length}")
    return compose_config("minilm", *keys)


def rows(name: str, config: Config, *, steps: int, timed: int, rounds: int) -> Iterator[str]:
    """Yield the lines of a set."""
    set_seed(config.seed)
    encoder = build_encoder(config.backbone, config.head)
    ways = build_ways(config, encoder)
    steps = min(steps, ways[0].batches.steps_per_epoch)
    rates = {way.name: "-" for way in ways}
    if timed:
        taken = {way.name: spread(way, steps, timed) for way in ways}
        accelerator = build_accelerator(config)
        with embedding_gradients_by_token(encoder, accelerator), fast_dropout(encoder, accelerator.device):
            measured = measure(build_step(config, encoder, accelerator), ways, taken, rounds)
        rates = {key: f"{rate:.1f}" for key, rate in measured.items()}
    for way in ways:
        yield f"| {name} | {way.name} | {ratio(way, steps):.2f} | {rates[way.name]} |"


def build_ways(config: Config, encoder: MultiVectorEncoder) -> list[Way]:
    """The five ways to lay the documents of a training set."""
    accelerator, data = build_accelerator(config), load_data(config.data)
    check_batch(config, data, accelerator.num_processes)

    def batches(*, pack: bool = False, **keys: Any) -> StepBatches:
        changed = replace(config, data=replace(config.data, **keys), trainer=replace(config.trainer, pack=pack))
        return build_batches(changed, data.sets, encoder, accelerator)

    cap = config.data.document_length or config.backbone.document_length
    assert cap is not None, "compose sets it"
    tokenizer: Any = encoder.tokenizer
    in_order, in_windows = batches(length_window=None), batches(length_window=WINDOW)

    def padded_to(width: int | None) -> Callable[[TokenizedTexts], TokenizedTexts]:
        return lambda texts: one_chunk(texts, width=width, padding=tokenizer.pad_token_id or 0)

    return [
        Way("cap", in_order, padded_to(cap)),
        Way("longest", in_order, padded_to(None)),
        Way("chunks", in_order),
        Way("windows", in_windows),
        Way("rows", batches(pack=True)),
    ]


def one_chunk(texts: TokenizedTexts, *, width: int | None, padding: int) -> TokenizedTexts:
    """The same texts in one chunk, padded on the right to this width, or to that of the longest.

    padding: the id of the padding token.
    """
    width = width or max(chunk["input_ids"].shape[1] for chunk in texts.chunks)

    def whole(name: str) -> Any:
        parts = [chunk[name] for chunk in texts.chunks]
        if not isinstance(parts[0], Tensor) or parts[0].dim() != 2:
            return parts[0]
        fill = padding if name == "input_ids" else 0
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    chunk = {name: whole(name) for name in texts.chunks[0]}
    return replace(texts, chunks=[chunk], padded_tokens=chunk["input_ids"].numel())


def documents_of(micro_batches: list[Batch]) -> tuple[int, int]:
    """Computed tokens of the documents of a step, and those that stand for text."""
    documents = [batch.documents for batch in micro_batches]
    return sum(each.padded_tokens for each in documents), sum(each.tokens for each in documents)


def ratio(way: Way, steps: int) -> float:
    """Computed tokens over real ones in the first steps."""
    counts = [documents_of(way.step(number)) for number in range(steps)]
    return sum(padded for padded, _ in counts) / sum(real for _, real in counts)


def spread(way: Way, steps: int, wanted: int) -> list[int]:
    """So many of the steps, in the middle of as many equal ranges from the one with the fewest tokens to the one with
    the most: of batches of like lengths a few at random would tell little of all."""
    tokens = [documents_of(way.batches[number])[1] for number in range(steps)]
    rising = sorted(range(steps), key=tokens.__getitem__)
    ranges = [bounds(steps, part, min(wanted, steps)) for part in range(min(wanted, steps))]
    return [rising[(start + stop) // 2] for start, stop in ranges]


def build_step(config: Config, encoder: MultiVectorEncoder, accelerator: Accelerator) -> Step:
    """What trainer/loop.py does of a step, without logging."""
    maxsim = choose_maxsim(config, accelerator.device, encoder)
    loss = build_loss(config.loss, width=encoder.get_embedding_dimension() or 0, maxsim=maxsim)
    freeze(encoder, loss.learnt, config.optimizer)
    whole = build_model(encoder, loss, config).to(accelerator.device)
    model, optimizer = accelerator.prepare(whole, build_optimizer(encoder, loss.learnt, config.optimizer))

    def step(micro_batches: list[Batch]) -> None:
        model.train()
        compute_gradient(accelerator, model, loss, micro_batches, cached=config.trainer.cache_tokens is not None)
        accelerator.clip_grad_norm_(model.parameters(), config.trainer.max_gradient_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Step, ways: Sequence[Way], taken: dict[str, list[int]], rounds: int) -> dict[str, float]:
    """Queries per second of each way, over its own steps, after one round that does not count."""
    seconds: dict[tuple[str, int], list[float]] = {}
    queries = {way.name: 0 for way in ways}
    for nth in range(rounds + 1):
        # One step of each way, then the next of each: what else the machine does falls on all alike.
        for place in range(len(taken[ways[0].name])):
            for way in ways:
                micro_batches = way.step(taken[way.name][place])
                start = time.perf_counter()
                step(micro_batches)
                passed = time.perf_counter() - start
                if nth:
                    seconds.setdefault((way.name, place), []).append(passed)
                else:
                    queries[way.name] += sum(len(batch.places) for batch in micro_batches)
    return {
        name: count / sum(statistics.median(each) for (of, _), each in seconds.items() if of == name)
        for name, count in queries.items()
    }


if __name__ == "__main__":
    datasets.disable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
