"""A Video-LLM: a vision tower and a projector map frames into the embedding space of a decoder.

As in LLaVA (arXiv 2304.08485), but with a frame's patches averaged to a few before the two-layer projector maps them to
embeddings, which the decoder reads among those of words; or as LLaVA-OneVision (arXiv 2408.03326) reads videos.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Int, UInt8

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.config_checks import check_choice, check_nested
from mlx_pretrain.models.decoder import Decoder, DecoderConfig
from mlx_pretrain.models.encoder import gelu
from mlx_pretrain.models.layers import matrix, project, vector
from mlx_pretrain.models.vision import VisionConfig, VisionTransformer

# Order of question and frames; the answer follows.
PROMPT = "{question}{frames}"
_PERIODS = tuple(0.5 * 2.0**k for k in range(16))  # seconds: half a second to four and a half hours


def time_waves(times: Float[ArrayLike, "*frames"]) -> Float32[Array, "*frames waves"]:
    """Returns sines and cosines of times in seconds at sixteen frequencies, float32 `[..., 32]`."""
    angles = 2 * jnp.pi * jnp.asarray(times, jnp.float32)[..., None] / jnp.asarray(_PERIODS, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class VideoLLMConfig:
    """Shape of a Video-LLM.

    Attributes:
      vision: the vision tower, @VisionConfig().
      decoder: the language model, @DecoderConfig().
      pooled_side: a frame's patches are pooled to pooled_side x pooled_side; None: all patches stay.
      prompt: text before the answer, with {question} and {frames} once each. With the question first, it is computed
        once for all combinations of frames, see `video.label`.
      variant: "llava": patches are averaged before the projector. "onevision": they are interpolated behind it, and a
        learned vector, the newline, follows the frames.
      frame_times: the decoder sees when a frame was shown: a projection of its time's waves is added to its embeddings.
    """

    vision: VisionConfig = gin.REQUIRED
    decoder: DecoderConfig = gin.REQUIRED
    pooled_side: int | None = None
    prompt: str = PROMPT
    variant: str = "llava"
    frame_times: bool = False

    def __post_init__(self):
        check_nested(self, "vision", VisionConfig)
        check_nested(self, "decoder", DecoderConfig)
        check_choice(self, "variant", ("llava", "onevision"))
        if self.pooled_side is not None and not 1 <= self.pooled_side <= self.vision.side:
            raise InputError(f"VideoLLMConfig.pooled_side = {self.pooled_side!r}: must be from 1 to the tower's "
                             f"{self.vision.side}")
        if any(self.prompt.count(part) != 1 for part in ("{question}", "{frames}")):
            raise InputError(f"VideoLLMConfig.prompt = {self.prompt!r}: needs {{question}} and {{frames}}, once each")

    @property
    def dtype(self) -> str:
        """Compute dtype of the decoder."""
        return self.decoder.dtype

    @property
    def frame_tokens(self) -> int:
        """Number of the decoder's positions that a frame takes."""
        return (self.pooled_side or self.vision.side) ** 2

    @property
    def has_newline(self) -> bool:
        """Whether a newline follows the frames; it is then the first of the vectors that ids refer to."""
        return self.variant == "onevision"

    def init(self, key: jax.Array) -> Any:
        """Draws parameters `{"frames": {"vision", "projector", ...}, "decoder"}` in boxes with their axis names."""
        frames_key, decoder_key = jax.random.split(key)
        images = jnp.zeros((1, self.vision.image_size, self.vision.image_size, 3), jnp.uint8)
        frames = FrameEncoder(self).init(frames_key, images, jnp.zeros(1))["params"]
        return {"frames": frames, "decoder": self.decoder.init(decoder_key)}

    def parameters(self) -> int:
        """Number of parameters."""
        embed = self.decoder.embed_dim
        projector = (self.vision.embed_dim + 1) * embed + (embed + 1) * embed
        times = 2 * len(_PERIODS) * embed * self.frame_times
        return self.vision.parameters() + projector + embed * self.has_newline + times + self.decoder.parameters()


class FrameEncoder(nn.Module):
    """Maps frames to embeddings that the decoder reads."""

    config: VideoLLMConfig

    @nn.compact
    def __call__(
        self, images: UInt8[ArrayLike, "frames size size 3"], times: Float[ArrayLike, " frames"]
    ) -> Float[Array, "frames frame_tokens embed"]:
        """Maps uint8 `[frames, size, size, 3]`, shown at these seconds, to `[frames, frame_tokens, embed]`."""
        config, embed = self.config, self.config.decoder.embed_dim
        x, projector = VisionTransformer(config.vision, name="vision")(images), _Projector(embed, name="projector")
        if config.variant == "llava":
            x = projector(self._pooled(x, average_pooling))
        else:
            # Declared here so that one parameter tree holds it; `with_newline` reads it.
            vector(self, "newline", (embed,), ("norm",), nn.initializers.normal(embed**-0.5))
            x = self._pooled(projector(x), bilinear_pooling)
        if config.frame_times:
            waves = time_waves(times)
            kernel = matrix(self, "time", (waves.shape[-1], embed), (None, "norm"), waves.shape[-1])
            x = x.astype(jnp.float32) + (waves @ kernel)[:, None]
        return x.astype(config.decoder.dtype)

    def _pooled(self, x: jax.Array, pooling: Callable[[int, int], np.ndarray]) -> jax.Array:
        """Pools both sides of the grid of patches `[frames, patches, features]`."""
        side, pooled_side = self.config.vision.side, self.config.pooled_side
        if pooled_side is None:
            return x
        weights = jnp.asarray(pooling(side, pooled_side), x.dtype)
        grid = x.reshape(x.shape[0], side, side, x.shape[-1])
        return jnp.einsum("BYXD,PY,QX->BPQD", grid, weights, weights).reshape(x.shape[0], -1, x.shape[-1])


class _Projector(nn.Module):
    """LLaVA's projector: two layers with a GELU between them."""

    embed_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "frames frame_tokens features"]) -> Float[Array, "frames frame_tokens embed"]:
        into, embed = x.shape[-1], self.embed_dim
        first = matrix(self, "first", (into, embed), ("embed", None), into)
        bias = vector(self, "first_bias", (embed,), ("norm",))
        second = matrix(self, "second", (embed, embed), (None, "embed"), embed)
        second_bias = vector(self, "second_bias", (embed,), ("norm",))
        hidden = gelu(project("BTD,DE->BTE", x, first).astype(jnp.float32) + bias).astype(x.dtype)
        return project("BTD,DE->BTE", hidden, second) + second_bias.astype(x.dtype)


def average_pooling(size: int, parts: int) -> np.ndarray:
    """Returns a matrix float32 `[parts, size]` that averages nearly equal parts, as PyTorch's adaptive pooling does."""
    starts = np.arange(parts) * size // parts
    stops = -(-(np.arange(parts) + 1) * size // parts)
    indices = np.arange(size)
    inside = (indices >= starts[:, None]) & (indices < stops[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def bilinear_pooling(size: int, parts: int) -> np.ndarray:
    """Returns a matrix float32 `[parts, size]` that interpolates linearly at the middles of equal parts.

    As PyTorch's bilinear `interpolate` along one axis: of 27 patches, 14 values are read at 0.46, 2.39, ...
    """
    at = np.clip((np.arange(parts) + 0.5) * size / parts - 0.5, 0, size - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(size)), 0).astype(np.float32)


def encode_frames(
    config: VideoLLMConfig, params: Any, images: UInt8[ArrayLike, "*batch size size 3"],
    times: Float[ArrayLike, "*batch"],
) -> Float[Array, "*batch frame_tokens embed"]:
    """Encodes frames uint8 `[..., size, size, 3]`, shown at `times` in seconds, as `[..., frame_tokens, embed]`."""
    shape = images.shape[:-3]
    embeddings = FrameEncoder(config).apply(
        {"params": params["frames"]}, images.reshape(-1, *images.shape[-3:]), jnp.reshape(times, -1))
    return embeddings.reshape(*shape, *embeddings.shape[1:])


def with_newline(
    config: VideoLLMConfig, params: Any, features: Float[ArrayLike, "batch_or_1 n embed"]
) -> Float[ArrayLike, "batch_or_1 rows embed"]:
    """Puts the newline, where the model has one, before the embeddings of frames: `[batch or 1, n + 1, embed]`."""
    if not config.has_newline:
        return features
    newline = jnp.asarray(params["frames"]["newline"], features.dtype)
    return jnp.concatenate([jnp.broadcast_to(newline, (features.shape[0], 1, newline.shape[0])), features], axis=1)


def hidden_states(
    config: VideoLLMConfig,
    params: Any,
    features: Float[ArrayLike, "batch_or_1 n embed"],
    tokens: Int[ArrayLike, "batch length"],
) -> Float[Array, "batch length embed"]:
    """Returns the decoder's final hidden states `[batch, length, embed]`.

    Args:
      config, params: the Video-LLM.
      features: `[batch or 1, n, embed]`, embeddings of the frames' tokens, frame by frame.
      tokens: int `[batch, length]`; ids from vocab_size on refer to `with_newline` of them, see `video.llm.prompts`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rows = with_newline(config, params, features)
    return Decoder(config.decoder).apply({"params": params["decoder"]}, tokens, positions, features=rows)[0]
