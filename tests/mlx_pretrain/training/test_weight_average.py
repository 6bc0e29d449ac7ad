"""The moving average of the weights: its formula, its place in the state, a run that keeps it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.train import TrainConfig, train
from mlx_pretrain.training import optimizers, trainer
from mlx_pretrain.training.checkpoints import restore_params
from mlx_pretrain.training.heldout_evaluator import HeldOutEvaluator
from mlx_pretrain.training.metric_writer import read_metrics
from mlx_pretrain.training.train_state import abstract_params, abstract_state, initial_state
from mlx_pretrain.training.weight_average import WeightAverage


def test_formula():
    decay, params = 0.7, {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    optimizer = WeightAverage(decay).added_to(optax.sgd(0.5))
    state = optimizer.init(params)
    expected = {name: np.asarray(x, np.float64) for name, x in params.items()}
    rng = np.random.default_rng(0)
    for t in range(1, 40):
        gradients = {"a": jnp.asarray(rng.normal(size=2), jnp.float32), "b": jnp.float32(rng.normal())}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        d = min(decay, t / (t + 9))
        expected = {name: d * expected[name] + (1 - d) * np.asarray(params[name], np.float64) for name in params}
    for name in params:
        np.testing.assert_allclose(state.average[name], expected[name], rtol=1e-5)
    assert int(state.updates) == 39


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.muon])
def test_the_average_is_laid_out_as_the_parameters(tiny_config, optimizer):
    mesh = partitioning.make_mesh(1, 4, 2)
    plain = optimizer(optimizers.constant(1e-3))
    state = abstract_state(tiny_config, WeightAverage().added_to(plain), mesh)
    assert state.opt_state.average == state.params
    assert state.opt_state.optimizer == abstract_state(tiny_config, plain, mesh).opt_state


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match=r"WeightAverage.decay = 1.0"):
        WeightAverage(1.0)
    with pytest.raises(InputError, match="no evaluator 'tasks'"):
        WeightAverage(evaluate=["tasks"]).evaluators([])


def config(tiny_config, store_dir, run_dir, **settings) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir), model=tiny_config, token_store=store_dir, rates=f"{store_dir}/rates.json", batch_size=8,
        learning_rate=optimizers.constant(1e-2), eval_batch_size=8, compilation_cache=None, **settings,
    )  # fmt: skip


def test_a_run_keeps_evaluates_and_restores_the_average(tiny_config, store_dir, tmp_path):
    average = WeightAverage(0.9)
    train(config(tiny_config, store_dir, tmp_path / "whole", steps=4, average=average))
    for steps in (2, 4):
        train(config(tiny_config, store_dir, tmp_path / "restarted", steps=steps, average=average))
    train(config(tiny_config, store_dir, tmp_path / "plain", steps=4))
    mesh = partitioning.make_mesh()
    weights = {}
    for run in ("whole", "restarted"):
        for name in ("last", "ema"):
            weights[run, name], step = restore_params(tmp_path / run, abstract_params(tiny_config, mesh), weights=name)
            assert step == 4
    for name in ("last", "ema"):
        jax.tree.map(np.testing.assert_array_equal, weights["whole", name], weights["restarted", name])
    plain, _ = restore_params(tmp_path / "plain", abstract_params(tiny_config, mesh))
    jax.tree.map(np.testing.assert_array_equal, weights["whole", "last"], plain)

    [line] = [line for line in read_metrics(tmp_path / "whole") if (line["step"], line["kind"]) == (4, "eval_ema")]
    with partitioning.use(mesh):
        metrics = HeldOutEvaluator(TokenStore(store_dir), tiny_config, mesh, batch_size=8)(weights["whole", "ema"])
    assert {name: line[name] for name in metrics} == metrics
    with pytest.raises(InputError, match="plain/checkpoints/4: holds no average of the weights"):
        restore_params(tmp_path / "plain", abstract_params(tiny_config, mesh), weights="ema")
    with pytest.raises(InputError, match="weights = 'mean': must be 'last' or 'ema'"):
        restore_params(tmp_path / "plain", abstract_params(tiny_config, mesh), weights="mean")


def test_the_average_starts_from_initial_weights(tiny_config, store_dir, tmp_path, monkeypatch):
    """The optimizer state of the initial weights takes the memory of that of the random ones."""
    random_states = []
    monkeypatch.setattr(trainer, "initial_state", lambda *args: random_states.append(initial_state(*args))
                        or random_states[-1])
    source = config(tiny_config, store_dir, tmp_path / "source", steps=1)
    train(source)
    start = dataclasses.replace(source, run_dir=str(tmp_path / "run"), init_from=source.run_dir,
                                average=WeightAverage(), learning_rate=optimizers.constant(0.0))
    train(start)
    assert all(x.is_deleted() for x in jax.tree.leaves(random_states[-1].opt_state))
    mesh = partitioning.make_mesh()
    last, average = (restore_params(start.run_dir, abstract_params(tiny_config, mesh), weights=name)[0]
                     for name in ("last", "ema"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, last)
