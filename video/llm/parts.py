"""Reads only those parts of a Video-LLM that are used.

Training Frame-Voyager takes the decoder's embedding and bottom layers, its use the vision tower, the projector and the
embedding: of 8 billion parameters a tenth.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.checksums import RunningChecksum, named_leaves
from mlx_pretrain.training.saved_arrays import SavedArray, open_params
from mlx_pretrain.training.train_state import abstract_params
from video.llm.model import VideoLLMConfig


def read_parts(
    path: epath.PathLike, config: VideoLLMConfig, mesh: Mesh, step: int, layers: int | None, frames: bool
) -> dict[str, Any]:
    """Reads parts of a checkpoint's parameters, and not the others.

    Args:
      path: folder of the run.
      config: shape of the whole model.
      mesh: devices to put the parts on.
      step: step of the checkpoint.
      layers, frames: see `load_video_llm`.

    Raises:
      InputError: the checkpoint is missing, damaged or of another model.
    """
    abstract = abstract_params(config, mesh)

    def read(keys: tuple[Any, ...], like: jax.ShapeDtypeStruct, array: SavedArray) -> jax.Array:
        if layers is not None and jax.tree_util.keystr(keys[:2], simple=True, separator="/") == "decoder/layers":
            values = np.stack([array[layer] for layer in range(min(layers, array.shape[0]))])
        else:
            values = array[...]
        return partitioning.put(values, like.sharding)

    with open_params(path, abstract, step) as saved:
        wanted = _wanted(abstract, layers, frames)
        return jax.tree_util.tree_map_with_path(read, wanted, _wanted(saved, layers, frames))


def read_stored_parts(
    stored: dict[str, Any], layout: dict[str, Any], layers: int | None, frames: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a published model tensor by tensor, and keeps parts of it.

    Args:
      stored: tree of `StoredParameter`, all of them.
      layout: shapes, dtypes and layouts of the parameters.
      layers, frames: see `load_video_llm`.

    Returns:
      The parts, and the checksums of all parameters, as `checksums` has them of arrays: a model's fingerprint is the
      same whichever parts of it are kept.
    """
    wanted = _wanted(layout, layers, frames)
    arrays, sums = dict.fromkeys(named_leaves(wanted)), {}
    for (name, like), array in zip(named_leaves(layout).items(), jax.tree.leaves(stored), strict=True):
        checksum, rows, array = RunningChecksum(), [], array.astype(like.dtype)
        last = layers if layers is not None and name.startswith("decoder/layers/") else array.shape[0]
        for number in range(array.shape[0]) if array.is_stacked else [...]:
            part = array[number]
            checksum.add(*((part[None], number) if array.is_stacked else (part, 0)))
            if name in arrays and len(rows) < last:
                rows.append(part)
        sums[name] = checksum.digits()
        if name in arrays:
            arrays[name] = partitioning.put(np.stack(rows) if array.is_stacked else rows[0], like.sharding)
    return jax.tree.unflatten(jax.tree.structure(wanted), arrays.values()), sums


def _wanted(params: dict[str, Any], layers: int | None, frames: bool) -> dict[str, Any]:
    """Returns the parameters that have to be read, whole."""
    parts = {"frames": params["frames"]} if frames else {}
    if layers is None:
        parts["decoder"] = params["decoder"]
    else:
        names = ("embedding", "final_norm", "layers") if layers else ("embedding",)
        parts["decoder"] = {name: params["decoder"][name] for name in names}
    return parts
