"""The compiled steps: one training step with gradient accumulation, one evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlx_pretrain import losses, partitioning
from mlx_pretrain.data.batches import DecoderBatch, decoder_batch
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, output_kernel
from mlx_pretrain.train_state import TrainState

Metrics = dict[str, jax.Array]


def _hidden(config: DecoderConfig, params: Any, tokens: jax.Array) -> tuple[jax.Array, DecoderBatch]:
    """Final hidden states `[batch, length, embed]` of packed sequences `[batch, length]`, and how they were split."""
    batch = decoder_batch(tokens)
    hidden, _ = Decoder(config).apply({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
    return hidden, batch


def batch_loss(
    config: DecoderConfig, params: Any, tokens: jax.Array, z_coefficient: float, chunk_tokens: int
) -> tuple[jax.Array, losses.LossSums]:
    """Summed loss of packed sequences `[batch, length]`: (scalar to differentiate, its parts)."""
    hidden, batch = _hidden(config, params, tokens)
    return losses.cross_entropy(
        hidden,
        output_kernel(params),
        batch.targets,
        batch.weights,
        z_coefficient=z_coefficient,
        chunk_tokens=chunk_tokens,
    )


def make_train_step(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    microbatches: int = 1,
    z_coefficient: float = 0.0,
    chunk_tokens: int = 1024,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """Builds `step(state, tokens [batch, length]) -> (state, metrics)`, to be jitted with the state donated.

    Gradients are summed over `microbatches` slices of the batch and divided by the total loss weight once, so the
    result is that of the whole batch however unevenly padding falls. A non-finite loss or gradient leaves parameters
    and optimizer as they were and counts in `state.skipped`; metrics carry `finite`.
    """

    def gradients(params: Any, tokens: jax.Array) -> tuple[losses.LossSums, Any]:
        loss = lambda p, t: batch_loss(config, p, t, z_coefficient, chunk_tokens)  # noqa: E731
        gradient = jax.grad(loss, has_aux=True)
        if microbatches == 1:
            grads, sums = gradient(params, tokens)
            return sums, grads

        def add(carry, slice_tokens):
            grads, sums = gradient(params, partitioning.constrain(slice_tokens, "batch", "length"))
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        # Every device keeps its own rows: consecutive microbatches take every k-th row.
        slices = tokens.reshape(-1, microbatches, tokens.shape[1]).swapaxes(0, 1)
        zero = jnp.zeros((), jnp.float32)
        start = (losses.LossSums(zero, zero, zero), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, start, slices)[0]

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        sums, grads = gradients(state.params, tokens)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1.0), grads)
        grad_norm = optax.tree.norm(grads)
        metrics = losses.mean_loss(sums)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        def apply(operands):
            params, opt_state = operands
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.lax.cond(finite, apply, lambda operands: operands, (state.params, state.opt_state))
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            params=params,
            opt_state=opt_state,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "finite": finite,
            "skipped": new.skipped,
        }
        return new, metrics

    return step


def make_eval_step(
    config: DecoderConfig, n_sources: int, chunk_tokens: int = 1024
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds `step(params, tokens [batch, length], source [batch]) -> (nll, tokens)`, float32 `[n_sources]` sums."""

    def step(params: Any, tokens: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, batch = _hidden(config, params, tokens)
        nll = losses.token_nll(hidden, output_kernel(params), batch.targets, chunk_tokens) * batch.weights
        by_source = jax.nn.one_hot(source, n_sources, dtype=jnp.float32)
        return nll.sum(axis=1) @ by_source, batch.weights.sum(axis=1) @ by_source

    return step
