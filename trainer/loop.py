"""The training loop: plain text, no callbacks; "every k steps" is an `if`."""

import math
import resource
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from sentence_transformers import MultiVectorEncoder
from torch.utils.data import DataLoader

from configs.schema import Config
from losses import Loss
from trainer.data import Data
from trainer.data.batches import Batch, StepBatches, count_steps_per_epoch
from trainer.display import ProgressDisplay
from trainer.encoding import encode_batch
from trainer.evaluation import evaluate
from trainer.optim import build_optimizer, build_schedule
from trainer.run_folder import BEST, MODEL, RunFolder


class TrainingError(Exception):
    """A run that cannot go on: what happened, at which step, to which examples."""


def count_steps(config: Config, examples: int) -> int:
    """Optimiser steps of a run: as configured, or as many as its epochs take."""
    if config.trainer.steps is not None:
        return config.trainer.steps
    assert config.trainer.epochs is not None, "parse_config lets one of the two pass"
    steps = config.trainer.epochs * count_steps_per_epoch(examples, config.trainer.batch_size)
    return max(1, math.ceil(round(steps, 6)))  # 0.07 of 100 steps are 7, though the product is a little more


def train(
    accelerator: Accelerator,
    encoder: MultiVectorEncoder,
    *,
    loss: Loss,
    data: Data,
    config: Config,
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Train the encoder, score it before, during and after, save it, and return what result.json holds.

    Raises TrainingError where the loss is not finite.
    """
    started = time.perf_counter()
    steps = count_steps(config, len(data.train))
    batches = StepBatches(
        data.train,
        encoder,
        batch_size=config.trainer.batch_size,
        accumulation_steps=config.trainer.accumulation_steps,
        chunk_tokens=config.trainer.chunk_tokens,
        seed=config.seed,
    )
    loader = DataLoader(batches, batch_size=None, sampler=range(steps))
    encoder.to(accelerator.device)
    optimizer = build_optimizer(encoder, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, steps=steps)
    model, optimizer = accelerator.prepare(encoder, optimizer)

    def score() -> dict[str, float] | None:
        if data.evaluation is None:
            return None
        return evaluate(encoder, data.evaluation, batch_size=config.evaluation.batch_size)

    before = after = score()
    if before is not None:
        console.print(f"before  {_one_line(before)}")
    folder.log(0, _prefixed("eval", before))
    best, best_step = -math.inf, 0
    totals = {"queries": 0, "tokens": 0, "padded_tokens": 0, "seconds": 0.0}
    with ProgressDisplay(console, steps=steps, log_every_steps=config.trainer.log_every_steps) as progress:
        step_started = time.perf_counter()
        for step, micro_batches in enumerate(loader, start=1):
            model.train()
            step_loss = torch.zeros((), device=accelerator.device)
            for batch in micro_batches:
                with accelerator.no_sync(model) if batch is not micro_batches[-1] else nullcontext():
                    with accelerator.autocast():
                        micro_loss = loss(encode_batch(model, batch, accelerator.device)) * batch.share
                    accelerator.backward(micro_loss)
                step_loss += micro_loss.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), config.trainer.max_gradient_norm or math.inf)
            loss_value, gradient_norm = step_loss.item(), float(norm)
            _check_finite(step, "loss", loss_value, micro_batches, data, folder)
            if accelerator.scaler is None:  # the scaler of fp16 skips a step whose gradient overflows
                _check_finite(step, "gradient norm", gradient_norm, micro_batches, data, folder)
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - step_started
            counts = {
                "queries": sum(len(batch.rows) for batch in micro_batches),
                "tokens": sum(batch.documents.tokens for batch in micro_batches),
                "padded_tokens": sum(batch.documents.padded_tokens for batch in micro_batches),
                "seconds": seconds,
            }
            totals = {key: totals[key] + value for key, value in counts.items()}
            metrics: dict[str, float] = {
                "train/loss": loss_value,
                "train/learning_rate": learning_rate,
                "train/gradient_norm": gradient_norm,
                **_prefixed("train", _rates(counts)),
                "train/seconds": seconds,
            }
            progress.step(step, metrics, seconds_left=(steps - step) * totals["seconds"] / step)
            every = config.evaluation.every_steps
            if step == steps or (every is not None and step % every == 0):
                after = score()
                metrics |= _prefixed("eval", after)
                if after is not None:
                    progress.say(f"step {step}  {_one_line(after)}")
                    # The last model is saved anyway: where it is the best, no earlier one is kept beside it.
                    if after[config.evaluation.metric.name] > best:
                        best, best_step = after[config.evaluation.metric.name], step
                        if step < steps:
                            folder.save_model(encoder, BEST)
                        else:
                            folder.remove_model(BEST)
            folder.log(step, metrics)
            step_started = time.perf_counter()

    path = folder.save_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False), MODEL)
    return {
        "model": str(path),
        "best": None
        if after is None
        else {
            "model": str(folder.path / BEST if best_step < steps else path),
            "step": best_step,
            config.evaluation.metric.name: best,
        },
        "steps": steps,
        "queries": totals["queries"],
        "seconds": time.perf_counter() - started,
        "processes": accelerator.num_processes,
        "before": before,
        "after": after,
        **_rates(totals),
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }


def _check_finite(
    step: int, name: str, value: float, micro_batches: list[Batch], data: Data, folder: RunFolder
) -> None:
    if math.isfinite(value):
        return
    examples = [data.train[row] for batch in micro_batches for row in batch.rows]
    path = folder.write_failed_batch(examples)
    raise TrainingError(
        f"step {step}: the {name} is {value}; the batch is {examples[0]['place']} and {len(examples) - 1} more "
        f"examples, all in {path}: look at them, or lower optimizer.learning_rate"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was allocated on the GPU, or that the process held where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rates(counts: dict[str, float]) -> dict[str, float]:
    return {
        "queries_per_second": counts["queries"] / counts["seconds"],
        "document_tokens_per_second": counts["tokens"] / counts["seconds"],
        "padding_fraction": 1 - counts["tokens"] / counts["padded_tokens"],
    }


def _prefixed(prefix: str, metrics: dict[str, float] | None) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in (metrics or {}).items()}


def _one_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
