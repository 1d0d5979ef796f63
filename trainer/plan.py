"""What a run is checked for before its first step, most of it before any weight is loaded."""

import os
import warnings
from typing import TypedDict

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, ConfigError, Draw, MixedBatch, Normalization, Precision, Score
from losses.maxsim import check_kernel, choose_backend
from trainer.compiling import layers_of
from trainer.data import Data
from trainer.data.batches import choose_documents
from trainer.data.order import count_steps_per_epoch
from trainer.data.scores import ONE_HOT, is_one_hot
from trainer.data.tables import TrainingSet

# Queries whose teacher is looked at, evenly over the data.
TEACHER_SAMPLE = 10_000


def check_batch(config: Config, data: Data, processes: int) -> None:
    """Raise ConfigError where the training examples do not fill one batch, or a micro-batch not every process."""
    if len(data.sets) > 1 and config.data.mix_batches is MixedBatch.one_set:
        for each in data.sets:
            _check_batch(config, len(each), f"{len(each)} training examples of {each.name}", processes)
    else:
        _check_batch(config, data.size, f"{data.size} training examples", processes)


def _check_batch(config: Config, examples: int, which: str, processes: int) -> None:
    trainer = config.trainer
    if trainer.batch_size > examples:
        raise ConfigError(f"trainer.batch_size={trainer.batch_size} is larger than the {which}: set {examples} or less")
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


def check_teacher(config: Config, data: Data, *, query_length: int | None) -> None:
    """Raise ConfigError where most of the teacher's scores cannot teach: the same for all documents of a query, one
    document's alone under the softmax, or margins that no MaxSim has; of the documents that the first epoch takes.

    query_length: tokens of a query, each of which adds 1 to a score at most; None where that is not known.
    """
    terms = config.loss.terms
    if terms.distillation or terms.margin_mse:
        for index, examples in enumerate(data.sets):
            _check_teacher(config, examples, index, query_length=query_length)


def _check_teacher(config: Config, examples: TrainingSet, index: int, *, query_length: int | None) -> None:
    terms, loss = config.loss.terms, config.loss
    if not examples.has_teacher:
        raise ConfigError(
            f"loss.terms.distillation and margin_mse need teacher scores, and {examples.name} has none: give some, or "
            "set both to 0"
        )
    rows = range(0, len(examples), max(1, len(examples) // TEACHER_SAMPLE))
    sample = examples.examples.select_columns(["scores", "positives", "place"]).select(rows)
    taught = [
        np.array(scores)[
            choose_documents(
                len(scores),
                examples.config.documents_per_query,
                positives=positives,
                stratified=examples.config.draw is Draw.stratified,
                seed=(config.seed, 0, row, index),
            )
        ]
        for row, scores, positives in zip(rows, sample["scores"], sample["positives"], strict=True)
    ]

    def complain(bad: list[bool], what: str, remedy: str) -> None:
        if sum(bad) > len(bad) / 2:
            first = bad.index(True)
            scores = ", ".join(f"{score:g}" for score in taught[first][:3])
            raise ConfigError(
                f"{what} in {sum(bad) / len(bad):.0%} of {len(bad)} queries, such as {sample[first]['place']} "
                f"({scores}, ...): {remedy}"
            )

    complain(
        [np.ptp(scores) == 0 for scores in taught],
        "the teacher's scores are all the same",
        "there is nothing to learn from; check data.path",
    )
    if terms.distillation and loss.distillation.normalization is Normalization.min_max:
        complain(
            [len(scores) < 3 for scores in taught],
            "loss.distillation.normalization=min_max makes 0 and 1 of two documents",
            "give a query 3 or more, or set it to none",
        )
    if terms.distillation:
        temperature = loss.distillation.teacher_temperature
        deviation = np.median([scores.std() for scores in taught])
        complain(
            [is_one_hot(scores, temperature) for scores in taught],
            f"loss.distillation.teacher_temperature={temperature:g} leaves one document more than {ONE_HOT:.0%}",
            f"raise it; the scores of a query have a standard deviation of {deviation:.3g}",
        )
    if terms.margin_mse and query_length is not None:
        temperature, highest = loss.margin_mse.teacher_temperature, query_length
        if loss.margin_mse.score is Score.mean_maxsim:
            highest = 1
        margins = [np.abs(scores[0] - scores[1:]).mean() for scores in taught]
        complain(
            [margin / temperature > 2 * highest for margin in margins],
            f"loss.margin_mse.teacher_temperature={temperature:g} leaves margins above {2 * highest}, which "
            f"{loss.margin_mse.score.name} cannot have,",
            f"raise it; the margins of a query are {np.median(margins):.3g} on average",
        )


def check_encoder(config: Config, encoder: MultiVectorEncoder) -> None:
    """Raise ConfigError where the model cannot do what the loss and the trainer ask of it."""
    widths, own = config.loss.matryoshka.widths, encoder.get_embedding_dimension()
    if widths and widths[0] != own:
        narrower = [width for width in widths if width < (own or 0)]
        raise ConfigError(
            f"loss.matryoshka.widths={widths} must begin with the model's own width, {own}: "
            f"set it to {[own, *narrower] if narrower else []}, or give the head another width"
        )
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    if config.trainer.gradient_checkpointing and not transformer.model.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing=true: {type(transformer.model).__name__} cannot; "
            "set it to false, and trainer.cache_tokens for memory"
        )
    if config.trainer.compile:
        layers_of(encoder)


def choose_maxsim(config: Config, device: torch.device, encoder: MultiVectorEncoder | None = None) -> str:
    """Return the name of the MaxSim that runs, or raise ConfigError where the one asked for cannot.

    Without an encoder, whose sizes may forbid the kernel, the answer says what the machine and the precision allow.
    With one, the kernel is compiled and held against the reference.
    """
    choice = config.trainer.maxsim.name
    try:
        vectors = maxsim_inputs(config, device, encoder)
        # One for all widths: those that the kernel cannot take would be others' numbers.
        backend = min((choose_backend(choice, **each) for each in vectors), key=("reference", "cuda").index)
        if backend == "cuda" and encoder is not None:
            for each in vectors:
                check_kernel(device, each["dtype"], each["embedding_size"])
    except ValueError as error:
        raise ConfigError(f"trainer.{error}") from error
    except RuntimeError as error:
        raise ConfigError(f"trainer.maxsim={choice}: {error}\nUse trainer.maxsim=reference") from error
    return backend


def build_accelerator(config: Config, *, on_cpu: bool = False, program: str = "train.py") -> Accelerator:
    """Return the accelerator for the precision asked for, on the devices and processes that it finds.

    on_cpu: leave accelerators alone; program: what was started, for the commands in errors.
    Raises ConfigError where the devices or processes are not what was asked for.
    """
    if config.trainer.precision is Precision.fp16 and not torch.cuda.is_available():
        raise ConfigError("trainer.precision=fp16 needs a GPU and this machine has none: use float32 or bf16")
    # torch 2.13 has another name for it, which accelerate does not know yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        mixed_precision=config.trainer.precision.value,
        # Unsaid, accelerate looks for GPUs to start processes on, and without one leaves each by itself.
        cpu=on_cpu or not torch.accelerator.is_available(),
        # Broadcast at every forward, they would wait for processes whose batch has fewer chunks; none ever changes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # accelerate launch sets the address for several processes, and with --cpu, or without a GPU, starts one.
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked == "1" and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ):
        asked = "several"
    if accelerator.num_processes == 1 and asked != "1":
        raise ConfigError(
            f"{asked} processes were asked for and each would run by itself: "
            f"on GPUs, accelerate launch --multi_gpu --num_processes 2 {program} ...; without, ACCELERATE_USE_CPU=true "
            f"before the same command, or torchrun --nproc_per_node 2 {program} ...; for one process, unset MASTER_ADDR"
        )
    kind = accelerator.distributed_type
    if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate launch was asked for {kind.value}, and several processes train here by data parallelism "
            "alone: launch with --multi_gpu, or --config_file configs/accelerate/one_node.yaml"
        )
    return accelerator


class MaxSimInput(TypedDict):
    device: torch.device
    dtype: torch.dtype
    embedding_size: int
    longest_text: int


def maxsim_inputs(config: Config, device: torch.device, encoder: MultiVectorEncoder | None) -> list[MaxSimInput]:
    """At each width."""
    dtype = {Precision.float32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
    sizes = MaxSimInput(device=device, dtype=dtype[config.trainer.precision], embedding_size=16, longest_text=0)
    if encoder is not None:
        transformer, width = encoder[0], encoder.get_embedding_dimension()
        assert isinstance(transformer, Transformer)
        assert width is not None
        sizes["embedding_size"] = width
        sizes["longest_text"] = max(token_cap(transformer, task) for task in ("query", "document"))
    widths = config.loss.matryoshka.widths or [sizes["embedding_size"]]
    return [sizes | {"embedding_size": width} for width in widths]


def token_cap(transformer: Transformer, task: str) -> int:
    """Tokens that a side is cut to."""
    assert transformer.tokenizer is not None
    cap = transformer.query_length if task == "query" else transformer.document_length
    return int(cap or transformer.max_seq_length or transformer.tokenizer.model_max_length)
