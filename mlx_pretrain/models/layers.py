"""Layers that models share: normalisation, rotary positions, gated MLP."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mlx_pretrain.models.projections import project
from mlx_pretrain.parallel.partitioning import constrain

# Cosines and sines of rotary positions.
Angles = tuple[Float32[Array, "batch length 1 half_head_dim"], Float32[Array, "batch length 1 half_head_dim"]]


def fan_in_init(fan_in: int, gain: float = 1.0) -> Callable[..., jax.Array]:
    """Returns an initializer: truncated normal with standard deviation gain / sqrt(fan_in)."""
    # 0.8796 is the standard deviation of a unit normal truncated to [-2, 2].
    return nn.initializers.truncated_normal(gain / (0.8796 * fan_in**0.5))


def matrix(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], fan_in: int,
    gain: float = 1.0,
) -> Float[ArrayLike, "..."]:  # fmt: skip
    """Declares a weight `name` of `shape` with logical `axes`, float32 when drawn, and returns it."""
    init = nn.with_logical_partitioning(fan_in_init(fan_in, gain), tuple(axes))
    return module.param(name, init, tuple(shape), jnp.float32)


def vector(module: nn.Module, name: str, shape, axes, init=nn.initializers.zeros) -> Float[ArrayLike, "..."]:
    """Declares a bias or scale `name` of `shape` with logical `axes`, float32 when drawn, and returns it."""
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) in float32, `[..., features]` in and out."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(self.dtype)


def rotary_angles(positions: Int[ArrayLike, "batch length"], head_dim: int, theta: float) -> Angles:
    """Returns cosines and sines of the rotary embedding (arXiv 2104.09864), frequencies theta^(-2i/head_dim).

    Args:
      positions: int `[batch, length]`.
      head_dim: size of a head, even.
      theta: base of the frequencies.

    Returns:
      cos, sin: float32 `[batch, length, 1, head_dim / 2]`.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float32[Array, "batch length 1 head_dim//2"],
    sin: Float32[Array, "batch length 1 head_dim//2"],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates `[batch, length, heads, head_dim]`; pairs are (i, i + head_dim / 2), as in Hugging Face's LLaMA."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): `(silu(x W_gate) * x W_up) W_down`, `[batch, length, embed]`."""

    mlp_dim: int
    output_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        embed = x.shape[-1]
        gate = matrix(self, "gate", (embed, self.mlp_dim), ("embed", "mlp"), embed)
        up = matrix(self, "up", (embed, self.mlp_dim), ("embed", "mlp"), embed)
        down = matrix(self, "down", (self.mlp_dim, embed), ("mlp", "embed"), self.mlp_dim, self.output_gain)
        hidden = nn.silu(project("BTD,DF->BTF", x, gate)) * project("BTD,DF->BTF", x, up)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return project("BTF,FD->BTD", hidden, down)
