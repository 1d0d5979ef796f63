"""What the reports show: curves of a run, scores before and after, groups of a sweep. Each function draws one figure,
inside `themed`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trainer.comparison import Group
from trainer.theme import FONT, HEIGHT, LIGHT, SERIES, WIDTH, new_figure

Style = Literal["smoothed", "line", "points"]
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Places = np.ndarray[tuple[int, int], np.dtype[np.float64]]

INK, MUTED, PAPER = LIGHT["ink"], LIGHT["muted"], LIGHT["paper"]
# In points: of a letter, on average, of a line of text, and what stands around the axes.
LETTER, LINE, LEFT, RIGHT, TOP, BOTTOM = 0.7 * FONT, 1.35 * FONT, 42.0, 14.0, 26.0, 36.0
LABEL_LETTERS = 16
# A line of more points than a figure has pixels is drawn as its extremes.
MOST_POINTS = 1_000
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


@dataclass(frozen=True)
class Curve:
    """Values over steps, in their order; NaN where there was none."""

    name: str
    steps: Floats
    values: Floats


def smoothing_window(steps: int) -> int:
    """Over how many steps the means of a curve go: an odd number near a twentieth, 1 where there are few."""
    return 1 if steps < 20 else max(5, 2 * (steps // 40) + 1)


def smoothed(values: Floats, window: int) -> Floats:
    """The mean of the `window` values around each, of those that there are at the ends; NaNs are left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places, half = np.arange(len(values)), window // 2
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    count = counts[high] - counts[low]
    means: Floats = np.divide(sums[high] - sums[low], count, out=np.full(len(values), np.nan), where=count > 0)
    return means


def thinned(curve: Curve) -> Curve:
    """The curve itself, or of a long one the least and the largest value of each of MOST_POINTS / 2 stretches."""
    if len(curve.values) <= MOST_POINTS:
        return curve
    kept = []
    for places in np.array_split(np.arange(len(curve.values)), MOST_POINTS // 2):
        own = curve.values[places]
        if np.isfinite(own).any():
            kept += sorted({places[np.nanargmin(own)], places[np.nanargmax(own)]})
    return Curve(curve.name, curve.steps[kept], curve.values[kept])


def draw_curves(
    curves: Sequence[Curve],
    *,
    unit: str,
    style: Style = "smoothed",
    from_zero: bool = True,
    limit: float | None = None,
) -> Figure:
    """Curves over the steps, each with its name at its end where there are several.

    style: smoothed draws each step thin, where it is one curve, and the means over `smoothing_window` thick.
    limit: a value that is drawn across.
    """
    figure = new_figure()
    labels = [_shortened(curve.name) for curve in curves] if len(curves) > 1 else []
    axes = _axes(figure, right=max([RIGHT, *(LETTER * len(label) + 12 for label in labels)]))
    ends, shown = [], list[Curve]()
    for number, curve in enumerate(curves):
        color, dashes = SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]
        window = smoothing_window(len(curve.values)) if style == "smoothed" else 1
        thick, drawn = Curve(curve.name, curve.steps, smoothed(curve.values, window)), thinned(curve)
        if window > 1:
            # Several would hide each other.
            if len(curves) == 1:
                axes.plot(drawn.steps, drawn.values, color=MUTED, alpha=0.45, linewidth=0.7, gid="each")
                shown.append(drawn)
            drawn = thinned(thick)
        shown.append(drawn)
        marker = "none" if style != "points" and len(drawn.values) > 1 else "o"
        [line] = axes.plot(drawn.steps, drawn.values, color=color, linestyle=dashes, linewidth=1.8)
        line.set(marker=marker, markersize=4.5, gid=f"line-{number}")
        known = np.flatnonzero(np.isfinite(thick.values))
        ends.append(thick.values[known[-1]] if len(known) else math.nan)
    _scale(axes, shown, from_zero=from_zero)
    if limit is not None:
        axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), gid="limit")
    last = max(curve.steps[-1] for curve in curves)
    axes.set_xlim(min(curve.steps[0] for curve in curves), last if last > curves[0].steps[0] else None)
    if labels:
        heights = _heights(axes, [(last, end) for end in ends])
        for number, (label, height) in enumerate(zip(labels, heights, strict=True)):
            _write(figure, _right_edge(axes) + 8, height, label, color=SERIES[number % len(SERIES)])
    _write(figure, 4, HEIGHT - TOP / 2 + 2, unit, color=MUTED)
    _write(figure, _right_edge(axes), 7, "step", color=MUTED, align="right")
    return figure


def draw_before_after(
    before: Mapping[str, float], after: Mapping[str, float], *, change: Mapping[str, float], metric: str
) -> Figure:
    """A row a metric: a ring before, a dot after, and for `metric` the interval of its change, from `before` on."""
    figure, axes = _rows(len(after))
    for row, (name, value) in enumerate(after.items()):
        axes.plot([before[name], value], [row, row], color=SERIES[0], linewidth=1.4, alpha=0.5)
        if name == metric:
            interval = [before[name] + change["low"], before[name] + change["high"]]
            axes.plot(interval, [row, row], color=SERIES[0], linewidth=5, alpha=0.3, gid="interval")
        axes.plot(before[name], row, "o", color=SERIES[0], markerfacecolor=PAPER, markersize=7, gid=f"before-{row}")
        axes.plot(value, row, "o", color=SERIES[0], markersize=7, gid=f"after-{row}")
        _row_label(axes, row, name, f"{before[name]:.4f} to {value:.4f}")
    _value_axis(axes)
    return figure


def draw_seeds(groups: Sequence[Group], *, metric: str) -> Figure:
    """A row a group: a small dot for each seed, a bar at their mean."""
    figure, axes = _rows(len(groups))
    for row, group in enumerate(groups):
        axes.plot(group.scores, [row] * len(group.scores), "o", color=SERIES[0], alpha=0.7, gid=f"seeds-{row}")
        axes.plot([group.mean], [row], "|", color=INK, markersize=15, markeredgewidth=2, gid=f"mean-{row}")
        spread = "" if group.sd is None else f" ± {group.sd:.4f}"
        _row_label(axes, row, group.name, f"{group.mean:.4f}{spread}")
    _value_axis(axes, unit=metric)
    return figure


def draw_differences(groups: Sequence[Group], *, metric: str) -> Figure:
    """A row for each group but the first: the difference to that, with its interval over the queries."""
    others = groups[1:]
    figure, axes = _rows(len(others))
    axes.axvline(0, color=INK, linewidth=1, gid="zero")
    for row, group in enumerate(others):
        assert group.difference is not None, "only the first has none"
        if group.low is not None and group.high is not None:
            axes.plot([group.low, group.high], [row, row], color=SERIES[0], linewidth=2, gid=f"interval-{row}")
        axes.plot(group.difference, row, "o", color=SERIES[0], markersize=7, gid=f"difference-{row}")
        _row_label(axes, row, group.name, f"{group.difference:+.4f}")
    _value_axis(axes, unit=f"difference of {metric}")
    return figure


def draw_quality_and_size(groups: Sequence[Group], *, metric: str) -> Figure:
    """Each group's seeds and their mean over what a token takes in the index."""
    figure = new_figure(HEIGHT + 60)
    sizes = np.array([group.bytes_per_token for group in groups], dtype=float)
    places = sizes.copy()
    for size in set(sizes):  # those of one size stand side by side
        same = np.flatnonzero(sizes == size)
        places[same] *= 2 ** (0.12 * (np.arange(len(same)) - (len(same) - 1) / 2))
    keys = {group.name.partition("=")[0] for group in groups}
    names = [group.name.partition("=")[2] if len(keys) == 1 else group.name for group in groups]
    labels = [_shortened(name or group.name) for name, group in zip(names, groups, strict=True)]
    axes = _axes(figure, right=max(LETTER * len(label) + 20 for label in labels), height=HEIGHT + 60)
    for number, group in enumerate(groups):
        axes.plot([places[number]] * len(group.scores), group.scores, "o", color=MUTED, alpha=0.6, markersize=3.5)
        axes.plot(places[number], group.mean, "o", color=SERIES[0], markersize=8, gid=f"group-{number}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(places.min() / 1.5, places.max() * 1.5)
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.minorticks_off()
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    means = [(size, group.mean) for size, group in zip(places, groups, strict=True)]
    edge = _right_edge(axes) + 14
    for number, (label, height) in enumerate(zip(labels, _heights(axes, means), strict=True)):
        _write(figure, edge, height, label, color=INK)
        _connect(figure, _in_points(axes, means)[number], (edge - 2, height), color=MUTED)
    _write(figure, 4, HEIGHT + 60 - TOP / 2 + 2, metric, color=MUTED)
    _write(figure, WIDTH - 4, 7, "bytes a token in the index, float16", color=MUTED, align="right")
    return figure


def _axes(figure: Figure, *, right: float, height: float = HEIGHT) -> Axes:
    """Axes at a fixed place, all in points: nothing has to be measured, and figures of a row stand level."""
    return figure.add_axes(
        (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - right) / WIDTH, (height - BOTTOM - TOP) / height)
    )


def _in_points(axes: Axes, places: Sequence[tuple[float, float]]) -> Places:
    """Where data lies in the figure, (places, 2)."""
    points: Places = axes.transData.transform(places) * 72 / axes.figure.dpi
    return points


def _heights(axes: Axes, places: Sequence[tuple[float, float]]) -> list[float]:
    """How high the labels of data stand that are beside the axes."""
    low, high = (_in_points(axes, [(axes.get_xlim()[0], value)])[0, 1] for value in axes.get_ylim())
    return _spread(np.nan_to_num(_in_points(axes, places)[:, 1]), low=low, high=high)


def _right_edge(axes: Axes) -> float:
    """Where the axes end, in points."""
    return WIDTH * float(axes.get_position().x1)


def _rows(count: int) -> tuple[Figure, Axes]:
    """A figure of a row each, the first on top, with room for a label above each row's marks."""
    row = 3.0 * LINE
    height = row * count + BOTTOM
    figure = new_figure(height)
    axes = figure.add_axes((10 / WIDTH, BOTTOM / height, 1 - 20 / WIDTH, row * count / height))
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    return figure, axes


def _row_label(axes: Axes, row: int, left: str, right: str = "") -> None:
    """Texts above the marks of a row, at both its ends."""
    room = int((WIDTH - 20) / LETTER) - len(right) - 2
    for x, text, align in ((0, _shortened(left, room), "left"), (1, right, "right")):
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # over the lines behind it
        axes.text(x, row - 0.42, text, transform=axes.get_yaxis_transform(), ha=align, va="top", bbox=box)


def _value_axis(axes: Axes, *, unit: str = "") -> None:
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    figure = axes.figure
    assert isinstance(figure, Figure)
    _write(figure, WIDTH - 10, 7, unit, color=MUTED, align="right")


def _scale(axes: Axes, curves: Sequence[Curve], *, from_zero: bool) -> None:
    """From zero; or, over more than two orders of magnitude, by orders."""
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if from_zero and len(values) and values.min() >= 0:
            axes.set_ylim(0, values.max() * 1.05 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def _compact(value: float) -> str:
    """A tick in few letters: 0.05, 250, 12k, 1e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _shortened(name: str, letters: int = LABEL_LETTERS) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _spread(heights: Floats, *, low: float, high: float) -> list[float]:
    """The heights, moved as little as it takes for texts not to overlap and to stay between two heights; in points."""
    order = np.argsort(heights)

    def middle(wanted: list[float]) -> float:
        half = LINE * (len(wanted) - 1) / 2
        return max(min(sum(wanted) / len(wanted), high - half), low + half)

    # Texts that touch are a block, in the middle of where they would be.
    blocks = list[list[float]]()
    for height in heights[order].tolist():
        blocks.append([height])
        while len(blocks) > 1:
            lower, upper = blocks[-2:]
            if middle(upper) - middle(lower) >= LINE * (len(upper) + len(lower)) / 2:
                break
            blocks[-2:] = [lower + upper]
    placed = [middle(block) + LINE * (place - (len(block) - 1) / 2) for block in blocks for place in range(len(block))]
    return [placed[place] for place in np.argsort(order)]


def _write(figure: Figure, x: float, y: float, text: str, *, color: str, align: str = "left") -> None:
    """A text whose middle is y points above the figure's lower edge."""
    figure.text(x / WIDTH, y / (figure.get_figheight() * 72), text, color=color, ha=align, va="center_baseline")


def _connect(figure: Figure, start: Sequence[float], end: Sequence[float], *, color: str) -> None:
    """A thin line between two places, in points."""
    height = figure.get_figheight() * 72
    (x0, y0), (x1, y1) = start, end
    figure.add_artist(
        Line2D((x0 / WIDTH, x1 / WIDTH), (y0 / height, y1 / height), color=color, linewidth=0.6, alpha=0.6)
    )
