"""Time and peak memory of one optimiser step, plain and cached (trainer.cache_tokens), each in a process of its own.

    python scripts/benchmark_cache.py device=cpu [queries=1024] [cache_tokens=N]
    python scripts/benchmark_cache.py device=cuda [queries=16384] [cache_tokens=N]

On a CPU it is the default config with its weights, its texts and the calls of train.py. On a GPU it is a backbone of
ModernBERT-base's size over random tokens in bf16, which needs torch, transformers and accelerate alone. queries= is the
largest cached step; without cache_tokens= its chunks are as large as those of the plain step.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.maxsim import choose_backend
from losses.scores import gather_pool, score
from scripts.benchmark_maxsim import options
from scripts.machine import processor
from scripts.maxsim_contestants import first_line
from trainer.grad_cache import GradCache

if TYPE_CHECKING:
    from configs.schema import Config

SMALL, WIDTH, QUERY_TOKENS, DOCUMENT_TOKENS = 32, 128, 32, 300
COLUMNS = ("step", "queries", "chunks", "seconds", "peak memory", "of it before the first step", "over the plain one")
# Takes a number of queries and the number of the step; returns how many chunks were encoded.
Step = Callable[[int, int], int]


@dataclass(frozen=True)
class Case:
    """What to measure; cache_tokens: 0 takes the chunks of the plain step."""

    device: str
    cache_tokens: int
    queries: int
    cached: bool
    steps: int


@dataclass(frozen=True)
class Measured:
    """before_bytes: the peak of libraries, data, weights, gradients and moments, whatever the batch."""

    chunks: int
    seconds: float
    before_bytes: int
    peak_bytes: int
    maxsim: str


def main(arguments: Sequence[str]) -> int:
    """The status is 0, 1 where a step could not be measured, 2 for a mistake in what was asked."""
    try:
        chosen = options(arguments, device=("cpu", "cuda"), queries=0, cache_tokens=0)
        if chosen["device"] == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a GPU, and torch sees none: take device=cpu")
    except ValueError as error:
        print(f"benchmark_cache: {error}", file=sys.stderr)
        return 2
    return run(plan(**chosen))


def plan(*, device: str, queries: int, cache_tokens: int) -> list[Case]:
    """The plain step, then the cached ones; queries: of the largest, where 0 is 1,024 or, on a GPU, 16,384."""
    large = [(queries or 1024, True, 1)] if device == "cpu" else [(1024, True, 3), (queries or 16384, True, 1)]
    steps = [(SMALL, False, 3), (SMALL, True, 3), *large]
    return [Case(device, cache_tokens, *step) for step in steps]


def run(cases: Sequence[Case]) -> int:
    """Measure each case alone, print its row and at the end the machine, and return the status."""
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    results: list[Measured | str] = []
    for case in cases:
        # A process has one peak. On Linux it begins at that of the process which started it: this one stays small.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                results.append(pool.submit(measure_alone, case).result())
            except Exception as error:  # whatever a step raises, such as no memory left, is its result
                results.append(first_line(error))
        print(row(case, results[-1], results[0]), flush=True)
    on_gpu = cases[0].device == "cuda"
    machine = [torch.cuda.get_device_name() if on_gpu else processor(), f"{torch.get_num_threads()} threads"]
    packages = ["torch", "transformers", *([] if on_gpu else ["sentence-transformers"])]
    machine += [f"{name} {version(name)}" for name in packages]
    machine += sorted({f"MaxSim {result.maxsim}" for result in results if isinstance(result, Measured)})
    print(", ".join(machine))
    return int(any(isinstance(result, str) for result in results))


def row(case: Case, result: Measured | str, plain: Measured | str) -> str:
    """A line of the table; a text says why nothing was measured."""
    cells = ["cached" if case.cached else "plain", f"{case.queries:,}"]
    if isinstance(result, str):
        cells += [result.replace("|", "/"), *"----"]
    else:
        cells += [f"{result.chunks:,}", f"{result.seconds:.3g}"]
        cells += [f"{size / 2**20:,.0f} MiB" for size in (result.peak_bytes, result.before_bytes)]
        cells.append("-" if isinstance(plain, str) else f"{result.peak_bytes / plain.peak_bytes:.2f}x")
    return f"| {' | '.join(cells)} |"


def measure_alone(case: Case) -> Measured:
    """Measure in a process that has done nothing else."""
    if case.device == "cuda":
        # The sizes that transformers gives a ModernBERT by default are those of ModernBERT-base.
        return measure(case, *prepare_random(case, sizes={}))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer would take a GPU that is there
    return measure(case, *prepare_training(compose_config(case)))


def measure(case: Case, step: Step, optimizer: Optimizer, maxsim: str) -> Measured:
    """Warm up with a small step of the same kind, then take the median of the steps."""
    # Gradients and moments, which a step of any batch needs; zeros move the weights by their decay alone.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    before, chunks, seconds = peak_bytes(case.device), 0, []
    for number, queries in enumerate([SMALL, *[case.queries] * case.steps]):
        start = time.perf_counter()
        chunks = step(queries, number)
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Measured(chunks, statistics.median(seconds[1:]), before, peak_bytes(case.device), maxsim)


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    from trainer.loop import peak_memory_bytes

    return peak_memory_bytes(torch.device(device))


def compose_config(case: Case) -> "Config":
    """The default config with the batch and the cache of the case."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from configs.schema import Config, parse_config

    ConfigStore.instance().store("schema", Config)
    cache = f"trainer.cache_tokens={(case.cache_tokens or '${trainer.chunk_tokens}') if case.cached else 'null'}"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse_config(compose("train", ["name=benchmark_cache", f"trainer.batch_size={case.queries}", cache]))


def prepare_training(config: "Config") -> tuple[Step, Optimizer, str]:
    """Build what train.py builds; a step is what trainer/loop.py does, tokens included, without logging."""
    import logging

    import datasets
    from accelerate.utils import set_seed
    from transformers.utils import logging as transformers_logging

    from architectures.factory import build_encoder
    from losses.factory import build_loss
    from trainer.data import load_data
    from trainer.encoding import TrainedModel
    from trainer.loop import build_batches
    from trainer.optim import build_optimizer, freeze
    from trainer.plan import build_accelerator, check_batch, choose_maxsim
    from trainer.step import compute_gradient

    datasets.disable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    data, accelerator = load_data(config.data), build_accelerator(config)
    check_batch(config, data, accelerator.num_processes)
    [examples] = data.sets
    set_seed(config.seed)
    encoder = build_encoder(config.backbone, config.head)
    maxsim = choose_maxsim(config, accelerator.device, encoder)
    loss = build_loss(config.loss, width=encoder.get_embedding_dimension() or 0, maxsim=maxsim)
    freeze(encoder, loss.learnt, config.optimizer)
    batches = {}
    for queries in (SMALL, config.trainer.batch_size):
        sized = replace(config, trainer=replace(config.trainer, batch_size=queries))
        # An epoch is cut evenly: only a multiple of the batch is cut into full ones.
        full = examples.select(range(len(examples) // queries * queries))
        batches[queries] = build_batches(sized, [full], encoder, accelerator)
    whole = TrainedModel(encoder, loss.learnt).to(accelerator.device)
    model, optimizer = accelerator.prepare(whole, build_optimizer(encoder, loss.learnt, config.optimizer))

    def step(queries: int, number: int) -> int:
        micro_batches = batches[queries][number]
        model.train()
        compute_gradient(accelerator, model, loss, micro_batches, cached=config.trainer.cache_tokens is not None)
        accelerator.clip_grad_norm_(model.parameters(), config.trainer.max_gradient_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(batch.queries.chunks) + len(batch.documents.chunks) for batch in micro_batches)

    return step, optimizer, maxsim


class RandomEncoder(nn.Module):
    """ModernBERT under a linear head, untrained; it is called as the trainer's model is."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        from transformers import ModernBertConfig, ModernBertModel

        self.backbone = ModernBertModel(ModernBertConfig(**sizes))
        self.head = nn.Linear(self.backbone.config.hidden_size, WIDTH, bias=False)

    def forward(self, features: dict[str, Any], *, task: str) -> dict[str, Any]:
        vectors = self.head(self.backbone(**features).last_hidden_state)
        return {"token_embeddings": F.normalize(vectors, dim=-1), "attention_mask": features["attention_mask"]}


def prepare_random(case: Case, sizes: dict[str, Any]) -> tuple[Step, Optimizer, str]:
    """Build a random encoder and its optimiser; sizes: what of a ModernBertConfig is not its default."""
    torch.manual_seed(1)
    device = torch.device(case.device)
    accelerator = Accelerator(mixed_precision="bf16", cpu=case.device == "cpu")
    encoder = RandomEncoder(sizes).to(device)
    model, optimizer = accelerator.prepare(encoder, AdamW(encoder.parameters(), lr=1e-4, fused=True))
    maxsim = choose_backend(
        "auto", device=device, dtype=torch.bfloat16, embedding_size=WIDTH, longest_text=DOCUMENT_TOKENS
    )
    vocabulary = encoder.backbone.config.vocab_size
    chunk_tokens = (case.cached and case.cache_tokens) or SMALL * DOCUMENT_TOKENS

    def step(queries: int, number: int) -> int:
        model.train()
        chunks = {}
        for task, tokens in (("query", QUERY_TOKENS), ("document", DOCUMENT_TOKENS)):
            ids = torch.randint(vocabulary, (queries, tokens), device=device)
            chunks[task] = ids.split(max(1, chunk_tokens // tokens))
        leave_gradient(accelerator, model, chunks, cached=case.cached, maxsim=maxsim)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(map(len, chunks.values()))

    return step, optimizer, maxsim


def leave_gradient(
    accelerator: Accelerator, model: nn.Module, chunks: dict[str, Sequence[Tensor]], *, cached: bool, maxsim: str
) -> None:
    """Do what compute_gradient of trainer/step.py does, which needs `datasets` and more to be imported.

    chunks: ids (texts, tokens) of "query" and "document"; each query's positive is the document in its place.
    """
    encoder = GradCache(model) if cached else model
    with accelerator.autocast():
        places = torch.arange(sum(map(len, chunks["query"])), device=chunks["query"][0].device)
        sides = []
        for task, several in chunks.items():
            outputs = [
                encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, task=task) for ids in several
            ]
            for name in ("token_embeddings", "attention_mask"):
                # Indexed, which copies them: the trainer puts the texts back into their order.
                sides.append(torch.cat([output[name] for output in outputs])[places])
        queries, query_mask, documents, document_mask = sides
        batch = EncodedBatch(
            queries=queries,
            query_mask=query_mask.bool(),
            documents=documents,
            document_mask=document_mask.bool(),
            candidates=places[:, None],
            teacher_scores=None,
            document_ids=places + 1,
            known_positives=places[:, None] + 1,
        )
        loss = ContrastiveLoss(
            temperature=1.0, symmetric=False, own_negatives=True, mask_known_positives=True, max_negative_ratio=None
        )
        values, _ = loss(score(batch, gather_pool(batch), width=WIDTH, maxsim_backend=maxsim))
    accelerator.backward(values.mean())
    if isinstance(encoder, GradCache):
        encoder.replay(accelerator, [], synchronise=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
