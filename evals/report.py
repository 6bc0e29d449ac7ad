"""The report of an evaluation: `python -m evals.report --gin.evals_report.folder=OUTPUT`.

Reads the latest results_*.json of OUTPUT and its samples; writes report.html, and figures/ with each figure as SVG and
PNG. `evals.run` does it at its end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from evals.language_families import ENGLISH, by_family, family
from evals.metrics import EXACT_MATCH, NORMALISATIONS
from evals.tasks import MODES
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

SHOWN = 12  # items of each task in the browser
_WITH_NUMBERS = 24  # languages, at most, whose heat map has numbers in it


class TaskPage:
    """What the page says of one task.

    Attributes:
      name, dataset, mode, metric: of the task.
      languages: by family.
      accuracy: [{value, low, high}] in their order.
      mean: over the languages, {value, low, high}.
    """

    def __init__(self, name: str, content: Mapping[str, Any]):
        self.name, self._content = name, content
        self.dataset, _, self.mode = name.partition("_")
        self.metric, self.languages = self._content["metric"], list(self._content["languages"])
        self.accuracy = self._content["accuracy"]
        self.mean = self._content["mean_accuracy"]

    def interval(self, name: str) -> Mapping[str, float] | None:
        """A figure over all languages with its interval, see `metrics.intervals`; None where there is none."""
        return self._content.get(name)

    @property
    def generated(self) -> bool:
        """Whether answers were generated, not chosen among the options."""
        return self.metric == EXACT_MATCH

    @property
    def english(self) -> float | None:
        return self.accuracy[self.languages.index(ENGLISH)]["value"] if ENGLISH in self.languages else None

    @property
    def gap(self) -> float | None:
        """Accuracy in English less the mean over the other languages; None without English or others."""
        others = [one["value"] for one, language in zip(self.accuracy, self.languages) if language != ENGLISH]
        return None if self.english is None or not others else self.english - float(np.mean(others))

    def matrix(self, name: str) -> np.ndarray | None:
        values = self._content.get(f"{name}_matrix")
        return None if values is None else np.where(np.array(values) < 0, np.nan, np.array(values, float))


def accuracy_figure(task: TaskPage) -> Figure:
    """A dot and its interval for every language; English's as a line."""
    figure, axes, rows = rows_panel(f"{task.metric} (%)", task.languages, row=17)
    value, low, high = (100 * np.array([one[key] for one in task.accuracy]) for key in ("value", "low", "high"))
    axes.hlines(rows, low, high, color=ACCENT, alpha=0.45, linewidth=2.2)
    axes.plot(value, rows, "o", color=ACCENT, markersize=4.5)
    if task.english is not None:
        axes.axvline(100 * task.english, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
    if not high.max() > 0:
        axes.set_xlim(0, 100)
    return figure


def consistency_figure(task: TaskPage) -> Figure | None:
    """Heat map: MLC of every pair of languages, lines between families; accuracies in the diagonal."""
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
        if n <= _WITH_NUMBERS:
            shown = task.accuracy[row]["value"] if own else value
            axes.text(column, row, f"{100 * shown:.0f}", ha="center", va="center", color=INK,
                      fontsize=min(9.5, 0.36 * cell))
    fill_cells(axes, colours)
    for place in range(1, n):
        if family(task.languages[place]) != family(task.languages[place - 1]):
            axes.axhline(place - 0.5, color=MUTED, linewidth=0.6)
            axes.axvline(place - 0.5, color=MUTED, linewidth=0.6)
    return figure


def draw(task: TaskPage) -> Iterator[tuple[str, Figure, str]]:
    """(name, figure, description) of what there is to draw."""
    yield f"accuracy_{task.name}", accuracy_figure(task), f"Accuracy by language, {task.name}"
    if (figure := consistency_figure(task)) is not None:
        yield f"mlc_{task.name}", figure, f"Consistency of pairs of languages, {task.name}"


def accuracies(tasks: Sequence[TaskPage]) -> list[dict[str, Any]]:
    """Language by language: accuracy of every task, None where the language is not in it, and their mean."""
    found = [{language: one["value"] for language, one in zip(task.languages, task.accuracy)} for task in tasks]
    rows = []
    for language in by_family(language for task in tasks for language in task.languages):
        values = [accuracy.get(language) for accuracy in found]
        rows.append({"language": language, "accuracy": values,
                     "mean": float(np.mean([value for value in values if value is not None]))})
    return rows


def mixed_less_local(tasks: Sequence[TaskPage]) -> list[dict[str, Any]]:
    """Code-switched tasks beside the unmixed ones they come from: accuracy by language and the difference."""
    by_name = {task.name: task for task in tasks}
    found = []
    for task in tasks:
        for mode, source in (("mix_lighteval", "lighteval"), ("mix", "local_template")):
            base = by_name.get(f"{task.dataset}_{source}")
            if base is None or (task.mode != mode and not task.mode.removeprefix(f"{mode}_").isdigit()):
                continue
            plain = {language: one["value"] for language, one in zip(base.languages, base.accuracy)}
            rows = [{"language": language, "plain": plain[language], "mixed": one["value"]}
                    for language, one in zip(task.languages, task.accuracy) if language in plain]
            if rows:
                found.append({"name": task.name, "base": base.name, "rows": rows,
                              "mean": float(np.mean([row["mixed"] - row["plain"] for row in rows]))})
    return found


def examples(folder: epath.Path, stamp: str, task: TaskPage) -> list[dict[str, Any]]:
    """Items on which languages disagree or which are wrong in English (or the first language), the most divided first.

    Evenly spread over the divided ones, so that not only the extreme are shown.
    """
    samples = {}
    for language in task.languages:
        path = folder / f"samples_{task.name}_{language}_{stamp}.jsonl"
        samples[language] = [record for _, record in read_jsonl(path)]
    first = ENGLISH if ENGLISH in samples else task.languages[0]
    found = []
    for number, sample in enumerate(samples[first]):
        scored = {language: records[number] for language, records in samples.items()}
        chosen = {language: record["chosen"][task.metric] for language, record in scored.items()}
        right = sum(choice == sample["doc"]["label"] for choice in chosen.values())
        if right == len(chosen):
            continue
        found.append({"id": sample["doc"]["_id"], "label": sample["doc"]["label"], "share": right / len(chosen),
                      "kinds": len(set(chosen.values()) - {-1}),
                      "languages": [{"language": language, "prompt": scored[language]["doc"]["prompt"],
                                     "choices": scored[language]["doc"]["choices"], "chosen": chosen[language],
                                     "answer": scored[language]["resps"][0][0] if task.generated else None,
                                     "right": chosen[language] == sample["doc"]["label"]} for language in chosen]})
    found.sort(key=lambda item: (-item["kinds"], item["id"]))
    return [found[n * len(found) // min(SHOWN, len(found))] for n in range(min(SHOWN, len(found)))]


@gin.configurable("evals_report")
def report(folder: epath.PathLike = gin.REQUIRED) -> None:
    """Writes FOLDER/report.html and FOLDER/figures.

    Args:
      folder: the output of evals.run.

    Raises:
      InputError: no results there, or malformed ones; nothing is written then.
    """
    folder = epath.Path(folder)
    found = sorted(path for path in (folder.iterdir() if folder.is_dir() else ()) if path.match("results_*.json"))
    if not found:
        raise InputError(f"{folder}: no results_*.json, not the output of evals.run")
    results = read_json(found[-1], "results")
    stamp = found[-1].name.removeprefix("results_").removesuffix(".json")
    try:
        tasks = [TaskPage(name, content) for name, content in results["consistency"].items()]
        shown = {task.name: examples(folder, stamp, task) for task in tasks}
        entries, left_out = results["results"], results["left_out"]
        settings = {name: json.dumps(value) if isinstance(value, dict) else str(value)
                    for name, value in results["config"].items() if value is not None}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{found[-1]}: malformed: {type(error).__name__} {error}") from None
    with plot_style():
        figures = save_figures((drawn for task in tasks for drawn in draw(task)), folder / "figures")
    page = render_page(
        epath.Path(__file__).parent / "report.html.j2", name=folder.absolute().name, tasks=tasks, figures=figures,
        entries=entries, left_out=left_out, examples=shown, mixed=mixed_less_local(tasks), settings=settings,
        by_language=accuracies(tasks),
        samples=results["n-samples"], family=family, modes=MODES,
        model=results["config"]["model_args"]["path"], step=results["config"]["model_args"]["step"],
        few_shot=results["config"]["few_shot"], metrics=(*NORMALISATIONS, EXACT_MATCH))
    write_atomic(folder / "report.html", page)


if __name__ == "__main__":
    run(report, "evals.report")
