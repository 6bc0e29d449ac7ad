"""The LLaMA decoder (arXiv 2302.13971, 2307.09288): RMSNorm, rotary grouped-query attention, SwiGLU."""

import dataclasses
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.attention import Attention, Cache, check_attention, keep_attention
from mlx_pretrain.models.config_checks import check_choice, check_divides, check_integers
from mlx_pretrain.models.layers import Angles, GatedMLP, RMSNorm, fan_in_init, rotary_angles
from mlx_pretrain.models.projections import lookup
from mlx_pretrain.models.tree_attention import TreeMask
from mlx_pretrain.parallel.partitioning import constrain

# Values of each layer that the backward pass keeps; it computes the rest again. Products are known by the name that
# `project` gives them: policies that look for matrix products do not see into functions with their own gradient.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        keep_attention, jax.checkpoint_policies.save_only_these_names("product")
    ),
    "attention": keep_attention,
}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder.

    Example:
      config = DecoderConfig(vocab_size=32_000, embed_dim=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64,
                             mlp_dim=1408, max_length=2048, dtype="bfloat16")
      params = flax.linen.unbox(config.init(jax.random.key(0)))
      config.parameters()  # 56_369_664

    Attributes:
      vocab_size: rows of the embedding; pad it to a multiple of the tensor axis.
      embed_dim: width of the residual stream.
      n_layers: number of layers.
      n_heads: query heads of a layer.
      n_kv_heads: key and value heads; fewer than n_heads is grouped-query attention.
      head_dim: size of a head, even.
      mlp_dim: width of the feed-forward part.
      max_length: longest sequence (positions) the model is meant for.
      rope_theta: base of the rotary frequencies.
      norm_epsilon: summand inside the square root of RMSNorm.
      tie_embeddings: the output projection is the embedding transposed.
      attention_bias: queries, keys and values have biases, as in Qwen2.
      segment_attention: tokens attend only within their own document of a packed sequence. False: a row is one text,
        its documents attend to those before them, and positions run through the row.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 in training.
      remat: key of REMAT_POLICIES.
      unroll: layers per iteration of the scan over layers; n_layers unrolls all (same parameters).
      attention: name of an implementation in `models.attention.IMPLEMENTATIONS`; None: the platform's fastest.
    """

    vocab_size: int = gin.REQUIRED
    embed_dim: int = gin.REQUIRED
    n_layers: int = gin.REQUIRED
    n_heads: int = gin.REQUIRED
    n_kv_heads: int = gin.REQUIRED
    head_dim: int = gin.REQUIRED
    mlp_dim: int = gin.REQUIRED
    max_length: int = gin.REQUIRED
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    segment_attention: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_dim", "max_length")
        check_integers(self, *sizes)
        check_divides(self, "n_kv_heads", "n_heads")
        if self.head_dim % 2:
            raise InputError(f"DecoderConfig.head_dim = {self.head_dim}: rotary positions need an even number")
        check_choice(self, "remat", REMAT_POLICIES)
        check_choice(self, "dtype", ("float32", "bfloat16"))
        check_attention(self, self.head_dim)

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters in boxes that carry their logical axis names."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Decoder(self).init(key, tokens, tokens, tokens)["params"]

    def parameters(self) -> int:
        """Returns the number of parameters."""
        attention = 2 * self.embed_dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        matrices = attention + 3 * self.embed_dim * self.mlp_dim
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * matrices + embeddings + self._vectors()

    def _vectors(self) -> int:
        """Number of the parameters of norms and biases."""
        biases = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim * self.attention_bias
        return self.n_layers * (2 * self.embed_dim + biases) + self.embed_dim

    def flops_per_token(self, length: int) -> float:
        """Returns the FLOPs to train on one token of a sequence of `length`, without recomputation.

        6 per weight in a matrix product (the output projection included, the embedding lookup not) plus
        12 * layers * heads * head_dim * length for attention scores and values over the whole square, halved for
        the causal mask (arXiv 2204.02311, appendix B, counts the whole square).
        """
        lookup = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
        attention = 6 * self.n_layers * self.n_heads * self.head_dim * length
        return 6.0 * (self.parameters() - lookup - self._vectors()) + attention


class Block(nn.Module):
    """One layer, `[batch, length, embed]` in and out, in the signature of `nn.scan`: the carry comes first."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        angles: Angles,
        positions: Int[ArrayLike, "batch length"],
        segment_ids: Int[ArrayLike, "batch length"] | None,
        tree_mask: TreeMask | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None]:
        config = self.config
        # Residual branches start smaller in deep models, so that the stream's variance does not grow with depth.
        gain = (2 * config.n_layers) ** -0.5
        normed = RMSNorm(config.norm_epsilon, self.dtype, name="attention_norm")(x)
        attended, cache = Attention(
            config.n_heads, config.n_kv_heads, config.head_dim, config.attention_bias, gain, config.attention,
            name="attention",
        )(normed, angles, positions, segment_ids, tree_mask, cache)
        x = constrain(x + attended, "batch", "length", "act_embed")
        hidden = RMSNorm(config.norm_epsilon, self.dtype, name="mlp_norm")(x)
        x = x + GatedMLP(config.mlp_dim, gain, name="mlp")(hidden)
        return constrain(x, "batch", "length", "act_embed"), cache


class Decoder(nn.Module):
    """Computes the final hidden states of tokens; `logits` projects those to the vocabulary.

    Example:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)     # tokens: int [batch, length]
      hidden, _ = Decoder(config).apply({"params": params}, tokens, positions)    # [batch, length, embed]
      log_probs = jax.nn.log_softmax(logits(params, hidden))                      # [batch, length, vocab]

    Training hands the hidden states to `losses.cross_entropy` with `output_kernel(params)`, so that float32 logits of
    a whole batch never exist.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[ArrayLike, "batch length"],
        positions: Int[ArrayLike, "batch length"],
        segment_ids: Int[ArrayLike, "batch length"] | None = None,
        cache: Cache | None = None,
        tree_mask: TreeMask | None = None,
        features: Float[ArrayLike, "batch_or_1 n embed"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None]:
        """Runs the decoder.

        Args:
          tokens: int `[batch, length]`; with `features`, id vocab_size + i stands for the i-th of them.
          positions: int `[batch, length]`, counted within each document.
          segment_ids: int `[batch, length]`, number of the document that a token is in; None: one document, as for
            `segment_attention=False`, which also counts positions through the row.
          cache: keys and values `[layers, batch, cache_length, kv_heads, head_dim]` to extend; None: training.
          tree_mask: rows are trees, for `inference.scoring`; a cache is then the prefix they share, see
            `tree_attention`.
          features: `[batch or 1, n, embed]`, inputs that are no words, as frames of a video; 1: the same for all rows.

        Returns:
          hidden: `[batch, length, embed]` after the final norm.
          cache: extended, or None.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = config.embed_dim
        init = nn.with_logical_partitioning(fan_in_init(embed), ("vocab", "embed"))
        table = self.param("embedding", init, (config.vocab_size, embed), jnp.float32)
        if not config.tie_embeddings:
            # Declared here so that one parameter tree holds it; used by `output_kernel`.
            _Output(config.vocab_size, embed, name="output")()
        words = tokens if features is None else jnp.minimum(tokens, config.vocab_size - 1)
        x = lookup(table, words, dtype)
        if features is not None:
            indices = jnp.maximum(tokens - config.vocab_size, 0)
            vectors = (jnp.take(features[0], indices, axis=0) if features.shape[0] == 1
                       else jnp.take_along_axis(features, indices[..., None], axis=1))
            x = jnp.where((tokens < config.vocab_size)[..., None], x, vectors.astype(dtype))
        x = constrain(x, "batch", "length", "act_embed")
        if segment_ids is not None and not config.segment_attention:
            # Positions that restart would place documents that attend to each other on top of each other.
            segment_ids, positions = None, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return _run_layers(config, x, positions, segment_ids, cache, tree_mask)


class DecoderLayers(nn.Module):
    """The layers of a decoder, for inputs that are embeddings already: `Decoder` without its embedding."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[ArrayLike, "batch length embed"],
        positions: Int[ArrayLike, "batch length"],
        tree_mask: TreeMask | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Maps embeddings `[batch, length, embed]` to states after the final norm; arguments as in `Decoder`."""
        return _run_layers(self.config, jnp.asarray(x, self.config.dtype), positions, None, None, tree_mask)[0]


def _run_layers(
    config: DecoderConfig,
    x: Float[Array, "batch length embed"],
    positions: Int[ArrayLike, "batch length"],
    segment_ids: Int[ArrayLike, "batch length"] | None,
    cache: Cache | None,
    tree_mask: TreeMask | None,
) -> tuple[Float[Array, "batch length embed"], Cache | None]:
    """Runs all layers and the final norm, whose parameters belong to the module that calls it."""
    dtype = jnp.dtype(config.dtype)
    angles = rotary_angles(positions, config.head_dim, config.rope_theta)
    block = Block
    if config.remat != "none" and cache is None:
        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
        length=config.n_layers,
        unroll=config.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, cache = layers(config, dtype, name="layers")(x, angles, positions, segment_ids, tree_mask, cache)
    return RMSNorm(config.norm_epsilon, dtype, name="final_norm")(x), cache


class _Output(nn.Module):
    """Holds the output projection `[embed, vocab]`."""

    vocab_size: int
    embed_dim: int

    @nn.compact
    def __call__(self) -> Float[ArrayLike, "embed vocab"]:
        init = nn.with_logical_partitioning(fan_in_init(self.embed_dim), ("embed", "vocab"))
        return self.param("kernel", init, (self.embed_dim, self.vocab_size), jnp.float32)


def output_kernel(params: Any) -> Float[ArrayLike, "embed vocab"]:
    """Returns the output projection `[embed, vocab]` of a decoder's (unboxed) parameters, tied or not."""
    return params["output"]["kernel"] if "output" in params else params["embedding"].T


def logits(params: Any, hidden: Float[ArrayLike, "*tokens embed"]) -> Float32[Array, "*tokens vocab"]:
    """Returns float32 logits `[..., vocab]` of hidden states `[..., embed]`."""
    kernel = output_kernel(params).astype(hidden.dtype)
    return jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)


def token_logits(
    params: Any, hidden: Float[Array, "*tokens embed"], tokens: Int[ArrayLike, "*tokens"]
) -> Float32[Array, "*tokens"]:
    """Returns the float32 logit `[...]` of one token, int `[...]`, for each of the hidden states `[..., embed]`."""
    if "output" in params:
        kernel = jnp.moveaxis(jnp.take(params["output"]["kernel"], tokens, axis=1), 0, -1)
    else:
        kernel = jnp.take(params["embedding"], tokens, axis=0)
    return jnp.einsum("...D,...D->...", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def empty_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """Returns a cache of zeros for all layers: `[layers, batch, length, kv_heads, head_dim]`."""
    shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
