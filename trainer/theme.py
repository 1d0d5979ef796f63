"""How figures look: colours for light and dark, and a figure as SVG for a page and as PNG for a paper."""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

# Each is drawn in its light value, which stands for its name: in a page, CSS puts the one that fits there. Texts and
# lines have a contrast of 4.5 or more to their paper, and the series stay apart for colour-blind eyes (tests).
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1d22",
    "muted": "#5a606b",
    "grid": "#e4e6ea",
    "series-1": "#0068a8",
    "series-2": "#b8430a",
    "series-3": "#8c25f4",
    "series-4": "#661940",
}
DARK = {
    "paper": "#16181d",
    "ink": "#e8eaee",
    "muted": "#a3a9b4",
    "grid": "#31353d",
    "series-1": "#5cb3f2",
    "series-2": "#ff9358",
    "series-3": "#f2479f",
    "series-4": "#e9dca0",
}
SERIES = [color for name, color in LIGHT.items() if name.startswith("series-")]
# In points, which are pixels of a phone where the page is 390 wide.
WIDTH, HEIGHT, FONT = 345.6, 208.0, 11.5
SETTINGS: Any = {
    "svg.fonttype": "none",  # texts stay texts, in the font of the page
    "path.simplify": False,
    "font.size": FONT,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same PNG everywhere
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a `$` in a name is one
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.color": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


@contextmanager
def themed() -> Iterator[None]:
    """Draw inside: the caller's settings of matplotlib, from a file or its own code, neither count nor change."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    # It says where it cannot keep its list of fonts, and that it makes one; neither is of the run.
    logger.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(SETTINGS)
            yield
    finally:
        logger.setLevel(level)


def new_figure(height: float = HEIGHT) -> Figure:
    """An empty figure as wide as all are; height in points."""
    return Figure(figsize=(WIDTH / 72, height / 72))


def to_png(figure: Figure) -> bytes:
    """The figure on white, at 300 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=300, facecolor=LIGHT["paper"], metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of a page: colours by name (var(--ink)), ids that begin with `name`, `label` for those
    who do not see it. The same figure gives the same text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    # Its style is of all elements, also those of the page.
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {key: _attribute(key, value, name) for key, value in element.attrib.items()}
        if link := element.attrib.pop(f"{_XLINK}href", None):
            element.attrib["href"] = link
        # What it indents by; texts have theirs in elements without children.
        element.tail = None
        if len(element):
            element.text = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    match key:
        case "id":
            return f"{name}-{value}"
        case "clip-path":
            return value.replace("url(#", f"url(#{name}-")
        case "style":
            value = re.sub(r"font-family: [^;]*(; )?", "", value)
            value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
            for color, light in LIGHT.items():
                value = value.replace(light, f"var(--{color})")
            return value
        case "d" | "x" | "y" | "transform":
            # A hundredth of a pixel is enough.
            return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    return value.replace("#", f"#{name}-") if key == f"{_XLINK}href" else value


def css_variables(colors: dict[str, str]) -> str:
    """Colours as CSS declares them."""
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
