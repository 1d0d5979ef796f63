"""What a person reads: the start-up table, the progress of a run, and its end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from configs.schema import LossTerms
from trainer.phases import describe

TERMS = [field.name for field in fields(LossTerms)]


def print_start(console: Console, described: Sequence[tuple[str, str, int]], facts: Mapping[str, str]) -> None:
    """Print the modules, each as class, what it does and parameters, then the facts of the run, one a line."""
    modules = Table(box=None, pad_edge=False, header_style="bold")
    modules.add_column("module")
    modules.add_column("what it does")
    modules.add_column("parameters", justify="right")
    for name, words, count in described:
        modules.add_row(name, words, f"{count:,}" if count else "")
    modules.add_row("", "", f"{sum(count for *_, count in described):,}", style="bold")
    console.print(modules)
    console.print()
    print_facts(console, facts)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print facts by name, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in facts.items():
        table.add_row(key, value)
    console.print(table)
    console.print()


def print_end(console: Console, result: dict[str, Any], *, loading: str, report: Path | None = None) -> None:
    """Print the scores before and after, where the models and the report lie, and how to load a model: loading, lines
    of Python."""
    before, after, best, change = (result[key] for key in ("before", "after", "best", "change"))
    if before is not None and after is not None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for metric, value in after.items():
            table.add_row(metric, f"{before[metric]:.4f}", f"{value:.4f}", f"{value - before[metric]:+.4f}")
        console.print()
        console.print(table)
        console.print(
            f"change of {change['metric']}: {change['change']:+.4f}, "
            f"95 % interval over the queries {change['low']:+.4f} to {change['high']:+.4f}"
        )
    console.print()
    if result.get("phases"):
        console.print(f"seconds of a step: {describe(result['phases'])}")
    if best is not None and best["model"] != result["model"]:
        console.print(f"best model, of step {best['step']}: {best['model']}")
    console.print(f"model: {result['model']}")
    if report is not None:
        console.print(f"report: {report}")
    console.print("load it with:")
    for line in loading.splitlines():
        console.print(f"    {line}")


@contextmanager
def counting(console: Console, what: str, *, line_seconds: float = 30.0) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how many of how many are done, and shows it: on a terminal as a bar, which may
    stand beside another, elsewhere as a line every line_seconds."""
    started = said = time.monotonic()
    columns = TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, refresh=True)
            now = time.monotonic()
            if bar.disable and now - said >= line_seconds:
                said = now
                console.print(f"{what}  {done:,} of {total:,}  {_minutes((now - started) * (total / done - 1))} left")

        yield show


class ProgressDisplay:
    """A bar on a terminal; elsewhere a line every few steps."""

    def __init__(self, console: Console, *, steps: int, log_every_steps: int) -> None:
        self._console = console
        self._steps = steps
        self._log_every_steps = log_every_steps
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, metrics: dict[str, float], *, seconds_left: float) -> None:
        """Show a finished step."""
        assert self._task is not None, "shown inside the with block"
        quality = f"loss {metrics['train/loss']:.4f}{_terms(metrics)}  lr {metrics['train/learning_rate']:.2e}"
        speed = (
            f"{metrics['train/queries_per_second']:.1f} queries/s  "
            f"{metrics['train/document_tokens_per_second']:,.0f} document tokens/s"
        )
        padding = f"padding {metrics['train/padding_fraction']:.0%}"
        # Two lines fit a terminal of 80 columns.
        self._bar.update(self._task, completed=step, status=f"{quality}  {padding}\n{speed}")
        if self._bar.disable and (step % self._log_every_steps == 0 or step in (1, self._steps)):
            self._console.print(
                f"step {step}/{self._steps}  {quality}  {speed}  {padding}  {_minutes(seconds_left)} left"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line)


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _terms(metrics: dict[str, float]) -> str:
    """The terms of a loss that has several, each at its widest."""
    values: dict[str, float] = {}
    for key, value in metrics.items():
        name = key.removeprefix("train/").partition("@")[0]
        if name in TERMS:
            values.setdefault(name, value)
    return f" ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})" if len(values) > 1 else ""
