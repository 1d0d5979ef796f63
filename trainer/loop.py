"""The training loop: plain text, no callbacks; "every k steps" is an `if`."""

import math
import resource
import shlex
import sys
import time
from contextlib import nullcontext
from signal import SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from configs.schema import Config
from losses.factory import Loss
from trainer.checkpoint import TrainState, UnreadableCheckpoint, gather_random_states, set_random_state
from trainer.data import Data
from trainer.data.batches import Batch, StepBatches, count_steps_per_epoch
from trainer.display import ProgressDisplay
from trainer.encoding import encode_batch
from trainer.evaluation import evaluate
from trainer.optim import build_optimizer, build_schedule
from trainer.run_folder import BEST, MODEL, RunFolder
from trainer.stop import StopWish
from trainer.tracker import Tracker


class TrainingError(Exception):
    """A run that cannot go on: what happened, at which step, to which examples."""


class Stopped(Exception):
    """A run that a signal ended after a step, all of which is saved."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


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
    tracker: Tracker,
    console: Console,
) -> dict[str, Any]:
    """Train the encoder, score it before, during and after, save it, and return what result.json holds.

    Goes on from the newest checkpoint of the folder, if it has one. Each of several processes calls it.
    Raises TrainingError where the loss is not finite, Stopped after a signal.
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
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    encoder.to(accelerator.device)
    optimizer = build_optimizer(encoder, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, steps=steps)
    state = TrainState(encoder, optimizer, schedule, accelerator.scaler)
    # Each process drops other activations.
    set_seed(config.seed, device_specific=True)
    resume(state, accelerator, folder, console)
    for line in folder.metrics():  # what a tracker of the killed run may not have got to its disk or server
        tracker.log(line.pop("step"), line)
    done, earlier_seconds = state.progress, state.progress.seconds
    model, optimizer = accelerator.prepare(encoder, optimizer)

    def score() -> dict[str, float] | None:
        if data.evaluation is None:
            return None
        return evaluate(encoder, data.evaluation, batch_size=config.evaluation.batch_size)

    if done.step == 0:
        done.before = done.after = score()
        folder.log(0, _prefixed("eval", done.before))
        tracker.log(0, _prefixed("eval", done.before))
    if done.before is not None:
        console.print(f"before  {_one_line(done.before)}")
    # A generator of its own, or the loader would draw from the one of dropout.
    loader = DataLoader(batches, batch_size=None, sampler=range(done.step, steps), generator=torch.Generator())
    with (
        ProgressDisplay(console, steps=steps, log_every_steps=config.trainer.log_every_steps) as progress,
        StopWish(progress.say) as wish,
    ):
        step_started = time.perf_counter()
        for micro_batches in loader:
            step = done.step + 1
            model.train()
            step_loss = compute_gradient(accelerator, model, loss, micro_batches)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.trainer.max_gradient_norm or math.inf)
            counts = {
                "loss": step_loss.item(),
                "queries": sum(len(batch.rows) for batch in micro_batches),
                "tokens": sum(batch.documents.tokens for batch in micro_batches),
                "padded_tokens": sum(batch.documents.padded_tokens for batch in micro_batches),
                "signal": wish.signal or 0,
            }
            counts = _sum_over_processes(accelerator, counts)
            loss_value, gradient_norm = counts.pop("loss"), float(norm)
            stop_signal = counts.pop("signal")
            # The scaler of fp16 skips a step whose gradient overflows.
            for name, value in (("loss", loss_value), ("gradient norm", gradient_norm)):
                if not math.isfinite(value) and not (name == "gradient norm" and accelerator.scaler):
                    raise _not_finite(step, name, value, [data.train[row] for row in batches.rows(step - 1)], folder)
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            optimizer.zero_grad()

            counts["seconds"] = time.perf_counter() - step_started
            done.step = step
            done.totals = {key: done.totals[key] + value for key, value in counts.items()}
            metrics: dict[str, float] = {
                "train/loss": loss_value,
                "train/learning_rate": learning_rate,
                "train/gradient_norm": gradient_norm,
                **_prefixed("train", _rates(counts)),
                "train/seconds": counts["seconds"],
            }
            progress.step(step, metrics, seconds_left=(steps - step) * done.totals["seconds"] / step)
            every = config.evaluation.every_steps
            if step == steps or (every is not None and step % every == 0):
                done.after = score()
                metrics |= _prefixed("eval", done.after)
                if done.after is not None:
                    progress.say(f"step {step}  {_one_line(done.after)}")
                    # The last model is saved anyway: where it is the best, no earlier one is kept beside it.
                    value = done.after[config.evaluation.metric.name]
                    if done.best is None or value > done.best:
                        done.best, done.best_step = value, step
                        if step < steps:
                            folder.save_model(encoder, BEST, step=step)
                        else:
                            folder.remove_model(BEST)
            folder.log(step, metrics)
            tracker.log(step, metrics)
            every = config.trainer.save_every_steps
            if step < steps and (stop_signal or (every is not None and step % every == 0)):
                done.seconds = earlier_seconds + time.perf_counter() - started
                folder.save_checkpoint(state, gather_random_states(), keep=config.trainer.keep_checkpoints)
                if stop_signal:
                    accelerator.wait_for_everyone()  # a launcher that sees one process end ends the one that saves
                    # Of several processes, one may hear of the signal first.
                    raise Stopped(wish.signal or SIGTERM, _how_to_go_on(accelerator, folder, step, steps))
            step_started = time.perf_counter()

    path = folder.save_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False), MODEL, step=steps)
    best = None
    if done.best is not None:
        best_path = folder.path / BEST if done.best_step < steps else path
        best = {"model": str(best_path), "step": done.best_step, config.evaluation.metric.name: done.best}
    return {
        "model": str(path),
        "best": best,
        "steps": steps,
        "queries": int(done.totals["queries"]),
        "seconds": earlier_seconds + time.perf_counter() - started,
        "processes": accelerator.num_processes,
        "before": done.before,
        "after": done.after,
        **_rates(done.totals),
        "peak_memory_bytes": max(gather_object([peak_memory_bytes(accelerator.device)])),
    }


def compute_gradient(accelerator: Accelerator, model: nn.Module, loss: Loss, micro_batches: list[Batch]) -> Tensor:
    """Leave in the parameters the gradient of the mean loss over all queries of the step, on all processes, and return
    what this process adds to that loss."""
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in micro_batches:
        with accelerator.no_sync(model) if batch is not micro_batches[-1] else nullcontext():
            with accelerator.autocast():
                micro_loss = loss(encode_batch(model, batch, accelerator.device)) * batch.share
            # DistributedDataParallel takes the mean over processes, and the shares make a sum of it.
            accelerator.backward(micro_loss * accelerator.num_processes)
        step_loss += micro_loss.detach()
    return step_loss


def resume(state: TrainState, accelerator: Accelerator, folder: RunFolder, console: Console) -> None:
    """Take the newest whole checkpoint of the folder; where none was saved, the run starts at its first step.

    Raises TrainingError where none of those saved is whole, or the processes see different ones.
    """
    step, not_whole = None, []
    for checkpoint in folder.checkpoints():
        try:
            random_states = state.load(checkpoint)
        except UnreadableCheckpoint as error:
            console.print(f"left out: {error}")
            not_whole.append(checkpoint)
            continue
        except OSError as error:
            raise TrainingError(f"{checkpoint} cannot be read ({error}): mend that and resume again") from error
        step = state.progress.step
        console.print(f"resumed after step {step}, from {checkpoint}")
        if len(random_states) == accelerator.num_processes:
            set_random_state(random_states[accelerator.process_index])
        else:
            console.print(
                f"{len(random_states)} process(es) saved it and {accelerator.num_processes} go on: "
                "the examples stay the same, dropout is drawn anew"
            )
        break
    if not_whole and step is None:
        raise TrainingError(f"no checkpoint of {folder.path} is whole: rerun={folder.path} output_dir=... starts again")
    for checkpoint in not_whole:
        folder.set_aside(checkpoint)
    # The best model may be of a step that is still to come again; it is then chosen anew.
    if folder.model_step(BEST) != (state.progress.best_step or None):
        folder.remove_model(BEST)
        state.progress.best, state.progress.best_step = None, 0
    steps = gather_object([state.progress.step])
    if len(set(steps)) > 1:
        raise TrainingError(f"the processes read checkpoints of steps {steps}: do all see one folder {folder.path}?")
    folder.cut_metrics(step)


def _how_to_go_on(accelerator: Accelerator, folder: RunFolder, step: int, steps: int) -> str:
    processes = accelerator.num_processes
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    command = f"{launcher} train.py resume={shlex.quote(str(folder.path))}"
    return f"stopped after step {step} of {steps}; go on with: {command}"


def _not_finite(step: int, name: str, value: float, examples: list[dict[str, Any]], folder: RunFolder) -> TrainingError:
    path = folder.write_failed_batch(examples)
    return TrainingError(
        f"step {step}: the {name} is {value}; the batch is {examples[0]['place']} and {len(examples) - 1} more "
        f"examples, all in {path}: look at them, or lower optimizer.learning_rate"
    )


def _sum_over_processes(accelerator: Accelerator, counts: dict[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return counts
    # One exchange a step; float32 holds every count below 16 million.
    total = accelerator.reduce(torch.tensor(list(counts.values()), device=accelerator.device), reduction="sum")
    return dict(zip(counts, total.tolist(), strict=True))


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
