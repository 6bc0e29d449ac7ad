"""safetensors files, read as views of parts of the file and written tensor by tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header
(name -> dtype, shape and the tensor's place in the bytes that follow), and the tensors' bytes without gaps. The library
itself keeps a whole file mapped or makes one from all its tensors, and reads no gs://.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer

# Names of dtypes that are read; smaller ones are quantised, with scales beside them.
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as in the library
_BLOCK = 1 << 24  # bytes converted at once


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      path: the file.
      dtype: name of the dtype in the file, e.g. "BF16".
      shape: its shape.
      begin, end: the first of its bytes in the file, and the one after its last.
    """

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self) -> np.ndarray:
        """Returns the values as they are stored; parts of a local file are read when they are used.

        Dropping the array unmaps the file. On gs:// the whole tensor is read.
        """
        dtype = DTYPES[self.dtype]
        if gcs.is_gs(self.path):
            return np.frombuffer(_read(self.path, self.begin, self.end), dtype).reshape(self.shape)
        if self.begin == self.end:
            return np.empty(self.shape, dtype)
        return np.memmap(self.path, dtype, "r", self.begin, self.shape).view(np.ndarray)


def read_header(path: epath.PathLike) -> dict[str, StoredTensor]:
    """Reads the names and places of the tensors of a file, local or gs://.

    Raises:
      InputError: the file is missing, cut off, or no safetensors file.
    """
    path = epath.Path(path)
    try:
        with gcs.named_errors(path):
            size = path.stat().length
        start = 8 + int.from_bytes(_read(path, 0, min(8, size)), "little")
        if size < 8 or not 8 < start <= min(size, _MAX_HEADER):
            raise ValueError("its header is cut off")
        header = json.loads(_read(path, 8, start).decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, name, start, entry) for name, entry in header.items()}
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
            if tensor.begin != end:
                raise ValueError(f"its tensors overlap or leave a gap at byte {end}")
            end = tensor.end
        if end != size:
            raise ValueError(f"it has {size} bytes, its header describes {end}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # JSON and UnicodeDecode errors are ValueErrors
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    return tensors


def _read(path: epath.Path, begin: int, end: int) -> bytes:
    """Reads the bytes from `begin` to `end` of a file."""
    if gcs.is_gs(path):
        with gcs.named_errors(path):
            return gcs.filesystem().cat_file(str(path), begin, end)
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(name for name in names if names.count(name) > 1)} twice")
    return content


def _stored_tensor(path: epath.Path, name: str, start: int, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header does not describe {name}") from None
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError(f"its header does not describe {name}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes, {dtype}{list(shape)} needs another number")
    return StoredTensor(path, dtype, shape, start + begin, start + end)


def write_file(
    path: epath.PathLike, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, read: Callable[[str], np.ndarray]
) -> None:
    """Writes a file, tensor by tensor in the order of `shapes`.

    Args:
      path: local or gs:// path; a file there is replaced.
      shapes: name -> shape of each tensor.
      dtype: dtype in the file, one of `DTYPES`.
      read: function that returns the tensor of a name; it is called when the tensor before is written.

    Raises:
      InputError: the disk is full.
    """
    dtype, header, end = np.dtype(dtype), {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors are aligned
    with atomic_writer(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            _write(file, read(name), shape, dtype)


def _write(file: BinaryIO, tensor: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes a tensor block by block, so that a transposed or converted copy is never whole in memory."""
    if tensor.shape != shape:
        raise ValueError(f"a tensor has the shape {tensor.shape} instead of {shape}")
    rows = max(1, _BLOCK * len(tensor) // max(tensor.nbytes, 1))
    for begin in range(0, len(tensor), rows):
        file.write(np.ascontiguousarray(tensor[begin : begin + rows], dtype).view(np.uint8))
