"""Frame-Voyager (arXiv 2410.03226): gives every frame a reward, so that good combinations have high mean rewards.

The bottom layers of the Video-LLM's decoder read the question and all candidates, one token each; a head maps the final
state of each candidate to its reward. A combination's reward is the mean over its frames. Number of layers, head and
prompt are not published; ours are configuration.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.config_checks import check_integers, check_nested
from mlx_pretrain.models.decoder import Decoder, DecoderConfig
from mlx_pretrain.models.encoder import gelu, vector
from mlx_pretrain.models.layers import matrix
from video.llm.model import PROMPT, VideoLLMConfig
from video.voyager.frame_features import pool_tokens


@gin.configurable
@dataclasses.dataclass(frozen=True)
class VoyagerConfig:
    """Shape of Frame-Voyager.

    Attributes:
      decoder: the Video-LLM's decoder, cut to the layers that are used, see `bottom_layers`.
      frame_tokens: tokens of a frame, averages of the Video-LLM's (`pool_tokens`), whose final states are averaged.
      head_dim: hidden units of the head.
      prompt: {question} and {frames}; the frames come last, so that their states depend on the question.
    """

    decoder: DecoderConfig
    frame_tokens: int = 1
    head_dim: int = 128
    prompt: str = PROMPT

    def __post_init__(self):
        check_nested(self, "decoder", DecoderConfig)
        check_integers(self, "frame_tokens", "head_dim")

    @property
    def dtype(self) -> str:
        """Compute dtype."""
        return self.decoder.dtype

    def init(self, key: jax.Array) -> Any:
        """Draws parameters `{"decoder", "head"}` in boxes that carry their logical axis names."""
        features = jnp.zeros((1, 1, self.frame_tokens, self.decoder.embed_dim))
        frame_positions = jnp.zeros((1, 1, self.frame_tokens), jnp.int32)
        return FrameVoyager(self).init(key, features, jnp.zeros((1, 2), jnp.int32), frame_positions)["params"]

    def parameters(self) -> int:
        """Number of parameters."""
        return self.decoder.parameters() + (self.decoder.embed_dim + 2) * self.head_dim + 1


class FrameVoyager(nn.Module):
    """Maps a question and the features of candidate frames to rewards.

        decoder, decoder_params = bottom_layers(llm.config, llm.params, 2)
        config = VoyagerConfig(decoder)
        prompts = PaddedPrompts(config.prompt, config.frame_tokens, llm.language_model, questions)
        tokens, frame_positions = prompts(questions, candidates=16)
        FrameVoyager(config).apply({"params": params}, features, tokens, frame_positions)   # [questions, 16]
    """

    config: VoyagerConfig

    @nn.compact
    def __call__(
        self,
        features: Float[ArrayLike, "batch candidates llm_tokens embed"],
        tokens: Int[ArrayLike, "batch length"],
        frame_positions: Int[ArrayLike, "batch candidates frame_tokens"],
    ) -> Float32[Array, "batch candidates"]:
        """Returns rewards float32 `[batch, candidates]`.

        Args:
          features: `[batch, candidates, llm_tokens, embed]`, embeddings of each frame for the Video-LLM's decoder.
          tokens: int `[batch, length]`; id vocab_size + i refers to the i-th token of the candidates.
          frame_positions: int `[batch, candidates, frame_tokens]`, positions of those ids in `tokens`.
        """
        config, embed = self.config, self.config.decoder.embed_dim
        features = pool_tokens(features, config.frame_tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = Decoder(config.decoder, name="decoder")(
            tokens, positions, features=features.reshape(len(features), -1, embed))
        states = jnp.take_along_axis(hidden, frame_positions.reshape(len(frame_positions), -1)[..., None], axis=1)
        states = states.reshape(*frame_positions.shape, embed).astype(jnp.float32).mean(axis=2)
        return _Head(config.head_dim, name="head")(states)


class _Head(nn.Module):
    """Maps states `[batch, candidates, embed]` to rewards `[batch, candidates]`, in float32."""

    hidden_dim: int

    @nn.compact
    def __call__(self, x: Float32[Array, "batch candidates embed"]) -> Float32[Array, "batch candidates"]:
        first = matrix(self, "first", (x.shape[-1], self.hidden_dim), ("norm", None), x.shape[-1])
        bias = vector(self, "bias", (self.hidden_dim,), (None,))
        # Zeros, so that all frames start with the reward 0.
        second = vector(self, "second", (self.hidden_dim,), (None,))
        return gelu(x @ first + bias) @ second + vector(self, "second_bias", (), ())


def rewards(
    config: VoyagerConfig,
    params: Any,
    features: Float[ArrayLike, "batch candidates llm_tokens embed"],
    tokens: Int[ArrayLike, "batch length"],
    frame_positions: Int[ArrayLike, "batch candidates frame_tokens"],
) -> Float32[Array, "batch candidates"]:
    """Returns rewards float32 `[batch, candidates]`; arguments as in `FrameVoyager`."""
    return FrameVoyager(config).apply({"params": params}, features, tokens, frame_positions)


def combination_rewards(
    frame_rewards: Float32[Array, "batch candidates"], combinations: Int[ArrayLike, "batch combinations num_frames"]
) -> Float32[Array, "batch combinations"]:
    """Returns mean rewards float32 `[batch, combinations]`.

    Args:
      frame_rewards: `[batch, candidates]`.
      combinations: int `[batch, combinations, num_frames]`, indices of candidates; unused places hold M.
    """
    batch, candidates = jnp.arange(frame_rewards.shape[0])[:, None, None], frame_rewards.shape[1]
    used = combinations < candidates
    chosen = frame_rewards[batch, jnp.minimum(combinations, candidates - 1)]
    return jnp.where(used, chosen, 0).sum(axis=-1) / used.sum(axis=-1)


def ranking_loss(
    predicted: Float32[Array, "batch combinations"],
    losses: Float32[Array, "batch combinations"],
    sizes: Int[ArrayLike, "batch combinations"] | None = None,
) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"], Float32[Array, " batch"]]:
    """Returns the means of -log sigmoid(r_w - r_l) over pairs of a question's combinations; w has the lower loss.

    Args:
      predicted: rewards of combinations `[batch, combinations]`.
      losses: the Video-LLM's losses `[batch, combinations]`; pairs of equal losses are left out.
      sizes: frames of each combination `[batch, combinations]`; pairs of two sizes are left out, since more frames
        lower the loss whichever they are. None: all have the same size.

    Returns:
      For every question, float32 `[batch]` each: the mean over its pairs, the share of pairs in the right order, and
      1 where it has pairs, else 0.
    """
    better = losses[:, :, None] < losses[:, None, :]
    if sizes is not None:
        better &= sizes[:, :, None] == sizes[:, None, :]
    better = better.astype(jnp.float32)
    margin = predicted[:, :, None] - predicted[:, None, :]
    pairs = better.sum(axis=(1, 2))
    mean = lambda x: (better * x).sum(axis=(1, 2)) / jnp.maximum(pairs, 1)  # noqa: E731
    right = (margin > 0) + 0.5 * (margin == 0)
    return mean(-jax.nn.log_sigmoid(margin)), mean(right), (pairs > 0).astype(jnp.float32)


def bottom_layers(config: VideoLLMConfig, params: Any, layers: int) -> tuple[DecoderConfig, Any]:
    """Cuts a Video-LLM's decoder to its first layers; embedding and final norm stay.

    Returns:
      The cut decoder's configuration and parameters.

    Raises:
      InputError: `layers` is less than 1, or more than the decoder has.
    """
    if not 1 <= layers <= config.decoder.n_layers:
        raise InputError(f"layers = {layers}: the Video-LLM's decoder has {config.decoder.n_layers}")
    decoder = dataclasses.replace(config.decoder, n_layers=layers, tie_embeddings=True,
                                  unroll=min(config.decoder.unroll, layers))
    parts = params["decoder"]
    return decoder, {"embedding": parts["embedding"], "final_norm": parts["final_norm"],
                     "layers": jax.tree.map(lambda x: x[:layers], parts["layers"])}
