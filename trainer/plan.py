"""What a run will do, in global terms, checked before any weight is loaded and shown before the first step."""

import os
import statistics
import warnings
from typing import TypedDict

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, ConfigError, Precision
from losses.maxsim import check_kernel, choose_backend, kernel_obstacle
from trainer.data import Data
from trainer.data.batches import count_steps_per_epoch
from trainer.loop import count_steps

# Texts whose length is measured for the start-up table.
SAMPLE = 512


def check_batch(config: Config, examples: int, processes: int) -> None:
    """Raise ConfigError where the training examples do not fill one batch, or a micro-batch not every process."""
    trainer = config.trainer
    if trainer.batch_size > examples:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is larger than the {examples} training examples: "
            f"set {examples} or less"
        )
    smallest = examples // count_steps_per_epoch(examples, trainer.batch_size) // trainer.accumulation_steps
    if smallest < processes:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} in trainer.accumulation_steps={trainer.accumulation_steps} "
            f"leaves a micro-batch with {smallest} of its queries, fewer than the {processes} processes: "
            "raise trainer.batch_size or start fewer processes"
        )


def check_steps(steps: int, done: int) -> None:
    """Raise ConfigError where a resumed run has nothing left to do."""
    if steps <= done:
        raise ConfigError(
            f"trainer.steps={steps}: the run has done {done} steps: set more, or more trainer.epochs, to go on"
        )


def choose_maxsim(config: Config, device: torch.device, encoder: MultiVectorEncoder | None = None) -> str:
    """Return the name of the MaxSim that runs, or raise ConfigError where the one asked for cannot.

    Without an encoder, whose sizes may forbid the kernel, the answer says what the machine and the precision allow.
    With one, the kernel is compiled and held against the reference.
    """
    choice, vectors = config.trainer.maxsim.name, _what_maxsim_gets(config, device, encoder)
    try:
        backend = choose_backend(choice, **vectors)
        if backend == "cuda" and encoder is not None:
            check_kernel(device, vectors["dtype"], vectors["embedding_size"])
    except ValueError as error:
        raise ConfigError(f"trainer.{error}") from error
    except RuntimeError as error:
        raise ConfigError(f"trainer.maxsim={choice}: {error}\nUse trainer.maxsim=reference") from error
    return backend


def build_accelerator(config: Config) -> Accelerator:
    """Return the accelerator for the precision asked for, on the devices and processes that it finds.

    Raises ConfigError where these are not what was asked for.
    """
    if config.trainer.precision is Precision.fp16 and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=fp16 needs a GPU and this machine has none: use float32 or bf16")
    # torch 2.13 has another name for it, which accelerate does not know yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        mixed_precision=config.trainer.precision.value,
        # Unsaid, accelerate looks for GPUs to start processes on, and without one leaves each by itself.
        cpu=not torch.accelerator.is_available(),
        # Broadcast at every forward, they would wait for processes whose batch has fewer chunks; none ever changes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # accelerate launch sets the address for several processes, and with --cpu, or without a GPU, starts one.
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked == "1" and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ):
        asked = "several"
    if accelerator.num_processes == 1 and asked != "1":
        raise ConfigError(
            f"{asked} processes were asked for and each would train by itself: on GPUs, accelerate launch --multi_gpu "
            "--num_processes 2 train.py ...; without, ACCELERATE_USE_CPU=true before the same command, "
            "or torchrun --nproc_per_node 2 train.py ...; for one process, unset MASTER_ADDR"
        )
    kind = accelerator.distributed_type
    if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate launch was asked for {kind.value}, and several processes train here by data parallelism "
            "alone: launch with --multi_gpu, or --config_file configs/accelerate/one_node.yaml"
        )
    return accelerator


def describe_run(
    config: Config, data: Data, encoder: MultiVectorEncoder, accelerator: Accelerator, backend: str
) -> dict[str, str]:
    """The facts of the start-up table, by name."""
    trainer = config.trainer
    micro_batch = trainer.batch_size // trainer.accumulation_steps
    explicit = sum(map(len, data.train["negatives"])) / len(data.train)
    processes = accelerator.num_processes
    each = f"{micro_batch // processes}" if micro_batch % processes == 0 else f"about {micro_batch / processes:.1f}"
    negatives = f"{micro_batch - 1} in the batch" + (" gathered from all processes" if processes > 1 else "")
    if explicit:
        negatives += f" + {explicit * micro_batch:.1f} explicit of all its queries"
    evaluation = f"none: data.evaluation_fraction={config.data.evaluation_fraction:g} holds out no example"
    if data.evaluation is not None:
        evaluation = f"{len(data.evaluation.queries):,} queries, {len(data.evaluation.corpus):,} documents"
    steps = count_steps(config, len(data.train))
    sample = data.train[:SAMPLE]
    reason = kernel_obstacle(**_what_maxsim_gets(config, accelerator.device, encoder))
    return {
        "data": f"{config.data.format.name}, {len(data.train):,} training examples",
        "evaluation": evaluation,
        "queries": _lengths(encoder, sample["query"], "query"),
        "documents": _lengths(encoder, sample["positive"], "document"),
        "batch": f"{trainer.batch_size} queries a step, {trainer.accumulation_steps} micro-batch(es) of {micro_batch}, "
        f"{processes} process(es)" + (f" of {each} queries each" if processes > 1 else ""),
        "negatives a query": negatives,
        "steps": f"{steps:,}, {steps / count_steps_per_epoch(len(data.train), trainer.batch_size):.2f} epochs",
        "precision": f"{trainer.precision.name} on {accelerator.device.type}",
        "MaxSim": backend + (f", as {reason}" if backend != config.trainer.maxsim.name and reason else ""),
        "output": config.output_dir,
    }


class _MaxSimInput(TypedDict):
    device: torch.device
    dtype: torch.dtype
    embedding_size: int
    longest_text: int


def _what_maxsim_gets(config: Config, device: torch.device, encoder: MultiVectorEncoder | None) -> _MaxSimInput:
    dtype = {Precision.float32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
    sizes = _MaxSimInput(device=device, dtype=dtype[config.trainer.precision], embedding_size=16, longest_text=0)
    if encoder is not None:
        transformer, width = encoder[0], encoder.get_embedding_dimension()
        assert isinstance(transformer, Transformer)
        assert width is not None
        sizes["embedding_size"] = width
        sizes["longest_text"] = max(_cap(transformer, task) for task in ("query", "document"))
    return sizes


def _cap(transformer: Transformer, task: str) -> int:
    """Tokens that a side is cut to."""
    assert transformer.tokenizer is not None
    cap = transformer.query_length if task == "query" else transformer.document_length
    return int(cap or transformer.max_seq_length or transformer.tokenizer.model_max_length)


def _lengths(encoder: MultiVectorEncoder, texts: list[str], task: str) -> str:
    """The cap of a side, how much of a sample it cuts, and what is added to a text."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    assert transformer.tokenizer is not None
    prompt = encoder.prompts.get(task) or ""
    lengths = [len(tokens) for tokens in transformer.tokenizer([prompt + text for text in texts])["input_ids"]]
    cap = _cap(transformer, task)
    cut = sum(length > cap for length in lengths) / len(lengths)
    limit = f"at most {cap} tokens" if cap < 10**9 else "no limit"  # tokenizers without one say 10^30
    words = f"{limit}, which cuts {cut:.0%} of {len(texts)}, whose median is {statistics.median_low(lengths)}"
    if task == "query" and (expansion := transformer.query_expansion):
        least = "" if expansion["strategy"] == "fixed" else "at least "
        seen = "attended" if expansion["attend"] else "unattended"
        words += f"; filled to {least}{expansion['length']} with {seen} mask tokens"
    return f"{words}; prefix {prompt!r}" if prompt else words
