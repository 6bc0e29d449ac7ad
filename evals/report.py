"""Writes the report of an evaluation: `python -m evals.report --gin.evals_report.folder=OUTPUT`.

Reads the latest results_*.json of OUTPUT and its samples; writes report.html, and figures/ with each figure as SVG and
PNG. `evals.run` writes it at its end.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from evals.scoring.metrics import EXACT_MATCH, METRICS
from evals.tasks.language_families import ENGLISH, by_family, family
from evals.tasks.task_files import MODES
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl, write_atomic
from mlx_pretrain.reports.figures import (
    ACCENT,
    INK,
    MUTED,
    WARM,
    fill_cells,
    matrix_panel,
    plot_style,
    render_page,
    rows_panel,
    save_figures,
)

MAX_EXAMPLES = 12  # items of each task to read
_MAX_NUMBERED = 24  # greatest number of languages for which the cells of the heat map carry numbers


class TaskSummary:
    """The results of one task as results_*.json has them under "consistency".

    Attributes:
      name, dataset, mode: names of the task.
      metric: main metric.
      languages: languages by family.
      accuracy: [{value, low, high}], one per language.
      mean: {value, low, high} of the mean over the languages.
    """

    def __init__(self, name: str, content: Mapping[str, Any]):
        self.name, self._content = name, content
        self.dataset, _, self.mode = name.partition("_")
        self.metric, self.languages = self._content["metric"], list(self._content["languages"])
        self.accuracy = self._content["accuracy"]
        self.mean = self._content["mean_accuracy"]

    def interval(self, name: str) -> Mapping[str, float] | None:
        """Returns a value over all languages with its interval, see `bootstrap_intervals`; None where it is missing."""
        return self._content.get(name)

    @property
    def guessing(self) -> float | None:
        """Accuracy of options chosen at random; None where there are none, or in results of earlier versions."""
        return self._content.get("guessing")

    @property
    def generated(self) -> bool:
        """True if answers were generated instead of chosen among the options."""
        return self.metric == EXACT_MATCH

    @property
    def english(self) -> float | None:
        """Accuracy in English; None without English."""
        return self.accuracy[self.languages.index(ENGLISH)]["value"] if ENGLISH in self.languages else None

    @property
    def gap(self) -> float | None:
        """Accuracy in English less the mean over the other languages; None without English or others."""
        others = [interval["value"] for interval, language in zip(self.accuracy, self.languages) if language != ENGLISH]
        return None if self.english is None or not others else self.english - float(np.mean(others))

    def matrix(self, name: str) -> np.ndarray | None:
        """Returns a field of `consistency.Consistency`, `[languages, languages]`; None for one language."""
        values = self._content.get(f"{name}_matrix")
        return None if values is None else np.where(np.array(values) < 0, np.nan, np.array(values, float))


def accuracy_figure(task: TaskSummary) -> Figure:
    """Draws a dot with its interval for every language, and a line at English."""
    figure, axes, rows = rows_panel(f"{task.metric} (%)", task.languages, row=17)
    value, low, high = (100 * np.array([interval[key] for interval in task.accuracy])
                        for key in ("value", "low", "high"))
    axes.hlines(rows, low, high, color=ACCENT, alpha=0.45, linewidth=2.2)
    axes.plot(value, rows, "o", color=ACCENT, markersize=4.5)
    if task.english is not None:
        axes.axvline(100 * task.english, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
    if task.guessing is not None:
        axes.axvline(100 * task.guessing, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    if not high.max() > 0:
        axes.set_xlim(0, 100)
    return figure


def consistency_figure(task: TaskSummary) -> Figure | None:
    """Draws a heat map: MLC of every pair of languages, accuracy in the diagonal, lines between families."""
    matrix = task.matrix("mlc")
    if matrix is None:
        return None
    n = len(task.languages)
    figure, axes, cell = matrix_panel("MLC (%); accuracy in the diagonal", task.languages, task.languages, (0, 34))
    axes.tick_params(axis="x", labelsize=min(10.5, 0.62 * cell), labelrotation=0 if cell >= 16 else 90)
    axes.tick_params(axis="y", labelsize=min(10.5, 0.75 * cell))
    pairs = matrix[np.triu_indices(n, 1)]
    bottom, top = float(np.nanmin(pairs)), float(np.nanmax(pairs))
    colours = np.empty((n, n, 4))
    for (row, column), value in np.ndenumerate(matrix):
        own = row == column
        strength = 0.12 + 0.7 * (value - bottom) / (top - bottom) if top > bottom else 0.4
        colours[row, column] = to_rgba(WARM, 0.22) if own else to_rgba(ACCENT, min(max(strength, 0.0), 0.82))
        if n <= _MAX_NUMBERED:
            shown = task.accuracy[row]["value"] if own else value
            axes.text(column, row, f"{100 * shown:.0f}", ha="center", va="center", color=INK,
                      fontsize=min(9.5, 0.36 * cell))
    fill_cells(axes, colours)
    for index in range(1, n):
        if family(task.languages[index]) != family(task.languages[index - 1]):
            axes.axhline(index - 0.5, color=MUTED, linewidth=0.6)
            axes.axvline(index - 0.5, color=MUTED, linewidth=0.6)
    return figure


def task_figures(task: TaskSummary) -> Iterator[tuple[str, Figure, str]]:
    """Yields (name, figure, description) of each figure of a task."""
    yield f"accuracy_{task.name}", accuracy_figure(task), f"Accuracy by language, {task.name}"
    if (figure := consistency_figure(task)) is not None:
        yield f"mlc_{task.name}", figure, f"Consistency of pairs of languages, {task.name}"


def _accuracy_by_language(task: TaskSummary) -> dict[str, float]:
    return {language: interval["value"] for language, interval in zip(task.languages, task.accuracy)}


def language_rows(tasks: Sequence[TaskSummary]) -> list[dict[str, Any]]:
    """Returns for each language its accuracy in every task, None where the task lacks it, and their mean."""
    accuracies = [_accuracy_by_language(task) for task in tasks]
    rows = []
    for language in by_family(language for task in tasks for language in task.languages):
        values = [accuracy.get(language) for accuracy in accuracies]
        rows.append({"language": language, "accuracy": values,
                     "mean": float(np.mean([value for value in values if value is not None]))})
    return rows


def mixed_less_local(tasks: Sequence[TaskSummary]) -> list[dict[str, Any]]:
    """Returns accuracies by language of code-switched tasks and of the unmixed tasks that they were made from."""
    by_name = {task.name: task for task in tasks}
    comparisons = []
    for task in tasks:
        for mode, source in (("mix_lighteval", "lighteval"), ("mix", "local_template")):
            base = by_name.get(f"{task.dataset}_{source}")
            if base is None or (task.mode != mode and not task.mode.removeprefix(f"{mode}_").isdigit()):
                continue
            plain = _accuracy_by_language(base)
            rows = [{"language": language, "plain": plain[language], "mixed": mixed}
                    for language, mixed in _accuracy_by_language(task).items() if language in plain]
            if rows:
                comparisons.append({"name": task.name, "base": base.name, "rows": rows,
                                    "mean": float(np.mean([row["mixed"] - row["plain"] for row in rows]))})
    return comparisons


def examples(folder: epath.Path, stamp: str, task: TaskSummary) -> list[dict[str, Any]]:
    """Returns up to MAX_EXAMPLES items that are wrong in some language, those with the most different answers first.

    They are evenly spaced among all such items, so that not only the extreme ones are shown.
    """
    samples = {}
    for language in task.languages:
        path = folder / f"samples_{task.name}_{language}_{stamp}.jsonl"
        samples[language] = [record for _, record in read_jsonl(path)]
    first = ENGLISH if ENGLISH in samples else task.languages[0]
    items = []
    for number, sample in enumerate(samples[first]):
        records = {language: language_samples[number] for language, language_samples in samples.items()}
        chosen = {language: record["chosen"][task.metric] for language, record in records.items()}
        right = sum(choice == sample["doc"]["label"] for choice in chosen.values())
        if right == len(chosen):
            continue
        items.append({"id": sample["doc"]["_id"], "label": sample["doc"]["label"], "share": right / len(chosen),
                      "answers": len(set(chosen.values()) - {-1}),
                      "languages": [{"language": language, "prompt": record["doc"]["prompt"],
                                     "choices": record["doc"]["choices"], "chosen": chosen[language],
                                     "answer": record["resps"][0][0] if task.generated else None,
                                     "right": chosen[language] == sample["doc"]["label"]}
                                    for language, record in records.items()]})
    items.sort(key=lambda item: (-item["answers"], item["id"]))
    count = min(MAX_EXAMPLES, len(items))
    return [items[n * len(items) // count] for n in range(count)]


@gin.configurable("evals_report")
@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Settings of the report.

    Attributes:
      folder: output folder of `evals.run`.
    """

    folder: epath.PathLike = gin.REQUIRED


def write_report(folder: epath.PathLike) -> None:
    """Writes FOLDER/report.html and FOLDER/figures.

    Args:
      folder: output folder of `evals.run`.

    Raises:
      InputError: the results are missing or malformed; nothing is written then.
    """
    folder = epath.Path(folder)
    paths = sorted(path for path in (folder.iterdir() if folder.is_dir() else ()) if path.match("results_*.json"))
    if not paths:
        raise InputError(f"{folder}: no results_*.json, not the output of evals.run")
    path = paths[-1]
    results = read_json(path, "results")
    stamp = path.name.removeprefix("results_").removesuffix(".json")
    try:
        tasks = [TaskSummary(name, content) for name, content in results["consistency"].items()]
        shown = {task.name: examples(folder, stamp, task) for task in tasks}
        entries, left_out = results["results"], results["left_out"]
        settings = {name: json.dumps(value) if isinstance(value, dict) else str(value)
                    for name, value in results["config"].items() if value is not None}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: malformed: {type(error).__name__} {error}") from None
    with plot_style():
        figures = save_figures((drawn for task in tasks for drawn in task_figures(task)), folder / "figures")
    page = render_page(
        epath.Path(__file__).parent / "report.html.j2", name=folder.absolute().name, tasks=tasks, figures=figures,
        entries=entries, left_out=left_out, examples=shown, mixed=mixed_less_local(tasks), settings=settings,
        by_language=language_rows(tasks), samples=results["n-samples"], family=family, modes=MODES,
        model=results["config"]["model_args"]["path"], step=results["config"]["model_args"]["step"],
        few_shot=results["config"]["few_shot"], metrics=(*METRICS, EXACT_MATCH))
    write_atomic(folder / "report.html", page)


def main(config: ReportConfig) -> None:
    """Writes the report of an evaluation."""
    write_report(config.folder)
    print(epath.Path(config.folder) / "report.html")


if __name__ == "__main__":
    run(main, ReportConfig, "evals.report")
