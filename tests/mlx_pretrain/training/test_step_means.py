"""A line of metrics.jsonl is the mean over all rows of its steps, not that of a step, nor a mean of means."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.training.step_means import StepMeans
from mlx_pretrain.training.train_state import TrainState
from mlx_pretrain.training.train_step import LossParts, make_train_step

ROWS = 4


def loss(params, batch):
    """Squared errors of the rows that count, and of those of the second type alone."""
    error = jnp.square(params - batch["target"])
    counted, second = batch["counted"], batch["counted"] * batch["second"]
    total = (counted * error).sum()
    return total, LossParts(counted.sum(), {"loss": (total, counted.sum()),
                                            "second_loss": ((second * error).sum(), second.sum())})


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "microbatches"])
def step(request):
    return jax.jit(make_train_step(loss, optax.sgd(0.1), lambda count: 0.1 * count, microbatches=request.param))


def state():
    params = jnp.float32(0.5)
    return TrainState(step=jnp.int32(0), skipped=jnp.int32(0), params=params, opt_state=optax.sgd(0.1).init(params))


@given(st.lists(st.tuples(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=ROWS, max_size=ROWS),
                          st.booleans()), min_size=1, max_size=5), st.integers(0, 99))
def test_the_mean_is_that_over_all_rows_of_finite_steps(step, steps, seed):
    rng, train, means = np.random.default_rng(seed), state(), StepMeans()
    errors, counted_rows, second_rows, norms = [], [], [], []
    for rows, broken in steps:
        counted, second = np.array(rows, np.float32).T
        target = rng.normal(size=ROWS).astype(np.float32)
        broken &= bool(counted.any())
        if broken:
            target[np.argmax(counted)] = np.nan
        params = float(train.params)
        if not broken:
            errors += np.square(params - target).tolist()
            counted_rows += counted.tolist()
            second_rows += (counted * second).tolist()
            norms.append(abs((2 * (params - target) * counted).sum()) / max(counted.sum(), 1))
        train, metrics = step(train, {"target": target, "counted": counted, "second": second})
        means.add(metrics)
    line = means.take()

    def mean(weights):
        return np.dot(errors, weights) / np.sum(weights) if np.sum(weights) else np.nan

    expected = {"loss": mean(counted_rows), "second_loss": mean(second_rows),
                "grad_norm": np.mean(norms) if norms else np.nan,
                "learning_rate": 0.1 * (len(steps) - 1 - sum(skipped(steps)[:-1])), "skipped": sum(skipped(steps))}
    assert line == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


def skipped(steps):
    return [broken and any(counted for counted, _ in rows) for rows, broken in steps]


def test_a_line_begins_after_the_last(step):
    means, rows = StepMeans(), {"counted": np.ones(ROWS, np.float32), "second": np.zeros(ROWS, np.float32)}
    for target in (1.5, 2.5):
        means.add(step(state(), rows | {"target": np.full(ROWS, target, np.float32)})[1])
        assert means.take()["loss"] == pytest.approx((target - 0.5) ** 2)
