"""What a run will do, in global terms, checked before any weight is loaded and shown before the first step."""

import statistics

import torch
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, ConfigError, Precision
from losses.maxsim import choose_backend
from trainer.data import Data
from trainer.data.batches import count_steps_per_epoch
from trainer.loop import count_steps

# Texts whose length is measured for the start-up table.
SAMPLE = 512


def check_batch(config: Config, examples: int) -> None:
    """Raise ConfigError where the training examples do not fill one batch."""
    if config.trainer.batch_size > examples:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} is larger than the {examples} training examples: "
            f"set {examples} or less"
        )


def choose_maxsim(config: Config) -> str:
    """Return the name of the MaxSim that runs, or raise ConfigError where the one asked for cannot."""
    try:
        return choose_backend(config.trainer.maxsim.name)
    except ValueError as error:
        raise ConfigError(f"trainer.{error}") from error


def build_accelerator(config: Config) -> Accelerator:
    """Return the accelerator for the precision asked for, on the device that it finds."""
    if config.trainer.precision is Precision.fp16 and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=fp16 needs a GPU and this machine has none: use float32 or bf16")
    accelerator = Accelerator(mixed_precision=config.trainer.precision.value)
    if accelerator.num_processes > 1:
        raise ConfigError(f"{accelerator.num_processes} processes were started; this version trains on one: start one")
    return accelerator


def describe_run(
    config: Config, data: Data, encoder: MultiVectorEncoder, accelerator: Accelerator, backend: str
) -> dict[str, str]:
    """The facts of the start-up table, by name."""
    trainer = config.trainer
    micro_batch = trainer.batch_size // trainer.accumulation_steps
    explicit = sum(map(len, data.train["negatives"])) / len(data.train)
    negatives = f"{micro_batch - 1} in the batch"
    if explicit:
        negatives += f" + {explicit * micro_batch:.1f} explicit of all its queries"
    evaluation = f"none: data.evaluation_fraction={config.data.evaluation_fraction:g} holds out no example"
    if data.evaluation is not None:
        evaluation = f"{len(data.evaluation.queries):,} queries, {len(data.evaluation.corpus):,} documents"
    steps = count_steps(config, len(data.train))
    sample = data.train[:SAMPLE]
    return {
        "data": f"{config.data.format.name}, {len(data.train):,} training examples",
        "evaluation": evaluation,
        "queries": _lengths(encoder, sample["query"], "query"),
        "documents": _lengths(encoder, sample["positive"], "document"),
        "batch": f"{trainer.batch_size} queries a step, {trainer.accumulation_steps} micro-batch(es) of {micro_batch}, "
        f"{accelerator.num_processes} process(es)",
        "negatives a query": negatives,
        "steps": f"{steps:,}, {steps / count_steps_per_epoch(len(data.train), trainer.batch_size):.2f} epochs",
        "precision": f"{trainer.precision.name} on {accelerator.device}",
        "MaxSim": backend,
        "output": config.output_dir,
    }


def _lengths(encoder: MultiVectorEncoder, texts: list[str], task: str) -> str:
    """The cap of a side, how much of a sample it cuts, and what is added to a text."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    assert transformer.tokenizer is not None
    prompt = encoder.prompts.get(task) or ""
    lengths = [len(tokens) for tokens in transformer.tokenizer([prompt + text for text in texts])["input_ids"]]
    cap = transformer.query_length if task == "query" else transformer.document_length
    cap = cap or transformer.tokenizer.model_max_length
    cut = sum(length > cap for length in lengths) / len(lengths)
    limit = f"at most {cap} tokens" if cap < 10**9 else "no limit"  # tokenizers without one say 10^30
    words = f"{limit}, which cuts {cut:.0%} of {len(texts)}, whose median is {statistics.median_low(lengths)}"
    if task == "query" and (expansion := transformer.query_expansion):
        least = "" if expansion["strategy"] == "fixed" else "at least "
        seen = "attended" if expansion["attend"] else "unattended"
        words += f"; filled to {least}{expansion['length']} with {seen} mask tokens"
    return f"{words}; prefix {prompt!r}" if prompt else words
