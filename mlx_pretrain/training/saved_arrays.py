"""Reads a checkpoint's weights layer by layer, for conversions that never hold more than one tensor in memory.

    with open_params("runs/demo", abstract_params(config, mesh)) as params:
        params["layers"]["mlp"]["up"][3]        # numpy array of layer 3
        params["embedding"][...]                # all of it
"""

import contextlib
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import kvstore
from mlx_pretrain.training.checkpoint_errors import cause_line, is_damage
from mlx_pretrain.training.checkpoints import find_params
from mlx_pretrain.training.checksums import RunningChecksum, changed_arrays, named_leaves

# Chunks of a checkpoint are read one after the other: in parallel, all of an array would be in memory twice.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 1 << 23}, "file_io_concurrency": {"limit": 1},
            "gcs_request_concurrency": {"limit": 2}, "data_copy_concurrency": {"limit": 2}}  # fmt: skip


class SavedArray:
    """An array of a checkpoint that is read when it is indexed.

    Reading a layer reads the chunks that hold it. `Checkpoints` saves each layer in chunks of its own; in older
    checkpoints layers share chunks, which are read once and kept until the last of their layers is read.

    Attributes:
      shape: its shape; `[layers, ...]` where parameters are stacked.
    """

    def __init__(self, store: ts.TensorStore):
        self.shape = store.shape
        self._store, self._rows = store, store.chunk_layout.read_chunk.shape[0]
        self._checksum, self._done = RunningChecksum(), set()
        self._begin, self._block = 0, None

    def __getitem__(self, index: int | EllipsisType) -> np.ndarray:
        """Returns one layer by its number, or the whole array by `...`."""
        if index is ...:
            return self._read(0, self.shape[0])
        begin = index - index % self._rows
        if self._block is None or self._begin != begin:
            self._begin, self._block = begin, self._read(begin, min(begin + self._rows, self.shape[0]))
        layer = self._block[index - begin]
        if index - begin == len(self._block) - 1:
            self._block = None
        return layer

    def _read(self, begin: int, end: int) -> np.ndarray:
        rows = self._store[begin:end].read(order="C").result()
        if not self._done.issuperset(new := range(begin, end)):
            self._checksum.add(rows, begin)
            self._done.update(new)
        return rows

    def checksum(self) -> str | None:
        """Returns the checksum of what was read, as `checksums`; None: not all of it was read."""
        return self._checksum.digits() if len(self._done) == self.shape[0] else None


@contextlib.contextmanager
def open_params(
    run_dir: epath.PathLike, abstract: Any, step: int | None = None, weights: str = "last"
) -> Iterator[Any]:
    """Opens a checkpoint's weights; arguments and errors as those of `checkpoints.restore_params`.

    Yields:
      A tree of `SavedArray`. At the end of the block, the checksums of arrays that were read are compared
      with those that were saved, and InputError is raised where they differ.
    """
    _, folder, path = find_params(run_dir, abstract, step, weights)
    context = ts.Context(_CONTEXT)

    def opened(name: str) -> SavedArray:
        key = ".".join([*path, *name.split("/")])
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": kvstore(folder / "state"), "path": f"{key}/"}}
        return SavedArray(ts.open(spec, read=True, open=True, context=context).result())

    try:
        arrays = {name: opened(name) for name in named_leaves(abstract)}
        yield jax.tree.unflatten(jax.tree.structure(abstract), arrays.values())
        meta = ocp.handlers.JsonCheckpointHandler().restore(folder / "meta")
    except InputError:
        raise
    except Exception as error:
        if not is_damage(error):
            raise
        raise InputError(f"{folder}: damaged: {cause_line(error)}") from None
    read = {"/".join([*path, name]): digits for name, array in arrays.items() if (digits := array.checksum())}
    if (saved := meta.get("checksums")) is not None and (damage := changed_arrays(saved, read)):
        raise InputError(f"{folder}: damaged: {damage}")
