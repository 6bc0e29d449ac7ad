"""The figures of an allocation's report; see `data_mixtures.climb.allocation_file` for its fields."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from data_mixtures.climb.plot_parts import (
    LogScale,
    colour_bar,
    faded,
    grey_squares,
    legend_columns,
    small_plots,
    small_plots_legend,
    thinned,
    transfer_panel,
)
from mlx_pretrain.reports.figures import (
    ACCENT,
    FIGURE_WIDTH,
    GREEN,
    INK,
    MUTED,
    PAGE_WIDTH,
    PAPER,
    RULE,
    WARM,
    label_rows,
    rows_panel,
    short_label,
)
from mlx_pretrain.reports.numbers import compact

_NAMES = {"climb": "Climb", "unimax": "UniMax", "msl": "MSL", "regmix": "RegMix", "lightgbm": "LightGBM",
          "mixing_law": "mixing law", "gaussian_process": "Gaussian process", "structured_gp": "structured GP"}
# Marker, colour, size: ink for what needs no law, warm for laws without transfer, green for the others.
_MARKS = {
    "natural": ("|", INK, 12), "uniform": ("x", MUTED, 5), "temperature": ("^", MUTED, 5), "unimax": ("s", MUTED, 4.5),
    "two-step": ("D", ACCENT, 5), "joint": ("d", ACCENT, 5.5), "isolated": ("o", WARM, 5), "msl": ("v", WARM, 5),
    "regmix": ("s", GREEN, 4.5), "mixing_law": ("D", GREEN, 4.5),
}
_MORE_MARKS = [("^", GREEN, 5), ("v", GREEN, 5), ("p", GREEN, 5.5), ("h", GREEN, 5.5), ("<", GREEN, 5), (">", GREEN, 5)]


def display_name(name: str) -> str:
    """Returns the name of a method or law in words: "climb-joint", of a law and a solver, becomes "Climb joint"."""
    for solver in ("joint", "two-step", "sampling"):
        if name.endswith(f"-{solver}"):
            law = name.removesuffix(f"-{solver}")
            return f"{_NAMES.get(law, law)} {solver}"
    return _NAMES.get(name, name)


def _clustered(transfer: np.ndarray) -> np.ndarray:
    """Returns the order of languages that puts those of most mutual transfer together; `transfer` is square."""
    known = np.nan_to_num(transfer)
    mutual = (known + known.T) / 2
    distance = mutual.max() - mutual
    np.fill_diagonal(distance, 0)
    if len(distance) < 3:
        return np.arange(len(distance))
    return hierarchy.leaves_list(hierarchy.linkage(squareform(distance, checks=False), "average", True))


class Plots:
    """The figures of one allocation; each method returns None if the allocation has no data for it.

        for name, figure, description in Plots(read_allocation("runs/sample/climb/allocation.json")).all(): ...
    """

    def __init__(self, allocation: Mapping[str, Any]):
        """Takes an allocation as `data_mixtures.climb.allocation_file.read_allocation` returns it."""
        self._a = allocation
        self._methods = allocation["methods"]
        self._best = self._methods[allocation["method"]]
        self._order = np.argsort(-self._best["ratios"], kind="stable")
        ratio = dict(zip(allocation["languages"], self._best["ratios"]))
        self._target_order = np.argsort([-ratio.get(name, 0) for name in allocation["targets"]], kind="stable")
        self._row = 18 if len(allocation["languages"]) <= 24 else 15

    def all(self) -> Iterator[tuple[str, Figure, str]]:
        """Yields (name, figure, description for screen readers) of each figure."""
        for name, description in (
            ("ratios", "Ratio of each language by method; numbers in the table"),
            ("losses", "Predicted loss of each language against the baseline; numbers in the table"),
            ("epochs", "Epochs of each language; numbers in the table"),
            ("transfer", "Matrix of transfer between languages"),
            ("effective", "Effective ratio against ratio, by language"),
            ("predictions", "Predicted against measured loss, by language"),
        ):
            if (figure := getattr(self, name)()) is not None:
                yield name, figure, description

    def _marks(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yields (name, method, keywords of `plot`); the recommended method is the last, to lie on top."""
        more = iter(_MORE_MARKS * len(self._methods))
        for name, method in self._methods.items():
            if name != self._a["method"]:
                mark = next((solver for solver in ("joint", "two-step") if name.endswith(f"-{solver}")), name)
                marker, colour, size = _MARKS.get(mark) or next(more)
                yield name, method, {"marker": marker, "color": colour, "markersize": size, "linestyle": "none",
                                     "markerfacecolor": PAPER, "markeredgewidth": 1.2, "label": display_name(name)}
        name = self._a["method"]
        yield name, self._best, {"marker": "o", "color": ACCENT, "markersize": 7, "linestyle": "none",
                                 "label": display_name(name)}

    def _by_name(
        self, title: str, names: Sequence[str], entries: int, width: float = FIGURE_WIDTH
    ) -> tuple[Figure, Axes, np.ndarray]:
        """Returns a plot with a row per name and space for a legend of `entries` below the title."""
        figure, axes, rows = rows_panel("", [short_label(name) for name in names], self._row,
                                        30 + 16 * math.ceil(entries / legend_columns(entries)), width)
        figure.text(0, 1 - 6 / (72 * figure.get_figheight()), title, va="top", fontsize=11.5)
        if self._row < 18:
            axes.tick_params(axis="y", labelsize=9.5)
        return figure, axes, rows

    def _legend(self, figure: Figure, axes: Axes) -> None:
        width, height = figure.get_size_inches() * 72
        handles, labels = axes.get_legend_handles_labels()
        # By rows, the recommended method first; matplotlib fills by columns.
        handles, labels = [handles[-1], *handles[:-1]], [short_label(text, 13) for text in [labels[-1], *labels[:-1]]]
        columns = legend_columns(len(handles))
        order = [k for column in range(columns) for k in range(column, len(handles), columns)]
        figure.legend([handles[k] for k in order], [labels[k] for k in order], loc="upper left", ncols=columns,
                      bbox_to_anchor=(-6 / width, 1 - 20 / height), columnspacing=1.1, handletextpad=0.3,
                      labelspacing=0.25, fontsize=9.5, handlelength=1.2)

    def ratios(self) -> Figure:
        """Draws the ratios of all methods, a row per language, on a logarithmic axis."""
        figure, axes, rows = self._by_name("Share of the training tokens", self._names, len(self._methods))
        low, high = self._best["ratio_low"], self._best["ratio_high"]
        scale = LogScale(*(method["ratios"] for method in self._methods.values()),
                          *(ends for ends in (low, high) if ends is not None))
        if low is not None and high is not None:
            axes.hlines(rows, scale.place(low)[self._order], scale.place(high)[self._order], color=ACCENT,
                        linewidth=4.5, alpha=0.3)
        for _, method, mark in self._marks():
            axes.plot(scale.place(method["ratios"])[self._order], rows, **mark, clip_on=False)
        scale.apply(axes, "x", 100, " %", max_ticks=6)
        axes.set_xlabel("Share of the training tokens (log scale)")
        self._legend(figure, axes)
        return figure

    @property
    def _names(self) -> list[str]:
        return [self._a["languages"][k] for k in self._order]

    def losses(self) -> Figure:
        """Draws predicted losses of all methods, relative to the baseline's, if any."""
        names = [self._a["targets"][k] for k in self._target_order]
        baseline = self._a["baseline"]
        base = self._methods[baseline]["losses"] if baseline else np.ones(len(names))
        title = f"Predicted loss against {baseline}" if baseline else "Predicted loss (nats per token)"
        shown = [(name, method, mark) for name, method, mark in self._marks() if name != baseline]
        figure, axes, rows = self._by_name(title, names, len(shown))

        def place(losses: np.ndarray) -> np.ndarray:
            return (100 * (losses / base - 1) if baseline else losses)[self._target_order]

        if baseline:
            axes.axvline(0, color=INK, linewidth=1.2)
        if self._best["loss_low"] is not None and self._best["loss_high"] is not None:
            axes.hlines(rows, place(self._best["loss_low"]), place(self._best["loss_high"]), color=ACCENT,
                        linewidth=4.5, alpha=0.3)
        for _, method, mark in shown:
            axes.plot(place(method["losses"]), rows, **mark, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        if baseline:
            axes.xaxis.set_major_formatter(FuncFormatter(
                lambda value, _: f"{value:+g} %".replace("-", "−") if value else "0 %"))
        axes.set_xlabel("Change of the loss (left is better)" if baseline else "Loss (left is better)")
        axes.margins(x=0.04)
        self._legend(figure, axes)
        return figure

    def epochs(self) -> Figure | None:
        """Draws the epochs over each language's unique text, and the cap."""
        shown = [(name, method, mark) for name, method, mark in self._marks()
                 if method["epochs"] is not None and name in (self._a["method"], self._a["baseline"])]
        cap = self._a["constraints"].get("max_epochs")
        if self._best["epochs"] is None:
            return None
        names = self._names
        scale = LogScale(*(method["epochs"] for _, method, _ in shown), np.array([] if cap is None else [cap]))
        # A single plot of many rows would leave half of a page empty.
        half = math.ceil(len(names) / 2) if len(names) > 24 else len(names)
        figure, axes, _ = self._by_name("Epochs over the unique text", names[:half], len(shown) + (cap is not None),
                                        FIGURE_WIDTH if half == len(names) else PAGE_WIDTH)
        parts = [axes]
        if half < len(names):
            box = axes.get_position()
            side = FIGURE_WIDTH / PAGE_WIDTH - box.x0
            axes.set_position((box.x0, box.y0, side, box.height))
            bottom = box.y0 + box.height * (1 - (len(names) - half) / half)
            parts.append(figure.add_axes((1 - 14 / PAGE_WIDTH - side, bottom, side, box.y1 - bottom)))
            label_rows(parts[1], [short_label(name) for name in names[half:]])
            parts[1].tick_params(axis="y", labelsize=9.5)
        for number, part in enumerate(parts):
            order = self._order[number * half :][:half]
            rows = np.arange(len(order))
            if cap is not None:
                part.axvline(cap, color=WARM, linewidth=1.4, linestyle=(0, (4, 2)), label="cap")
            part.hlines(rows, scale.low, scale.place(self._best["epochs"])[order], color=ACCENT, linewidth=1.2,
                        alpha=0.45)
            for _, method, mark in shown:
                part.plot(scale.place(method["epochs"])[order], rows, **mark, clip_on=False)
            scale.apply(part, "x")
            part.set_xlabel("Epochs (log scale)")
        self._legend(figure, axes)
        return figure

    def transfer(self) -> Figure | None:
        """Draws a heat map of the transfer to each language (row) from each other (column)."""
        transfer, languages, targets = self._a["transfer"], self._a["languages"], self._a["targets"]
        if transfer is None:
            return None
        rows = columns = np.arange(len(languages))
        if list(languages) == list(targets):
            identified = np.where(transfer["identified"], transfer["values"], 0)
            rows = columns = _clustered(identified)
        else:
            rows = np.arange(len(targets))
        values, known = (transfer[name][np.ix_(rows, columns)] for name in ("values", "identified"))
        low, high = (None if transfer[name] is None else transfer[name][np.ix_(rows, columns)]
                     for name in ("low", "high"))
        size = max(values.shape)
        cell = 50 if size <= 6 else 42 if size <= 10 else 40 if size <= 20 else max(9, min(26, 850 // size))
        row_labels = [short_label(targets[k]) for k in rows]
        column_labels = [short_label(languages[k]) for k in columns]
        font = 10.5 if cell >= 16 else 8.5
        figure, axes = transfer_panel(row_labels, column_labels, cell, font)
        y, x = np.indices(values.shape)
        has_value = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            limit = float(np.nanmax(np.abs(np.where(known, values, np.nan)), initial=0)) or 1.0
        written = size <= 20
        strongest = 0.62 if written else 1.0
        square = {"marker": "s", "s": (cell - 1) ** 2, "linewidth": 0}
        for sign, colour in ((1, ACCENT), (-1, WARM)):
            cells = has_value & known & (sign * values > 0)
            opacity = np.minimum(np.abs(values[cells]) / limit, 1) * strongest
            axes.scatter(x[cells] + 0.5, y[cells] + 0.5, color=faded(colour, opacity), **square)
        cells = has_value & ~known
        grey_squares(axes, x[cells] + 0.5, y[cells] + 0.5, cell - 1, written)
        axes.scatter(x[~has_value] + 0.5, y[~has_value] + 0.5, marker="_", s=(cell / 4) ** 2, color=RULE, linewidth=1)
        if written:
            self._write_cells(axes, values, known, low, high, cell, limit)
        colour_bar(figure, axes, limit, strongest, bool(cells.any()), written)
        return figure

    @staticmethod
    def _write_cells(axes: Axes, values, known, low, high, cell: float, limit: float) -> None:
        digits = max(0, 1 - math.floor(math.log10(limit)))
        interval_width = 9.5 * digits + 19  # CSS pixels, of two numbers and " to " in the font below
        intervals = low is not None and high is not None and cell >= max(50, interval_width)

        def short(value: float) -> str:
            text = f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
            return text.replace("0.", ".", 1) if intervals and abs(value) < 1 else text

        for row, column in zip(*np.nonzero(np.isfinite(values))):
            colour = INK if known[row, column] else MUTED
            axes.text(column + 0.5, row + (0.4 if intervals else 0.5), short(values[row, column]),
                      ha="center", va="center", color=colour, fontsize=10 if cell >= 42 else 9)
            if intervals and np.isfinite([low[row, column], high[row, column]]).all():
                axes.text(column + 0.5, row + 0.74, f"{short(low[row, column])} to {short(high[row, column])}",
                          ha="center", va="center", color=colour, fontsize=7.5)

    def effective(self) -> Figure | None:
        """Draws effective ratio against ratio: measured run by run, and the law's."""
        effective = self._a["effective"]
        if effective is None:
            return None
        order = self._target_order
        figure, panels = small_plots([self._a["targets"][k] for k in order], "Effective share (%)",
                               "Share of the training tokens (%, log scales)", shared=True)
        ratio, measured, law = (effective[name] for name in ("ratio", "effective", "predicted"))
        keep = thinned(len(ratio), 2 * len(order))
        across, up = LogScale(ratio[keep]), LogScale(measured[keep], law[keep])
        ends = [min(across.low, up.low), max(across.high, up.high)]
        groups = _token_groups(effective["tokens"])
        handles = []
        for axes, k in zip(panels, order):
            axes.plot(ends, ends, color=MUTED, linewidth=0.9)
            handles = []
            for strength, (name, rows) in zip(np.linspace(0.3, 0.9, len(groups)) if len(groups) > 1 else [0.7],
                                               groups):
                rows = rows & keep
                handles += axes.plot(across.place(ratio[rows, k]), up.place(measured[rows, k]), "o", markersize=3.2,
                                     color=ACCENT, alpha=strength, markeredgewidth=0, label=name)
            handles += axes.plot(across.place(ratio[keep, k]), up.place(law[keep, k]), "_", markersize=6.5,
                                 color=WARM, markeredgewidth=0.9, zorder=1.9, label="law")
            across.apply(axes, "x", 100, max_ticks=3)
            up.apply(axes, "y", 100, max_ticks=3)
            axes.grid(visible=True)
        small_plots_legend(figure, handles)
        return figure

    def predictions(self) -> Figure | None:
        """Draws predicted against measured loss, out of fold, a small plot per target."""
        predictions = self._a["predictions"]
        if predictions is None or not len(predictions["measured"]):
            return None
        scores = self._a["validation"].get(self._a["law"].get("name")) or {}
        order = self._target_order
        figure, panels = small_plots([self._a["targets"][k] for k in order], "Predicted loss (nats per token)",
                               "Measured loss (nats per token)", shared=False)
        keep = thinned(len(predictions["measured"]), len(order))
        for axes, k in zip(panels, order):
            measured, predicted = (predictions[name][:, k] for name in ("measured", "predicted"))
            both = np.concatenate([measured, predicted])
            both = both[np.isfinite(both)] if np.isfinite(both).any() else np.array([0.0, 1.0])
            pad = 0.05 * np.ptp(both) or 0.1
            ends = [both.min() - pad, both.max() + pad]
            axes.plot(ends, ends, color=MUTED, linewidth=0.9)
            axes.plot(measured[keep], predicted[keep], "o", color=ACCENT, markersize=3, alpha=0.4, markeredgewidth=0)
            axes.set(xlim=ends, ylim=ends)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
            axes.grid(visible=True)
            lines = [f"{sign} {scores[name][k]:.{digits}f}" for name, sign, digits in
                     (("r2", "R²", 3), ("mae", "MAE", 3), ("spearman", "ρ", 3))
                     if name in scores and np.isfinite(scores[name][k])]
            axes.text(0.04, 0.97, "\n".join(lines if len(order) <= 24 else lines[:1]), transform=axes.transAxes,
                      va="top", fontsize=8, color=INK, linespacing=1.25)
        return figure


def _token_groups(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns rows by token count: at most four (name, mask), fewest tokens first."""
    counts = np.unique(tokens)
    if len(counts) <= 4:
        return [(f"{compact(count)} tokens", tokens == count) for count in counts]
    bounds = np.quantile(tokens, [1 / 3, 2 / 3, 1])
    lower = [-np.inf, *bounds[:-1]]
    groups = [(f"up to {compact(high)} tokens", (tokens > low) & (tokens <= high)) for low, high in zip(lower, bounds)]
    return [(name, which) for name, which in groups if which.any()]
