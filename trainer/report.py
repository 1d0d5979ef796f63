"""report.html of a run and of a sweep: one file without network or script, and its figures as PNG beside it.

It is made from what lies in the folder, so it can be made again; the same folder gives the same bytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from configs.schema import ConfigError
from trainer.comparison import Group, explain_groups, group_cells
from trainer.display import TERMS
from trainer.figures import (
    MOST_POINTS,
    Curve,
    draw_before_after,
    draw_curves,
    draw_differences,
    draw_quality_and_size,
    draw_seeds,
    smoothing_window,
)
from trainer.phases import describe
from trainer.run_folder import CONFIG, FIGURES, METRICS, REPORT, RESULT, remove_report
from trainer.sweep import Job, common_overrides, read_jobs
from trainer.theme import DARK, LIGHT, css_variables, themed, to_png, to_svg

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    result: dict[str, Any]
    """Empty where the run is not finished."""


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: what it shows in a few words, how it is to be read, and the drawing."""

    name: str
    title: str
    note: str
    svg: Markup
    png: bytes

    @property
    def file(self) -> str:
        return f"{FIGURES}/{self.name}.png"


def report_run(folder: Path) -> Path:
    """Write the page of a run, also of one that is not finished, and return it. Raises ConfigError for no run."""
    run = read_run(folder)
    with themed():
        scores, curves = list(score_figures(run)), list(curve_figures(run))
    result = run.result
    data, facts = result.get("data", {}), dict(result.get("facts", {}))
    page = _render(
        "run.html",
        title=run.config["name"],
        summary=list(_summary(run)),
        score_rows=_score_rows(result),
        change=_change(result),
        scores=scores,
        curves=curves,
        how_to_read=_how_smoothed(sum("train/loss" in line for line in run.lines)),
        modules=[(name, words, f"{count:,}" if count else "") for name, words, count in result.get("modules", [])],
        sets=data.get("sets"),
        evaluation=data.get("evaluation"),
        warnings=facts.pop("warnings", "").splitlines(),
        command=result.get("command"),
        versions=result.get("versions"),
        hardware=result.get("hardware"),
        facts=facts,
        config=run.config_text,
    )
    return _write(folder, page, [*scores, *curves])


def report_sweep(sweep: Path, groups: Sequence[Group]) -> Path:
    """Write the page of a sweep, and return it. groups: of its finished jobs, the first what others are compared to.

    Raises ConfigError where there is none.
    """
    if not groups:
        raise ConfigError(f"sweep={sweep} has no job with a score: run one to its end, with an evaluation")
    first = read_run(sweep / groups[0].jobs[0])
    metric = first.config["evaluation"]["metric"]
    with themed():
        drawn = list(group_figures(groups, metric))
    jobs = read_jobs(sweep)
    common = common_overrides(jobs)
    columns = _columns(groups, metric)
    page = _render(
        "sweep.html",
        title=sweep.resolve().name,
        summary=[
            f"{_count(len(groups), 'group')} of {_count(sum(len(group.jobs) for group in groups), 'finished job')}, "
            f"scored by {metric}"
        ],
        metric=metric,
        header=list(columns),
        rows=list(zip(*columns.values(), strict=True)),
        reading=[f"{line[0].upper()}{line[1:]}." for line in explain_groups(groups)],
        drawn=drawn,
        common=" ".join(override for override in jobs[0].overrides if override in common) if jobs else "",
        jobs=[_job_row(sweep, job, common) for job in jobs],
        versions=first.result.get("versions"),
        hardware=first.result.get("hardware"),
    )
    return _write(sweep, page, drawn)


def read_run(folder: Path) -> Run:
    """What lies in the folder of a run. Raises ConfigError where that is none, or holds what no run has written."""
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise ConfigError(f"run={folder}: the folder has no {name}: give the output folder of a run")
    text = (folder / CONFIG).read_text(encoding="utf-8")
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(config, dict)
    result = folder / RESULT
    return Run(
        folder,
        text,
        {str(key): value for key, value in config.items()},
        list(_lines(folder / METRICS)),
        json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {},
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):  # a run that is killed, or still writes
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is no JSON ({error}): mend or remove the line") from error


# --- a run ---


def score_figures(run: Run) -> Iterator[Drawn]:
    """Before and after; and, where it was scored in between, the metrics over the steps."""
    before, after, change = (run.result.get(key) for key in ("before", "after", "change"))
    watched = run.config["evaluation"]["metric"]
    if before and after and change:
        yield _drawn(
            "before_after",
            f"{watched}: {before[watched]:.4f} before, {after[watched]:.4f} after",
            f"Ring: before training; dot: after. The bar is the 95 % interval of the change of {change['metric']} over "
            "the queries, laid onto its value before.",
            draw_before_after(
                before,
                {name: value for name, value in after.items() if "/" not in name},  # not those of each width
                change=change,
                metric=change["metric"],
            ),
        )
    names = [key.removeprefix("eval/") for key in (run.lines[0] if run.lines else {}) if key.startswith("eval/")]
    curves = {name: _curve(run, f"eval/{name}", name) for name in names}
    points = len(next(iter(curves.values())).steps) if curves else 0
    if points < (3 if run.result else 1):
        return
    own = curves[watched]
    best = int(own.steps[np.nanargmax(own.values)])
    yield _drawn(
        "metrics",
        f"{watched}: {own.values[0]:.4f} at step 0, {own.values[-1]:.4f} at step {own.steps[-1]:,.0f}",
        f"Each point is one evaluation. {watched} is best at step {best:,}.",
        draw_curves(
            [curve for name, curve in curves.items() if "/" not in name], unit="score", style="points", from_zero=False
        ),
    )
    widths = [
        Curve(name.partition("/")[2] or "full", curve.steps, curve.values)
        for name, curve in curves.items()
        if name.split("/")[0] == watched
    ]
    if len(widths) > 1:
        yield _drawn(
            "widths",
            f"{watched} by width: "
            + ", ".join(f"{curve.values[-1]:.4f} at {curve.name}" for curve in sorted(widths, key=_at_the_end)),
            "Vectors cut to their first components.",
            draw_curves(widths, unit=watched, style="points", from_zero=False),
        )


def curve_figures(run: Run) -> Iterator[Drawn]:
    """What was logged at each step."""
    keys = dict.fromkeys(key for line in run.lines for key in line if key.startswith("train/"))
    if "train/loss" not in keys:
        return
    loss = _curve(run, "train/loss", "loss")
    yield _drawn("loss", f"Loss: {_trend(loss)}", "", draw_curves([loss], unit="loss"))

    terms = [key for key in keys if key.removeprefix("train/").partition("@")[0] in TERMS]
    for term in TERMS if len(terms) > 1 else ():
        curves = [
            _curve(run, key, f"width {width}" if width else term)
            for key in terms
            for name, _, width in [key.removeprefix("train/").partition("@")]
            if name == term
        ]
        if curves:
            yield _drawn(
                term,
                f"{_words(term)} term: {_trend(curves[0])}",
                "Before its weight." + (f" The figures are of {curves[0].name}." if len(curves) > 1 else ""),
                draw_curves(curves, unit="loss"),
            )
    sets = [_curve(run, key, key[6:-5]) for key in keys if key.endswith("/loss") and key != "train/loss"]
    if sets:
        yield _drawn(
            "loss_by_set",
            "Loss by set: " + ", ".join(f"{_ends(curve)[1]:.3g} of {curve.name}" for curve in sets) + " at the end",
            "Over the steps that have queries of the set.",
            draw_curves(sets, unit="loss"),
        )

    seconds = _curve(run, "train/seconds", "seconds").values
    queries = _curve(run, "train/queries_per_second", "queries")
    tokens = _curve(run, "train/document_tokens_per_second", "tokens")
    padding = _curve(run, "train/padding_fraction", "padding")
    note = "Of the steps alone, without evaluation and saving."
    for name, words, curve in (
        ("queries_per_second", "queries a second", queries),
        ("document_tokens_per_second", "document tokens a second", tokens),
    ):
        mean = float(np.sum(curve.values * seconds) / np.sum(seconds))
        yield _drawn(name, f"{mean:,.{0 if mean >= 100 else 1}f} {words}", note, draw_curves([curve], unit=words))
    real = tokens.values * seconds
    padded = 1 - float(np.sum(real) / np.sum(real / (1 - padding.values)))
    yield _drawn(
        "padding",
        f"{padded:.1%} of the document tokens that were computed are padding",
        "",
        draw_curves([Curve("padding", padding.steps, 100 * padding.values)], unit="% of document tokens"),
    )

    groups = [key for key in keys if key.startswith("train/learning_rate/")] or ["train/learning_rate"]
    rates = [_curve(run, key, key.rpartition("/")[2]) for key in groups]
    yield _drawn(
        "learning_rate",
        "Learning rate: up to "
        + ", ".join(f"{np.nanmax(rate.values):.3g}" + (f" of {rate.name}" if len(rates) > 1 else "") for rate in rates),
        f"{_words(run.config['optimizer']['schedule'])} schedule.",
        draw_curves(rates, unit="learning rate", style="line"),
    )
    norm, most = _curve(run, "train/gradient_norm", "norm"), run.config["trainer"]["max_gradient_norm"]
    clipped = "" if most is None else f", cut to {most:g} in {np.mean(norm.values > most):.0%} of the steps"
    yield _drawn(
        "gradient_norm",
        f"Gradient norm: median {np.nanmedian(norm.values):.3g}{clipped}",
        "Before it is cut; dashed: where." if clipped else "",
        draw_curves([norm], unit="norm of all gradients", limit=most),
    )
    if "train/temperature" in keys:
        temperature = _curve(run, "train/temperature", "temperature")
        yield _drawn(
            "temperature",
            f"Learnt temperature: {temperature.values[0]:.3g} at first, {temperature.values[-1]:.3g} at the end",
            "",
            draw_curves([temperature], unit="temperature", style="line", from_zero=False),
        )


def _summary(run: Run) -> Iterator[str]:
    """What became of it, in a few lines."""
    result = run.result
    if result:
        yield (
            f"Finished: {result['steps']:,} steps, {result['queries']:,} queries, {_duration(result['seconds'])} in "
            f"{_count(result['processes'], 'process', 'processes')}"
        )
        if result.get("phases"):
            yield f"Seconds of a step: {describe(result['phases'])}"
        if (best := result["best"]) is not None and best["step"] != result["steps"]:
            yield f"The best model is that of step {best['step']:,}: {best['model']}"
        yield f"Model: {result['model']}"
    else:
        done, steps = run.lines[-1]["step"] if run.lines else 0, run.config["trainer"]["steps"]
        of = f" of {steps:,}" if steps is not None else ""
        yield f"Not finished: {done:,}{of} steps are logged; python train.py resume={run.folder} goes on"


def _score_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    before, after = result.get("before"), result.get("after")
    if not (before and after):
        return []
    return [
        (name, f"{before[name]:.4f}", f"{value:.4f}", f"{value - before[name]:+.4f}") for name, value in after.items()
    ]


def _change(result: Mapping[str, Any]) -> str | None:
    change = result.get("change")
    return change and (
        f"Change of {change['metric']}: {change['change']:+.4f}, 95 % interval over the queries {change['low']:+.4f} "
        f"to {change['high']:+.4f}."
    )


def _curve(run: Run, key: str, name: str) -> Curve:
    """The values of a key, at the steps that have it."""
    points = [(line["step"], line[key]) for line in run.lines if key in line]
    values = [float("nan") if value is None else value for _, value in points]
    return Curve(name, np.array([step for step, _ in points], dtype=float), np.array(values, dtype=float))


def _ends(curve: Curve) -> tuple[float, float]:
    """Means of its first and of its last values, as many as a smoothed one goes over."""
    window = smoothing_window(len(curve.values))
    known = curve.values[np.isfinite(curve.values)]
    return (float(known[:window].mean()), float(known[-window:].mean())) if len(known) else (float("nan"),) * 2


def _at_the_end(curve: Curve) -> float:
    return -float(curve.values[-1])


def _trend(curve: Curve) -> str:
    return "{:.3g} at first, {:.3g} at the end".format(*_ends(curve))


def _how_smoothed(steps: int) -> str:
    """What is thin and what is thick in a curve of each step, and what the titles say of it."""
    window = smoothing_window(steps)
    if window == 1:
        return "A value for each step."
    each = "each step" if steps <= MOST_POINTS else f"least and largest of {steps // (MOST_POINTS // 2):,} steps"
    return (
        f"Thin: {each}. Thick: mean of the {window:,} values around each, fewer at the ends. At first and at the end: "
        f"means of the first and the last {window:,}. Where curves share a figure: the means alone, "
        "or the values of those that have fewer than 20."
    )


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- a sweep ---


def group_figures(groups: Sequence[Group], metric: str) -> Iterator[Drawn]:
    """The differences to the first group, the seeds, and quality over size."""
    compared = [groups[0], *(group for group in groups[1:] if group.difference is not None)]
    if len(compared) > 1:
        yield _drawn(
            "differences",
            f"Difference of {metric} to {groups[0].name}",
            "Dot: mean over the queries of scores that are averaged over the seeds; bar: its 95 % interval over the "
            "queries.",
            draw_differences(compared, metric=metric),
        )
    best = max(groups, key=lambda group: group.mean)
    yield _drawn(
        "seeds",
        f"{metric} by group and seed: {best.name} has the highest mean, {best.mean:.4f}",
        "Dot: a seed; bar: their mean; ±: standard deviation over the seeds.",
        draw_seeds(groups, metric=metric),
    )
    sizes = {group.bytes_per_token for group in groups}
    yield _drawn(
        "quality_and_size",
        f"{metric} over the size of the index: " + ", ".join(f"{size:,}" for size in sorted(sizes)) + " bytes a token",
        "Large dot: mean; small: a seed. Those of one size stand side by side.",
        draw_quality_and_size(groups, metric=metric),
    )


def _columns(groups: Sequence[Group], metric: str) -> dict[str, list[str]]:
    """The table of the groups, by column: as on the terminal, in fewer."""
    cells = group_cells(groups)

    def joined(one: str, other: str, form: str) -> list[str]:
        pairs = zip(cells[one], cells[other], strict=True)
        return [first + (form.format(second) if second else "") for first, second in pairs]

    return {
        "group": [group.name for group in groups],
        "seeds": cells["seeds"],
        f"{metric} ± sd": joined("score", "sd", " ± {}"),
        "difference (95 %)": joined("difference", "95 % interval", " ({})"),
        **{name: cells[name] for name in ("p", "p, Holm", "parameters", "bytes/token", "queries/s")},
        "memory": cells["peak memory"],
    }


def _job_row(sweep: Path, job: Job, common: set[str]) -> dict[str, str]:
    page = f"{job.job}/{REPORT}"
    return {
        "name": job.job,
        "page": page if (sweep / page).is_file() else "",
        "overrides": " ".join(override for override in job.overrides if override not in common),
        "score": _number(job.score, ".4f"),
        "seconds": _number(job.seconds, ".1f"),
        "state": f"{job.state}: {job.error}" if job.error else job.state,
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


# --- both ---


def _drawn(name: str, title: str, note: str, figure: Figure) -> Drawn:
    # Safe to be put into a page as it is: what ElementTree has written, escaped.
    return Drawn(name, title, note, Markup(to_svg(figure, name, title)), to_png(figure))


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        light=Markup(css_variables(LIGHT)), dark=Markup(css_variables(DARK)), **values
    )


def _write(folder: Path, page: str, figures: Sequence[Drawn]) -> Path:
    """Replace an earlier page and its figures; the page comes last, whole or not at all."""
    try:
        remove_report(folder)
        (folder / FIGURES).mkdir(exist_ok=True)
        for figure in figures:
            (folder / figure.file).write_bytes(figure.png)
        unfinished = folder / f"{REPORT}.unfinished"
        unfinished.write_text(page, encoding="utf-8")
        return unfinished.replace(folder / REPORT)
    except OSError as error:
        raise ConfigError(f"{folder / REPORT} cannot be written: {error}") from error
