"""Frame-Voyager (arXiv 2410.03226): a reward for every frame, so that good combinations have high rewards.

The bottom layers of the Video-LLM's decoder read the question and all candidates, one token each; a head turns what
they make of a candidate into its reward. A combination's reward is the mean of its frames'. Number of layers, head and
prompt are not published; ours are configuration.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder, DecoderConfig
from mlx_pretrain.models.encoder import gelu, vector
from mlx_pretrain.models.layers import matrix
from video.llm.model import PROMPT, VideoLLMConfig


@gin.configurable
@dataclasses.dataclass(frozen=True)
class VoyagerConfig:
    """Shape of the module.

    Attributes:
      decoder: of the Video-LLM, with as many layers as are used.
      frame_tokens: 1: a frame's tokens are averaged before the layers; or as many as the Video-LLM has: behind them.
      head_dim: hidden units of the head.
      prompt: {question} and {frames}; the frames come last, so that their states know the question.
    """

    decoder: DecoderConfig
    frame_tokens: int = 1
    head_dim: int = 128
    prompt: str = PROMPT

    def __post_init__(self):
        if isinstance(self.decoder, dict):  # from JSON
            object.__setattr__(self, "decoder", DecoderConfig(**self.decoder))
        for name in ("frame_tokens", "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"VoyagerConfig.{name} = {getattr(self, name)!r}: must be a positive integer")

    @property
    def dtype(self) -> str:
        """Compute dtype."""
        return self.decoder.dtype

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters `{"decoder", "head"}` in boxes that carry their logical axis names."""
        features = jnp.zeros((1, 1, self.frame_tokens, self.decoder.embed_dim))
        places = jnp.zeros((1, 1, self.frame_tokens), jnp.int32)
        return FrameVoyager(self).init(key, features, jnp.zeros((1, 2), jnp.int32), places)["params"]

    def parameters(self) -> int:
        """Number of parameters."""
        return self.decoder.parameters() + (self.decoder.embed_dim + 2) * self.head_dim + 1


class FrameVoyager(nn.Module):
    """Features of candidates and a question to rewards."""

    config: VoyagerConfig

    @nn.compact
    def __call__(self, features: jax.Array, tokens: jax.Array, places: jax.Array) -> jax.Array:
        """Rewards.

        Args:
          features: `[batch, candidates, tokens, embed]`, what the Video-LLM's decoder would read of each frame.
          tokens: int `[batch, length]`; id vocab_size + i stands for the i-th token of the candidates.
          places: int `[batch, candidates, frame_tokens]`, where in `tokens` those stand.

        Returns:
          float32 `[batch, candidates]`.
        """
        config, embed = self.config, self.config.decoder.embed_dim
        if features.shape[2] != config.frame_tokens:
            features = features.mean(axis=2, keepdims=True)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = Decoder(config.decoder, name="decoder")(
            tokens, positions, features=features.reshape(len(features), -1, embed))
        read = jnp.take_along_axis(hidden, places.reshape(len(places), -1)[..., None], axis=1)
        read = read.reshape(*places.shape, embed).astype(jnp.float32).mean(axis=2)
        return _Head(config.head_dim, name="head")(read)


class _Head(nn.Module):
    """`[batch, candidates, embed]` to `[batch, candidates]`, in float32."""

    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = matrix(self, "first", (x.shape[-1], self.hidden_dim), ("norm", None), x.shape[-1])
        bias = vector(self, "bias", (self.hidden_dim,), (None,))
        # All frames start with the reward 0.
        second = vector(self, "second", (self.hidden_dim,), (None,))
        return gelu(x @ first + bias) @ second + vector(self, "second_bias", (), ())


def rewards(
    config: VoyagerConfig, params: Any, features: jax.Array, tokens: jax.Array, places: jax.Array
) -> jax.Array:
    """Rewards float32 `[batch, candidates]`; arguments as in `FrameVoyager`."""
    return FrameVoyager(config).apply({"params": params}, features, tokens, places)


def combination_rewards(of_frames: jax.Array, combinations: jax.Array) -> jax.Array:
    """Mean reward float32 `[batch, combinations]` of the frames `[batch, combinations, chosen]`."""
    batch = jnp.arange(of_frames.shape[0])[:, None, None]
    return of_frames[batch, combinations].mean(axis=-1)


def ranking_loss(of_combinations: jax.Array, losses: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log sigmoid(r_w - r_l) over all pairs of a question's combinations, w the one with the lower loss.

    Args:
      of_combinations: rewards `[batch, combinations]`.
      losses: of the Video-LLM `[batch, combinations]`; pairs of equal losses are left out.

    Returns:
      For every question the mean over its pairs, the share of the pairs in the right order, and whether there are any:
      float32 `[batch]` each.
    """
    better = (losses[:, :, None] < losses[:, None, :]).astype(jnp.float32)
    margin = of_combinations[:, :, None] - of_combinations[:, None, :]
    pairs = better.sum(axis=(1, 2))
    mean = lambda x: (better * x).sum(axis=(1, 2)) / jnp.maximum(pairs, 1)  # noqa: E731
    right = (margin > 0) + 0.5 * (margin == 0)
    return mean(-jax.nn.log_sigmoid(margin)), mean(right), (pairs > 0).astype(jnp.float32)


def bottom_layers(config: VideoLLMConfig, params: Any, layers: int) -> tuple[DecoderConfig, Any]:
    """The first layers of a Video-LLM's decoder, its embedding and final norm, as a decoder of their own.

    Raises:
      InputError: it has not so many.
    """
    if not 1 <= layers <= config.decoder.n_layers:
        raise InputError(f"layers = {layers}: the Video-LLM's decoder has {config.decoder.n_layers}")
    decoder = dataclasses.replace(config.decoder, n_layers=layers, tie_embeddings=True,
                                  unroll=min(config.decoder.unroll, layers))
    parts = params["decoder"]
    return decoder, {"embedding": parts["embedding"], "final_norm": parts["final_norm"],
                     "layers": jax.tree.map(lambda x: x[:layers], parts["layers"])}
