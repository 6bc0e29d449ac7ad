"""The quality model: an encoder with a linear head, one score per token sequence (MuRating, arXiv 2507.01785)."""

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mlx_pretrain.convert.encoders import load_encoder, read_config
from mlx_pretrain.data.tokenizers import SubwordTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.encoder import Encoder, EncoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_params


@gin.configurable
@dataclasses.dataclass(frozen=True)
class QualityConfig(EncoderConfig):
    """Shape and numerics of the encoder; the head has no choices."""

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters `{"encoder", "head"}` in boxes that carry their logical axis names."""
        tokens = jnp.ones((1, 2), jnp.int32)
        return QualityModel(self).init(key, tokens, tokens)["params"]

    def parameters(self) -> int:
        """Number of parameters."""
        return super().parameters() + self.embed_dim + 1


class _Head(nn.Module):
    """The linear head: `[batch, embed]` to `[batch]`, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # All documents start with the score 0, so that the first gradients do not depend on a drawn direction.
        zeros, axes = nn.initializers.zeros, nn.with_logical_partitioning
        kernel = self.param("kernel", axes(zeros, ("norm",)), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", axes(zeros, ()), (), jnp.float32)
        return x.astype(jnp.float32) @ kernel + bias


class QualityModel(nn.Module):
    """The encoder with its head: tokens to scores."""

    config: QualityConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Returns scores float32 `[batch]` of `tokens` int32 `[batch, length]`; `segment_ids` are 0 at padding."""
        return _Head(name="head")(Encoder(self.config, name="encoder")(tokens, segment_ids, pooled=True))


def quality(config: QualityConfig, params: Any, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns the scores of token sequences, float32 `[batch]`; arguments as in `QualityModel`."""
    return QualityModel(config).apply({"params": params}, tokens, segment_ids)


def embed(config: QualityConfig, params: Any, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns what the head sees of token sequences, float32 `[batch, embed]`; arguments as in `QualityModel`."""
    return Encoder(config).apply({"params": params["encoder"]}, tokens, segment_ids, pooled=True)


def quality_config(run_dir: epath.PathLike) -> QualityConfig:
    """Returns the configuration that `load_quality` returns, without its parameters; errors as there."""
    if _is_encoder(run_dir):
        return QualityConfig(**dataclasses.asdict(read_config(run_dir)))
    return checkpoints.load_model(run_dir, QualityConfig)


def _is_encoder(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / "config.json").exists() and not (epath.Path(folder) / checkpoints.MODEL).exists()


def load_quality(
    run_dir: epath.PathLike, step: int | None = None
) -> tuple[QualityConfig, Any, Tokenizer | SubwordTokenizer]:
    """Returns configuration, parameters (on the first device) and tokenizer of a run of `raters.train`.

    Args:
      run_dir: the run's folder; or a Hugging Face encoder (config.json, model.safetensors and tokenizer.json), whose
        head gives no scores (nan).
      step: step of the checkpoint; None: the latest.

    Raises:
      InputError: `run_dir` holds neither, or none of the checkpoints can be read.
    """
    config = quality_config(run_dir)
    tokenizers = [path for path in (epath.Path(run_dir) / name for name in ("tokenizer.model", "tokenizer.json"))
                  if path.exists()]
    if len(tokenizers) != 1:
        raise InputError(f"{run_dir}: tokenizer.model or tokenizer.json is needed, one of them")
    tokenizer = load_tokenizer(tokenizers[0])
    check_vocabulary(tokenizers[0], tokenizer, config.vocab_size)
    if _is_encoder(run_dir):
        head = {"kernel": np.zeros(config.embed_dim, np.float32), "bias": np.float32(np.nan)}
        return config, {"encoder": load_encoder(run_dir)[1], "head": head}, tokenizer
    mesh = partitioning.make_mesh(devices=jax.local_devices()[:1])
    params, _ = checkpoints.restore_params(run_dir, abstract_params(config, mesh), step)
    return config, params, tokenizer
