"""Log-likelihoods of every option of every item, in parquet files: what all metrics are computed from.

    OUTPUT/log_likelihoods/<task>/<language>.parquet     one row per option, items in order

Written whole or not at all, with what they depend on in the metadata, so that a run that starts again computes only
what is not there yet.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from etils import epath

from evals.metrics import Options
from evals.requests import encode_pairs, prompt_of
from evals.tasks import Item, Task
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer
from mlx_pretrain.inference.language_model import LanguageModel
from mlx_pretrain.inference.scoring import Request, Score

_METADATA = b"evals"
SCHEMA = pa.schema([
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


def path_of(output: epath.PathLike, task: Task, language: str) -> epath.Path:
    """Where the options of one language are."""
    return epath.Path(output) / "log_likelihoods" / task.name / f"{language}.parquet"


def requests_of(
    model: LanguageModel, items: Sequence[Item], examples: Sequence[Item], unconditional: bool
) -> list[Request]:
    """One request per option; with `unconditional` as many again, without the prompt."""
    pairs = [(prompt_of(item, examples), item.delimiter + choice) for item in items for choice in item.choices]
    if unconditional:
        pairs += [("", item.delimiter + choice) for item in items for choice in item.choices]
    return encode_pairs(model, pairs)


def table_of(items: Sequence[Item], scores: Sequence[Score], unconditional: bool) -> pa.Table:
    """The options' table from the scores of `requests_of`."""
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
    ], schema=SCHEMA)


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
    if found is None or table.schema.names != SCHEMA.names:
        raise InputError(f"{path}: not written by evals.run; delete it to compute it again")
    if depends_on is not None and json.loads(found) != json.loads(json.dumps(depends_on)):
        return None
    return table


def items_of(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Ids, and labels int `[items]`, of a table's items in order."""
    first = table.filter(pa.compute.equal(table["option"], 0))
    return first["id"].to_pylist(), first["label"].to_numpy()


def options_of(table: pa.Table) -> Iterator[tuple[str, Options]]:
    """(id, what was measured of its options) of each item of a table, in order."""
    columns = {name: table[name].to_numpy() for name in SCHEMA.names if name not in ("id", "label", "greedy")}
    ids, option = table["id"].to_pylist(), columns["option"]
    starts = [*np.flatnonzero(option == 0).tolist(), len(option)]
    for start, stop in itertools.pairwise(starts):
        part = (columns[name][start:stop].astype(np.float64)
                for name in ("log_likelihood", "tokens", "characters", "bytes", "unconditional"))
        yield ids[start], Options(*part)


def windows(
    model: LanguageModel, todo: Iterable[tuple[Any, Sequence[Item], Sequence[Item]]], unconditional: bool
) -> Iterator[tuple[Any, list[Request]]]:
    """What `Scorer` takes: (key, requests) of (key, items, examples)."""
    for key, items, examples in todo:
        yield key, requests_of(model, items, examples, unconditional)
