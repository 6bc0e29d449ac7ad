"""Reading of Hugging Face folders: config.json, and tensors of model.safetensors or of the files of its index."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json

log = logging.getLogger(__name__)

DTYPES = ("F64", "F32", "F16", "BF16")  # smaller dtypes are quantised, with scales beside them
Read = Callable[[str, tuple[int, ...]], np.ndarray]


@contextlib.contextmanager
def open_weights(folder: epath.PathLike, rename: Callable[[str], str], ignored: re.Pattern) -> Iterator[Read]:
    """Opens a folder's safetensors.

    Args:
      folder: local folder with model.safetensors or model.safetensors.index.json with its files.
      rename: function from a tensor's name in the file to the name it is read by.
      ignored: pattern of names that need not be read.

    Yields:
      `read(name, shape)`, which returns a tensor as a numpy float32 array.

    Raises:
      InputError: a file is missing or malformed; a tensor is missing, stored twice, quantised, or of another shape;
        at the end of the block, a tensor that does not match `ignored` has not been read.
    """
    folder = epath.Path(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack, rename)
        used = set()

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name not in tensors:
                raise InputError(f"{folder}: no tensor {name} in its safetensors")
            used.add(name)
            path, stored, file = tensors[name]
            part = file.get_slice(stored)
            if (dtype := part.get_dtype()) not in DTYPES:
                raise InputError(f"{path}: tensor {stored} is stored as {dtype}; only {', '.join(DTYPES)} are read")
            if (stored_shape := part.get_shape()) != list(shape):
                raise InputError(f"{path}: tensor {stored} has shape {stored_shape}, config.json says {list(shape)}")
            return np.asarray(file.get_tensor(stored), np.float32)

        yield read
        rest = sorted(set(tensors) - used)
        unknown = [name for name in rest if not ignored.fullmatch(name)]
        if unknown:
            path, stored, _ = tensors[unknown[0]]
            raise InputError(f"{path}: tensor {stored} has no place in this model ({len(unknown)} such in all)")
    if rest:
        log.info("%s: ignored %s", folder, ", ".join(rest))


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


def _open_tensors(
    folder: epath.Path, stack: contextlib.ExitStack, rename: Callable[[str], str]
) -> dict[str, tuple[epath.Path, str, Any]]:
    """Opens a folder's files: new name of a tensor -> (file, name in the file, open file)."""
    tensors = {}
    for path, names in _files(folder):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file ({error})") from None
        names_in_file = set(file.keys())
        if names is not None and (missing := sorted(names - names_in_file)):
            raise InputError(f"{path}: no tensor {missing[0]}, which the index lists for it")
        for stored in sorted(names_in_file):
            name = rename(stored)
            if name in tensors:
                raise InputError(f"{path}: tensor {stored} is stored twice, also in {tensors[name][0].name}")
            tensors[name] = (path, stored, file)
    return tensors


def _files(folder: epath.Path) -> Iterator[tuple[epath.Path, set[str] | None]]:
    """Yields (file, names that the index expects in it; None without an index)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        yield folder / "model.safetensors", None
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
