"""Compares two runs of `evals.run` on the same items: accuracies, their difference and its significance.

    python -m evals.compare --gin.compare.first=runs/evals_a --gin.compare.second=runs/evals_b
"""

import dataclasses
from typing import NamedTuple

import gin
import numpy as np
from etils import epath

from evals.scoring import item_tables
from evals.scoring.bootstrap import PairedComparison, compare_paired
from evals.scoring.metrics import EXACT_MATCH, METRICS
from evals.tasks.language_families import by_family
from evals.tasks.task_files import Task
from mlx_pretrain.artifacts import is_current, provenance, read_record
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_json


class TaskComparison(NamedTuple):
    """The comparison of one task in one language, or in all languages together ("all").

    Attributes:
      task, language, metric: the accuracies compared.
      items: number of items in both runs.
      first, second: accuracy of each run.
      paired: difference and p-value.
    """

    task: str
    language: str
    metric: str
    items: int
    first: float
    second: float
    paired: PairedComparison


@gin.configurable("compare")
@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of the comparison.

    Attributes:
      first, second: output folders of `evals.run`.
      metric: name in `scoring.metrics.METRICS`; None: that of each dataset, and exact_match for generated answers.
      output: JSON file to write the table to; None: none.
      overwrite: replaces a table that was made from other runs or settings.
    """

    first: str = gin.REQUIRED
    second: str = gin.REQUIRED
    metric: str | None = None
    output: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        if self.metric is not None and self.metric not in METRICS:
            raise InputError(f"compare.metric = {self.metric!r}: not one of {', '.join(METRICS)}")


def main(config: CompareConfig) -> list[TaskComparison]:
    """Compares the accuracies of two runs, paired by item, and prints a table.

    Raises:
      InputError: a folder without tables, no task or item in both runs, labels that differ, a metric that was not
        measured, or the output has another origin.
    """
    runs = [_find_tables(epath.Path(folder)) for folder in (config.first, config.second)]
    common = sorted(set(runs[0]) & set(runs[1]))
    if not common:
        raise InputError(f"{config.first}, {config.second}: no task and language in both")
    made_from = provenance("evals.compare", config, {
        name: {"/".join(key): sha256(tables[key]) for key in common}
        for name, tables in zip(("first", "second"), runs)})
    kept = config.output is not None and is_current(
        config.output, read_record(config.output, "provenance"), made_from, overwrite=config.overwrite)
    comparisons: list[TaskComparison] = []
    for task_name in dict.fromkeys(task_name for task_name, _ in common):
        languages = by_family(language for name, language in common if name == task_name)
        generated = all(runs[0][task_name, language].parent.parent.name == "answers" for language in languages)
        dataset, _, mode = task_name.partition("_")
        task_metric = EXACT_MATCH if generated else config.metric or Task(dataset, mode).main_metric
        correct = {language: _read_correct(runs[0][task_name, language], runs[1][task_name, language], task_metric)
                   for language in languages}
        if len(correct) > 1 and len({ids for ids, _ in correct.values()}) == 1:
            ids = next(iter(correct.values()))[0]
            correct["all"] = ids, np.stack([right for _, right in correct.values()], axis=1)
        for language, (ids, right) in correct.items():
            comparisons.append(TaskComparison(
                task_name, language, task_metric, len(ids), float(right[0].mean()), float(right[1].mean()),
                compare_paired(*right)))
    print(f"{'task':<36} {'language':<9} {'metric':<10} {'items':>6} {'first':>7} {'second':>7} {'difference':>22} p")
    for row in comparisons:
        value, low, high = (100 * x for x in row.paired.difference)
        print(f"{row.task:<36} {row.language:<9} {row.metric:<10} {row.items:>6} {100 * row.first:>7.2f} "
              f"{100 * row.second:>7.2f} {value:>+7.2f} [{low:+.2f}, {high:+.2f}] {row.paired.p_value:.2g}")
    if config.output is not None and not kept:
        plain = [row._asdict() | {"paired": {"difference": row.paired.difference._asdict(),
                                             "p_value": row.paired.p_value}} for row in comparisons]
        write_json(config.output, {"first": str(config.first), "second": str(config.second), "compared": plain,
                                   "provenance": made_from})
    return comparisons


def _find_tables(folder: epath.Path) -> dict[tuple[str, str], epath.Path]:
    """Returns (task, language) -> file; scored options take precedence over generated answers."""
    paths = [path for name in reversed(item_tables.FOLDERS) if (folder / name).exists()
             for path in (folder / name).glob("*/*.parquet")]
    if not paths:
        raise InputError(f"{folder}: neither log_likelihoods nor answers, not the output of evals.run")
    return {(path.parent.name, path.stem): path for path in paths}


def _read_correct(first: epath.Path, second: epath.Path, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the ids of the items in both tables, and the correct answers of each: bool `[2, items]`."""
    answers = []
    for path in (first, second):
        table = item_tables.load(path)
        ids, labels = item_tables.ids_and_labels(table)
        choices = item_tables.choices_of(table)
        if metric not in choices:
            raise InputError(f"{path}: {metric} was not measured, only {', '.join(choices)}")
        answers.append(dict(zip(ids, zip(labels.tolist(), (labels == choices[metric]).tolist()))))
    ids = tuple(id for id in answers[0] if id in answers[1])
    if not ids:
        raise InputError(f"{first}, {second}: no item in both")
    if differing := [id for id in ids if answers[0][id][0] != answers[1][id][0]]:
        raise InputError(f"{first}, {second}: item {differing[0]} has another label in each; not the same files")
    return ids, np.array([[answer[id][1] for id in ids] for answer in answers])


if __name__ == "__main__":
    run(main, CompareConfig, "evals.compare")
