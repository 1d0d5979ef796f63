"""The run at a tracker: what metrics.jsonl holds, under the same names. A tracker that fails never stops a run."""

import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from configs.schema import Config, ConfigError, TrackerName, as_dict

if TYPE_CHECKING:
    from wandb import Run


# How long the end of a run may take to reach the tracker.
FINISH_SECONDS = 300


def new_id() -> str:
    """An id that no run has yet, of eight letters as Weights & Biases draws them."""
    return secrets.token_hex(4)


def check_tracker(config: Config) -> None:
    """Raise ConfigError where the tracker asked for would not know who is there."""
    if config.tracker.name is not TrackerName.wandb:
        return
    import wandb

    try:
        # The terminal belongs to the progress bar; what wandb would print there, `Tracker.where` says.
        known = wandb.setup(wandb.Settings(silent=True)).settings.mode != "online" or wandb.login(prompt=False)
    except ValueError as error:  # such as a WANDB_MODE that is none
        raise ConfigError(f"tracker=wandb: {' '.join(str(error).split())}") from error
    except wandb.Error:  # a key is there, and the server does not answer or does not take it: `Tracker` says so
        return
    if not known:
        raise ConfigError(
            "tracker=wandb: nobody is logged in: type `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to "
            "keep the run in its folder"
        )


class Tracker:
    """What the loop and its caller tell a tracker; with none, or after a failure, the calls do nothing.

    A run whose `with` block ends before `finish` is one that failed, or was stopped and may go on.

    main: whether this process tells it; of several, one does.
    """

    def __init__(self, config: Config, *, main: bool, say: Callable[[str], None]) -> None:
        self._say = say
        self._run: Run | None = None
        self._first_step = 0
        match config.tracker.name:
            case TrackerName.none:
                pass
            case TrackerName.wandb:
                if main:
                    self._try(lambda: self._start(config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._try(lambda: self._end(exit_code=1))

    def _start(self, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracker.project,
            entity=config.tracker.entity,
            group=config.tracker.group,
            id=config.tracker.id,
            resume="allow",
            name=config.name,
            config=as_dict(config),
            dir=config.output_dir,
            # A server that is gone at the end must not keep the process: what it lacks waits on disk for `wandb sync`.
            settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS),
        )
        self._first_step = self._run.step

    def where(self) -> str | None:
        """Where the run can be looked at."""
        if self._run is None or self._run.disabled:
            return None
        if self._run.offline:
            return f"wandb offline: wandb sync {Path(self._run.dir).parent}"
        return f"wandb {self._run.url}"

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Send the metrics of a step, unless the run that was resumed had sent them before it was killed."""
        run = self._run
        if run is not None and step >= self._first_step:
            self._try(lambda: run.log(metrics, step=step))

    def finish(self, result: dict[str, Any]) -> None:
        """End the run with what it came to."""
        run = self._run
        if run is not None:
            self._try(lambda: run.summary.update(result))
        if self._run is not None:
            self._try(lambda: self._end(exit_code=0))

    def _end(self, *, exit_code: int) -> None:
        assert self._run is not None
        run, self._run = self._run, None
        run.finish(exit_code=exit_code)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker's network, server or disk comes up with
            self._run = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"the tracker failed ({reason}): training goes on without it, metrics.jsonl has everything")
