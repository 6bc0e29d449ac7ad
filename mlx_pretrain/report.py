"""The report of a pretraining run: one self-contained HTML file, for the screen (light and dark) and for paper.

Made from the run folder that `mlx_pretrain.history` describes. Needs matplotlib and jinja2, which the extra `data`
brings; nothing else in this package imports them.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jinja2
import matplotlib
import numpy as np
from etils import epath
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mlx_pretrain.configuration import run
from mlx_pretrain.files import write_atomic
from mlx_pretrain.history import (
    GROUPS,
    LANGUAGES,
    History,
    Language,
    Summary,
    column,
    mean_bits,
    parse_time,
    parts_of_time,
    per_language,
    read_history,
    read_run,
    read_samples,
)

# Plots are drawn in these stand-in colours; the page's style sheet gives the real ones, for light and for dark.
INK, MUTED, RULE, ACCENT, WARM, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", WARM: "warm", PAPER: "paper"}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10.5, "text.color": INK,
    "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE,
    "grid.linewidth": 0.7, "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titlecolor": INK,
    "axes.titlepad": 10, "axes.labelsize": 10.5, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5, "ytick.left": False, "xtick.major.size": 3, "lines.linewidth": 1.7,
    "legend.frameon": False, "legend.handlelength": 1.3, "legend.fontsize": 10.5, "axes.xmargin": 0.02,
}
# Characters that HTML or UTF-8 cannot hold; a model writing bytes makes some.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_FIGURE_WIDTH = 400  # CSS pixels before scaling; two stand side by side on a wide page, one fits a phone.


def _panel(title: str, height: float, left: float = 46, width: float = _FIGURE_WIDTH) -> tuple[Figure, Axes]:
    """A figure of one plot with fixed margins, so that neighbours align; sizes in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.subplots_adjust(left=left / width, right=1 - 14 / width, bottom=42 / height, top=1 - 28 / height)
    axes = figure.subplots()
    # The title names the y axis: it reads better than text turned by 90 degrees.
    axes.set_title(title, x=-left / (width - left - 14))
    return figure, axes


def _legend(axes: Axes, **more: Any) -> None:
    """The legend, in the line of the title, where no curve can cross it."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, columnspacing=1.1, borderaxespad=0.25,
                handletextpad=0.4, **more)


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as inline SVG: coloured by the page, ids unique to `name`, `label` for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>| transform=\"rotate\(-0 [^\"]*\"", "", text,
                  flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    opening = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">').format(
        width, height, width, height, label)
    return opening + Markup(re.sub(r"\A<svg[^>]*>", "", text).strip())


def _unit(largest: float) -> tuple[float, str]:
    """A divisor that makes numbers up to `largest` short, and its name."""
    for divisor, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if largest >= divisor:
            return divisor, f"{name} "
    return 1.0, ""


def _runs(x: np.ndarray, y: np.ndarray, most: int = 240) -> np.ndarray:
    """Long series made short: means of x and y, minimum and maximum of y over runs of points: [4, at most `most`]."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if not len(x):
        return np.zeros((4, 0))
    starts = np.linspace(0, len(x), min(most, len(x)), endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(x)))
    return np.stack([np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes,
                     np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)])


class Plots:
    """The plots of one run, each as inline SVG, or None where the run did not record what it shows."""

    def __init__(self, summary: Summary, history: History):
        self._summary, self._history = summary, history
        self._divisor, unit = _unit(summary.tokens)
        self.x_label = f"training tokens ({unit.strip()}s)" if unit else "training tokens"
        self._train_x = summary.tokens_at(column(history.train, "step")) / self._divisor
        self._means = np.array([np.nan if (v := mean_bits(line)) is None else v for line in history.evals])
        self._eval_x = summary.tokens_at(column(history.evals, "step")) / self._divisor

    def _over_tokens(self, title: str) -> tuple[Figure, Axes]:
        figure, axes = _panel(title, 236)
        axes.set_xlabel(self.x_label.capitalize())
        axes.set_xlim(0, self._summary.tokens / self._divisor * 1.02)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        return figure, axes

    def loss(self) -> Markup:
        """Training loss and held-out loss over tokens."""
        figure, axes = self._over_tokens("Loss (nats per token)")
        train, held_out = column(self._history.train, "loss"), column(self._history.evals, "loss")
        x, mean, low, high = _runs(self._train_x, train)
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=ACCENT, label="training", marker="o" if len(x) == 1 else None, markersize=4)
        if np.isfinite(held_out).any():
            axes.plot(self._eval_x, held_out, color=WARM, label="held out", marker="o", markersize=4, linewidth=1.2,
                      clip_on=False)
        if len(x):
            # One spike must not flatten the curve: the top is what the run started from, or nearly all of it.
            top = max([mean[0], np.percentile(high, 99), *held_out[np.isfinite(held_out)]])
            bottom = min([low.min(), *held_out[np.isfinite(held_out)]])
            pad = 0.05 * (top - bottom) or 0.5
            axes.set_ylim(bottom - pad, top + pad)
        _legend(axes, labelcolor="linecolor")
        return _svg(figure, "loss", "Training and held-out loss over training tokens")

    def mean_bits(self) -> Markup | None:
        """Mean held-out bits per byte over tokens, and the range over languages."""
        if not np.isfinite(self._means).any():
            return None
        figure, axes = self._over_tokens("Held-out text (bits per byte)")
        ranges = [[v for v in per_language(line, "bits_per_byte").values() if math.isfinite(v)]
                  for line in self._history.evals]
        if any(len(values) > 1 for values in ranges):
            low, high = (np.array([pick(v) if v else np.nan for v in ranges]) for pick in (min, max))
            axes.fill_between(self._eval_x, low, high, color=ACCENT, alpha=0.14, linewidth=0, label="range")
        axes.plot(self._eval_x, self._means, color=ACCENT, marker="o", markersize=4, label="mean of languages",
                  clip_on=False)
        axes.set_ylim(bottom=0)
        if any(len(values) > 1 for values in ranges):
            _legend(axes)
        return _svg(figure, "bits", "Bits per byte on held-out text over training tokens")

    def _by_language(self, title: str, languages: Sequence[Language]) -> tuple[Figure, Axes, np.ndarray]:
        """A plot with one row per language, first on top."""
        left = 14 + 6.5 * max(len(language.label) for language in languages)
        figure, axes = _panel(title, 72 + 18 * len(languages), left)
        rows = np.arange(len(languages))
        axes.set_yticks(rows, [language.label for language in languages])
        axes.set_ylim(len(languages) - 0.4, -0.6)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        return figure, axes, rows

    def dumbbells(self) -> Markup | None:
        """Bits per byte of every language, before and after training."""
        languages = [language for language in self._summary.languages if language.measured]
        if len(languages) < 2:
            return None
        figure, axes, rows = self._by_language("Bits per byte on held-out text, by language", languages)
        before, after = (np.array([np.nan if v is None else v for v in ends], np.float64)
                         for ends in zip(*(language.bits for language in languages)))
        axes.hlines(rows, before, after, color=RULE, linewidth=2.5)
        axes.plot(before, rows, "o", markersize=6, color=MUTED, markerfacecolor=PAPER, label="before")
        axes.plot(after, rows, "o", markersize=6.5, color=ACCENT, label="after")
        axes.set_xlim(left=0)
        axes.set_xlabel("Bits per byte (lower is better)")
        _legend(axes)
        return _svg(figure, "dumbbells", "Bits per byte by language, before and after training; numbers in the table")

    def shares(self) -> Markup | None:
        """Share of the training tokens asked for and delivered, by language."""
        languages = sorted(self._summary.languages, key=lambda language: -language.asked)
        if len(languages) < 2 or all(language.delivered is None for language in languages):
            return None
        figure, axes, rows = self._by_language("Share of training tokens, by language", languages)
        delivered = [language.delivered or 0.0 for language in languages]
        axes.barh(rows, delivered, height=0.5, color=ACCENT, linewidth=0, label="delivered")
        axes.plot([language.asked for language in languages], rows, "|", color=INK, markersize=12,
                  markeredgewidth=1.8, label="asked for")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axes.set_xlim(left=0)
        axes.set_xlabel("Share of training tokens")
        _legend(axes)
        return _svg(figure, "shares", "Share of training tokens asked for and delivered; numbers in the table")

    def small_multiples(self) -> list[tuple[str, list[tuple[Language, Markup]]]]:
        """Bits per byte over tokens, a small plot per language on one scale: (group, [(language, SVG)])."""
        curves = {language: column(self._history.evals, f"bits_per_byte/{language.code}")
                  for language in self._summary.languages}
        curves = {language: curve for language, curve in curves.items() if np.isfinite(curve).sum() > 1}
        if len(curves) < 2:
            return []
        top = max(np.nanmax(curve[np.isfinite(curve)]) for curve in curves.values()) * 1.08
        groups: dict[int, list[tuple[Language, Markup]]] = {key: [] for key in GROUPS}
        for number, (language, curve) in enumerate(curves.items()):
            figure = Figure(figsize=(150 / 72, 92 / 72))
            figure.subplots_adjust(left=20 / 150, right=1 - 10 / 150, bottom=20 / 92, top=1 - 6 / 92)
            axes = figure.subplots()
            axes.plot(self._eval_x, self._means, color=MUTED, linewidth=1, alpha=0.7)
            axes.plot(self._eval_x, curve, color=ACCENT)
            axes.plot(self._eval_x[-1:], curve[-1:], "o", color=ACCENT, markersize=4)
            axes.set(ylim=(0, top), xlim=(0, self._summary.tokens / self._divisor * 1.02))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(labelsize=9.5)
            groups[language.group].append((language, _svg(figure, f"m{number}", f"Bits per byte of {language.code}")))
        return [(GROUPS[key], panels) for key, panels in groups.items() if panels]

    def _series(self, title: str, name: str, metric: str, scale: float = 1.0, log: bool = False) -> Markup | None:
        x, mean, low, high = _runs(self._train_x, column(self._history.train, metric) / scale)
        if not len(x):
            return None
        figure, axes = self._over_tokens(title)
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=ACCENT, marker="o" if len(x) == 1 else None, markersize=4)
        if log and low.min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.set_ylim(0, (max(mean.max(), np.percentile(high, 98)) or 1) * 1.08)
        return _svg(figure, name, f"{title} over training tokens")

    def dynamics(self) -> list[Markup]:
        """Learning rate, gradient norm, throughput and the parts of a step's time, as far as they were recorded."""
        divisor, unit = _unit(self._summary.tokens_per_s or 0)
        rate = column(self._history.train, "learning_rate")
        exponent = math.floor(math.log10(np.nanmax(rate))) if np.isfinite(rate).any() and np.nanmax(rate) > 0 else 0
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        plots = [
            self._series(f"Learning rate (10{power})" if exponent else "Learning rate", "rate", "learning_rate",
                         10.0**exponent),
            self._series("Gradient norm (log scale)", "norm", "grad_norm", log=True),
            self._series(f"Throughput ({unit}tokens per second)", "speed", "tokens_per_s", divisor),
            self._step_time(),
        ]
        return [plot for plot in plots if plot is not None]

    def _step_time(self) -> Markup | None:
        if not self._summary.time_shares or len(self._train_x) < 2:
            return None
        x, parts = self._train_x, parts_of_time(self._history.train)
        del parts["eval"]  # its spikes would hide the rest; the text has its share
        total = sum(parts.values())
        scale, unit = (1e3, "ms") if np.median(total) < 1 else (1, "s")
        figure, axes = self._over_tokens(f"Time per step ({unit})")
        axes.stackplot(_runs(x, total)[0], *(_runs(x, values)[1] * scale for values in parts.values()), alpha=0.7,
                       linewidth=0, colors=(ACCENT, WARM, INK), labels=("compute", "data wait", "checkpoint"))
        # A slow start or checkpoint makes a spike; what a usual step takes must stay readable.
        axes.set_ylim(0, max(np.percentile(total, 90) * 1.2, np.median(total) * 1.6) * scale)
        _legend(axes, handlelength=0.8)
        return _svg(figure, "time", "Time per training step, by what it was spent on")


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits, thousands separated; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def compact(value: float | None) -> str:
    """Three significant digits with k, M, B or T; a dash for None."""
    if value is None or not math.isfinite(value):
        return number(value)
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * divisor:
            return f"{float(f'{value / divisor:.3g}'):g}{suffix}"
    return f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """With its sign and two significant digits or `digits` decimals, whichever is more."""
    if 1e-9 <= abs(value) < math.inf:
        digits = max(digits, 1 - math.floor(math.log10(abs(value))))
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter; a dash for None."""
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def sampling(sample: Mapping[str, Any]) -> str:
    """How a sample was drawn, in words; empty when not recorded."""
    parts = [f"{word} {sample[name]}" for name, word in (("temperature", "temperature"), ("top_p", "top-p"))
             if sample.get(name) is not None]
    return ", ".join(parts)


@gin.configurable
def report(run_dir: epath.PathLike = gin.REQUIRED, output: epath.PathLike | None = None) -> None:
    """Writes the HTML report of a pretraining run.

    Args:
      run_dir: folder with run.json, metrics.jsonl and, optionally, samples.jsonl.
      output: the file to write; RUN/report.html by default.

    Raises:
      InputError: a file is missing or malformed; nothing is written then.
    """
    folder = epath.Path(run_dir)
    facts, history = read_run(folder / "run.json"), read_history(folder / "metrics.jsonl")
    samples = read_samples(folder / "samples.jsonl")
    summary = Summary(facts, history)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        plots = Plots(summary, history)
        drawn = {name: getattr(plots, name)()
                 for name in ("loss", "mean_bits", "dumbbells", "shares", "small_multiples", "dynamics")}
        drawn["x_label"] = plots.x_label
    loader = jinja2.FileSystemLoader(epath.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, compact=compact, duration=duration, signed=signed, sampling=sampling)
    page = environment.get_template("report.html.j2").render(
        name=folder.absolute().name, run=facts, summary=summary, history=history, plots=drawn, samples=samples,
        languages=LANGUAGES, started=parse_time(facts["started"]), mean_bits=mean_bits,
        gin_files={path.name: path.read_text() for path in sorted(folder.glob("*.gin"))})
    write_atomic(output or folder / "report.html", _UNPRINTABLE.sub("\ufffd", page))


if __name__ == "__main__":
    run(report, "mlx_pretrain.report")
