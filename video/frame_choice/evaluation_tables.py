"""Accuracies of a Video-LLM by the frames that it was shown: intervals, differences, tables, accuracy against cost."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic
from mlx_pretrain.reports.figures import ACCENT, INK, MUTED, plot_style, save_figure

REPORT, COST = "report.md", "cost"  # the figure is an SVG and a PNG
UNIFORM, RANDOM, EVIDENCE, VOYAGER = "uniform", "random", "frames that matter", "Frame-Voyager"
HYBRID = "hybrid of Frame-Voyager and similarity"
_LEVEL = 0.95

Key = tuple[int, int, str]  # M, T, method


class Cost(NamedTuple):
    """What choosing costs for one question, if it is the first on its video.

    Attributes:
      seconds: median time to score and choose, frames being decoded.
      frames: mean number of frames that were encoded.
    """

    seconds: float
    frames: float


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers of one Video-LLM.

    Attributes:
      ids, videos, types: of the questions.
      right: (M, T, method) -> bool `[seeds, questions]`.
    """

    ids: list[str]
    videos: list[str]
    types: list[str]
    right: Mapping[Key, np.ndarray]

    @classmethod
    def from_lines(cls, lines: Iterable[Mapping[str, Any]]) -> "Answered":
        """Reads lines of OUT/answers/<trial>.jsonl."""
        lines = list(lines)
        right: dict[Key, list[list[bool]]] = {}
        for line in lines:
            of_question: dict[Key, list[bool]] = {}
            for candidates, num_frames, method, _, is_right, _ in line["choices"]:
                of_question.setdefault((candidates, num_frames, method), []).append(is_right)
            for key, values in of_question.items():
                right.setdefault(key, []).append(values)
        return cls([line["id"] for line in lines], [line["video"] for line in lines], [line["type"] for line in lines],
                   {key: np.array(values).T for key, values in right.items()})


def summarise(
    answered: Sequence[Answered], costs: Sequence[Mapping[Key, Cost]], settings: Sequence[tuple[int, int]],
    resamples: int, seed: int,
) -> dict[str, Any]:
    """Returns accuracies and differences with bootstrap intervals, as JSON.

    Args:
      answered: the answers of each trial, to the same questions.
      costs: what choosing cost in each trial.
      settings: pairs (M, T).
      resamples, seed: of the bootstrap over videos.

    Returns:
      {"questions", "videos", "trials", "settings": [{"candidates", "frames", "methods": {method: ...}, ...}]}; each
      method has "accuracy", and "less" with the accuracy of Frame-Voyager less its own, by type of question and under
      "all": {"value", "low", "high"} in shares of 1.

    Raises:
      InputError: the trials answered different questions.
    """
    first = answered[0]
    if any(other.ids != first.ids for other in answered):
        raise InputError("the trials answered different questions")
    videos, video = np.unique(first.videos, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(videos), np.full(len(videos), 1 / len(videos)), resamples)
    weights = draws[:, video].astype(np.float64)  # [resamples, questions]
    types = np.array(first.types)
    groups = {"all": np.ones(len(types), bool), **{name: types == name for name in sorted(set(first.types)) if name}}

    def interval(values: np.ndarray) -> dict[str, dict[str, float]]:
        """Returns name of a group -> mean of `values` `[questions]` with its interval."""
        intervals = {}
        for name, group in groups.items():
            drawn = weights[:, group]
            low, high = _bounds(_ratios(drawn @ values[group], drawn.sum(axis=1)))
            intervals[name] = {"value": float(values[group].mean()), "low": low, "high": high}
        return intervals

    content = []
    for candidates, num_frames in settings:
        methods = {method: np.mean([trial.right[candidates, num_frames, method].mean(axis=0) for trial in answered],
                                   axis=0)
                   for size, shown, method in first.right if (size, shown) == (candidates, num_frames)}
        ours, rows = methods.get(VOYAGER), {}
        for method, values in methods.items():
            cost = [trial[candidates, num_frames, method] for trial in costs]
            of_seeds = [float(x) for trial in answered
                        for x in trial.right[candidates, num_frames, method].mean(axis=1)]
            rows[method] = {
                "accuracy": interval(values), "of_seeds": of_seeds,
                "seconds": float(np.median([each.seconds for each in cost])),
                "frames_encoded": float(np.mean([each.frames for each in cost]))}
            if ours is not None and method != VOYAGER:
                rows[method]["less"] = interval(ours - values)
        entry = {"candidates": candidates, "frames": num_frames, "methods": rows}
        if ours is not None and EVIDENCE in methods:
            gained, possible = methods[VOYAGER] - methods[UNIFORM], methods[EVIDENCE] - methods[UNIFORM]
            low, high = _bounds(_ratios(weights @ gained, weights @ possible))
            gap = possible.mean()
            entry["way"] = {"value": float(gained.mean() / gap) if gap > 0 else None,
                            "low": low, "high": high}
        content.append(entry)
    return {"questions": len(first.ids), "videos": len(videos), "trials": len(answered), "settings": content}


def _ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns ratios `[resamples]`; NaN where the denominator is not above 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _bounds(resampled: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the bounds of the percentile interval; None where no resample has a value."""
    if np.isnan(resampled).all():
        return None, None
    return tuple(float(x) for x in np.nanquantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]))


def write_report(folder: epath.Path, results: Mapping[str, Any]) -> None:
    """Writes the tables and the figure of results of `summarise`."""
    lines = ["# Accuracy by the frames that a Video-LLM was shown", "",
             f"{results['questions']:,} questions on {results['videos']:,} videos, {results['trials']} Video-LLM"
             f"{'s' if results['trials'] > 1 else ''}; in percent, [95% interval over videos].", ""]
    for setting in results["settings"]:
        lines += [f"## {setting['frames']} of {setting['candidates']} frames", "", *_table(setting["methods"]), ""]
        if "way" in setting and setting["way"]["value"] is not None:
            way = setting["way"]
            value, low, high = (f"{100 * way[name]:.0f}" for name in ("value", "low", "high"))
            lines += [f"Frame-Voyager goes {value}% [{low}, {high}] of the way from even spacing to the frames that "
                      "matter.", ""]
        ours = setting["methods"].get(VOYAGER)
        if ours and len(ours["of_seeds"]) > 1:
            spread = np.std(ours["of_seeds"], ddof=1)
            lines += [f"Frame-Voyager's {len(ours['of_seeds'])} runs: {_percent(min(ours['of_seeds']))} to "
                      f"{_percent(max(ours['of_seeds']))}, standard deviation {_percent(spread)}.", ""]
    write_atomic(folder / REPORT, "\n".join(lines))
    save_figure(_cost_figure(results["settings"]), folder, COST)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_interval(interval: Mapping[str, float], sign: str = "") -> str:
    return "{:{sign}.1f} [{:{sign}.1f}, {:{sign}.1f}]".format(
        *(100 * interval[name] for name in ("value", "low", "high")), sign=sign)


def _table(methods: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table: a row for each method."""
    types = [name for name in next(iter(methods.values()))["accuracy"] if name != "all"]
    head = ["chosen by", "all", *types, "Frame-Voyager less this", "frames encoded", "ms a question"]
    rows = [head, ["---"] * len(head)]
    for method, row in methods.items():
        accuracy = row["accuracy"]
        rows.append([
            method, _with_interval(accuracy["all"]), *(_percent(accuracy[name]["value"]) for name in types),
            _with_interval(row["less"]["all"], "+") if "less" in row else "",
            *([f"{row['frames_encoded']:.0f}", f"{1000 * row['seconds']:.1f}"] if row["frames_encoded"] else ["", ""])])
    return [f"| {' | '.join(row)} |" for row in rows]


_LABEL_GAP = 0.085  # between the middles of two labels, of the height of a panel


def _cost_figure(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws accuracy against the frames that were encoded, and against seconds a question, one row for each setting."""
    with plot_style():
        figure = Figure(figsize=(10, 2.6 * len(settings)), layout="constrained")
        grid = figure.subplots(len(settings), 2, squeeze=False)
        for (left, right), setting in zip(grid, settings):
            for axes, name, label in ((left, "frames_encoded", "frames encoded"), (right, "seconds", "ms a question")):
                scale = 1000 if name == "seconds" else 1
                labels = []  # accuracy, method, colour, x of its point or None
                for method, row in setting["methods"].items():
                    interval = {key: 100 * value for key, value in row["accuracy"]["all"].items()}
                    accuracy = interval["value"]
                    if row["frames_encoded"]:
                        colour, x = (ACCENT if method == VOYAGER else INK), scale * row[name]
                        axes.errorbar(x, accuracy, [[accuracy - interval["low"]], [interval["high"] - accuracy]],
                                      fmt="o", color=colour, markersize=5, linewidth=1.2)
                        labels.append((accuracy, method, colour, x))
                    elif method != RANDOM:
                        axes.axhline(accuracy, color=MUTED, linewidth=1, linestyle=":")
                        labels.append((accuracy, method, MUTED, None))
                axes.set_title(f"Accuracy, %: {setting['frames']} of {setting['candidates']} frames")
                axes.set_xlabel(label)
                axes.margins(x=0.1, y=0.1)
                if name == "frames_encoded":
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
                _label_points(axes, labels)
    return figure


def _label_points(axes: Axes, labels: Sequence[tuple[float, str, str, float | None]]) -> None:
    """Writes labels (y, text, colour, x or None) in a column right of the panel; a line joins each with its point."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[:2])
    heights = np.array([(y - low) / (high - low) for y, *_ in labels])
    steps = _LABEL_GAP * np.arange(len(heights))
    apart = isotonic_regression(heights - steps).x + steps  # the nearest heights with that gap, by least squares
    for own, height, (_, text, colour, x) in zip(heights, apart, labels):
        axes.annotate(text, (1.06, height), xycoords="axes fraction", va="center", fontsize=8.5, color=colour,
                      annotation_clip=False)
        end = 1 if x is None else (x - left) / (right - left)
        axes.plot([end, 1.05], [own, height], transform=axes.transAxes, color=colour, linewidth=0.5, clip_on=False,
                  alpha=0.5)
