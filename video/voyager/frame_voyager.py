"""Frame-Voyager (arXiv 2410.03226): gives sets of frames a reward, so that good combinations have high rewards.

Three steps, of which the paper publishes the first and the head in words only; their shapes are our own:

1. The bottom layers of the Video-LLM's decoder read the question and each candidate frame, each frame by itself, right
   behind the question: what a frame says about the question does not depend on the number of candidates.
2. A few layers of our own let all frames see each other, earlier and later ones, and their times.
3. A head maps each frame to a reward r_i, and each pair of frames to an interaction p_ij, of low rank. The reward of a
   combination S is their sum

       R(S) = sum of r_i over S + sum of p_ij over the pairs i < j of S.

The paper's reward is the mean of r_i alone, which is that of rank 0: it cannot know that two frames show the same
moment, or that one is worth nothing without the other.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.config_checks import check_integers, check_nested
from mlx_pretrain.models.decoder import DecoderConfig, DecoderLayers
from mlx_pretrain.models.encoder import LayerNorm, gelu, vector
from mlx_pretrain.models.layers import matrix
from mlx_pretrain.models.tree_attention import TreeMask
from mlx_pretrain.models.vision import LayersConfig, layers
from video.llm.model import PROMPT, VideoLLMConfig, time_waves
from video.voyager.frame_features import pool_tokens

OBJECTIVES = ("pairs", "gaps", "list")


class FrameRewards(NamedTuple):
    """Rewards of the candidates of questions.

    Attributes:
      values: float32 `[batch, candidates]`, reward of each frame.
      pairs: float32 `[batch, candidates, candidates]`, interaction of two frames; symmetric, 0 on the diagonal.
    """

    values: Float32[Array, "batch candidates"]
    pairs: Float32[Array, "batch candidates candidates"]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class VoyagerConfig:
    """Shape of Frame-Voyager.

    Attributes:
      decoder: the Video-LLM's decoder, cut to the layers that are used, see `bottom_layers`.
      frame_tokens: tokens of a frame, averages of the Video-LLM's (`pool_tokens`), whose final states are averaged.
      head_dim: hidden units of the head.
      frame_layers: layers in which the frames see each other; 0: none.
      frame_heads: heads of such a layer.
      rank: number of dimensions in which frames attract each other, and of those in which they repel each other; 0: no
        interactions.
      hybrid: a frame's similarity to the question, by another model, is an input besides.
      prompt: {question} and {frames}; the frames come last, so that their states depend on the question.
    """

    decoder: DecoderConfig
    frame_tokens: int = 1
    head_dim: int = 128
    frame_layers: int = 2
    frame_heads: int = 4
    rank: int = 16
    hybrid: bool = False
    prompt: str = PROMPT

    def __post_init__(self):
        check_nested(self, "decoder", DecoderConfig)
        check_integers(self, "frame_tokens", "head_dim", "frame_heads")
        check_integers(self, "frame_layers", "rank", minimum=0)
        if self.decoder.embed_dim % self.frame_heads:
            raise InputError(f"VoyagerConfig.frame_heads = {self.frame_heads}: must divide the decoder's embed_dim = "
                             f"{self.decoder.embed_dim}")
        if not self.prompt.endswith("{frames}"):
            raise InputError(f"VoyagerConfig.prompt = {self.prompt!r}: must end with {{frames}}")

    @property
    def dtype(self) -> str:
        """Compute dtype."""
        return self.decoder.dtype

    @property
    def layers(self) -> LayersConfig:
        """Shape of the layers in which the frames see each other."""
        return LayersConfig(self.frame_layers, self.frame_heads, 4 * self.decoder.embed_dim, unroll=self.frame_layers)

    def init(self, key: jax.Array) -> Any:
        """Draws parameters in boxes that carry their logical axis names."""
        embed, one = self.decoder.embed_dim, jnp.ones((1, 1), jnp.int32)
        return FrameVoyager(self).init(key, jnp.zeros((1, 1, self.frame_tokens, embed)), jnp.zeros((1, 1, embed)),
                                       one[0], jnp.zeros((1, 1)), one, jnp.zeros((1, 1)))["params"]

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0))))


class FrameVoyager(nn.Module):
    """Maps a question and the features of candidate frames to rewards.

        decoder, decoder_params = bottom_layers(llm.config, llm.params, 2)
        config = VoyagerConfig(decoder)
        words, lengths = QuestionWords(config.prompt, llm.language_model, questions)[[0]]
        FrameVoyager(config).apply({"params": params}, features, words, lengths, times, segments)

    The embedding of the question's words is the Video-LLM's and no parameter of this module: in a model of 8 billion
    parameters it has half a billion, and questions show few of them.
    """

    config: VoyagerConfig

    @nn.compact
    def __call__(
        self,
        features: Float[ArrayLike, "batch candidates llm_tokens embed"],
        words: Float[ArrayLike, "batch words embed"],
        lengths: Int[ArrayLike, " batch"],
        times: Float[ArrayLike, "batch candidates"],
        segments: Int[ArrayLike, "batch candidates"],
        similarities: Float[ArrayLike, "batch candidates"] | None = None,
    ) -> FrameRewards:
        """Returns the rewards of all candidates.

        Args:
          features: `[batch, candidates, llm_tokens, embed]`, embeddings of each frame for the Video-LLM's decoder.
          words: `[batch, words, embed]`, embeddings of the prompt's words before the frames, padded at the end.
          lengths: int `[batch]`, numbers of these words.
          times: `[batch, candidates]`, seconds.
          segments: int `[batch, candidates]`; only candidates of the same number see each other.
          similarities: `[batch, candidates]`, cosines of frame and question; read by a hybrid alone.
        """
        config = self.config
        if features.shape[2] != config.frame_tokens:
            features = pool_tokens(features, config.frame_tokens)
        flat = jnp.asarray(features, config.dtype).reshape(len(features), -1, features.shape[-1])
        positions, tree_mask = _each_frame_alone(jnp.asarray(lengths), words.shape[1], *features.shape[1:3])
        hidden = DecoderLayers(config.decoder, name="decoder")(
            jnp.concatenate([jnp.asarray(words, config.dtype), flat], axis=1), positions, tree_mask)
        states = hidden[:, words.shape[1] :].reshape(features.shape).astype(jnp.float32).mean(axis=2)
        if config.hybrid:
            kernel = matrix(self, "similarity", (1, states.shape[-1]), (None, "norm"), 1)
            states += 10 * jnp.asarray(similarities, jnp.float32)[..., None] @ kernel  # cosines differ by about a tenth
        if config.frame_layers:
            waves, embed = time_waves(times), states.shape[-1]
            states += waves @ matrix(self, "time", (waves.shape[-1], embed), (None, "norm"), waves.shape[-1])
            states, _ = layers(config.layers, name="layers")(states.astype(config.dtype), segments)
            states = LayerNorm(1e-6, name="final_norm")(states.astype(jnp.float32))
        return _Head(config.head_dim, config.rank, name="head")(states)


def _each_frame_alone(
    lengths: Int[Array, " batch"], words: int, candidates: int, size: int
) -> tuple[Int[Array, "batch length"], TreeMask]:
    """Returns positions and a mask under which each frame reads the question and itself, right behind the question.

    A row is `words` words, of which the first `lengths` are the question, and candidates of `size` tokens.
    """
    index, lengths = jnp.arange(words + candidates * size, dtype=jnp.int32), lengths[:, None]
    behind = index - words
    positions = jnp.where(behind < 0, index, lengths + behind % size)
    ends = jnp.where(behind >= 0, words + (behind // size + 1) * size,
                     jnp.where(index < lengths, len(index), index + 1))  # padding is seen by nobody else
    return positions, TreeMask(ends, jnp.int32(0))


class _Head(nn.Module):
    """Maps states `[batch, candidates, embed]` to rewards, in float32."""

    hidden_dim: int
    rank: int

    @nn.compact
    def __call__(self, x: Float32[Array, "batch candidates embed"]) -> FrameRewards:
        embed, candidates = x.shape[-1], x.shape[1]
        first = matrix(self, "first", (embed, self.hidden_dim), ("norm", None), embed)
        bias = vector(self, "bias", (self.hidden_dim,), (None,))
        # Zeros, so that all frames start with the reward 0.
        second = vector(self, "second", (self.hidden_dim,), (None,))
        values = gelu(x @ first + bias) @ second + vector(self, "second_bias", (), ())
        if not self.rank:
            return FrameRewards(values, jnp.zeros((*values.shape, candidates), jnp.float32))
        # Small, so that interactions start near 0; at 0 their gradient would be 0 too.
        kernel = matrix(self, "pairs", (embed, 2 * self.rank), ("norm", None), embed, gain=0.3)
        attract, repel = jnp.split(x @ kernel, 2, axis=-1)
        pairs = jnp.einsum("bir,bjr->bij", attract, attract) - jnp.einsum("bir,bjr->bij", repel, repel)
        return FrameRewards(values, pairs / self.rank * (1 - jnp.eye(candidates)))


def rewards(config: VoyagerConfig, params: Any, *arguments: Any) -> FrameRewards:
    """Returns the rewards; arguments as in `FrameVoyager`."""
    return FrameVoyager(config).apply({"params": params}, *arguments)


def combination_rewards(
    frame_rewards: FrameRewards, combinations: Int[ArrayLike, "batch combinations num_frames"]
) -> Float32[Array, "batch combinations"]:
    """Returns R(S) of combinations, float32 `[batch, combinations]`.

    Args:
      frame_rewards: rewards of the candidates.
      combinations: int `[batch, combinations, num_frames]`, indices of candidates; a place that holds the number of
        candidates is empty.
    """
    chosen = jax.nn.one_hot(combinations, frame_rewards.values.shape[1], dtype=jnp.float32).sum(axis=2)
    of_pairs = jnp.einsum("bki,bij,bkj->bk", chosen, frame_rewards.pairs, chosen)
    return jnp.einsum("bki,bi->bk", chosen, frame_rewards.values) + of_pairs / 2


def ranking_loss(
    predicted: Float32[Array, "batch combinations"],
    losses: Float32[Array, "batch combinations"],
    sizes: Int[ArrayLike, "batch combinations"],
    objective: str = "pairs",
    temperature: float = 0.1,
) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"], Float32[Array, " batch"]]:
    """Compares rewards with losses, among the combinations of a question that have the same number of frames.

    Args:
      predicted: rewards of combinations `[batch, combinations]`.
      losses: the Video-LLM's losses `[batch, combinations]`, nats; pairs of equal losses are left out.
      sizes: int `[batch, combinations]`, number of frames.
      objective: "pairs": the mean of -log sigmoid(r_w - r_l) over pairs, w the one with the lower loss (the paper's);
        "gaps": the same mean, each pair weighted by the difference of its losses; "list": the cross-entropy of
        softmax(r) and softmax(-loss / temperature).
      temperature: of the list, nats.

    Returns:
      For every question, float32 `[batch]` each: the loss, the share of pairs in the right order, and 1 where it has
      pairs, else 0.
    """
    same = sizes[:, :, None] == sizes[:, None, :]
    better = ((losses[:, :, None] < losses[:, None, :]) & same).astype(jnp.float32)
    margin = predicted[:, :, None] - predicted[:, None, :]
    count = better.sum(axis=(1, 2))
    weighted = lambda x, w: (w * x).sum(axis=(1, 2)) / jnp.maximum(w.sum(axis=(1, 2)), 1e-9)  # noqa: E731
    right = weighted((margin > 0) + 0.5 * (margin == 0), better)
    if objective == "list":
        log_sum = lambda x: jax.nn.logsumexp(jnp.where(same, x[:, None, :], -jnp.inf), axis=-1)  # noqa: E731
        wanted = -losses / temperature
        share = jnp.exp(wanted - log_sum(wanted))  # sums to 1 over each size
        sums = same.astype(jnp.float32).sum(axis=-1)
        loss = (share * (log_sum(predicted) - predicted)).sum(axis=1) / (1 / sums).sum(axis=1)
    else:
        gaps = jnp.abs(losses[:, :, None] - losses[:, None, :])
        loss = weighted(-jax.nn.log_sigmoid(margin), better * gaps if objective == "gaps" else better)
    usable = (count > 0).astype(jnp.float32)
    return loss * usable, right, usable


def bottom_layers(config: VideoLLMConfig, params: Any, layers: int) -> tuple[DecoderConfig, Any]:
    """Cuts a Video-LLM's decoder to its first layers and the final norm.

    Returns:
      The cut decoder's configuration and the parameters of `DecoderLayers`.

    Raises:
      InputError: `layers` is less than 1, or more than the decoder has.
    """
    if not 1 <= layers <= config.decoder.n_layers:
        raise InputError(f"layers = {layers}: the Video-LLM's decoder has {config.decoder.n_layers}")
    decoder = dataclasses.replace(config.decoder, n_layers=layers, unroll=min(config.decoder.unroll, layers))
    parts = params["decoder"]
    return decoder, {"final_norm": parts["final_norm"], "layers": jax.tree.map(lambda x: x[:layers], parts["layers"])}
