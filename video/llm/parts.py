"""Reads only those parts of a Video-LLM that are used, from a run of `video.train`.

Training Frame-Voyager takes the decoder's bottom layers, its use the vision tower and the projector: of 8 billion
parameters a tenth.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.parallel import partitioning
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


def _wanted(params: dict[str, Any], layers: int | None, frames: bool) -> dict[str, Any]:
    """Returns the parameters that have to be read, whole."""
    parts = {"frames": params["frames"]} if frames else {}
    if layers is None:
        parts["decoder"] = params["decoder"]
    elif layers:
        parts["decoder"] = {name: params["decoder"][name] for name in ("embedding", "final_norm", "layers")}
    return parts
