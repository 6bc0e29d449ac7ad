"""Applies a function to every input file of a command, in one process or shared by those of `--shard=I/N`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mlx_pretrain.artifacts import as_json, read_record
from mlx_pretrain.files import write_atomic
from mlx_pretrain.parallel import cluster


def map_files(
    output: epath.PathLike, names: Sequence[str], made_from: Callable[[str], Mapping[str, Any]],
    function: Callable[[str], Any],
) -> list[Any] | None:
    """Applies a function to each input file; the processes of `--shard=I/N` share the files.

    A process with a shard leaves its results in a hidden folder beside `output`. The command without `--shard` takes
    the results that are there and current, computes the others, and completes the output.

    Args:
      output: output of the command.
      names: names of the input files.
      made_from: name -> provenance of its result.
      function: name -> result, as JSON.

    Returns:
      The results, in order of `names`; None in a process with a shard.
    """
    number, count = cluster.shard()
    results = []
    for name in names[number::count]:
        part = _parts(output) / f"{name}.json"
        known = read_record(part) or {}
        record = as_json(made_from(name)) if count > 1 or known else None
        if known and known.get("made_from") == record:
            results.append(known["result"])
            continue
        results.append(as_json(function(name)))
        if count > 1:
            # With escapes, because a field may hold half a surrogate pair.
            write_atomic(part, json.dumps({"made_from": record, "result": results[-1]}))
    if count == 1:
        return results
    cluster.log(f"{output}: {len(results):,} of {len(names):,} files are done in this shard; when all shards are, the "
                "same command without --shard completes the output")
    return None


def remove_parts(output: epath.PathLike) -> None:
    """Removes the results that shards have left for `map_files`."""
    if _parts(output).exists():
        _parts(output).rmtree()


def _parts(output: epath.PathLike) -> epath.Path:
    output = epath.Path(output)
    return output.parent / f".{output.name}.parts"
