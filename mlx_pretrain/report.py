"""The report of a pretraining run: one self-contained HTML file, for the screen (light and dark) and for paper.

    python -m mlx_pretrain.report --gin.report.run_dir=RUN

The run folder is described in `mlx_pretrain.reports.run_history`. The report needs matplotlib and jinja2, which the
extra `data` brings; nothing else in this package imports them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np
from etils import epath
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mlx_pretrain.command_line import run
from mlx_pretrain.files import write_atomic
from mlx_pretrain.languages import GROUPS
from mlx_pretrain.reports.figures import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    RULE,
    WARM,
    inline_svg,
    legend,
    panel,
    plot_style,
    render_page,
    rows_panel,
)
from mlx_pretrain.reports.numbers import unit
from mlx_pretrain.reports.run_history import (
    LanguageSummary,
    RunHistory,
    RunSummary,
    column,
    mean_bits,
    parse_time,
    parts_of_time,
    per_language,
    read_history,
    read_run,
    read_samples,
)
from mlx_pretrain.training.goodput import GOODPUT, PARTS, Goodput, read_goodput


def _thinned(x: np.ndarray, y: np.ndarray, max_points: int = 240) -> np.ndarray:
    """Returns means of x and y, minimum and maximum of y over stretches of a long series: [4, up to `max_points`]."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if not len(x):
        return np.zeros((4, 0))
    starts = np.linspace(0, len(x), min(max_points, len(x)), endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(x)))
    return np.stack([np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes,
                     np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)])


class Plots:
    """The plots of one run, each as inline SVG, or None if the run did not record the data."""

    def __init__(self, summary: RunSummary, history: RunHistory, goodput: Goodput | None):
        self._summary, self._history, self._goodput = summary, history, goodput
        self._divisor, name = unit(summary.tokens)
        self.x_label = f"training tokens ({name.strip()}s)" if name else "training tokens"
        self._train_x = summary.tokens_at(column(history.train, "step")) / self._divisor
        self._means = np.array([np.nan if (v := mean_bits(line)) is None else v for line in history.evals])
        self._eval_x = summary.tokens_at(column(history.evals, "step")) / self._divisor

    def _over_tokens(self, title: str) -> tuple[Figure, Axes]:
        figure, axes = panel(title, 236)
        axes.set_xlabel(self.x_label.capitalize())
        axes.set_xlim(0, self._summary.tokens / self._divisor * 1.02)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        return figure, axes

    def loss(self) -> Markup:
        """Plots training loss and held-out loss over tokens."""
        figure, axes = self._over_tokens("Loss (nats per token)")
        train, held_out = column(self._history.train, "loss"), column(self._history.evals, "loss")
        average = column(self._history.averages, "loss")
        x, mean, low, high = _thinned(self._train_x, train)
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=ACCENT, label="training", marker="o" if len(x) == 1 else None, markersize=4)
        if np.isfinite(held_out).any():
            axes.plot(self._eval_x, held_out, color=WARM, label="held out", marker="o", markersize=4, linewidth=1.2,
                      clip_on=False)
        if np.isfinite(average).any():
            axes.plot(self._summary.tokens_at(column(self._history.averages, "step")) / self._divisor, average,
                      color=MUTED, label="EMA", linewidth=1.2, linestyle=(0, (4, 3)))
            held_out = np.append(held_out, average)
        if len(x):
            # One spike must not flatten the curve: the top is the first value, or the 99th percentile.
            top = max([mean[0], np.percentile(high, 99), *held_out[np.isfinite(held_out)]])
            bottom = min([low.min(), *held_out[np.isfinite(held_out)]])
            pad = 0.05 * (top - bottom) or 0.5
            axes.set_ylim(bottom - pad, top + pad)
        legend(axes, labelcolor="linecolor")
        return inline_svg(figure, "loss", "Training and held-out loss over training tokens")

    def mean_bits(self) -> Markup | None:
        """Plots the mean held-out bits per byte over tokens, and the range over languages."""
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
            legend(axes)
        return inline_svg(figure, "bits", "Bits per byte on held-out text over training tokens")

    def tasks(self) -> list[tuple[str, list[Markup]]]:
        """Plots every task over tokens: (name, plots of accuracy and of the consistency of languages)."""
        lines, tasks = self._history.tasks, []
        x = self._summary.tokens_at(column(lines, "step")) / self._divisor
        every = dict.fromkeys(name for line in lines for name in line)
        for name in every:
            task, _, metric = name.rpartition("/")
            if metric not in ("acc", "acc_norm"):
                continue
            languages = [column(lines, other) for other in every if other.startswith(f"{name}/")]
            figure, axes = self._over_tokens("Accuracy (%)")
            if len(languages) > 1:
                axes.fill_between(x, 100 * np.min(languages, axis=0), 100 * np.max(languages, axis=0), color=ACCENT,
                                  alpha=0.14, linewidth=0, label="range")
            axes.plot(x, 100 * column(lines, name), color=ACCENT, marker="o", markersize=4,
                      label="mean of languages" if len(languages) > 1 else metric, clip_on=False)
            legend(axes)
            plots = [inline_svg(figure, f"accuracy-{len(tasks)}", f"Accuracy in {task} over training tokens")]
            if f"{task}/mlc" in every:
                figure, axes = self._over_tokens("Consistency, MLC (%)")
                axes.plot(x, 100 * column(lines, f"{task}/mlc"), color=WARM, marker="o", markersize=4,
                          label="pairs of languages", clip_on=False)
                axes.plot(x, 100 * column(lines, f"{task}/chance"), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)),
                          label="by chance")
                legend(axes)
                plots.append(inline_svg(figure, f"mlc-{len(tasks)}", f"Consistency in {task} over training tokens"))
            tasks.append((name.replace("/", ", "), plots))
        return tasks

    def dumbbells(self) -> Markup | None:
        """Plots the bits per byte of every language before and after training."""
        languages = [language for language in self._summary.languages if language.measured]
        if len(languages) < 2:
            return None
        figure, axes, rows = rows_panel(
            "Bits per byte on held-out text, by language", [language.label for language in languages])
        before, after = (np.array([np.nan if v is None else v for v in ends], np.float64)
                         for ends in zip(*(language.bits for language in languages)))
        axes.hlines(rows, before, after, color=RULE, linewidth=2.5)
        # Unclipped: where both values are nearly the same, the axis ends at them.
        axes.plot(before, rows, "o", markersize=6, color=MUTED, markerfacecolor=PAPER, label="before", clip_on=False)
        axes.plot(after, rows, "o", markersize=6.5, color=ACCENT, label="after", clip_on=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("Bits per byte (lower is better)")
        legend(axes)
        return inline_svg(
            figure, "dumbbells", "Bits per byte by language, before and after training; numbers in the table")

    def shares(self) -> Markup | None:
        """Plots target and actual share of the training tokens by language."""
        languages = sorted(self._summary.languages, key=lambda language: -language.target_share)
        if len(languages) < 2 or all(language.actual_share is None for language in languages):
            return None
        figure, axes, rows = rows_panel(
            "Share of training tokens, by language", [language.label for language in languages])
        actual = [language.actual_share or 0.0 for language in languages]
        axes.barh(rows, actual, height=0.5, color=ACCENT, linewidth=0, label="actual")
        axes.plot([language.target_share for language in languages], rows, "|", color=INK, markersize=12,
                  markeredgewidth=1.8, label="target")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axes.set_xlim(left=0)
        axes.set_xlabel("Share of training tokens")
        legend(axes)
        return inline_svg(figure, "shares", "Target and actual share of training tokens; numbers in the table")

    def small_multiples(self) -> list[tuple[str, list[tuple[LanguageSummary, Markup]]]]:
        """Plots bits per byte over tokens, a small plot per language on one scale: (group, [(language, SVG)])."""
        curves = {language: column(self._history.evals, f"bits_per_byte/{language.code}")
                  for language in self._summary.languages}
        curves = {language: curve for language, curve in curves.items() if np.isfinite(curve).sum() > 1}
        if len(curves) < 2:
            return []
        top = max(np.nanmax(curve[np.isfinite(curve)]) for curve in curves.values()) * 1.08
        groups: dict[int, list[tuple[LanguageSummary, Markup]]] = {key: [] for key in GROUPS}
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
            plot = inline_svg(figure, f"m{number}", f"Bits per byte of {language.code}")
            groups[language.group].append((language, plot))
        return [(GROUPS[key], panels) for key, panels in groups.items() if panels]

    def _series(self, title: str, name: str, metric: str, scale: float = 1.0, log: bool = False) -> Markup | None:
        x, mean, low, high = _thinned(self._train_x, column(self._history.train, metric) / scale)
        if len(x) < 2:  # no course
            return None
        figure, axes = self._over_tokens(title)
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=ACCENT)
        if log and low.min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.set_ylim(0, (max(mean.max(), np.percentile(high, 98)) or 1) * 1.08)
        return inline_svg(figure, name, f"{title} over training tokens")

    def dynamics(self) -> list[Markup]:
        """Plots learning rate, gradient norm, throughput and the parts of a step's time, those that were recorded."""
        divisor, name = unit(self._summary.tokens_per_s or 0)
        rate = column(self._history.train, "learning_rate")
        exponent = math.floor(math.log10(np.nanmax(rate))) if np.isfinite(rate).any() and np.nanmax(rate) > 0 else 0
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        plots = [
            self._series(f"Learning rate (10{power})" if exponent else "Learning rate", "rate", "learning_rate",
                         10.0**exponent),
            self._series("Gradient norm (log scale)", "norm", "grad_norm", log=True),
            self._series(f"Throughput ({name}tokens per second)", "speed", "tokens_per_s", divisor),
            self._step_time(),
        ]
        return [plot for plot in plots if plot is not None]

    def _step_time(self) -> Markup | None:
        if not self._summary.time_shares or len(self._train_x) < 2:
            return None
        x, parts = self._train_x, parts_of_time(self._history.train)
        del parts["eval"]  # its spikes would hide the rest; the text has its share
        total = sum(parts.values())
        scale, name = (1e3, "ms") if np.median(total) < 1 else (1, "s")
        figure, axes = self._over_tokens(f"Time per step ({name})")
        axes.stackplot(_thinned(x, total)[0], *(_thinned(x, values)[1] * scale for values in parts.values()), alpha=0.7,
                       linewidth=0, colors=(ACCENT, WARM, INK), labels=("compute", "data wait", "checkpoint"))
        # A slow start or checkpoint makes a spike; usual steps must stay readable.
        axes.set_ylim(0, max(np.percentile(total, 90) * 1.2, np.median(total) * 1.6) * scale)
        legend(axes, handlelength=0.8)
        return inline_svg(figure, "time", "Time per training step, by activity")

    def goodput(self) -> Markup | None:
        """Plots the share of the run's time that each part of the work took."""
        if self._goodput is None:
            return None
        seconds = {part: self._goodput.seconds[part] for part in PARTS if self._goodput.seconds[part] > 0}
        figure, axes, rows = rows_panel("Share of the time (%)", [PARTS[part] for part in seconds])
        shares = 100 * np.array(list(seconds.values())) / self._goodput.wall_s
        axes.barh(rows, shares, height=0.6, color=[ACCENT if part == "step" else MUTED for part in seconds])
        for row, share in zip(rows, shares):
            axes.annotate(f"{share:.1f}", (share, row), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(shares) * 1.15)
        return inline_svg(figure, "goodput", "Share of the run's time, by activity")


def sampling(sample: Mapping[str, Any]) -> str:
    """Describes the settings of a sample in words; empty if they were not recorded."""
    parts = [f"{word} {sample[name]}" for name, word in (("temperature", "temperature"), ("top_p", "top-p"))
             if sample.get(name) is not None]
    return ", ".join(parts)


@gin.configurable("report")
@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Parameters of the report of a pretraining run.

    Attributes:
      run_dir: folder with run.json, metrics.jsonl and, optionally, samples.jsonl and goodput.jsonl.
      output: file to write; RUN/report.html by default.
    """

    run_dir: epath.PathLike = gin.REQUIRED
    output: epath.PathLike | None = None


def report(config: ReportConfig) -> None:
    """Writes the HTML report of a pretraining run.

    Raises:
      InputError: a file is missing or malformed; nothing is written then.
    """
    folder = epath.Path(config.run_dir)
    facts, history = read_run(folder / "run.json"), read_history(folder / "metrics.jsonl")
    samples, goodput = read_samples(folder / "samples.jsonl"), read_goodput(folder / GOODPUT)
    summary = RunSummary(facts, history)
    with plot_style():
        plots = Plots(summary, history, goodput)
        drawn = {name: getattr(plots, name)()
                 for name in ("loss", "mean_bits", "tasks", "dumbbells", "shares", "small_multiples", "dynamics",
                              "goodput")}
        drawn["x_label"] = plots.x_label
    page = render_page(
        epath.Path(__file__).parent / "reports" / "run_report.html.j2",
        name=folder.absolute().name, run=facts, summary=summary, history=history, plots=drawn, samples=samples,
        goodput=goodput, started=parse_time(facts["started"]), mean_bits=mean_bits,
        sampling=sampling,
        gin_files={path.name: path.read_text() for path in sorted(folder.glob("*.gin"))})
    output = config.output or folder / "report.html"
    write_atomic(output, page)
    print(output)


if __name__ == "__main__":
    run(report, ReportConfig, "mlx_pretrain.report")
