"""The common style of reports: colours and type of plots, pages from templates.

A plot is drawn once. Inside a page it takes the colours of the page's style sheet, light or dark; as a file of its own
it has the colours below on white, for paper. The module needs matplotlib and jinja2, which the extra `data` brings.
"""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from etils import epath
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from mlx_pretrain.files import write_atomic
from mlx_pretrain.languages import LANGUAGES, RIGHT_TO_LEFT
from mlx_pretrain.reports.numbers import compact, duration, number, signed

# The light colours of style.html.j2, where each has its dark counterpart. No two may be equal, as `inline_svg` finds
# them in the text of a plot.
INK, MUTED, RULE, PAPER = "#1c1e21", "#63676d", "#dcdcd6", "#ffffff"
ACCENT, WARM, GREEN = "#0b63a5", "#c8570b", "#2f7d4a"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", WARM: "warm", GREEN: "green", PAPER: "paper"}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10.5, "text.color": INK,
    "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE,
    "grid.linewidth": 0.7, "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titlecolor": INK,
    "axes.titlepad": 10, "axes.labelsize": 10.5, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5, "ytick.left": False, "xtick.major.size": 3, "lines.linewidth": 1.7,
    "legend.frameon": False, "legend.handlelength": 1.3, "legend.fontsize": 10.5, "axes.xmargin": 0.02,
    "hatch.color": RULE, "figure.facecolor": PAPER, "axes.facecolor": "none",
}
_FONTS = "font-family: 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
# Characters that HTML, XML or UTF-8 cannot hold; a model writing bytes makes some.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# In CSS pixels. A wide page has two figures side by side, a phone one.
FIGURE_WIDTH, PAGE_WIDTH = 400, 936


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Lets matplotlib draw in this style inside the block, whatever its global settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def panel(
    title: str, height: float, left: float = 46, width: float = FIGURE_WIDTH, top: float = 28, bottom: float = 42
) -> tuple[Figure, Axes]:
    """Returns a figure of one plot with fixed margins, so that neighbours align; sizes in CSS pixels.

    The title names the y axis: it reads better than text turned by 90 degrees.
    """
    figure = Figure(figsize=(width / 72, height / 72))
    figure.subplots_adjust(left=left / width, right=1 - 14 / width, bottom=bottom / height, top=1 - top / height)
    axes = figure.subplots()
    axes.set_title(title, x=-left / (width - left - 14), pad=top - 18)
    return figure, axes


def label_rows(axes: Axes, labels: Sequence[str]) -> np.ndarray:
    """Makes the y axis one row per label, first on top; returns the rows' positions `[labels]`."""
    rows = np.arange(len(labels))
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    return rows


def rows_panel(
    title: str, labels: Sequence[str], row: float = 18, top: float = 28, width: float = FIGURE_WIDTH
) -> tuple[Figure, Axes, np.ndarray]:
    """Returns a plot with a row of `row` CSS pixels per label, and the rows' positions `[labels]`; see `panel`."""
    figure, axes = panel(title, top + 44 + row * len(labels), 14 + 6.5 * max(map(len, labels)), width, top)
    return figure, axes, label_rows(axes, labels)


def matrix_panel(
    title: str, rows: Sequence[str], columns: Sequence[str], widths: tuple[float, float], height: float | None = None
) -> tuple[Figure, Axes, float]:
    """Returns axes for a matrix of cells with the rows' labels on the left and the columns' on top.

    Args:
      title: title of the figure, the quantity in the cells.
      rows, columns: labels; row 0 is the uppermost.
      widths: bounds of a cell's width in CSS pixels, which fits the page between them.
      height: a cell's height in CSS pixels; its width by default.

    Returns:
      The figure; axes on which cell [row, column] is the unit square around (column, row); a cell's width.
    """
    left = 14 + 6.5 * max(map(len, rows))
    cell = min(max((PAGE_WIDTH - left - 14) / len(columns), widths[0]), widths[1])
    total = 60 + (height or cell) * len(rows)
    width = max(left + cell * len(columns) + 14, FIGURE_WIDTH)
    figure, axes = panel(title, total, left, width, 52, 8)
    figure.subplots_adjust(right=(left + cell * len(columns)) / width)
    label_rows(axes, rows)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), columns)
    axes.set_title(title, x=-left / (cell * len(columns)), pad=24)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    return figure, axes, cell


def fill_cells(axes: Axes, colours: np.ndarray) -> None:
    """Fills the cells of a `matrix_panel` with RGBA colours `[rows, columns, 4]`; an opacity of 0 leaves one empty."""
    corners = np.array(((-0.48, -0.48), (0.48, -0.48), (0.48, 0.48), (-0.48, 0.48)))
    rows, columns = np.nonzero(colours[..., 3])
    squares = np.stack([columns, rows], axis=-1)[:, None] + corners
    axes.add_collection(PolyCollection(squares, facecolors=colours[rows, columns], linewidths=0))


def short_label(name: str, longest: int = 18) -> str:
    """Shortens a name for a plot to one line of at most `longest` characters that fonts can show."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split())) or "(none)"
    return name if len(name) <= longest else name[: longest - 1] + "…"


def legend(axes: Axes, **more: Any) -> None:
    """Draws the legend in the line of the title, where no curve can cross it; `more` goes to `Axes.legend`."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, columnspacing=1.1, borderaxespad=0.25,
                handletextpad=0.4, **more)


def _svg(figure: Figure) -> str:
    """Returns the figure as the text of an SVG file, without the time and the program that made it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>| transform=\"rotate\(-0 [^\"]*\"", "", buffer.getvalue(), flags=re.DOTALL)
    return _UNPRINTABLE.sub("\ufffd", text)


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Returns the figure as inline SVG: coloured by the page, ids unique to `name`, `label` for screen readers."""
    text = _svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    opening = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">').format(
        width, height, width, height, label)
    return opening + Markup(re.sub(r"\A<svg[^>]*>", "", text).strip())


def save_figure(figure: Figure, folder: epath.PathLike, name: str) -> None:
    """Writes `name`.svg (text as text, in a generic sans serif) and `name`.png (300 dpi) on white, atomically."""
    text = re.sub(r"font-family: [^;\"]*", _FONTS, _svg(figure))
    # The background is a rectangle right after the opening tag, below everything else.
    text = re.sub(r"(<svg[^>]*>)", rf'\1\n<rect width="100%" height="100%" fill="{PAPER}"/>', text, count=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=300)
    write_atomic(epath.Path(folder) / f"{name}.svg", text)
    write_atomic(epath.Path(folder) / f"{name}.png", buffer.getvalue())


def save_figures(figures: Iterable[tuple[str, Figure, str]], folder: epath.PathLike) -> dict[str, tuple[Markup, int]]:
    """Writes figures into a folder, see `save_figure`, and returns them for a page.

    Args:
      figures: (name, figure, description for screen readers).
      folder: made if absent.

    Returns:
      name -> (inline SVG, width in CSS pixels).
    """
    drawn = {}
    for name, figure, description in figures:
        save_figure(figure, folder, name)
        svg = inline_svg(figure, name.replace(" ", "-"), description)
        drawn[name] = svg, round(figure.get_figwidth() * 72)
    return drawn


def render_page(template: epath.PathLike, **values: Any) -> str:
    """Renders a template with `values`, which are escaped; it may include templates of this package.

    The functions of `reports.numbers` are its filters, and so is every callable among `values`, under its name; it also
    knows `languages` and `right_to_left` of `mlx_pretrain.languages`.
    """
    template = epath.Path(template)
    loader = jinja2.FileSystemLoader([template.parent, epath.Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(languages=LANGUAGES, right_to_left=RIGHT_TO_LEFT)
    environment.filters.update(number=number, compact=compact, duration=duration, signed=signed)
    environment.filters.update({name: value for name, value in values.items() if callable(value)})
    return _UNPRINTABLE.sub("\ufffd", environment.get_template(template.name).render(**values))
