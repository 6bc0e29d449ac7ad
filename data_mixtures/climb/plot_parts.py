"""Parts of the figures of an allocation's report: logarithmic axes with a place for 0, small plots, matrices."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlx_pretrain.reports.figures import ACCENT, FIGURE_WIDTH, INK, MUTED, PAGE_WIDTH, RULE, WARM, short_label

# More points than this make a page slow; the rest is left out evenly.
_MAX_POINTS = 6000


def _ticks(low: float, high: float) -> list[float]:
    """Returns three to seven round values on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)]


class LogScale:
    """A logarithmic axis of at most three decades; 0 and smaller values have one place at its lower end."""

    def __init__(self, *values: np.ndarray):
        values = np.concatenate([np.ravel(v) for v in values])
        values = values[np.isfinite(values)]
        positive = values[values > 0] if (values > 0).any() else np.ones(1)
        self._low, self.high = max(positive.min() / 1.3, positive.max() * 1e-3), positive.max() * 1.3
        self._has_zero = bool((values < self._low).any())
        self._below = "0" if positive.min() >= self._low else None
        self._zero = self._low / (self.high / self._low) ** 0.07

    def place(self, values: np.ndarray) -> np.ndarray:
        """Returns the positions of values on the axis."""
        return np.where(values >= self._low, values, self._zero)

    @property
    def low(self) -> float:
        """The lower end of the axis."""
        return self._zero / (self.high / self._low) ** 0.03 if self._has_zero else self._low

    def apply(self, axes: Axes, name: str, scale: float = 1.0, suffix: str = "", max_ticks: int = 7) -> None:
        """Sets scale, limits and ticks of axis "x" or "y"; a tick label is `scale` times its value, with `suffix`."""
        axes.set(**{f"{name}scale": "log", f"{name}lim": (self.low, self.high)})
        axis = axes.xaxis if name == "x" else axes.yaxis
        ticks = _ticks(self._low, self.high)
        ticks = ticks[:: math.ceil(len(ticks) / max_ticks)]
        if self._has_zero:  # space for its label
            ticks = [tick for tick in ticks if tick > self._zero * (self.high / self._zero) ** (0.6 / max_ticks)]
        axis.set_major_locator(FixedLocator([*([self._zero] if self._has_zero else []), *ticks]))
        axis.set_minor_locator(NullLocator())
        lowest = self._below or f"<{scale * self._low:.1g}"
        axis.set_major_formatter(FuncFormatter(
            lambda value, _: f"{lowest}{suffix}" if value < self._low else f"{scale * value:.4g}{suffix}"))


def legend_columns(entries: int) -> int:
    """Returns the number of columns of a legend: at most five, with full rows."""
    return math.ceil(entries / math.ceil(entries / 5))


def faded(colour: str, opacity: np.ndarray) -> np.ndarray:
    """Returns the colour at each opacity: `[cells, 4]`; over the page's paper it is right in light and in dark."""
    rgb = np.broadcast_to(matplotlib.colors.to_rgb(colour), (len(opacity), 3))
    return np.concatenate([rgb, opacity[:, None]], axis=1)


def grey_squares(axes: Axes, x: np.ndarray, y: np.ndarray, side: float, hatched: bool) -> None:
    """Draws squares for pairs that the data do not identify; hatching would blur where they are small."""
    square = {"marker": "s", "s": side**2, "linewidth": 0}
    axes.scatter(x, y, color=RULE, alpha=0.35 if hatched else 0.6, **square)
    if hatched:  # apart, as it would take the opacity of the fill
        axes.scatter(x, y, facecolor="none", hatch="////", **square)


def thinned(rows: int, panels: int) -> np.ndarray:
    """Returns a mask of the rows to draw, evenly spread, so that all panels together stay readable."""
    keep = np.zeros(rows, bool)
    keep[np.linspace(0, rows - 1, min(rows, _MAX_POINTS // panels)).round().astype(int)] = True
    return keep


def thinning(rows: int, panels: int) -> int:
    """Returns the number of points, out of `rows`, that each of `panels` small plots shows."""
    return int(thinned(rows, panels).sum())


def small_plots(names: Sequence[str], title: str, x_label: str, shared: bool) -> tuple[Figure, list[Axes]]:
    """Returns square small plots, one per name.

    Args:
      names: titles of the plots.
      title: title of the figure, the name of the y axes.
      x_label: name of the x axes.
      shared: True: all have the same axes, and only the outer ones have numbers.
    """
    count = len(names)
    columns = min(count, 2 if count <= 4 else 3 if count <= 9 else 6 if count <= 24 else 8)
    width = FIGURE_WIDTH if columns <= 3 else PAGE_WIDTH
    left, right, top, bottom = 38, 8, 64 if shared else 44, 38
    gap_x, gap_y = (12, 24) if shared else (34, 40)
    side = (width - left - right - gap_x * (columns - 1)) / columns
    rows = math.ceil(count / columns)
    height = top + bottom + rows * side + (rows - 1) * gap_y
    figure = Figure(figsize=(width / 72, height / 72))
    panels = []
    for k, name in enumerate(names):
        row, column = divmod(k, columns)
        x, y = left + column * (side + gap_x), height - top - row * (side + gap_y) - side
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        axes.set_title(short_label(name, max(6, round(side / 6))), fontsize=10, pad=4)
        axes.tick_params(labelsize=9, length=2, pad=2)
        if shared:
            axes.tick_params(labelleft=column == 0, labelbottom=k + columns >= count)
        panels.append(axes)
    figure.text(0, 1 - 6 / height, title, va="top", fontsize=11.5)
    figure.text(1 - right / width, 6 / height, x_label, ha="right", va="bottom", color=MUTED)
    return figure, panels


def small_plots_legend(figure: Figure, handles: Sequence) -> None:
    width, height = figure.get_size_inches() * 72
    figure.legend(handles=handles, loc="upper left", ncols=5, bbox_to_anchor=(-6 / width, 1 - 20 / height),
                  columnspacing=1.2, handletextpad=0.2, fontsize=9.5, markerscale=1.4)


def transfer_panel(rows: Sequence[str], columns: Sequence[str], cell: float, font: float) -> tuple[Figure, Axes]:
    """Returns axes of `cell` pixels per unit for a matrix, labelled left and on top, with space for a scale below."""
    turned = max(len(name) for name in columns) * font * 0.62 > cell
    left = 12 + font * 0.62 * max(len(name) for name in rows)
    head = 42 + (font * 0.62 * max(len(name) for name in columns) if turned else font)
    width, height = left + cell * len(columns) + 14, head + cell * len(rows) + 58
    width = max(width, FIGURE_WIDTH)
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((left / width, 58 / height, cell * len(columns) / width, cell * len(rows) / height))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.tick_top()
    turn = {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"} if turned else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **turn)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0, labelsize=font, labelcolor=INK)
    figure.text(0, 1 - 6 / height, "Transfer to the row's language from the column's", va="top", fontsize=11.5)
    return figure, axes


def colour_bar(figure: Figure, axes: Axes, limit: float, strongest: float, greyed: bool, hatched: bool) -> None:
    """Draws the scale of colours below a matrix, and the meaning of grey."""
    width, height = figure.get_size_inches() * 72
    left = axes.get_position().x0 * width
    bar = figure.add_axes((left / width, 12 / height, (width - left) / width, 34 / height))
    bar.set(xlim=(0, width - left), ylim=(0, 34))
    bar.set_axis_off()
    steps = np.linspace(-1, 1, 11)
    for k, step in enumerate(steps):
        colour = faded(ACCENT if step > 0 else WARM, np.array([abs(step) * strongest]))
        bar.scatter(8 + 14 * k, 24, marker="s", s=13**2, color=colour, linewidth=0)
    for x, text in ((8, f"−{limit:.2g}"), (78, "0"), (148, f"+{limit:.2g}")):
        bar.text(x, 4, text, ha="center", va="bottom", fontsize=9, color=MUTED)
    if greyed:
        grey_squares(bar, np.array([186]), np.array([24]), 13, hatched)
        bar.text(198, 24, "not identified", va="center", fontsize=9, color=MUTED)
