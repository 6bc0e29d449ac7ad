"""Two towers that map frames and texts into one space, as SigLIP's do (arXiv 2303.15343), for "CLIP scores" of frames.

The vision tower is `VisionTransformer` of `mlx_pretrain.models.vision`; the text tower has the same layers. Each
averages its tokens and projects the mean; the score of a frame and a text is their cosine.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float32, Int, Shaped, UInt8

from mlx_pretrain.data.token_store import PAD_ID
from mlx_pretrain.models.config_checks import check_integers, check_nested
from mlx_pretrain.models.encoder import LayerNorm, vector
from mlx_pretrain.models.layers import fan_in_init, matrix
from mlx_pretrain.models.vision import VisionConfig, VisionTransformer, layers


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """Shape of both towers.

    Attributes:
      vision: the vision tower, @VisionConfig(); the text tower has its layers, heads and widths.
      vocab_size: size of the tokenizer's vocabulary.
      max_length: tokens of a text; longer texts are cut.
      shared_dim: dimensions of the common space.
    """

    vision: VisionConfig = gin.REQUIRED
    vocab_size: int = gin.REQUIRED
    max_length: int = 32
    shared_dim: int = 64

    def __post_init__(self):
        check_nested(self, "vision", VisionConfig)
        check_integers(self, "vocab_size", "max_length", "shared_dim")

    @property
    def dtype(self) -> str:
        """Compute dtype."""
        return self.vision.dtype

    def init(self, key: jax.Array) -> Any:
        """Draws parameters `{"frames", "texts", "scale", "bias"}` in boxes that carry their logical axis names."""
        frames_key, texts_key = jax.random.split(key)
        images = jnp.zeros((1, self.vision.image_size, self.vision.image_size, 3), jnp.uint8)
        box = lambda value: nn.Partitioned(jnp.float32(value), ())  # noqa: E731
        return {
            "frames": _FrameTower(self).init(frames_key, images)["params"],
            "texts": _TextTower(self).init(texts_key, jnp.zeros((1, 2), jnp.int32))["params"],
            # As published: a temperature of 10, and a bias for the many pairs that do not belong together.
            "scale": box(jnp.log(10.0)),
            "bias": box(-10.0),
        }

    def parameters(self) -> int:
        """Number of parameters."""
        vision, embed = self.vision, self.vision.embed_dim
        patches = (3 * vision.patch_size**2 + 1 + vision.side**2) * embed
        text = vision.parameters() - patches + (self.vocab_size + self.max_length) * embed
        return vision.parameters() + text + 2 * embed * self.shared_dim + 2


class _FrameTower(nn.Module):
    config: TowersConfig

    @nn.compact
    def __call__(self, images: UInt8[ArrayLike, "batch size size 3"]) -> Float32[Array, "batch shared_dim"]:
        """Maps images uint8 `[batch, size, size, 3]` to unit vectors float32 `[batch, shared_dim]`."""
        x = VisionTransformer(self.config.vision, name="vision")(images)
        return _Projection(self.config.shared_dim, name="projection")(x, jnp.ones(x.shape[:2]))


class _TextTower(nn.Module):
    config: TowersConfig

    @nn.compact
    def __call__(self, tokens: Int[ArrayLike, "batch length"]) -> Float32[Array, "batch shared_dim"]:
        """Maps tokens int `[batch, length]` to unit vectors float32 `[batch, shared_dim]`."""
        config, vision = self.config, self.config.vision
        embed, real = vision.embed_dim, tokens != PAD_ID
        init = nn.with_logical_partitioning(fan_in_init(embed), ("vocab", "embed"))
        table = self.param("embedding", init, (config.vocab_size, embed), jnp.float32)
        positions = vector(self, "positions", (config.max_length, embed), (None, "embed"),
                           nn.initializers.normal(embed**-0.5))
        x = (jnp.take(table, tokens, axis=0) + positions[: tokens.shape[1]]).astype(vision.dtype)
        x, _ = layers(vision, name="layers")(x, real.astype(jnp.int32))
        if vision.final_norm:
            x = LayerNorm(vision.norm_epsilon, name="final_norm")(x.astype(jnp.float32))
        return _Projection(config.shared_dim, name="projection")(x, real)


class _Projection(nn.Module):
    dim: int

    @nn.compact
    def __call__(
        self, x: Shaped[Array, "batch tokens embed"], weights: Shaped[Array, "batch tokens"]
    ) -> Float32[Array, "batch shared_dim"]:
        """Projects the mean of `[batch, tokens, embed]` with weights `[batch, tokens]`, in float32."""
        kernel = matrix(self, "kernel", (x.shape[-1], self.dim), ("embed", None), x.shape[-1])
        weights = weights.astype(jnp.float32)[..., None]
        mean = (x.astype(jnp.float32) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        projected = mean @ kernel
        return projected * jax.lax.rsqrt(jnp.maximum(jnp.sum(projected**2, axis=-1, keepdims=True), 1e-12))


def embed_frames(
    config: TowersConfig, params: Any, images: UInt8[ArrayLike, "frames size size 3"]
) -> Float32[Array, "frames shared_dim"]:
    """Maps frames uint8 `[frames, size, size, 3]` to unit vectors float32 `[frames, shared_dim]`."""
    return _FrameTower(config).apply({"params": params["frames"]}, images)


def embed_texts(
    config: TowersConfig, params: Any, tokens: Int[ArrayLike, "texts length"]
) -> Float32[Array, "texts shared_dim"]:
    """Maps padded tokens int `[texts, length]` to unit vectors float32 `[texts, shared_dim]`."""
    return _TextTower(config).apply({"params": params["texts"]}, tokens)


def sigmoid_loss(
    params: Any,
    frames: Float32[ArrayLike, "batch shared_dim"],
    texts: Float32[ArrayLike, "batch shared_dim"],
    same: Bool[ArrayLike, "batch batch"],
) -> Float32[Array, ""]:
    """Returns SigLIP's loss: a binary one for every frame and text of the batch, summed over texts, mean over frames.

    Args:
      params: the towers' parameters, of which `scale` and `bias` are read.
      frames, texts: `[batch, shared_dim]`.
      same: bool `[batch, batch]`, [i, j] True where text j belongs to frame i.
    """
    scores = frames @ texts.T * jnp.exp(params["scale"]) + params["bias"]
    return -jax.nn.log_sigmoid(jnp.where(same, scores, -scores)).sum(axis=1).mean()
