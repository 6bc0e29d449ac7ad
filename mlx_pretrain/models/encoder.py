"""The BERT family's encoder (arXiv 1810.04805): MiniLM, XLM-R (arXiv 1911.02116), BGE-M3 (arXiv 2402.03216).

Learned absolute positions, bidirectional attention, normalisation after each residual sum, GELU with the exact erf.
"""

import dataclasses

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Int32

from mlx_pretrain.models.attention import check_attention, dot_product_attention
from mlx_pretrain.models.config_checks import check_choice, check_divides, check_integers
from mlx_pretrain.models.layers import matrix, vector
from mlx_pretrain.models.projections import lookup, project
from mlx_pretrain.parallel.partitioning import constrain

POOLINGS = ("first", "mean")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of an encoder.

    Attributes:
      vocab_size: rows of the embedding; pad it to a multiple of the tensor axis.
      embed_dim: width of the residual stream.
      n_layers: number of layers.
      n_heads: heads of a layer, of embed_dim / n_heads dimensions each.
      mlp_dim: width of the feed-forward part.
      max_length: longest sequence (positions).
      position_offset: row of the position table that a first token takes: 0 in BERT, pad_id + 1 in XLM-R.
      token_types: rows of the table of token types (BERT's sentence A, B); 0: no such table.
      norm_epsilon: summand inside the square root of LayerNorm.
      pad_id: token that fills rows up; only segment_ids distinguish padding from text.
      pooling: a row's vector is its "first" token's or the "mean" of its tokens'.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 always.
      remat: the backward pass computes each layer again instead of keeping its activations.
      unroll: layers per iteration of the scan over layers; n_layers unrolls all (same parameters).
      attention: name of an implementation in `models.attention.IMPLEMENTATIONS`; None: the platform's fastest.
    """

    vocab_size: int = gin.REQUIRED
    embed_dim: int = gin.REQUIRED
    n_layers: int = gin.REQUIRED
    n_heads: int = gin.REQUIRED
    mlp_dim: int = gin.REQUIRED
    max_length: int = gin.REQUIRED
    position_offset: int = 0
    token_types: int = 0
    norm_epsilon: float = 1e-5
    pad_id: int = 0
    pooling: str = "first"
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1
    attention: str | None = None

    def __post_init__(self):
        check_integers(self, "vocab_size", "embed_dim", "n_layers", "n_heads", "mlp_dim", "max_length", "unroll")
        check_integers(self, "position_offset", "token_types", "pad_id", minimum=0)
        check_divides(self, "n_heads", "embed_dim")
        check_choice(self, "pooling", POOLINGS)
        check_choice(self, "dtype", ("float32", "bfloat16"))
        check_attention(self, self.embed_dim // self.n_heads)

    def parameters(self) -> int:
        """Returns the number of parameters."""
        embed, mlp = self.embed_dim, self.mlp_dim
        layer = 4 * embed * (embed + 1) + 2 * embed * mlp + mlp + embed + 4 * embed
        rows = self.vocab_size + self.max_length + self.position_offset + self.token_types
        return self.n_layers * layer + rows * embed + 2 * embed

    def flops_per_token(self, length: int) -> float:
        """Returns the FLOPs of the forward pass for one token of a sequence of `length`.

        2 per weight in a matrix product plus 4 * layers * embed * length for attention's scores and values. Training
        takes three times as many.
        """
        layer = 4 * self.embed_dim**2 + 2 * self.embed_dim * self.mlp_dim
        return self.n_layers * (2.0 * layer + 4.0 * self.embed_dim * length)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) of a float32 `[..., features]`."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float32[Array, "*batch features"]) -> Float32[Array, "*batch features"]:
        scale = vector(self, "scale", (x.shape[-1],), ("norm",), nn.initializers.ones)
        bias = vector(self, "bias", (x.shape[-1],), ("norm",))
        x -= jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * scale + bias


def gelu(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Returns x times the normal distribution's cumulative function (arXiv 1606.08415), in the shape of x.

    `jax.nn.gelu`'s erfc is 3x slower.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class SelfAttention(nn.Module):
    """Multi-head attention of the first `queries` tokens to all tokens of their segment, with biases."""

    n_heads: int
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], segment_ids: Int[ArrayLike, "batch length"], queries: int
    ) -> Float[Array, "batch {queries} embed"]:
        """Returns `[batch, queries, embed]` for x `[batch, length, embed]`."""
        embed, n_heads = x.shape[-1], self.n_heads
        heads = (n_heads, embed // n_heads)
        weight = matrix(self, "qkv", (embed, 3, *heads), ("embed", None, "heads", "head_dim"), embed)
        bias = vector(self, "qkv_bias", (3, *heads), (None, "heads", "head_dim"))
        out = matrix(self, "out", (*heads, embed), ("heads", "head_dim", "embed"), embed)
        # Heads before positions from here on: XLA's CPU backend has to transpose the operands of other products.
        if queries == x.shape[1]:
            q, k, v = project("BTD,DCNH->CBNTH", x, weight) + bias[:, None, :, None].astype(x.dtype)
        else:
            q = project("BTD,DNH->BNTH", x[:, :queries], weight[:, 0]) + bias[0, :, None].astype(x.dtype)
            k, v = project("BTD,DCNH->CBNTH", x, weight[:, 1:]) + bias[1:, None, :, None].astype(x.dtype)
        q, k, v = (constrain(a, "batch", "act_heads", "length", None) for a in (q, k, v))
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        attended = dot_product_attention(
            q, k, v, segment_ids=segment_ids, causal=False, implementation=self.implementation
        )
        return project("BNTH,NHD->BTD", jnp.swapaxes(attended, 1, 2), out)


class Block(nn.Module):
    """One layer: `[batch, length, embed]` in, `[batch, queries, embed]` of the first `queries` tokens out."""

    config: EncoderConfig
    queries: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], segment_ids: Int[ArrayLike, "batch length"]
    ) -> Float[Array, "batch {self.queries} embed"]:
        config, dtype, embed = self.config, x.dtype, x.shape[-1]
        attended = SelfAttention(config.n_heads, config.attention, name="attention")(x, segment_ids, self.queries)
        x = self._add(x[:, : self.queries], attended, "attention")

        up = matrix(self, "up", (embed, config.mlp_dim), ("embed", "mlp"), embed)
        up_bias = vector(self, "up_bias", (config.mlp_dim,), ("mlp",))
        down = matrix(self, "down", (config.mlp_dim, embed), ("mlp", "embed"), config.mlp_dim)
        hidden = gelu(project("BTD,DF->BTF", x, up).astype(jnp.float32) + up_bias).astype(dtype)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return self._add(x, project("BTF,FD->BTD", hidden, down), "mlp")

    def _add(self, x: jax.Array, branch: jax.Array, name: str) -> jax.Array:
        """Returns the normalised sum of the residual stream, a branch's output and that output's bias."""
        bias = vector(self, f"{name}_bias", (x.shape[-1],), ("norm",))
        total = x.astype(jnp.float32) + branch.astype(jnp.float32) + bias
        x = LayerNorm(self.config.norm_epsilon, name=f"{name}_norm")(total).astype(x.dtype)
        return constrain(x, "batch", "length", "act_embed")


class Encoder(nn.Module):
    """Computes the final hidden states of tokens, or with `pooled` one vector a row.

    Example:
      config, params = load_encoder("minilm")                      # mlx_pretrain.convert.encoders
      tokens = jnp.array([[101, 7592, 102, 0]])                    # [CLS] hello [SEP], one padding token
      segment_ids = (tokens != config.pad_id).astype(jnp.int32)
      vectors = Encoder(config).apply({"params": params}, tokens, segment_ids, pooled=True)    # float32 [batch, embed]
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[ArrayLike, "batch length"],
        segment_ids: Int[ArrayLike, "batch length"],
        token_types: Int[ArrayLike, "batch length"] | None = None,
        pooled: bool = False,
    ) -> Float[Array, "batch length embed"] | Float32[Array, "batch embed"]:
        """Runs the encoder.

        Args:
          tokens: int `[batch, length]`.
          segment_ids: int `[batch, length]`; 0 is padding, tokens of another number are one document, side by side.
          token_types: int `[batch, length]`; None: all 0.
          pooled: return `pool` of the hidden states instead; for pooling "first" at less work, as the last layer
            then runs on the first tokens alone.

        Returns:
          `[batch, length, embed]`, or `[batch, embed]` float32 with `pooled`. Hidden states of padding are finite but
          meaningless.

        Raises:
          ValueError: the rows are longer than `max_length`.
        """
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(f"rows of {tokens.shape[1]} tokens are longer than max_length = {config.max_length}")
        x = Embeddings(config, name="embeddings")(tokens, segment_ids, token_types)

        def layer(x, params, queries=x.shape[1]):
            return Block(config, queries, parent=None).apply({"params": params}, x, segment_ids), None

        def init(key):
            keys = jax.random.split(key, config.n_layers)
            boxed = jax.vmap(lambda key: Block(config, 1, parent=None).init(key, x, segment_ids)["params"])(keys)
            return nn.meta.add_axis(boxed, 0, {nn.PARTITION_NAME: "layers"})

        # One stack of parameters, not nn.scan: the last layer may run on fewer tokens.
        params = self.param("layers", init)
        first_only = pooled and config.pooling == "first"

        def step(x, numbered):
            number, params = numbered
            if not first_only:
                return layer(x, params)
            # Left out, not cut off: a shorter stack would be copied.
            return jax.lax.cond(number < config.n_layers - 1, lambda x: layer(x, params)[0], lambda x: x, x), None

        body = jax.checkpoint(step, prevent_cse=False) if config.remat else step
        x, _ = jax.lax.scan(body, x, (jnp.arange(config.n_layers), params), unroll=config.unroll)
        if first_only:
            x, _ = layer(x, jax.tree.map(lambda p: p[-1], params), queries=1)
        return pool(config, x, segment_ids) if pooled else x


class Embeddings(nn.Module):
    """Computes the normalised sum of a token's, its position's and its type's vector, `[batch, length, embed]`."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[ArrayLike, "batch length"],
        segment_ids: Int[ArrayLike, "batch length"],
        token_types: Int[ArrayLike, "batch length"] | None,
    ) -> Float[Array, "batch length embed"]:
        config, embed = self.config, self.config.embed_dim
        rows = matrix(self, "token", (config.vocab_size, embed), ("vocab", "embed"), embed)
        position_rows = matrix(
            self, "position", (config.max_length + config.position_offset, embed), (None, "embed"), embed
        )
        x = lookup(rows, tokens, jnp.dtype(config.dtype)).astype(jnp.float32)
        x += jnp.take(constrain(position_rows, None, None), positions(segment_ids) + config.position_offset, axis=0)
        if config.token_types:
            types = matrix(self, "type", (config.token_types, embed), (None, "embed"), embed)
            x += types[0] if token_types is None else jnp.take(types, token_types, axis=0)
        x = LayerNorm(config.norm_epsilon, name="norm")(x).astype(config.dtype)
        return constrain(x, "batch", "length", "act_embed")


def positions(segment_ids: Int[ArrayLike, "batch length"]) -> Int32[Array, "batch length"]:
    """Returns the position of each token within its run of one segment id, from 0: int32 `[batch, length]`."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def pool(
    config: EncoderConfig, hidden: Float[ArrayLike, "batch columns embed"], segment_ids: Int[ArrayLike, "batch length"]
) -> Float32[ArrayLike, "batch embed"]:
    """Returns one float32 vector `[batch, embed]` of each row's hidden states `[batch, columns, embed]`.

    A row is one document. Its columns are its `length` tokens; for pooling "first" the first of them, where the
    document begins, is enough. "mean" takes the mean of the row's tokens without padding, zeros for a row without any.
    """
    if config.pooling == "first":
        return hidden[:, 0].astype(jnp.float32)
    weights = (segment_ids > 0).astype(jnp.float32)
    total = jnp.einsum("BTD,BT->BD", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
