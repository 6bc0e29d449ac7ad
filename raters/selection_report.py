"""Writes the calibration report of a selection: one HTML file, and each figure as a separate file for papers.

    python -m raters.selection_report --gin.selection_report.folder=runs/selected

The report shows what selection.json holds, the output of `raters.select`: score distributions, the share kept of each
language, source and length, how much of the score these explain, agreement of the raters, and texts at quantiles of the
scores to read.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_atomic
from mlx_pretrain.reports.figures import (
    ACCENT,
    GREEN,
    INK,
    MUTED,
    PAPER,
    WARM,
    fill_cells,
    legend,
    matrix_panel,
    panel,
    plot_style,
    render_page,
    rows_panel,
    save_figures,
    short_label,
)
from mlx_pretrain.reports.numbers import compact
from raters.filtering.score_statistics import quota_not_reached
from raters.select import FORMAT, MANIFEST, VERSION

_MARKS = (("o", ACCENT), ("D", WARM), ("s", GREEN), ("^", MUTED), ("v", INK))
_MAX_OPACITY = 0.62  # of a cell, so that its number stays readable


def read_selection(path: epath.PathLike) -> dict[str, Any]:
    """Returns the content of selection.json.

    Raises:
      InputError: it is missing, malformed or of another version.
    """
    selection = read_json(path, "selection")
    version = (selection.get("format"), selection.get("version")) if isinstance(selection, dict) else None
    if version != (FORMAT, VERSION):
        raise InputError(f"{path}: not a selection of version {VERSION}, as raters.select writes it")
    if not selection["languages"]:
        raise InputError(f"{path}: no language in it")
    return selection


def totals(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the sums over all groups of documents and tokens, of the input and kept."""
    return {key: sum(group[key] for group in groups)
            for key in ("documents", "tokens", "kept_documents", "kept_tokens")}


def shares(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each group its `share` of the input's tokens, its `kept_share` of the kept ones and its kept `rate`."""
    total = totals(groups)
    return [{**group, "share": group["tokens"] / max(total["tokens"], 1),
             "kept_share": group["kept_tokens"] / max(total["kept_tokens"], 1),
             "rate": group["kept_tokens"] / group["tokens"] if group["tokens"] else None} for group in groups]


class Plots:
    """The figures of one selection; a figure without data is None."""

    def __init__(self, selection: Mapping[str, Any]):
        self._s = selection
        self._total = totals(selection["languages"])
        self._sources = sorted(selection["sources"], key=lambda group: -group["tokens"])

    def all(self) -> Iterator[tuple[str, Figure, str]]:
        """Yields (name, figure, description for screen readers) of each figure that has data."""
        for name, description in (
            ("languages", "Distribution of the scores in each language, all documents and those kept"),
            ("sources", "Distribution of the scores in each source, all documents and those kept"),
            ("kept", "Share of the tokens kept of each source in each language"),
            ("variance", "Share of the score's variance that language, source and length explain"),
            ("lengths", "Share of the tokens kept by length of the document"),
            ("agreement", "Rank correlation of the raters in each language"),
        ):
            figure = getattr(self, name)()
            if figure is not None:
                yield name, figure, description

    def languages(self) -> Figure:
        """Draws the distribution of the scores in each language."""
        return self._ridges("Score by language", "language", self._s["languages"])

    def sources(self) -> Figure | None:
        """Draws the distribution of the scores in each source; None for one source."""
        if len(self._sources) < 2:
            return None
        return self._ridges("Score by source", "source", self._sources)

    def _ridges(self, title: str, key: str, groups: Sequence[Mapping[str, Any]]) -> Figure:
        groups = [group for group in groups if group["quantiles"]]
        figure, axes, rows = rows_panel(title, [short_label(group[key]) for group in groups], row=24 if len(groups) < 30
                                        else 18, top=34)
        edges = np.array(self._s["bins"])
        for row, group in zip(rows, groups):
            every, kept = np.array(group["histogram"]), np.array(group["kept_histogram"])
            scale = 0.86 / max(every.max(), 1)
            low = row + 0.4
            for counts, colour, label in ((every, to_rgba(MUTED, 0.28), "all"), (kept, to_rgba(ACCENT, 0.8), "kept")):
                axes.stairs(low - scale * counts, edges, baseline=low, fill=True, color=colour, linewidth=0,
                            label=label if row == 0 else None)
            median = group["quantiles"][self._s["quantiles"].index(0.5)]
            axes.plot([median] * 2, [low, low - 0.3], color=INK, linewidth=1.4, label="median" if row == 0 else None)
        axes.grid(visible=False, axis="x")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("Score")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        legend(axes)
        return figure

    def kept(self) -> Figure | None:
        """Draws a heat map: rate of tokens kept, by source (row) and language (column).

        None for one source, whose rates are those of the languages.
        """
        if len(self._sources) < 2:
            return None
        languages = [group["language"] for group in self._s["languages"]]
        sources = [group["source"] for group in self._sources]
        rate = np.full((len(sources), len(languages)), np.nan)
        for cell in self._s["cells"]:
            index = sources.index(cell["source"]), languages.index(cell["language"])
            rate[index] = cell["kept_tokens"] / max(cell["tokens"], 1)
        language_rate = np.array([group["kept_tokens"] / max(group["tokens"], 1) for group in self._s["languages"]])
        figure, axes, _ = matrix_panel("Tokens kept (%)", [short_label(name) for name in sources],
                                       [short_label(name, 6) for name in languages], widths=(20, 40), height=24)
        with np.errstate(divide="ignore", invalid="ignore"):
            strength = np.nan_to_num(np.clip(np.log2(rate / language_rate), -3, 3) / 3)
        colours = np.where(strength[..., None] > 0, to_rgba(ACCENT), to_rgba(WARM))
        colours[..., 3] = _MAX_OPACITY * np.abs(strength)
        fill_cells(axes, colours)
        for (row, column), value in np.ndenumerate(rate):
            if not np.isfinite(value):
                continue
            axes.text(column, row, f"{100 * value:.0f}" if value >= 0.01 or value == 0 else "<1", ha="center",
                      va="center", color=INK, fontsize=9.5)
        return figure

    def variance(self) -> Figure | None:
        """Draws bars: the share of the score's variance that language, source and length explain."""
        parts = [(f"{name}{suffix}", value, colour) for group, suffix, colour in (
            ("over_all", "", MUTED), ("within_languages", ", in language", ACCENT))
                 for name, value in self._s["variance"][group].items() if value is not None]
        if not parts:
            return None
        figure, axes, rows = rows_panel("Variance of the score explained (%)", [name for name, _, _ in parts], row=24)
        for row, (_, value, colour) in zip(rows, parts):
            axes.barh(row, 100 * value, 0.56, color=colour, alpha=0.8)
            axes.text(100 * value + 1.5, row, f"{100 * value:.0f}", va="center", color=INK, fontsize=10)
        axes.set_xlim(0, 108)
        axes.set_xticks((0, 25, 50, 75, 100))
        return figure

    def lengths(self) -> Figure | None:
        """Draws the rate of tokens kept by tenths of the documents, shortest first."""
        lengths = self._s["lengths"]
        tokens, kept = np.array(lengths["tokens"], float), np.array(lengths["kept_tokens"], float)
        filled = tokens > 0
        if filled.sum() < 2:
            return None
        figure, axes = panel("Tokens kept (%), by length", 236)
        # Several tenths of short documents may have the same longest one; all its documents are in the first of them.
        axes.bar(range(filled.sum()), 100 * kept[filled] / tokens[filled], 0.7, color=ACCENT, alpha=0.8)
        axes.axhline(100 * self._total["kept_tokens"] / max(self._total["tokens"], 1), color=INK, linewidth=1,
                     linestyle=(0, (4, 3)))
        upper = np.array(lengths["upper"])[filled]
        axes.set_xticks(range(len(upper)), [compact(round(tokens)) for tokens in upper])
        axes.set_xlabel("Tenths of the documents, longest of each in tokens")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        return figure

    def agreement(self) -> Figure | None:
        """Draws the rank correlation of the deciding rater with each other one, by language."""
        pairs = [pair for pair in self._s["agreement"] if pair["raters"][0] == self._s["rater"]][: len(_MARKS)]
        languages = [group["language"] for group in self._s["languages"]]
        if not pairs:
            return None
        figure, axes, rows = rows_panel(f"Rank correlation with {short_label(self._s['rater'], 24)}",
                                        [short_label(name) for name in languages], top=46)
        for pair, (marker, colour) in zip(pairs, _MARKS):
            values = [pair["spearman_by_language"].get(name) for name in languages]
            known = [i for i, value in enumerate(values) if value is not None]
            axes.plot([values[i] for i in known], rows[known], marker, color=colour, markersize=5, linestyle="none",
                      markeredgecolor=PAPER, markeredgewidth=0.5, label=short_label(pair["raters"][1], 24))
        low = min([0.0, *(v for pair in pairs for v in pair["spearman_by_language"].values() if v is not None)])
        axes.set_xlim(min(-0.05, low - 0.05), 1.02)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        _second_line_legend(axes)
        return figure


def _second_line_legend(axes: Axes) -> None:
    """Draws the legend on the left below the title, where names of raters fit."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.1, borderaxespad=0.1,
                handletextpad=0.2, bbox_transform=axes.transAxes)


def findings(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of the first lines: variance explained by other things than quality, and changed shares."""
    within = selection["variance"]["within_languages"]
    gain = lambda source: source["kept_share"] - source["share"]  # noqa: E731
    sources = sorted((source for source in shares(selection["sources"])
                      if source["share"] >= 0.005 or source["kept_share"] >= 0.005), key=gain)
    return {
        "explained": within.get("source and length"), "by_source": within.get("source"),
        "by_length": within.get("length"), "by_language": selection["variance"]["over_all"].get("language"),
        "more": [source for source in sources[::-1] if gain(source) > 0.005][:3],
        "less": [source for source in sources if gain(source) < -0.005][:3],
        "short": [group["language"] for group in selection["languages"]
                  if quota_not_reached(group, selection["provenance"]["settings"]["source_caps"] is not None)],
    }


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share in per cent with a space before the sign; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u202f%"


def _settings(selection: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that are set, as texts."""
    return {name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict)
            else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in selection["provenance"]["settings"].items() if value not in (None, [], {})}


@gin.configurable("selection_report")
@dataclasses.dataclass(frozen=True)
class SelectionReportConfig:
    """Settings of the report.

    Attributes:
      folder: output folder of `raters.select`.
    """

    folder: epath.PathLike = gin.REQUIRED


def main(config: SelectionReportConfig) -> None:
    """Writes the report of a selection to FOLDER/report.html, and FOLDER/figures with each figure as SVG and PNG.

    Raises:
      InputError: selection.json is missing or malformed; nothing is written then.
    """
    folder = epath.Path(config.folder)
    selection = read_selection(folder / MANIFEST)
    with plot_style():
        figures = save_figures(Plots(selection).all(), folder / "figures")
    examples: dict[str, list[dict[str, Any]]] = {}
    for example in selection["examples"]:
        examples.setdefault(example["language"], []).append(example)
    page = render_page(
        epath.Path(__file__).parent / "selection_report.html.j2", name=folder.absolute().name, s=selection,
        figures=figures, total=totals(selection["languages"]), by_language=shares(selection["languages"]),
        by_source=sorted(shares(selection["sources"]), key=lambda group: -group["tokens"]),
        findings=findings(selection), examples=examples, settings=_settings(selection), percent=percent)
    write_atomic(folder / "report.html", page)
    print(folder / "report.html")


if __name__ == "__main__":
    run(main, SelectionReportConfig, "raters.selection_report")
