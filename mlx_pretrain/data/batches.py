"""Turns stored token sequences into a decoder's input: inputs, positions, segments, loss weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int32, Integer

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID


class DecoderBatch(NamedTuple):
    """Input of a decoder; all arrays are `[batch, length]`.

    Attributes:
      inputs: previous token; BOS at the start of a row and of each document.
      targets: token to predict.
      positions: position within its document, from 0.
      segment_ids: number of the document within its row.
      weights: float32, 1 for real targets and 0 for padding.
    """

    inputs: Integer[Array, "batch length"]
    targets: Integer[Array, "batch length"]
    positions: Int32[Array, "batch length"]
    segment_ids: Int32[Array, "batch length"]
    weights: Float32[Array, "batch length"]


def decoder_batch(tokens: Integer[ArrayLike, "batch length"]) -> DecoderBatch:
    """Splits packed sequences `[batch, length]` at their EOS tokens.

    Every stored token is predicted once, EOS and the first token of each document included; EOS is never read.
    """
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=EOS_ID)
    starts = previous == EOS_ID
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    document_start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return DecoderBatch(
        inputs=jnp.where(starts, BOS_ID, previous),
        targets=tokens,
        positions=index - document_start,
        segment_ids=jnp.cumsum(starts, axis=1, dtype=jnp.int32),
        weights=(tokens != PAD_ID).astype(jnp.float32),
    )
