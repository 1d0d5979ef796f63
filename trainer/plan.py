"""What a run will do, in global terms, checked before any weight is loaded and shown before the first step."""

import torch
from accelerate import Accelerator
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder

from configs.schema import Config, ConfigError, Precision
from trainer.data import Data
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
    evaluation = "none: data.evaluation_fraction=0"
    if data.evaluation is not None:
        evaluation = f"{len(data.evaluation.queries):,} queries, {len(data.evaluation.corpus):,} documents"
    steps = count_steps(config, len(data.train))
    return {
        "data": f"{config.data.format.name}, {len(data.train):,} training examples",
        "evaluation": evaluation,
        "queries": _lengths(encoder, data.train, "query"),
        "documents": _lengths(encoder, data.train, "document"),
        "batch": f"{trainer.batch_size} queries a step, {trainer.accumulation_steps} micro-batch(es) of {micro_batch}, "
        f"{accelerator.num_processes} process(es)",
        "negatives a query": negatives,
        "steps": f"{steps:,}, {steps * trainer.batch_size / len(data.train):.2f} epochs",
        "precision": f"{trainer.precision.name} on {accelerator.device}",
        "MaxSim": backend,
        "output": config.output_dir,
    }


def _lengths(encoder: MultiVectorEncoder, examples: Dataset, task: str) -> str:
    """The cap of a side, and how much of a sample it cuts."""
    transformer = encoder[0]
    texts = examples[:SAMPLE]["query" if task == "query" else "positive"]
    prompt = encoder.prompts.get(task) or ""
    lengths = [len(tokens) for tokens in transformer.tokenizer([prompt + text for text in texts])["input_ids"]]
    cap = transformer.query_length if task == "query" else transformer.document_length
    expansion = transformer.query_expansion if task == "query" else None
    if cap is None:
        cap = transformer.tokenizer.model_max_length
    cut = sum(length > cap for length in lengths) / len(lengths)
    words = f"at most {cap} tokens, which cuts {cut:.0%}; the median is {sorted(lengths)[len(lengths) // 2]}"
    if expansion:
        seen = "attended" if expansion["attend"] else "unattended"
        words += f"; {'filled' if expansion['strategy'] == 'fixed' else 'at least filled'} to {expansion['length']} with {seen} mask tokens"
    return f"{words}; prefix {prompt!r}" if prompt else words
