"""Reading of Hugging Face folders: config.json, and tensors of model.safetensors or of the files of its index."""

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.convert.safetensors_files import DTYPES, StoredTensor, read_header
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json

log = logging.getLogger(__name__)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
Read = Callable[[str, tuple[int, ...]], np.ndarray]


@contextlib.contextmanager
def open_weights(folder: epath.PathLike, rename: Callable[[str], str], ignored: re.Pattern) -> Iterator[Read]:
    """Opens a folder's safetensors.

    Args:
      folder: local or gs:// folder with model.safetensors or model.safetensors.index.json with its files.
      rename: function from a tensor's name in the file to the name it is read by.
      ignored: pattern of names that need not be read.

    Yields:
      `read(name, shape)`, which returns a tensor in the dtype of the file, see `StoredTensor.view`.

    Raises:
      InputError: a file is missing or malformed; a tensor is missing, stored twice, quantised, or of another shape;
        at the end of the block, a tensor that does not match `ignored` has not been read.
    """
    folder = epath.Path(folder)
    tensors, used = _find_tensors(folder, rename), set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise InputError(f"{folder}: no tensor {name} in its safetensors")
        used.add(name)
        stored, tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise InputError(f"{tensor.path}: tensor {stored} is stored as {tensor.dtype}; only {', '.join(DTYPES)} "
                             "are read")
        if tensor.shape != tuple(shape):
            raise InputError(f"{tensor.path}: tensor {stored} has shape {list(tensor.shape)}, config.json says "
                             f"{list(shape)}")
        return tensor.view()

    yield read
    rest = sorted(set(tensors) - used)
    unknown = [name for name in rest if not ignored.fullmatch(name)]
    if unknown:
        stored, tensor = tensors[unknown[0]]
        raise InputError(f"{tensor.path}: tensor {stored} has no place in this model ({len(unknown)} such in all)")
    if rest:
        log.info("%s: ignored %s", folder, ", ".join(rest))


class StoredParameter:
    """A parameter that is read from a file when it is indexed, and then only the parts that are asked for.

        parameter[...]                # all of it
        parameter[2:4, :, :512]       # only the tensors of layers 2 and 3 are read

    Attributes:
      shape: its shape; `[layers, ...]` where it is stacked.
      dtype: dtype of the arrays that indexing returns.
    """

    def __init__(
        self, shape: tuple[int, ...], read: Callable[[int | None], np.ndarray], n_layers: int | None = None,
        dtype: np.dtype | type = np.float32,
    ):  # fmt: skip
        """Stores where to read.

        Args:
          shape: its shape, of one layer.
          read: function that returns a layer's values by its number, in any dtype; of the only layer for None.
          n_layers: number of layers that are stacked; None: the parameter belongs to no layer.
          dtype: see the class.
        """
        self._layer_shape, self._read, self._n_layers = tuple(shape), read, n_layers
        self.shape = self._layer_shape if n_layers is None else (n_layers, *self._layer_shape)
        self.dtype = np.dtype(dtype)

    @property
    def is_stacked(self) -> bool:
        """Whether the first axis is that of layers, each of which is a tensor of its own."""
        return self._n_layers is not None

    def astype(self, dtype: np.dtype | type) -> "StoredParameter":
        """Returns the same parameter in another dtype; tensors are converted one by one."""
        return StoredParameter(self._layer_shape, self._read, self._n_layers, dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a part as an array; the index has an int or a slice for each axis, or is `...`."""
        index = (index if isinstance(index, tuple) else (index,)) if index is not ... else ()
        if self._n_layers is None:
            return self._part(None, index)
        numbers = range(self._n_layers)[index[0]] if index else range(self._n_layers)
        if isinstance(numbers, int):
            return self._part(numbers, index[1:])
        parts = (self._part(number, index[1:]) for number in numbers)
        first = next(parts)
        stacked = np.empty((len(numbers), *first.shape), self.dtype)
        for place, part in zip(stacked, itertools.chain([first], parts)):
            place[...] = part
        return stacked

    def _part(self, number: int | None, index: tuple[Any, ...]) -> np.ndarray:
        return np.array(self._read(number)[index], self.dtype)


def read_all(params: Any) -> Any:
    """Reads a tree of `StoredParameter`, in its order, to a tree of arrays."""
    if isinstance(params, dict):
        return {name: read_all(part) for name, part in params.items()}
    return params[...]


def as_float32(read: Read) -> Read:
    """Returns a function like `read` whose tensors are float32 arrays in memory."""
    return lambda name, shape: np.array(read(name, shape), np.float32)


def stack_layers(trees: list[Any]) -> Any:
    """Stacks the trees of the layers' parameters to one tree of arrays `[layers, ...]`."""
    if isinstance(trees[0], dict):
        return {key: stack_layers([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)


def get_number(path: epath.Path, raw: Mapping[str, Any], key: str, types: type | tuple[type, ...] = int) -> Any:
    """Returns a number of a config.json, of one of `types`; raises InputError where it is missing."""
    if isinstance(raw.get(key), bool) or not isinstance(raw.get(key), types):
        raise InputError(f"{path}: {key} is {raw.get(key)!r}, not a number")
    return raw[key]


def read_object(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError where it is missing."""
    raw = read_json(path, "configuration")
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object")
    return raw


def _find_tensors(folder: epath.Path, rename: Callable[[str], str]) -> dict[str, tuple[str, StoredTensor]]:
    """Reads the headers of a folder's files: new name of a tensor -> (name in the file, tensor)."""
    tensors = {}
    for path, names in _files(folder):
        in_file = read_header(path)
        if names is not None and (missing := sorted(names - set(in_file))):
            raise InputError(f"{path}: no tensor {missing[0]}, which the index lists for it")
        for stored, tensor in sorted(in_file.items()):
            name = rename(stored)
            if name in tensors:
                raise InputError(f"{path}: tensor {stored} is stored twice, also in {tensors[name][1].path.name}")
            tensors[name] = stored, tensor
    return tensors


def _files(folder: epath.Path) -> Iterator[tuple[epath.Path, set[str] | None]]:
    """Yields (file, names that the index expects in it; None without an index)."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        yield folder / WEIGHTS, None
        return
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{index}: no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A plain name, so that nothing outside the folder is opened.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise InputError(f"{index}: {name} is in {file!r}, which is no file name of this folder")
        files.setdefault(file, set()).add(name)
    for file, names in sorted(files.items()):
        yield folder / file, names
