"""The vision tower of SigLIP (arXiv 2303.15343): a pre-norm vision transformer (arXiv 2010.11929) without a class
token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.attention import check_attention
from mlx_pretrain.models.config_checks import check_choice, check_divides, check_integers
from mlx_pretrain.models.encoder import LayerNorm, SelfAttention, vector
from mlx_pretrain.models.layers import matrix, project
from mlx_pretrain.parallel.partitioning import constrain


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Shape of layers outside a tower; attributes as in `VisionConfig`."""

    n_layers: int
    n_heads: int
    mlp_dim: int
    norm_epsilon: float = 1e-6
    unroll: int = 1
    attention: str | None = None


@gin.configurable
@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape and numerics of a vision tower.

    Attributes:
      image_size: pixels of a side of the square images.
      patch_size: pixels of a side of a patch; pixels left over at the right and below are not read.
      embed_dim: width of the residual stream.
      n_layers: number of layers.
      n_heads: heads of a layer, of embed_dim / n_heads dimensions each.
      mlp_dim: width of the feed-forward part.
      final_norm: normalise the last layer's output (SigLIP does, LLaVA takes an earlier layer as it is).
      norm_epsilon: summand inside the square root of LayerNorm.
      mean, std: of red, green and blue, subtracted from pixels of 0 to 1 and divided by.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 always.
      unroll: layers per iteration of the scan over layers.
      attention: name of an implementation in `models.attention.IMPLEMENTATIONS`; None: the platform's fastest.
    """

    image_size: int = gin.REQUIRED
    patch_size: int = gin.REQUIRED
    embed_dim: int = gin.REQUIRED
    n_layers: int = gin.REQUIRED
    n_heads: int = gin.REQUIRED
    mlp_dim: int = gin.REQUIRED
    final_norm: bool = True
    norm_epsilon: float = 1e-6
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    unroll: int = 1
    attention: str | None = None

    def __post_init__(self):
        check_integers(self, "image_size", "patch_size", "embed_dim", "n_layers", "n_heads", "mlp_dim", "unroll")
        if self.patch_size > self.image_size:
            raise InputError(f"VisionConfig: patch_size={self.patch_size} exceeds image_size={self.image_size}")
        check_divides(self, "n_heads", "embed_dim")
        for name in ("mean", "std"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or (name == "std" and not min(value) > 0):
                raise InputError(f"VisionConfig.{name} = {value!r}: must be three numbers, one for each colour")
            object.__setattr__(self, name, value)  # JSON has no tuples
        check_choice(self, "dtype", ("float32", "bfloat16"))
        check_attention(self, self.embed_dim // self.n_heads)

    @property
    def side(self) -> int:
        """Patches of a side of an image."""
        return self.image_size // self.patch_size

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters in boxes that carry their logical axis names."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3), jnp.uint8)
        return VisionTransformer(self).init(key, images)["params"]

    def parameters(self) -> int:
        """Returns the number of parameters."""
        embed, mlp = self.embed_dim, self.mlp_dim
        layer = 4 * embed * (embed + 1) + 2 * embed * mlp + mlp + embed + 4 * embed
        patches = (3 * self.patch_size**2 + 1 + self.side**2) * embed
        return self.n_layers * layer + patches + 2 * embed * self.final_norm

    def flops_per_image(self) -> float:
        """Returns the FLOPs of the forward pass; training takes three times as many."""
        tokens, embed = self.side**2, self.embed_dim
        layer = 4 * embed**2 + 2 * embed * self.mlp_dim + 2 * embed * tokens
        return 2.0 * tokens * (self.n_layers * layer + 3 * self.patch_size**2 * embed)


class _Block(nn.Module):
    """One layer, `[batch, patches, embed]` in and out, in the signature of `nn.scan`."""

    config: VisionConfig | LayersConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch patches embed"], segment_ids: Int[ArrayLike, "batch patches"]
    ) -> tuple[Float[Array, "batch patches embed"], None]:
        config, dtype, embed = self.config, x.dtype, x.shape[-1]

        def normed(x: jax.Array, name: str) -> jax.Array:
            return LayerNorm(config.norm_epsilon, name=name)(x.astype(jnp.float32)).astype(dtype)

        def add(x: jax.Array, branch: jax.Array, name: str) -> jax.Array:
            bias = vector(self, name, (embed,), ("norm",))
            return constrain((x + branch + bias).astype(dtype), "batch", "length", "act_embed")

        attention = SelfAttention(config.n_heads, config.attention, name="attention")
        x = add(x, attention(normed(x, "attention_norm"), segment_ids, x.shape[1]), "attention_bias")
        up = matrix(self, "up", (embed, config.mlp_dim), ("embed", "mlp"), embed)
        up_bias = vector(self, "up_bias", (config.mlp_dim,), ("mlp",))
        down = matrix(self, "down", (config.mlp_dim, embed), ("mlp", "embed"), config.mlp_dim)
        hidden = project("BTD,DF->BTF", normed(x, "mlp_norm"), up).astype(jnp.float32) + up_bias
        hidden = constrain(jax.nn.gelu(hidden, approximate=True).astype(dtype), "batch", "length", "act_mlp")
        return add(x, project("BTF,FD->BTD", hidden, down), "mlp_bias"), None


def layers(config: VisionConfig | LayersConfig, name: str) -> nn.Module:
    """Returns the tower's layers, a module of (`[batch, tokens, embed]`, int segment ids `[batch, tokens]`) that
    returns (`[batch, tokens, embed]`, None)."""
    scanned = nn.scan(
        _Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
        length=config.n_layers, unroll=config.unroll, metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, name=name)


class VisionTransformer(nn.Module):
    """Computes one vector for every patch of images, row by row from the top."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self, images: UInt8[ArrayLike, "batch {self.config.image_size} {self.config.image_size} 3"]
    ) -> Float[Array, "batch {self.config.side**2} embed"]:
        """Returns `[batch, patches, embed]` for uint8 `[batch, image_size, image_size, 3]`, red, green, blue."""
        config, dtype, embed = self.config, jnp.dtype(self.config.dtype), self.config.embed_dim
        side, patch, batch = config.side, config.patch_size, images.shape[0]
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(config.mean)) / jnp.array(config.std)
        patches = pixels[:, : side * patch, : side * patch].reshape(batch, side, patch, side, patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side**2, 3 * patch**2).astype(dtype)
        kernel = matrix(self, "patch", (3 * patch**2, embed), (None, "embed"), 3 * patch**2)
        bias = vector(self, "patch_bias", (embed,), ("norm",))
        positions = vector(self, "positions", (side**2, embed), (None, "embed"), nn.initializers.normal(embed**-0.5))
        x = (project("BTP,PD->BTD", patches, kernel) + bias + positions).astype(dtype)
        x, _ = layers(config, name="layers")(x, jnp.ones(x.shape[:2], jnp.int32))
        if config.final_norm:
            x = LayerNorm(config.norm_epsilon, name="final_norm")(x.astype(jnp.float32)).astype(dtype)
        return x
