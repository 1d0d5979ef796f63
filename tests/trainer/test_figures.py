"""What is drawn is what was logged: paths against the values, labels apart."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.trainer.made_groups import make_group
from trainer.figures import (
    LINE,
    MOST_POINTS,
    Curve,
    Floats,
    _spread,
    draw_before_after,
    draw_curves,
    draw_differences,
    draw_quality_and_size,
    draw_seeds,
    smoothed,
    smoothing_window,
    thinned,
)
from trainer.theme import themed, to_svg

NAN = math.nan


def make_curve(values: list[float] | Floats, name: str = "loss") -> Curve:
    return Curve(name, np.arange(1, len(values) + 1, dtype=float), np.array(values, dtype=float))


def drawn(figure: Figure) -> ElementTree.Element:
    with themed():
        return ElementTree.fromstring(to_svg(figure, "f", "label"))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def points(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Where a line of the figure goes through, in pixels."""
    [group] = [element for element in root.iter("g") if element.get("id") == f"f-{name}"]
    path = group.find("path")
    if path is not None:
        return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])]
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in group.iter("use")]


def assert_at_scale(pixels: list[float], values: list[float]) -> None:
    """One is the other, stretched and moved."""
    slope, offset = np.polyfit(values, pixels, 1)
    # Coordinates are rounded to a hundredth.
    assert np.abs(slope * np.array(values) + offset - pixels).max() < 0.011


# --- smoothing ---


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (19, 1), (20, 5), (100, 5), (120, 7), (3000, 151)])
def test_the_window_is_odd_and_near_a_twentieth(steps: int, window: int) -> None:
    assert smoothing_window(steps) == window


@pytest.mark.parametrize("window", [1, 5, 7])
def test_smoothed_values_are_means_of_those_around(window: int) -> None:
    values = np.random.default_rng(0).normal(size=23)
    values[[3, 8, 9, 10, 11, 12, 13, 14]] = NAN
    expected = []
    for place in range(23):
        around = values[max(place - window // 2, 0) : place + window // 2 + 1]
        known = [value for value in around if not math.isnan(value)]
        expected.append(sum(known) / len(known) if known else NAN)
    np.testing.assert_allclose(smoothed(values, window), expected, rtol=1e-12)


def test_a_long_curve_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=12_345)
    values[[77, 9_000]] = 50, -50
    values[100:120] = NAN
    few = thinned(make_curve(values))
    assert MOST_POINTS / 2 < len(few.values) <= MOST_POINTS
    assert {50, -50} <= set(few.values)
    assert (np.diff(few.steps) > 0).all()
    assert (few.values == values[few.steps.astype(int) - 1]).all()
    short = make_curve(values[:MOST_POINTS])
    assert thinned(short) is short


# --- curves ---


def test_a_curve_goes_through_every_step_and_its_means() -> None:
    curve = make_curve(np.random.default_rng(0).uniform(1, 3, size=60))
    with themed():
        root = drawn(draw_curves([curve], unit="nats"))
    for name, values in (("each", curve.values), ("line-0", smoothed(curve.values, 5))):
        own = points(root, name)
        assert len(own) == 60
        assert_at_scale([x for x, _ in own], curve.steps.tolist())
        assert_at_scale([y for _, y in own], values.tolist())
        assert own[0][1] > 0
    assert {"nats", "step", "0"} <= set(texts(root))


def test_a_value_that_was_not_finite_is_a_gap() -> None:
    with themed():
        root = drawn(draw_curves([make_curve([3, 2, NAN, 1, 2])], unit="norm"))
    assert len(points(root, "line-0")) == 4
    [group] = [element for element in root.iter("g") if element.get("id") == "f-line-0"]
    assert "".join(path.attrib["d"] for path in group.iter("path")).count("M") == 2


def test_a_value_each_evaluation_is_a_point_on_a_line() -> None:
    curve = make_curve([0.5, 0.625, 0.75])
    with themed():
        root = drawn(draw_curves([curve], unit="score", style="points", from_zero=False))
    [group] = [element for element in root.iter("g") if element.get("id") == "f-line-0"]
    marks = [(float(use.attrib["x"]), float(use.attrib["y"])) for use in group.iter("use")]
    assert len(marks) == 3
    assert marks == points(root, "line-0")
    assert_at_scale([y for _, y in marks], curve.values.tolist())


def test_one_step_is_seen() -> None:
    with themed():
        root = drawn(draw_curves([make_curve([0.5])], unit="loss"))
    [group] = [element for element in root.iter("g") if element.get("id") == "f-line-0"]
    assert len(list(group.iter("use"))) == 1


def test_several_curves_have_their_names_at_their_ends_in_their_order() -> None:
    curves = [
        make_curve([1, 2, level], name=name) for name, level in (("low", 1), ("high", 3), ("a-very-long-name-it-is", 2))
    ]
    with themed():
        root = drawn(draw_curves(curves, unit="loss", style="line"))
    heights = {element.text: float(element.attrib["y"]) for element in root.iter("text")}
    assert heights["high"] < heights["a-very-long-nam…"] < heights["low"]
    assert abs(heights["high"] - points(root, "line-1")[-1][1]) < LINE / 2


def test_values_over_three_orders_are_drawn_by_orders() -> None:
    values = [1000.0, 100, 10, 1]
    with themed():
        root = drawn(draw_curves([make_curve(values)], unit="norm", style="line"))
    assert_at_scale([y for _, y in points(root, "line-0")], np.log10(values).tolist())


def test_a_limit_is_a_level_line() -> None:
    with themed():
        root = drawn(draw_curves([make_curve([2, 0, 1])], unit="norm", style="line", limit=1.0))
    assert {y for _, y in points(root, "limit")} == {points(root, "line-0")[-1][1]}


def test_labels_never_overlap_nor_leave_and_move_no_more_than_they_must() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        count = int(draw.integers(1, 9))
        heights = draw.uniform(20, 200, size=count)
        placed = _spread(heights, low=20, high=200)
        for lower, upper in zip(np.argsort(heights)[:-1], np.argsort(heights)[1:], strict=True):
            assert placed[upper] - placed[lower] >= LINE - 1e-9
        assert min(placed) >= 20 - 1e-9
        assert max(placed) <= 200 + 1e-9
        free = [
            place
            for place in range(count)
            if all(abs(heights[place] - heights[other]) > count * LINE for other in range(count) if other != place)
        ]
        assert all(placed[place] == pytest.approx(heights[place]) for place in free)


# --- scores ---


def test_before_and_after_are_where_the_values_are() -> None:
    before, after = {"ndcg@10": 0.25, "map": 0.5}, {"ndcg@10": 0.75, "map": 0.375}
    with themed():
        root = drawn(draw_before_after(before, after, change={"low": 0.25, "high": 0.625}, metric="ndcg@10"))
    found = [points(root, name)[0][0] for name in ("before-0", "after-0", "before-1", "after-1")]
    ends = [x for x, _ in points(root, "interval")]
    assert_at_scale([*found, *ends], [0.25, 0.75, 0.5, 0.375, 0.5, 0.875])
    assert {"ndcg@10", "0.2500 to 0.7500", "map", "0.5000 to 0.3750"} <= set(texts(root))


def test_differences_seeds_and_sizes_are_where_the_values_are() -> None:
    groups = [
        make_group("head=linear", [0.5, 0.6], size=256),
        make_group("head=mlp", [0.7, 0.8], difference=0.2, low=0.1, high=0.35, size=256),
        make_group("head=best", [0.4, 0.5], difference=-0.1, low=-0.2, high=0.05, size=64),
    ]
    with themed():
        root = drawn(draw_differences(groups, metric="map"))
    found = [
        x
        for name in ("zero", "difference-0", "interval-0", "difference-1", "interval-1")
        for x, _ in points(root, name)
    ]
    assert_at_scale(found, [0, 0, 0.2, 0.1, 0.35, -0.1, -0.2, 0.05])
    assert {"head=mlp", "+0.2000", "-0.1000", "difference of map"} <= set(texts(root))

    with themed():
        root = drawn(draw_seeds(groups, metric="map"))
    found = [x for row in range(3) for name in ("seeds", "mean") for x, _ in points(root, f"{name}-{row}")]
    assert_at_scale(found, [0.5, 0.6, 0.55, 0.7, 0.8, 0.75, 0.4, 0.5, 0.45])

    with themed():
        root = drawn(draw_quality_and_size(groups, metric="map"))
    (first, second, third) = (points(root, f"group-{number}")[0] for number in range(3))
    assert_at_scale([first[1], second[1], third[1]], [0.55, 0.75, 0.45])
    # Two of one size stand beside its place, on a scale of powers of 2.
    assert third[0] < first[0] < second[0]
    assert second[0] - first[0] == pytest.approx(0.12 / 2 * ((first[0] + second[0]) / 2 - third[0]), abs=0.02)
    assert {"linear", "mlp", "best", "64", "256", "map"} <= set(texts(root))
