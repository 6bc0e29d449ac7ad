"""Optimizers and learning-rate schedules from optax, with the choices a pretraining run needs."""

from collections.abc import Callable
from typing import Any

import gin
import jax
import optax

from mlx_pretrain.errors import InputError

Schedule = Callable[[Any], Any]


@gin.configurable
def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
    """Linear warm-up from 0 to `peak`, then a cosine down to `final_fraction * peak` at `total_steps`."""
    _check_steps("warmup_cosine", warmup_steps, 0, total_steps)
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    if warmup_steps == total_steps:  # optax refuses a cosine of no steps
        return warmup
    decay = optax.cosine_decay_schedule(peak, total_steps - warmup_steps, final_fraction)
    return optax.join_schedules([warmup, decay], [warmup_steps])


@gin.configurable("constant_schedule")  # gin has a "constant" of its own
def constant(value: float) -> Schedule:
    """The same learning rate at every step."""
    return optax.constant_schedule(value)


@gin.configurable
def warmup_stable_decay(
    peak: float, total_steps: int, warmup_steps: int, decay_steps: int, final_fraction: float = 0.0
) -> Schedule:
    """WSD (arXiv 2404.06395): linear warm-up, constant `peak`, linear decay over the last `decay_steps`."""
    _check_steps("warmup_stable_decay", warmup_steps, decay_steps, total_steps)
    phases = [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)]
    ends = [warmup_steps]
    if decay_steps:  # optax takes a decay of no steps for a rate that stays
        phases.append(optax.linear_schedule(peak, peak * final_fraction, decay_steps))
        ends.append(total_steps - decay_steps)
    return optax.join_schedules(phases, ends)


def _check_steps(name: str, warmup: int, decay: int, total: int) -> None:
    if warmup < 0 or decay < 0 or warmup + decay > total:
        raise InputError(f"{name}: {warmup} steps of warm-up and {decay} of decay do not fit {total} steps")


def decay_mask(params: Any) -> Any:
    """True for the parameters weight decay applies to: all but the scales of norms, biases and single vectors.

    By name: those of all layers are stacked, so that the rank does not tell a bias from a matrix.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        name = path[-1].key
        return leaf.ndim >= 2 and name != "scale" and name != "bias" and not name.endswith("_bias")

    return jax.tree_util.tree_map_with_path(decays, params)


@gin.configurable
def adamw(
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind clipping by the global norm; decay on matrices only."""
    update = optax.adamw(learning_rate, b1, b2, epsilon, weight_decay=weight_decay, mask=decay_mask)
    return _clipped(clip_norm, update)


@gin.configurable
def muon(
    learning_rate: Schedule,
    adam_fraction: float = 0.1,
    beta: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Muon (optax.contrib) for the layers' matrices, AdamW for embedding, output projection and norms.

    The update of an m x n matrix is scaled by sqrt(max(1, n / m)) (optax's default); AdamW's rate is `adam_fraction`
    times Muon's.
    """
    update = optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=decay_mask,
        adam_learning_rate=lambda step: adam_fraction * learning_rate(step),
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return _clipped(clip_norm, update)


# Input and output axes of the layers' weights; axis 0 is the layer.
_MUON_AXES = {
    "query": ((1,), (2, 3)),
    "key": ((1,), (2, 3)),
    "value": ((1,), (2, 3)),
    "qkv": ((1,), (3, 4)),
    "out": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


def _muon_dimensions(params: Any) -> Any:
    def dimensions(path, _):
        axes = _MUON_AXES.get(path[-1].key)
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _clipped(clip_norm: float | None, update: optax.GradientTransformation) -> optax.GradientTransformation:
    return update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
