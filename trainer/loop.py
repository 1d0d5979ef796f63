"""The training loop: plain text, no callbacks; "every k steps" is an `if`."""

import math
import resource
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from sentence_transformers import MultiVectorEncoder
from torch.utils.data import DataLoader

from architectures.heads import backbone_of
from configs.schema import Config
from losses.factory import Loss
from trainer.attention import use_own_attention
from trainer.checkpoint import TrainState, UnreadableCheckpoint, gather_random_states, set_random_state
from trainer.compiling import compilations, compile_layers
from trainer.data.batches import Batch, StepBatches
from trainer.data.order import count_steps_per_epoch
from trainer.data.retrieval import RetrievalSet, queries_of
from trainer.data.tables import TrainingSet, identity
from trainer.display import ProgressDisplay, counting
from trainer.dropout import fast_dropout
from trainer.encoding import TrainedModel
from trainer.evaluation import evaluate
from trainer.metrics import QueryScores, join_sets, means
from trainer.optim import build_optimizer, build_schedule, learning_rates
from trainer.packing import first_position, packing_obstacle
from trainer.phases import PHASES, Phases, tracing
from trainer.run_folder import BEST, MODEL, SCORES, SCORES_BEFORE, TRACE, RunFolder
from trainer.significance import change_interval
from trainer.step import Numbers, compute_gradient, embedding_gradients_by_token
from trainer.stop import StopWish
from trainer.tracker import Tracker

# Steps that a device is given before the host reads what came of the first of them.
STEPS_AHEAD = {"cuda": 1}


class TrainingError(Exception):
    """A run that cannot go on: what happened, at which step, to which examples."""


class Stopped(Exception):
    """A run that a signal ended after a step, all of which is saved."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class _Step:
    """A step that the device has been given."""

    step: int
    numbers: Numbers
    rates: dict[str, float]
    """Learning rates by the name of their group."""
    phases: Callable[[], dict[str, float]]
    """Gives the seconds of each phase."""


def count_steps(config: Config, examples: int) -> int:
    """Optimiser steps of a run: as configured, or as many as its epochs take."""
    if config.trainer.steps is not None:
        return config.trainer.steps
    assert config.trainer.epochs is not None, "parse_config lets one of the two pass"
    steps = config.trainer.epochs * count_steps_per_epoch(examples, config.trainer.batch_size)
    return max(1, math.ceil(round(steps, 6)))  # 0.07 of 100 steps are 7, though the product is a little more


def build_batches(
    config: Config, sets: Sequence[TrainingSet], encoder: MultiVectorEncoder, accelerator: Accelerator
) -> StepBatches:
    """What this process has of each step; all texts are tokenised first, or their tokens are an earlier run's.

    Texts are padded where trainer.pack is false, or the encoder makes other vectors of the first step's without.
    """
    batches = StepBatches(
        sets,
        encoder,
        config=config.data,
        batch_size=config.trainer.batch_size,
        accumulation_steps=config.trainer.accumulation_steps,
        chunk_tokens=config.trainer.cache_tokens or config.trainer.chunk_tokens,
        seed=config.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    use_own_attention(encoder)
    batches.first_position = first_position(encoder)
    batches.padded_because = "trainer.pack=false"
    if config.trainer.pack:
        batches.padded_because = packing_obstacle(encoder, batches[0][0].documents, accelerator)
    return batches


def build_model(encoder: MultiVectorEncoder, loss: Loss, config: Config) -> TrainedModel:
    """What is trained, as one module."""
    if config.trainer.gradient_checkpointing:
        backbone = backbone_of(encoder).model
        # The name from transformers 5.23 on, which 5.0 does not know, and 6 will not know the old one.
        enable = getattr(backbone, "activation_checkpointing_enable", None)
        # Not the reentrant kind: it breaks under DistributedDataParallel, and where the embeddings are frozen.
        (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
    return TrainedModel(encoder, loss.learnt)


def train(
    accelerator: Accelerator,
    encoder: MultiVectorEncoder,
    *,
    loss: Loss,
    batches: StepBatches,
    evaluation: Mapping[str, RetrievalSet],
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
    steps = count_steps(config, sum(map(len, batches.sets)))
    whole = build_model(encoder, loss, config).to(accelerator.device)
    optimizer = build_optimizer(encoder, loss.learnt, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, steps=steps)
    state = TrainState(whole, optimizer, schedule, accelerator.scaler)
    # Each process drops other activations.
    set_seed(config.seed, device_specific=True)
    resume(state, accelerator, folder, console)
    for line in folder.metrics():  # what a tracker of the killed run may not have got to its disk or server
        tracker.log(line.pop("step"), line)
    done, earlier_seconds = state.progress, state.progress.seconds
    model, optimizer = accelerator.prepare(whole, optimizer)
    cached, watched = config.trainer.cache_tokens is not None, config.evaluation.metric.name

    scores: QueryScores = {}  # of each query, at the last evaluation

    def score() -> dict[str, float] | None:
        nonlocal scores
        if not evaluation:
            return None
        with accelerator.autocast(), counting(console, "documents ranked") as ranked:
            of_sets = evaluate(
                encoder,
                evaluation,
                batch_size=config.evaluation.batch_size,
                widths=config.loss.matryoshka.widths[1:],
                progress=ranked,
            )
        scores = join_sets(of_sets)
        several = of_sets if len(of_sets) > 1 else {}
        return means(scores) | {f"{name}/{watched}": means(own)[watched] for name, own in several.items()}

    asked = queries_of(evaluation)
    evaluation_id = identity("\n".join(asked)) if asked else 0
    if done.step > 0 and done.evaluation_id != evaluation_id:
        raise TrainingError(
            f"{folder.path} was scored on other queries before it stopped: give it the data that it had, or start "
            f"again with rerun={folder.path} output_dir=..."
        )
    done.evaluation_id = evaluation_id
    if done.step == 0:
        done.before = done.after = score()
        if done.before is not None:
            folder.write_scores(SCORES_BEFORE, scores)
        folder.log(0, _prefixed("eval", done.before))
        tracker.log(0, _prefixed("eval", done.before))
    scores_before = scores if done.step == 0 or done.before is None else folder.scores(SCORES_BEFORE)
    if done.before is not None:
        console.print(f"before  {_one_line(done.before)}")
    # A generator of its own, or the loader would draw from the one of dropout.
    loader = DataLoader(batches, batch_size=None, sampler=range(done.step, steps), generator=torch.Generator())
    names, phases = [each.name for each in batches.sets], Phases(accelerator.device if config.trainer.profile else None)
    unread, ahead, stop_signal = deque[_Step](), STEPS_AHEAD.get(accelerator.device.type, 0), 0.0
    with (
        ProgressDisplay(console, steps=steps, log_every_steps=config.trainer.log_every_steps) as progress,
        StopWish(progress.say) as wish,
        embedding_gradients_by_token(encoder, accelerator),
        fast_dropout(encoder, accelerator.device),
        tracing(folder.path / TRACE if config.trainer.profile and accelerator.is_main_process else None) as trace,
    ):
        if config.trainer.compile:
            progress.say(f"compile  {compile_layers(encoder, batches[done.step][0], accelerator)}")
        loaded, step_started = iter(loader), time.perf_counter()
        for step in range(done.step + 1, steps + 1):
            with phases("data", on_host=True):
                micro_batches = next(loaded)
            model.train()
            parts = compute_gradient(
                accelerator, model, loss, micro_batches, cached=cached, sets=len(names), phases=phases
            )
            with phases("optimizer"):
                norm = accelerator.clip_grad_norm_(model.parameters(), config.trainer.max_gradient_norm or math.inf)
                rates = learning_rates(optimizer)
                scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
                optimizer.step()
                # fp16 lowers its scale where it skips a step; of fused AdamW, accelerate does not see that.
                if not accelerator.scaler or accelerator.scaler.get_scale() >= scale:
                    schedule.step()
                optimizer.zero_grad()
            counts = _counts(micro_batches) | {"signal": float(wish.signal or 0)}
            numbers = Numbers(accelerator, parts, counts, alike={"gradient_norm": norm})
            unread.append(_Step(step, numbers, rates, phases.take()))
            trace()
            scored = step == steps or _is_due(step, config.evaluation.every_steps)
            saved = _is_due(step, config.trainer.save_every_steps)
            # The numbers of a step are read while the device has the next one to do.
            while unread and (len(unread) > ahead or scored or saved or stop_signal):
                own = unread.popleft()
                with phases("numbers", on_host=True):
                    values = own.numbers.read()
                # The scaler of fp16 skips a step whose gradient overflows.
                for name in ("loss", *([] if accelerator.scaler else ["gradient_norm"])):
                    if not math.isfinite(values[name]):
                        raise _not_finite(own.step, name, values[name], batches.examples(own.step - 1), folder)
                stop_signal = values.pop("signal")
                values["seconds"] = time.perf_counter() - step_started
                if config.trainer.compile:
                    values["compilations"] = compilations()
                values |= {f"seconds/{name}": seconds for name, seconds in own.phases().items()}
                done.step = own.step
                for name in filter(_adds_up, values):
                    done.totals[name] = done.totals.get(name, 0.0) + values[name]
                metrics = _metrics(values, own.rates, names)
                progress.step(own.step, metrics, seconds_left=(steps - own.step) * done.totals["seconds"] / own.step)
                if scored and own.step == step:
                    done.after = score()
                    metrics |= _prefixed("eval", done.after)
                    if done.after is not None:
                        progress.say(f"step {step}  {_one_line(done.after)}")
                        # The last model is saved anyway: where it is the best, no earlier one is kept beside it.
                        value = done.after[watched]
                        if done.best is None or value > done.best:
                            done.best, done.best_step = value, step
                            if step < steps:
                                folder.save_model(encoder, BEST, step=step)
                            else:
                                folder.remove_model(BEST)
                folder.log(own.step, metrics)
                tracker.log(own.step, metrics)
                step_started = time.perf_counter()
            if step < steps and (stop_signal or saved):
                done.seconds = earlier_seconds + time.perf_counter() - started
                folder.save_checkpoint(state, gather_random_states(), keep=config.trainer.keep_checkpoints)
                if stop_signal:
                    accelerator.wait_for_everyone()  # a launcher that sees one process end ends the one that saves
                    # Of several processes, one may hear of the signal first.
                    raise Stopped(wish.signal or SIGTERM, _how_to_go_on(accelerator, folder, step, steps))
                step_started = time.perf_counter()

    path = folder.save_model(encoder, MODEL, step=steps)
    best = None
    if done.best is not None:
        best_path = folder.path / BEST if done.best_step < steps else path
        best = {"model": str(best_path), "step": done.best_step, watched: done.best}
    interval = None
    if done.before is not None and done.after is not None:
        folder.write_scores(SCORES, scores)
        low, high = change_interval(*(list(each[watched].values()) for each in (scores_before, scores)))
        interval = {"metric": watched, "change": done.after[watched] - done.before[watched], "low": low, "high": high}
    return {
        "model": str(path),
        "best": best,
        "steps": steps,
        "queries": int(done.totals["queries"]),
        "seconds": earlier_seconds + time.perf_counter() - started,
        "processes": accelerator.num_processes,
        "before": done.before,
        "after": done.after,
        "change": interval,
        "evaluation_id": done.evaluation_id,
        **_rates(done.totals),
        "phases": {name: done.totals[f"seconds/{name}"] / steps for name in PHASES if f"seconds/{name}" in done.totals},
        "peak_memory_bytes": max(gather_object([peak_memory_bytes(accelerator.device)])),
    }


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
    path, what = folder.write_failed_batch(examples), name.replace("_", " ")
    return TrainingError(
        f"step {step}: the {what} is {value}; the batch is {examples[0]['place']} and {len(examples) - 1} more "
        f"examples, all in {path}: look at them, or lower optimizer.learning_rate"
    )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _counts(micro_batches: list[Batch]) -> dict[str, float]:
    """What this process has of a step."""
    documents = [batch.documents for batch in micro_batches]
    return {
        "queries": sum(len(batch.places) for batch in micro_batches),
        "tokens": sum(each.tokens for each in documents),
        "padded_tokens": sum(each.padded_tokens for each in documents),
    }


def _adds_up(name: str) -> bool:
    return name in ("queries", "tokens", "padded_tokens") or name.partition("/")[0] == "seconds"


def _metrics(values: dict[str, float], rates: dict[str, float], sets: list[str]) -> dict[str, float]:
    """What is logged of a step, from all that was counted and measured."""
    losses = {
        name: value
        for name, value in values.items()
        if " of set " not in name and name != "gradient_norm" and not _adds_up(name)
    }
    return {
        **_prefixed("train", losses),
        **_prefixed("train", _by_set(values, sets) if len(sets) > 1 else {}),
        "train/learning_rate": next(iter(rates.values())),
        **(_prefixed("train/learning_rate", rates) if len(rates) > 1 else {}),
        "train/gradient_norm": values["gradient_norm"],
        **_prefixed("train", _rates(values)),
        **_prefixed("train", {name: value for name, value in values.items() if name.startswith("seconds")}),
    }


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


def _by_set(counts: dict[str, float], names: list[str]) -> dict[str, float]:
    """Mean loss and queries of each set of a mix that the step has queries of."""
    metrics = {}
    for index, name in enumerate(names):
        if queries := counts[f"queries of set {index}"]:
            metrics[f"{name}/loss"] = counts[f"loss of set {index}"] / queries
            metrics[f"{name}/queries"] = queries
    return metrics


def _prefixed(prefix: str, metrics: dict[str, float] | None) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in (metrics or {}).items()}


def _one_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
