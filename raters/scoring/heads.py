"""Linear heads on cached embeddings: a folder with their weights and what they were made from.

    heads.safetensors   kernel float32 [properties, embed] and bias float32 [properties]
    heads.json          the properties' names and held-out figures in the same order, the embeddings that the heads are
                        for, and provenance
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.convert.safetensors_files import read_header, write_file
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_json

FORMAT, VERSION = "mlx-rater-heads", 1
WEIGHTS, RECORD = "heads.safetensors", "heads.json"
_PROPERTY = re.compile(r"\w[\w-]*")  # names folders, too


@dataclasses.dataclass(frozen=True)
class Heads:
    """Linear heads: a score of each property is kernel @ embedding + bias.

    Attributes:
      properties: their names.
      kernels: float32 `[properties, embed]`.
      biases: float32 `[properties]`.
    """

    properties: Sequence[str]
    kernels: np.ndarray
    biases: np.ndarray

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns the scores of embeddings `[documents, embed]` of any type: float64 `[documents, properties]`."""
        return head_scores(embeddings, self.kernels.T, self.biases)

    def rater(self, name: str) -> str:
        """Returns a property's name with a fingerprint of its head, as the name of a rater."""
        index = self.properties.index(name)
        digest = hashlib.sha256(self.kernels[index].tobytes() + self.biases[index].tobytes())
        return f"{name}@{digest.hexdigest()[:8]}"

    def of(self, properties: Sequence[str]) -> "Heads":
        """Returns some of the heads."""
        rows = [self.properties.index(name) for name in properties]
        return Heads(list(properties), self.kernels[rows], self.biases[rows])


def head_scores(embeddings: np.ndarray, kernels: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Returns the scores of documents under linear heads, in float64.

    The first pass over documents and every later one compute their scores here, from the embeddings as they are kept.

    Args:
      embeddings: `[documents, embed]` of any type.
      kernels: `[embed, heads]`.
      biases: `[heads]`.

    Returns:
      float64 `[documents, heads]`.
    """
    return embeddings.astype(np.float64) @ kernels.astype(np.float64) + biases


def check_properties(names: Sequence[str], place: str) -> None:
    """Raises InputError for a name that cannot name a folder."""
    for name in names:
        if not _PROPERTY.fullmatch(name):
            raise InputError(f"{place}: {name!r} cannot name a property; use letters, digits, '_' and '-'")


def write_heads(folder: epath.PathLike, heads: Heads, record: Mapping[str, Any]) -> None:
    """Writes heads into a folder that exists, the record last; its "heads" are properties in the order of `heads`."""
    tensors = {"kernel": heads.kernels, "bias": heads.biases}
    write_file(epath.Path(folder) / WEIGHTS, {name: value.shape for name, value in tensors.items()},
               np.dtype(np.float32), tensors.__getitem__)
    write_json(epath.Path(folder) / RECORD, {"format": FORMAT, "version": VERSION, **record})


def read_heads(folder: epath.PathLike) -> tuple[Heads, dict[str, Any]]:
    """Reads heads, and their record.

    Raises:
      InputError: the folder holds no heads, or damaged ones.
    """
    record = read_json(epath.Path(folder) / RECORD, "record of heads; make them with raters.train_heads")
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{epath.Path(folder) / RECORD}: not the record of heads of version {VERSION}")
    path = epath.Path(folder) / WEIGHTS
    stored = read_header(path)
    properties = list(record.get("heads") or {})
    check_properties(properties, str(epath.Path(folder) / RECORD))
    if {"kernel", "bias"} != set(stored) or any(tensor.dtype != "F32" for tensor in stored.values()):
        raise InputError(f"{path}: holds other tensors than kernel and bias in float32")
    kernels, biases = stored["kernel"].view(), stored["bias"].view()
    if kernels.ndim != 2 or biases.shape != kernels.shape[:1] or len(biases) != len(properties):
        raise InputError(f"{path}: kernel {list(kernels.shape)} and bias {list(biases.shape)} do not fit the "
                         f"{len(properties)} heads of {RECORD}")
    if not (np.isfinite(kernels).all() and np.isfinite(biases).all()):
        raise InputError(f"{path}: holds numbers that are not finite")
    return Heads(properties, np.array(kernels), np.array(biases)), record
