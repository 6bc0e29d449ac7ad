"""Two runs of `evals.run` on the same items: which model is better, by how much, and how sure that is.

    python -m evals.compare --gin.compare.first=runs/evals_a --gin.compare.second=runs/evals_b
"""

from typing import NamedTuple

import gin
import numpy as np
from etils import epath

from evals import metrics, tables
from evals.language_families import by_family
from evals.tasks import Task
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json


class Compared(NamedTuple):
    """One task in one language, or in all ("all").

    Attributes:
      task, language, metric: what was compared.
      items: in both runs.
      first, second: accuracies.
      paired: see `metrics.paired`.
    """

    task: str
    language: str
    metric: str
    items: int
    first: float
    second: float
    paired: metrics.Paired


@gin.configurable
def compare(
    first: str = gin.REQUIRED, second: str = gin.REQUIRED, metric: str | None = None, output: str | None = None
) -> list[Compared]:
    """Compares accuracies, paired by item; prints a table.

    Args:
      first, second: output folders of `evals.run`.
      metric: of `metrics.NORMALISATIONS`; None: that of each dataset, and exact_match for generated answers.
      output: JSON file to write the table to.

    Raises:
      InputError: a folder that is none, nothing in both, items with other labels, or a metric that was not measured.
    """
    if metric is not None and metric not in metrics.NORMALISATIONS:
        raise InputError(f"compare.metric = {metric!r}: not one of {', '.join(metrics.NORMALISATIONS)}")
    there = [_tables(epath.Path(folder)) for folder in (first, second)]
    common = sorted(set(there[0]) & set(there[1]))
    if not common:
        raise InputError(f"{first}, {second}: no task and language in both")
    found: list[Compared] = []
    for name in dict.fromkeys(name for name, _ in common):
        generated = all(there[0][name, language].parent.parent.name == "answers" for task, language in common
                        if task == name)
        chosen = metrics.EXACT_MATCH if generated else metric or Task(*_split(name)).metric
        rows = {language: _right(there[0][name, language], there[1][name, language], chosen)
                for language in by_family(language for task, language in common if task == name)}
        if len(rows) > 1 and len({ids for ids, _ in rows.values()}) == 1:
            ids = next(iter(rows.values()))[0]
            rows["all"] = ids, np.stack([right for _, right in rows.values()], axis=1)
        for language, (ids, right) in rows.items():
            found.append(Compared(name, language, chosen, len(ids), float(right[0].mean()), float(right[1].mean()),
                                  metrics.paired(*right)))
    print(f"{'task':<36} {'language':<9} {'metric':<10} {'items':>6} {'first':>7} {'second':>7} {'difference':>22} p")
    for row in found:
        value, low, high = (100 * x for x in row.paired.difference)
        print(f"{row.task:<36} {row.language:<9} {row.metric:<10} {row.items:>6} {100 * row.first:>7.2f} "
              f"{100 * row.second:>7.2f} {value:>+7.2f} [{low:+.2f}, {high:+.2f}] {row.paired.p_value:.2g}")
    if output is not None:
        plain = [row._asdict() | {"paired": {"difference": row.paired.difference._asdict(),
                                             "p_value": row.paired.p_value}} for row in found]
        write_json(output, {"first": str(first), "second": str(second), "compared": plain})
    return found


def _tables(folder: epath.Path) -> dict[tuple[str, str], epath.Path]:
    """(task, language) -> file; options, where both they and answers are there."""
    paths = [path for name in reversed(tables.FOLDERS) if (folder / name).exists()
             for path in (folder / name).glob("*/*.parquet")]
    if not paths:
        raise InputError(f"{folder}: neither log_likelihoods nor answers, not the output of evals.run")
    return {(path.parent.name, path.stem): path for path in paths}


def _split(name: str) -> tuple[str, str]:
    dataset, _, mode = name.partition("_")
    return dataset, mode


def _right(first: epath.Path, second: epath.Path, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Ids of the items in both, and whether each was right: bool `[2, items]`."""
    answers = []
    for path in (first, second):
        table = tables.load(path)
        ids, labels = tables.items_of(table)
        choices = tables.choices_of(table)
        if metric not in choices:
            raise InputError(f"{path}: {metric} was not measured, only {', '.join(choices)}")
        answers.append(dict(zip(ids, zip(labels.tolist(), (labels == choices[metric]).tolist()))))
    ids = tuple(id for id in answers[0] if id in answers[1])
    if not ids:
        raise InputError(f"{first}, {second}: no item in both")
    if other := [id for id in ids if answers[0][id][0] != answers[1][id][0]]:
        raise InputError(f"{first}, {second}: item {other[0]} has another label in each; not the same files")
    return ids, np.array([[answer[id][1] for id in ids] for answer in answers])


if __name__ == "__main__":
    run(compare, "evals.compare")
