"""Colours that can be told apart, and figures that are the same wherever and whenever they are drawn."""

import io
import itertools
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from trainer.theme import DARK, LIGHT, css_variables, new_figure, themed, to_png, to_svg

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# How colours look at full protanopia, deuteranopia and tritanopia (Machado et al. 2009, table 1), in linear RGB.
SEEN = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]


def linear(color: str) -> Array:
    """sRGB to linear RGB."""
    channels = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""
    low, high = sorted(float(linear(color) @ TO_XYZ[1]) + 0.05 for color in (one, other))
    return high / low


def lab(rgb: Array) -> Array:
    """Linear RGB to CIE L*a*b* under D65."""
    xyz = np.array(TO_XYZ) @ rgb.clip(0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("colors", [LIGHT, DARK])
def test_texts_and_lines_stand_out_from_their_paper(colors: dict[str, str]) -> None:
    assert list(colors) == list(LIGHT)
    for name, color in colors.items():
        if name not in ("paper", "grid"):
            assert contrast(color, colors["paper"]) >= 4.5, name


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("colors", [LIGHT, DARK])
def test_series_are_told_apart_by_colour_blind_eyes(colors: dict[str, str], kind: str) -> None:
    series = [lab(np.array(SEEN[kind]) @ linear(color)) for name, color in colors.items() if name.startswith("series-")]
    assert len(series) == 4
    # A difference of 10 is seen at a glance; of lines that cross, twice that.
    assert min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(series, 2)) > 20


def draw(text: str = "a text") -> Figure:
    """A line over all that a figure of ours has: marks, ticks, texts."""
    with themed():
        figure = new_figure()
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        axes.plot([0, 1, 2], [1, 0, 1], "o-", color=LIGHT["series-2"], markerfacecolor=LIGHT["paper"], gid="line")
        figure.text(0.5, 0.5, text)
        return figure


def svg_of(figure: Figure, name: str = "name", label: str = "what is seen") -> str:
    with themed():
        return to_svg(figure, name, label)


def test_an_svg_names_every_colour_and_no_font() -> None:
    svg = svg_of(draw())
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?!\d)(?=[;\"])", svg.replace('href="#', ""))
    assert set(re.findall(r"var\(--([\w-]+)\)", svg)) == {"paper", "ink", "muted", "grid", "series-2"}
    assert "font-family" not in svg
    assert "font-size: 11.5px" in svg
    assert "<style" not in svg
    assert "metadata" not in svg
    assert "http" not in svg


def test_ids_of_an_svg_begin_with_its_name_and_what_refers_to_them_too() -> None:
    root = ElementTree.fromstring(svg_of(draw(), name="loss"))
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert all(own.startswith("loss-") for own in ids)
    assert "loss-line" in ids
    links = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
    clips = [element.attrib["clip-path"] for element in root.iter() if "clip-path" in element.attrib]
    assert links
    assert clips
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert {clip.removeprefix("url(#").removesuffix(")") for clip in clips} <= set(ids)


def test_texts_of_an_svg_are_texts_and_escaped() -> None:
    svg = svg_of(draw("<b> & $x_1$"), label='a "quoted" <label>')
    root = ElementTree.fromstring(svg)
    assert "<b> & $x_1$" in [element.text for element in root.iter("text")]
    assert root.attrib["aria-label"] == 'a "quoted" <label>'
    assert root.attrib["role"] == "img"
    assert "<b>" not in svg


def test_the_same_figure_is_the_same_text() -> None:
    assert svg_of(draw()) == svg_of(draw())
    with themed():
        assert to_png(draw()) == to_png(draw())


def test_a_users_settings_neither_count_nor_change() -> None:
    expected = svg_of(draw())
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "axes.facecolor": "pink", "font.size": 30, "svg.fonttype": "path"}
    ):
        before = dict(matplotlib.rcParams)
        assert svg_of(draw()) == expected
        assert dict(matplotlib.rcParams) == before


def test_a_png_is_on_white_at_300_dots_an_inch() -> None:
    with themed():
        picture = imread(io.BytesIO(to_png(draw())))
    assert picture.shape == (866, 1440, 4)  # 208 x 345.6 points
    assert picture[0, 0].tolist() == [1, 1, 1, 1]


def test_css_declares_each_colour() -> None:
    assert css_variables({"ink": "#000000", "series-1": "#ffffff"}) == "--ink: #000000; --series-1: #ffffff;"
