"""The compiled steps: a training step with gradient accumulation for any model, the decoder's loss and evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlx_pretrain.data.batches import DecoderBatch, decoder_batch
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, output_kernel
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import losses
from mlx_pretrain.training.train_state import TrainState

Metrics = dict[str, Any]


class LossParts(NamedTuple):
    """Results of a loss beside the sum to differentiate; those of microbatches are added up.

    Attributes:
      weight: float32 scalar that the sum, and so the gradient, is divided by.
      means: name -> (sum, weight), float32 scalars to log as sum / weight. One of them is "loss".
    """

    weight: jax.Array
    means: dict[str, tuple[jax.Array, jax.Array]]


Loss = Callable[[Any, Any], tuple[jax.Array, LossParts]]


def _hidden(config: DecoderConfig, params: Any, tokens: jax.Array) -> tuple[jax.Array, DecoderBatch]:
    """Returns the final hidden states `[batch, length, embed]` of packed sequences `[batch, length]`, and their split
    into inputs and targets."""
    batch = decoder_batch(tokens)
    hidden, _ = Decoder(config).apply({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
    return hidden, batch


def make_decoder_loss(config: DecoderConfig, *, z_coefficient: float = 0.0, chunk_tokens: int | None = None) -> Loss:
    """Builds `loss(params, tokens [batch, length])`, the cross entropy of packed sequences in nats plus the z-loss."""

    def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, LossParts]:
        hidden, batch = _hidden(config, params, tokens)
        total, sums = losses.cross_entropy(
            hidden,
            output_kernel(params),
            batch.targets,
            batch.weights,
            z_coefficient=z_coefficient,
            chunk_tokens=chunk_tokens,
        )
        means = {"loss": (sums.nll, sums.weight), "z_loss": (sums.z_loss, sums.weight)}
        return total, LossParts(sums.weight, means)

    return loss


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    microbatches: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    A batch is an array or a tree of them, each `[batch, ...]`. Gradients are summed over `microbatches` slices of the
    batch and divided once by the total weight of the loss, so the result is that of the whole batch, however unevenly
    its padding is spread. A non-finite loss or gradient leaves parameters and optimizer as they were and counts in
    `state.skipped`.

    Metrics are float32 scalars by name, `finite` (bool), `skipped` (int32), and `weights`: name of a metric -> weight
    of this step in its mean over several steps, see `StepMeans`.
    """
    gradient = jax.grad(loss, has_aux=True)

    def gradients(params: Any, batch: Any) -> tuple[LossParts, Any]:
        if microbatches == 1:
            grads, parts = gradient(params, batch)
            return parts, grads

        # A microbatch takes every k-th row, so that every device keeps its own rows.
        slices = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(carry, part):
            pinned = jax.tree.map(lambda x: partitioning.constrain(x, "batch", *(None,) * (x.ndim - 1)), part)
            grads, parts = gradient(params, pinned)
            return jax.tree.map(jnp.add, carry, (parts, grads)), None

        _, parts = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], slices))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, start, slices)[0]

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        parts, grads = gradients(state.params, batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(parts.weight, 1.0), grads)
        grad_norm = optax.tree.norm(grads)
        metrics = {name: total / jnp.where(weight > 0, weight, 1.0) for name, (total, weight) in parts.means.items()}
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
            "weights": {name: weight for name, (_, weight) in parts.means.items()} | {"grad_norm": jnp.float32(1)},
        }
        return new, metrics

    return step


def make_eval_step(
    config: DecoderConfig, n_languages: int, chunk_tokens: int | None = None
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds `step(params, tokens [batch, length], language_id [batch]) -> (nll, tokens)`.

    Both results are sums by language, float32 `[n_languages]`.
    """

    def step(params: Any, tokens: jax.Array, language_id: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, batch = _hidden(config, params, tokens)
        nll = losses.token_nll(hidden, output_kernel(params), batch.targets, chunk_tokens) * batch.weights
        # A product with one-hot rows would round the sums to bfloat16 on TPUs.
        by_language = lambda sums: jax.ops.segment_sum(sums, language_id, n_languages)  # noqa: E731
        return by_language(nll.sum(axis=1)), by_language(batch.weights.sum(axis=1))

    return step
