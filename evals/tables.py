"""What was measured of every item, in parquet files: all metrics are computed from them.

    OUTPUT/log_likelihoods/<task>/<language>.parquet     one row per option, items in order
    OUTPUT/answers/<task>/<language>.parquet             generated answers, one row per item

Written whole or not at all, with what they depend on in the metadata, so that a run that starts again computes only
what is not there yet.
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

from evals.metrics import EXACT_MATCH, NORMALISATIONS, Options, choose, matching
from evals.tasks import Item, Task
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer
from mlx_pretrain.inference.scoring import Score

_METADATA = b"evals"
LOG_LIKELIHOODS = pa.schema([
    ("id", pa.string()),
    ("label", pa.int32()),  # of the right option
    ("option", pa.int32()),
    ("log_likelihood", pa.float64()),
    ("greedy", pa.bool_()),
    ("tokens", pa.int32()),
    ("characters", pa.int32()),
    ("bytes", pa.int32()),
    ("unconditional", pa.float64()),
    ("dropped", pa.int32()),  # tokens left out at the beginning of the prompt
])
ANSWERS = pa.schema([
    ("id", pa.string()),
    ("label", pa.int32()),
    ("answer", pa.string()),
    ("chosen", pa.int32()),  # the option that the answer is; -1: none
    ("dropped", pa.int32()),
])
FOLDERS = {"log_likelihoods": LOG_LIKELIHOODS, "answers": ANSWERS}


def path_of(output: epath.PathLike, folder: str, task: Task, language: str) -> epath.Path:
    """Where the table of one language is; `folder` is one of FOLDERS."""
    return epath.Path(output) / folder / task.name / f"{language}.parquet"


def table_of_scores(items: Sequence[Item], scores: Sequence[Score], unconditional: bool) -> pa.Table:
    """The options' table from the scores of `requests.requests_of`."""
    choices = [(item, option, choice) for item in items for option, choice in enumerate(item.choices)]
    scored = scores[: len(choices)]
    without = [score.log_likelihood for score in scores[len(choices) :]] if unconditional else [np.nan] * len(choices)
    return pa.table([
        [item.id for item, _, _ in choices],
        [item.label for item, _, _ in choices],
        [option for _, option, _ in choices],
        [score.log_likelihood for score in scored],
        [score.greedy for score in scored],
        [len(score.log_probs) for score in scored],
        [len(choice) for _, _, choice in choices],
        [len(choice.encode()) for _, _, choice in choices],
        without,
        [score.dropped for score in scored],
    ], schema=LOG_LIKELIHOODS)


def table_of_answers(items: Sequence[Item], answers: Sequence[str], dropped: Sequence[int]) -> pa.Table:
    """The table of generated answers."""
    return pa.table([
        [item.id for item in items],
        [item.label for item in items],
        list(answers),
        [matching(answer, item.choices) for answer, item in zip(answers, items)],
        list(dropped),
    ], schema=ANSWERS)


def save(path: epath.Path, table: pa.Table, depends_on: Mapping[str, Any]) -> None:
    """Writes a table, atomically."""
    metadata = {_METADATA: json.dumps(depends_on, sort_keys=True).encode()}
    with atomic_writer(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)


def load(path: epath.Path, depends_on: Mapping[str, Any] | None = None) -> pa.Table | None:
    """A table; None where there is none, or one that depends on something else.

    Raises:
      InputError: the file is no such table.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file ({error}); delete it to compute it again") from None
    found = (table.schema.metadata or {}).get(_METADATA)
    if found is None or table.schema.names not in [schema.names for schema in FOLDERS.values()]:
        raise InputError(f"{path}: not written by evals.run; delete it to compute it again")
    if depends_on is not None and json.loads(found) != json.loads(json.dumps(depends_on)):
        return None
    return table


def items_of(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Ids, and labels int `[items]`, of a table's items in order."""
    if "option" in table.schema.names:
        table = table.filter(pa.compute.equal(table["option"], 0))
    return table["id"].to_pylist(), table["label"].to_numpy()


def _rows(table: pa.Table) -> Iterator[slice]:
    """Of the options of each item, in order."""
    starts = [*np.flatnonzero(table["option"].to_numpy() == 0).tolist(), len(table)]
    return itertools.starmap(slice, itertools.pairwise(starts))


def options_of(table: pa.Table) -> Iterator[Options]:
    """What was measured of the options of each item of a table, in order."""
    columns = [table[name].to_numpy().astype(np.float64)
               for name in ("log_likelihood", "tokens", "characters", "bytes", "unconditional")]
    for rows in _rows(table):
        yield Options(*(column[rows] for column in columns))


def responses_of(table: pa.Table) -> Iterator[list[Any]]:
    """(log-likelihood, greedy) of every option, or the generated answer alone, item by item."""
    if "answer" in table.schema.names:
        yield from ([answer] for answer in table["answer"].to_pylist())
        return
    answers = list(zip(table["log_likelihood"].to_pylist(), table["greedy"].to_pylist()))
    yield from (answers[rows] for rows in _rows(table))


def choices_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Metric -> the option that each item's answer is by it, int `[items]`, -1 for none; metrics that were measured."""
    if "answer" in table.schema.names:
        return {EXACT_MATCH: table["chosen"].to_numpy()}
    options = list(options_of(table))
    measured = [name for name in NORMALISATIONS
                if name != "acc_mutual_info" or not np.isnan(table["unconditional"].to_numpy()).all()]
    return {name: np.array([choose(item, name) for item in options]) for name in measured}


def unscored(table: pa.Table) -> int:
    """Items with an option whose log-likelihood is no number: no choice, and wrong, in every metric."""
    if "answer" in table.schema.names:
        return 0
    return sum(bool(np.isnan(item.log_likelihood).any()) for item in options_of(table))
