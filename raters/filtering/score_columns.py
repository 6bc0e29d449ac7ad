"""Scores of one file at a time as NumPy files, which the tasks of a selection leave for one another.

    FOLDER/<file>/<column>.npy      columns of a `ScoreTable` of that file, and other0, other1, ... of further raters
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from raters.filtering.score_table import ScoreTable

_COLUMNS = {"number": np.int64, "key": np.uint64, "language": np.int32, "source": np.int32, "score": np.float64,
            "tokens": np.int64}


def write_array(path: epath.Path, values: np.ndarray) -> None:
    """Writes an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, values)


def read_array(path: epath.Path) -> np.ndarray:
    """Reads an array that `write_array` wrote."""
    with path.open("rb") as file:
        return np.load(file)


def write_columns(folder: epath.Path, scores: ScoreTable, others: Sequence[np.ndarray]) -> None:
    """Writes the scores of one file, and those of other raters for the same rows."""
    columns = {name: getattr(scores, name) for name in _COLUMNS}
    for name, values in {**columns, **{f"other{i}": values for i, values in enumerate(others)}}.items():
        write_array(folder / f"{name}.npy", values)


def join_columns(
    folder: epath.Path, read: Mapping[str, Mapping[str, Any]]
) -> tuple[ScoreTable, list[ScoreTable]]:
    """Returns the scores of several files, one after the other, as if they had been read at once.

    Args:
      folder: where `write_columns` has left them.
      read: file -> {"raters", "languages", "sources"}, names of its table and of the other raters.

    Returns:
      The table, and for each other rater the same table with that rater's scores.

    Raises:
      InputError: the files were scored by several raters.
    """
    names = {field: sorted(set().union(*(one[f"{field}s"] for one in read.values())))
             for field in ("language", "source")}
    codes = {field: {name: code for code, name in enumerate(of_field)} for field, of_field in names.items()}
    n_others = max((len(one["raters"]) - 1 for one in read.values()), default=0)
    raters = [_only_name({one["raters"][i] for one in read.values()}) for i in range(n_others + 1)]
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in (
        ("file", np.int32), *_COLUMNS.items(), *((f"other{i}", np.float64) for i in range(n_others)))}
    for index, (file, one) in enumerate(read.items()):
        columns = {name: read_array(folder / file / f"{name}.npy") for name in parts if name != "file"}
        columns["file"] = np.full(len(columns["number"]), index, np.int32)
        for field in names:
            columns[field] = np.array([codes[field][name] for name in one[f"{field}s"]], np.int32)[columns[field]]
        for name, values in columns.items():
            parts[name].append(values)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    others = [joined.pop(f"other{i}") for i in range(n_others)]
    table = ScoreTable(raters[0], tuple(read), languages=tuple(names["language"]), sources=tuple(names["source"]),
                       **joined)
    return table, [dataclasses.replace(table, rater=rater, score=score) for rater, score in zip(raters[1:], others)]


def _only_name(names: set[str]) -> str:
    """Returns the one rater of several files; those without documents name none."""
    if len(names := names - {""}) > 1:
        raise InputError(f"scores of several raters: {', '.join(sorted(names))}; rate all files with one")
    return next(iter(names), "")
