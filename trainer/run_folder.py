"""What a run leaves in its folder, each written whole or not at all, by one process that holds its lock."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from configs.schema import Config, ConfigError, save_config
from trainer.metrics import read_scores, write_scores

if TYPE_CHECKING:  # checked before this slow import is made
    from sentence_transformers import MultiVectorEncoder

    from trainer.checkpoint import TrainState

CONFIG, METRICS, RESULT, FAILED_BATCH = "config.yaml", "metrics.jsonl", "result.json", "failed_batch.jsonl"
# Each query's metrics, of the last model and of the untrained one.
SCORES, SCORES_BEFORE = "scores.jsonl", "scores_before.jsonl"
MODEL, BEST, CHECKPOINTS = "model", "best", "checkpoints"
# Of a few steps, for chrome://tracing or Perfetto.
TRACE = "trace.json.gz"
# The page of a run or a sweep, and the folder of its figures as PNG.
REPORT, FIGURES = "report.html", "figures"
LEFT = (RESULT, CONFIG, METRICS, FAILED_BATCH, SCORES, SCORES_BEFORE, TRACE, REPORT, MODEL, BEST, CHECKPOINTS)
LOCK = ".lock"
# Beside a model's own files: after which step it was saved.
STEP = "step.json"
# What `_placed` leaves where a process dies while it writes.
UNFINISHED, OLD = ".unfinished", ".replaced"
# What is left of a checkpoint that is not whole.
UNREADABLE = ".unreadable"


class RunFolder:
    """outputs/<name>/{config.yaml, metrics.jsonl, scores_before.jsonl, checkpoints/, model/, best/, scores.jsonl,
    result.json, report.html, figures/}

    resume: go on with the run that the folder holds, instead of a new one.
    """

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.path = Path(config.output_dir)
        self._config = config
        self._resume = resume
        self._main = True
        self._lock = FileLock(self.path / LOCK)

    def check(self) -> None:
        """Raise ConfigError where the folder is another process's, holds a run that may not be replaced, or this one's
        input; for a resumed run, where it holds none that can go on.

        Touches nothing.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file: name a folder")
        if (self.path / LOCK).exists() and not self._lock.is_locked:
            with self._errors(LOCK):
                self._acquire()
            self._lock.release()
        if self._resume:
            self._check_resumable()
        else:
            self._check_free()

    def _check_resumable(self) -> None:
        if (self.path / RESULT).exists():
            raise ConfigError(
                f"resume={self.path} is finished: train its model further with backbone=checkpoint "
                f"backbone.name={self.path / MODEL}, or repeat it with rerun={self.path} output_dir=..."
            )
        if not (self.path / CONFIG).is_file():
            raise ConfigError(f"resume={self.path} has no {CONFIG}: give the output folder of a run")

    def _check_free(self) -> None:
        held = [name for name in LEFT if (self.path / name).exists()]
        if held and not self._config.overwrite:
            kind = "a finished run" if RESULT in held else f"a run that did not finish ({', '.join(held)})"
            remedy = "set another name= or output_dir=, or overwrite=true to replace it"
            if RESULT not in held and CONFIG in held:
                remedy = f"resume={self.path} goes on with it; else {remedy}"
            raise ConfigError(f"output_dir={self.path} holds {kind}: {remedy}")
        for key, value in (("backbone.name", self._config.backbone.name), ("data.path", self._config.data.path)):
            inside = value is not None and Path(value).resolve().is_relative_to(self.path.resolve())
            if inside and held:
                raise ConfigError(f"{key}={value} lies in output_dir={self.path}, which is replaced: set another name=")

    def open(self, *, main: bool = True) -> None:
        """Take the folder for this process until it ends: clear it for a new run, mend it for a resumed one, and write
        the config.

        main: whether this process writes; of several, one does, and here and from now on the others' calls do nothing.
        """
        self._main = main
        if not main:
            return
        with self._errors(CONFIG):
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.check()
            self._mend()
            if not self._resume:
                remove_report(self.path)
            # By name: a folder given by mistake keeps all that no run has written.
            for name in (FAILED_BATCH,) if self._resume else LEFT:
                _remove(self.path / name)
        with self._placed(CONFIG) as path:
            save_config(self._config, str(path))

    def _acquire(self) -> None:
        # The system drops the lock with the process, however that ends.
        try:
            self._lock.acquire(timeout=1)  # as long as the processes of one run may look at it
        except Timeout as error:
            raise ConfigError(
                f"output_dir={self.path} is being written by another process: wait for its end, or stop it"
            ) from error

    def _mend(self) -> None:
        """Finish or undo what a process left half written, by name: all else is the user's."""
        checkpoints = {path.with_suffix("") for path in (self.path / CHECKPOINTS).glob("step_*.*")}
        for target in (*(self.path / name for name in LEFT), *checkpoints):
            _remove(target.with_name(target.name + UNFINISHED))
            old = target.with_name(target.name + OLD)
            if old.exists() and not target.exists():
                old.rename(target)
            _remove(old)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the one line of a step to metrics.jsonl."""
        if not self._main:
            return
        with self._errors(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            # JSON has no infinity, which the gradient norm of a skipped fp16 step is.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, those of a resumed run up to its checkpoint."""
        if not (self.path / METRICS).exists():
            return []
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]

    def cut_metrics(self, step: int | None) -> None:
        """Drop the lines of metrics.jsonl after a step, or all for None, and what a killed process wrote of a line."""
        metrics = self.path / METRICS
        if not self._main or not metrics.exists():
            return
        kept = []
        for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if step is not None else []:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        with self._placed(METRICS) as path:
            path.write_text("".join(kept), encoding="utf-8")

    def write_scores(self, name: str, values: dict[str, dict[str, float]]) -> None:
        """Write the metrics of each query: values, by query id, by the metric's name."""
        if self._main:
            with self._placed(name) as path:
                write_scores(path, values)

    def scores(self, name: str) -> dict[str, dict[str, float]]:
        """What `write_scores` wrote. Raises ConfigError where that is not there."""
        return read_scores(self.path / name)

    def save_model(self, encoder: "MultiVectorEncoder", name: str, *, step: int) -> Path:
        """Write the model of a step as a folder that `MultiVectorEncoder` loads, and return it."""
        if self._main:
            with self._placed(name) as path:
                # Its card follows once the scores are known.
                encoder.save_pretrained(str(path), create_model_card=False)
                (path / STEP).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        return self.path / name

    def write_card(self, name: str, card: str) -> None:
        """Write the card of a saved model."""
        if self._main:
            with self._placed(f"{name}/README.md") as path:
                path.write_text(card, encoding="utf-8")

    def model_step(self, name: str) -> int | None:
        """The step that a saved model is of, None where there is none."""
        path = self.path / name / STEP
        return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.exists() else None

    def remove_model(self, name: str) -> None:
        """Remove a model that is no longer what its name says."""
        if self._main:
            with self._errors(name):
                _remove(self.path / name)

    def save_checkpoint(self, state: "TrainState", random_states: list[dict[str, Any]], *, keep: int) -> None:
        """Write what a resumed run needs; once it is whole, remove all but the newest `keep`."""
        if not self._main:
            return
        with self._errors(CHECKPOINTS):
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            _to_disk(self.path / METRICS)  # no checkpoint is ahead of the lines that it keeps
        with self._placed(f"{CHECKPOINTS}/step_{state.progress.step:08d}") as path:
            state.save(path, random_states)
        with self._errors(CHECKPOINTS):
            for old in self.checkpoints()[keep:]:
                _remove(old)

    def checkpoints(self) -> list[Path]:
        """The checkpoints that there are, the newest first."""
        return sorted((self.path / CHECKPOINTS).glob("step_" + "[0-9]" * 8), reverse=True)

    def saved_step(self) -> int:
        """Steps that the newest checkpoint says are done, 0 without one."""
        return max((int(path.name.removeprefix("step_")) for path in self.checkpoints()), default=0)

    def set_aside(self, checkpoint: Path) -> None:
        """Take a checkpoint that is not whole out of the row."""
        if self._main:
            with self._errors(CHECKPOINTS):
                aside = checkpoint.with_name(checkpoint.name + UNREADABLE)
                _remove(aside)
                checkpoint.rename(aside)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the sign that the run is finished; its checkpoints go, as nothing resumes it."""
        if not self._main:
            return
        with self._placed(RESULT) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        with self._errors(CHECKPOINTS):
            _remove(self.path / CHECKPOINTS)

    def write_failed_batch(self, examples: list[dict[str, Any]]) -> Path:
        """Write the examples of the batch that stopped the run, one a line, and return the file."""
        if self._main:
            with self._placed(FAILED_BATCH) as path:
                path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return self.path / FAILED_BATCH

    @contextmanager
    def _placed(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes `name` once all is written and goes where anything fails."""
        target, unfinished, old = (self.path / f"{name}{suffix}" for suffix in ("", UNFINISHED, OLD))
        with self._errors(name):
            try:
                _remove(unfinished)
                yield unfinished
                for file in [unfinished, *unfinished.rglob("*")]:
                    _to_disk(file)
                if target.is_dir():  # a folder cannot be replaced in one move
                    target.rename(old)
                unfinished.replace(target)
                _remove(old)
            except BaseException:
                _remove(unfinished)
                raise

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # safetensors and tokenizers report a full disk by exceptions of their own.
            if not isinstance(error, OSError) and "(os error" not in str(error):
                raise
            raise ConfigError(
                f"output_dir={self.path}: {name} cannot be written ({error}): "
                "free space on the disk or name another folder"
            ) from error


def remove_report(folder: Path) -> None:
    """Remove the page of a run or a sweep and its figures; `figures` without a page is someone else's."""
    if (folder / REPORT).exists():
        for path in (folder / FIGURES).glob("*.png"):
            path.unlink()
        with suppress(OSError):  # where it holds something, or is not there
            (folder / FIGURES).rmdir()
        _remove(folder / REPORT)


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file: a move could otherwise outlive what it moved when the machine loses power."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
