"""Sampling from a decoder with a key-value cache: prompts of unlike length in one batch of a fixed shape."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Cache, Decoder, DecoderConfig, empty_cache, logits
from mlx_pretrain.parallel import partitioning


def generate(
    config: DecoderConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    prefix_ids: Sequence[int] = (BOS_ID,),
    eos_ids: Sequence[int] = (EOS_ID,),
    suppressed_ids: Sequence[int] = (PAD_ID, UNK_ID, BOS_ID),
) -> list[list[int]]:
    """Continues prompts (token ids) until one of `eos_ids` or `max_new_tokens`.

    Example:
      new = generate(config, params, [[17, 42], [5]], max_new_tokens=20, temperature=0.8, top_p=0.95, seed=1)
      texts = [tokenizer.decode(ids) for ids in new]

    `LanguageModel.generate` does this for texts.

    Args:
      config, params: configuration and parameters of the decoder.
      prompts: token ids `[tokens]` each; may be empty lists, unless `prefix_ids` is empty as well.
      max_new_tokens: largest number of new tokens of a prompt.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: probability that the smallest set of tokens to sample from holds (arXiv 1904.09751).
      seed: seed of the sampling; each row of a batch has its own stream.
      vocab_size: size of the tokenizer's vocabulary; ids from there on, which pad the model's vocabulary, are never
        taken. None: the model's.
      prefix_ids: put before every prompt. These and the next two are by default those of our own tokenizers.
      eos_ids: ids that end a text; at least one.
      suppressed_ids: ids that are never taken.

    Returns:
      The new tokens of each prompt, without the id that ended it.

    Raises:
      InputError: a prompt and its continuation do not fit the model's positions, or a sampling parameter is off.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError(
            f"generate: temperature={temperature} must be >= 0, top_p={top_p} in (0, 1], "
            f"max_new_tokens={max_new_tokens} >= 1"
        )
    lengths = np.array([len(prefix_ids) + len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise InputError("generate: an empty prompt, and no prefix_ids to put before it")
    if (longest := int(lengths.max())) + max_new_tokens > config.max_length:
        raise InputError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_length} positions"
        )
    # Prompt widths are rounded up, so that prompts of similar length share a compiled program.
    width = min(-(-longest // 32) * 32, config.max_length)
    tokens = np.full((len(prompts), width), PAD_ID, np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prefix_ids) + len(prompt)] = [*prefix_ids, *prompt]
    suppressed = np.array([*suppressed_ids, *range(vocab_size or config.vocab_size, config.vocab_size)], np.int32)
    key = jax.random.key(seed)
    new = _generate(
        config, max_new_tokens, temperature == 0, params, tokens, lengths, temperature, top_p, suppressed, key
    )
    eos_ids = frozenset(eos_ids)
    return [list(itertools.takewhile(lambda token: token not in eos_ids, row)) for row in np.asarray(new).tolist()]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(config, max_new_tokens, greedy, params, tokens, lengths, temperature, top_p, suppressed, key):
    """Returns new tokens `[batch, max_new_tokens]`, including those that end a text and all after them."""
    batch, width = tokens.shape
    model = Decoder(config)
    rows = jnp.arange(batch)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

    def sample(hidden: jax.Array, step: jax.Array) -> jax.Array:
        scores = logits(params, hidden).at[:, suppressed].set(-jnp.inf)
        if greedy:
            return jnp.argmax(scores, axis=-1)
        scores = keep_top_p(scores / temperature, top_p)
        return jax.vmap(lambda k, s: jax.random.categorical(jax.random.fold_in(k, step), s))(keys, scores)

    # Padding behind a prompt writes keys that are overwritten before a later position may read them.
    cache = empty_cache(config, batch, min(width + max_new_tokens, config.max_length))
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    hidden, cache = model.apply({"params": params}, tokens, positions, cache=cache)
    first = sample(hidden[rows, lengths - 1], jnp.int32(0))

    def step(carry: tuple[Cache, jax.Array], index: jax.Array):
        cache, token = carry
        hidden, cache = model.apply(
            {"params": params}, token[:, None], (lengths + index)[:, None], cache=cache
        )
        following = sample(hidden[:, 0], index + 1)
        return (cache, following), following

    _, rest = jax.lax.scan(step, (cache, first), jnp.arange(max_new_tokens - 1, dtype=jnp.int32))
    new = jnp.concatenate([first[:, None], rest.T.astype(first.dtype)], axis=1)
    # A copy on every device, so that every process can read it.
    return partitioning.constrain_replicated(new)


def keep_top_p(scores: Float[Array, "batch vocab"], top_p: jax.Array | float) -> Float[Array, "batch vocab"]:
    """Sets all but the nucleus of scores `[batch, vocab]` to -inf; the most likely token is always kept."""
    ordered = jnp.sort(scores, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.min(jnp.where(more_likely < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= threshold, scores, -jnp.inf)
