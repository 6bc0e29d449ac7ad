"""The features of candidate frames that Frame-Voyager reads: a few vectors a frame, stored in bfloat16.

A Video-LLM's decoder reads a frame as many embeddings, 196 in LLaVA-OneVision. Frame-Voyager takes averages over equal
parts of the frame, which `video.label` stores: 1 x 3,584 x 2 bytes a frame instead of 196 x 3,584 x 4.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mlx_pretrain.errors import InputError
from video.frames.row_store import RowStore, RowWriter
from video.llm.model import average_pooling

FEATURES = "features"
# Bytes of features that a training keeps in memory; the rest is read from the store when a batch needs it.
_CACHE = 1 << 28


def pool_tokens(
    features: Float[ArrayLike, "*frames llm_tokens embed"], tokens: int
) -> Float[Array, "*frames tokens embed"]:
    """Averages the embeddings of each frame over equal parts of the frame, in float32.

    Args:
      features: `[..., llm_tokens, embed]`; the tokens are patches row by row, unless `tokens` is 1.
      tokens: number of parts, a square no larger than the square llm_tokens, or 1; llm_tokens leaves all as they are.

    Raises:
      InputError: the tokens cannot be divided so.
    """
    *frames, llm_tokens, embed = jnp.shape(features)
    if tokens == llm_tokens:
        return jnp.asarray(features)
    side, parts = math.isqrt(llm_tokens), math.isqrt(max(tokens, 0))
    if tokens != 1 and (side**2 != llm_tokens or parts**2 != tokens or not 1 <= parts <= side):
        raise InputError(f"{tokens} features of a frame of {llm_tokens} tokens: must be 1, all, or a square of equal "
                         "parts where the tokens are a square too")
    features = jnp.asarray(features).astype(jnp.float32)
    if tokens == 1:
        return features.mean(axis=-2, keepdims=True)
    pooling = average_pooling(side, parts)
    grid = features.reshape(*frames, side, side, embed)
    return jnp.einsum("...YXD,PY,QX->...PQD", grid, pooling, pooling).reshape(*frames, tokens, embed)


def open_feature_writer(
    path: epath.PathLike, settings: dict[str, Any], videos: int, shape: tuple[int, int, int]
) -> RowWriter:
    """Creates a store of features for at most `videos` videos, or resumes one.

    A row has "features" bfloat16 `[M, tokens, embed]`, in one chunk, "times" float64 `[M]`, and a "duration"; seconds.

    Raises:
      InputError: the folder holds other features.
    """
    return RowWriter(path, FEATURES, {**settings, "feature_tokens": shape[1]}, videos, {
        "features": (shape, np.dtype(ml_dtypes.bfloat16)), "times": (shape[:1], np.dtype(np.float64))})


class FeatureStore:
    """Stored features of the videos' candidates, which are read when they are needed.

        store = FeatureStore("runs/video/labels/features")
        store.features_of([store.row["videos/v00003.mp4"]])     # float32 [1, M, tokens, embed]

    Attributes:
      settings: settings that the features depend on.
      row: path of a video -> number of its row.
      shape: (M, tokens, embed), the shape of a video's features.
      times: float64 `[videos, M]`, when each candidate appears, seconds.
      durations: float64 `[videos]`, lengths of the videos, seconds.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the store; raises InputError when it is missing, incomplete or of an earlier version."""
        self._rows = RowStore(path, FEATURES, cache=_CACHE)
        self.settings = self._rows.settings
        if "feature_tokens" not in self.settings:
            raise InputError(f"{path}: features of an earlier version, which stored all tokens of a frame; make them "
                             "again, in another folder or after deleting this one")
        self.row = {line["id"]: line["row"] for line in self._rows.rows}
        self.shape: tuple[int, int, int] = tuple(self.settings["arrays"]["features"][0])
        self.times: np.ndarray = self._rows.read("times")
        self.durations = np.array([line["duration"] for line in self._rows.rows], np.float64)

    def features_of(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows M tokens embed"]:
        """Reads the features of the videos in these rows, which may repeat: float32 `[rows, M, tokens, embed]`."""
        return self._rows.read("features", rows).astype(np.float32)
