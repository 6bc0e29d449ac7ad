"""Parquet tables of the measurements of every item, from which all metrics are computed.

    OUTPUT/log_likelihoods/<task>/<language>.parquet     one row per option, items in order
    OUTPUT/answers/<task>/<language>.parquet             generated answers, one row per item

A table is written whole or not at all, with its settings, items and model in the metadata, so that a run that starts
again computes only the missing ones.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from etils import epath

from evals.scoring.metrics import EXACT_MATCH, Options, choose_options, match_answer
from evals.tasks.task_files import Item, Task
from mlx_pretrain import artifacts
from mlx_pretrain.errors import InputError, first_line
from mlx_pretrain.files import atomic_writer
from mlx_pretrain.inference.scoring import Score
from mlx_pretrain.parallel import cluster

_METADATA = b"evals"
LOG_LIKELIHOODS = pa.schema([
    ("id", pa.string()),
    ("label", pa.int32()),  # index of the right option
    ("option", pa.int32()),
    ("log_likelihood", pa.float64()),
    ("greedy", pa.bool_()),
    ("tokens", pa.int32()),
    ("characters", pa.int32()),
    ("bytes", pa.int32()),
    ("unconditional", pa.float64()),
    ("dropped", pa.int32()),  # tokens cut at the beginning of the prompt
])
ANSWERS = pa.schema([
    ("id", pa.string()),
    ("label", pa.int32()),
    ("answer", pa.string()),
    ("chosen", pa.int32()),  # index of the option that the answer equals; -1: none
    ("dropped", pa.int32()),
])
FOLDERS = {"log_likelihoods": LOG_LIKELIHOODS, "answers": ANSWERS}


def table_path(output: epath.PathLike, folder: str, task: Task, language: str) -> epath.Path:
    """Returns the path of the table of one language; `folder` is one of FOLDERS."""
    return epath.Path(output) / folder / task.name / f"{language}.parquet"


def table_of_scores(items: Sequence[Item], scores: Sequence[Score], unconditional: bool) -> pa.Table:
    """Returns the table of the options' scores, which are in the order of `requests.item_requests`."""
    options = [(item, number, choice) for item in items for number, choice in enumerate(item.choices)]
    scored = scores[: len(options)]
    without_prompt = ([score.log_likelihood for score in scores[len(options) :]] if unconditional
                      else [np.nan] * len(options))
    return pa.table([
        [item.id for item, _, _ in options],
        [item.label for item, _, _ in options],
        [number for _, number, _ in options],
        [score.log_likelihood for score in scored],
        [score.greedy for score in scored],
        [len(score.log_probs) for score in scored],
        [len(choice) for _, _, choice in options],
        [len(choice.encode()) for _, _, choice in options],
        without_prompt,
        [score.dropped for score in scored],
    ], schema=LOG_LIKELIHOODS)


def table_of_answers(items: Sequence[Item], answers: Sequence[str], dropped: Sequence[int]) -> pa.Table:
    """Returns the table of generated answers; `dropped` counts the tokens cut at each prompt's beginning."""
    return pa.table([
        [item.id for item in items],
        [item.label for item in items],
        list(answers),
        [match_answer(answer, item.choices) for answer, item in zip(answers, items)],
        list(dropped),
    ], schema=ANSWERS)


def save(path: epath.Path, table: pa.Table, made_from: Mapping[str, Any]) -> None:
    """Writes a table atomically."""
    metadata = {_METADATA: json.dumps(made_from, sort_keys=True).encode()}
    with atomic_writer(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)


def load(path: epath.Path) -> pa.Table:
    """Returns a table.

    Raises:
      InputError: the file is not such a table.
    """
    return _read(path)[0]


def load_current(path: epath.Path, made_from: Mapping[str, Any], *, overwrite: bool) -> pa.Table | None:
    """Returns a table that was made from the same; None where it is missing, damaged or to be replaced.

    Raises:
      InputError: the table was made from other inputs, or the file is not such a table, without `overwrite`.
    """
    if not path.exists():
        return None
    try:
        table, recorded = _read(path)
    except _Damaged as error:  # the command chose the name, so the file is one of its own
        cluster.log(f"{error}; made again")
        return None
    except InputError:
        table, recorded = None, {}
    compared = {**dict.fromkeys(recorded), **made_from}  # nothing else is recorded
    return table if artifacts.is_current(path, recorded, compared, overwrite=overwrite, quiet=True) else None


class _Damaged(InputError):
    """A file that is no readable parquet."""


def _read(path: epath.Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise _Damaged(f"{path}: not a parquet file ({first_line(error)})") from None
    metadata = (table.schema.metadata or {}).get(_METADATA)
    if metadata is None or table.schema.names not in [schema.names for schema in FOLDERS.values()]:
        raise InputError(f"{path}: was not made by evals.run")
    return table, json.loads(metadata)


def ids_and_labels(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Returns the ids and the labels, int `[items]`, of a table's items."""
    if "option" in table.schema.names:
        table = table.filter(pa.compute.equal(table["option"], 0))
    return table["id"].to_pylist(), table["label"].to_numpy()


def _item_rows(table: pa.Table) -> Iterator[slice]:
    """Yields the rows of each item's options."""
    starts = [*np.flatnonzero(table["option"].to_numpy() == 0).tolist(), len(table)]
    return itertools.starmap(slice, itertools.pairwise(starts))


def options_of(table: pa.Table) -> list[Options]:
    """Returns the measurements of each item's options."""
    columns = [table[name].to_numpy().astype(np.float64)
               for name in ("log_likelihood", "tokens", "characters", "bytes", "unconditional")]
    return [Options(*(column[rows] for column in columns)) for rows in _item_rows(table)]


def responses_of(table: pa.Table) -> Iterator[list[Any]]:
    """Yields for each item (log-likelihood, greedy) of every option, or the generated answer alone."""
    if "answer" in table.schema.names:
        yield from ([answer] for answer in table["answer"].to_pylist())
        return
    responses = list(zip(table["log_likelihood"].to_pylist(), table["greedy"].to_pylist()))
    yield from (responses[rows] for rows in _item_rows(table))


def choices_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Returns the options chosen by each metric that was measured: metric -> int `[items]`, -1 for none."""
    if "answer" in table.schema.names:
        return {EXACT_MATCH: table["chosen"].to_numpy()}
    return choose_options(options_of(table))


def count_unscored(table: pa.Table) -> int:
    """Returns the number of items with an option whose log-likelihood is nan: wrong in every metric."""
    if "answer" in table.schema.names:
        return 0
    return sum(bool(np.isnan(item.log_likelihood).any()) for item in options_of(table))
