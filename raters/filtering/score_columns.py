"""Scores and cells as NumPy files, which the tasks of a selection leave for one another."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from raters.filtering.cells import Cells
from raters.filtering.score_table import ScoreTable

_COLUMNS = ("number", "key", "language", "source", "score", "tokens")


def write_array(path: epath.Path, values: np.ndarray) -> None:
    """Writes an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, values)


def read_array(path: epath.Path) -> np.ndarray:
    """Reads an array that `write_array` wrote."""
    with path.open("rb") as file:
        return np.load(file)


def write_cells(path: epath.Path, cells: Cells) -> None:
    """Writes cells."""
    write_array(path, np.stack(dataclasses.astuple(cells)))


def read_cells(path: epath.Path) -> Cells:
    """Reads cells that `write_cells` wrote."""
    return Cells(*read_array(path))


def write_table(folder: epath.Path, scores: ScoreTable, others: Sequence[np.ndarray]) -> None:
    """Writes the scores of one file, a NumPy file for each column, and those of other raters for the same rows."""
    columns = {name: getattr(scores, name) for name in _COLUMNS}
    for name, values in {**columns, **{f"other{i}": values for i, values in enumerate(others)}}.items():
        write_array(folder / f"{name}.npy", values)


def read_table(folder: epath.Path, empty: ScoreTable, n_others: int = 0) -> tuple[ScoreTable, list[np.ndarray]]:
    """Reads what `write_table` wrote; `empty` is a table without rows of the same file."""
    columns = {name: read_array(folder / f"{name}.npy") for name in _COLUMNS}
    table = dataclasses.replace(empty, file=np.zeros(len(columns["number"]), np.int32), **columns)
    return table, [read_array(folder / f"other{i}.npy") for i in range(n_others)]


def join_tables(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Returns the tables of single files, which have names of languages and sources in common, as one."""
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS}
    file = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
    return dataclasses.replace(tables[0], files=tuple(table.files[0] for table in tables), file=file, **columns)
