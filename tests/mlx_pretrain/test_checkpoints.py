"""Checkpoints: the restore is tested, not only the save."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mlx_pretrain import checkpoints, optimizers, partitioning
from mlx_pretrain.checkpoints import Checkpoints, Progress
from mlx_pretrain.errors import InputError
from mlx_pretrain.train_state import abstract_params, abstract_state, initial_state

OPTIMIZER = optimizers.adamw(optimizers.constant(1e-3))


def mesh_of(*shape):
    return partitioning.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


@pytest.fixture(scope="module")
def state(tiny_config):
    mesh = mesh_of(2, 2, 2)
    with partitioning.use(mesh):
        return initial_state(tiny_config, OPTIMIZER, 3, abstract_state(tiny_config, OPTIMIZER, mesh))


def save_steps(run_dir, state, losses: dict[int, float | None], **options):
    saver = Checkpoints(run_dir, **options)
    for step, loss in losses.items():
        metrics = {} if loss is None else {"eval/loss": loss}
        saver.save(step, state, Progress(step * 16, {"aa": step}), metrics)
    saver.wait()
    return saver


def test_restores_bitwise_on_another_mesh(tmp_path, tiny_config, state):
    """maxtext#1760; progress comes back with it."""
    save_steps(tmp_path, state, {4: 1.0}).close()
    for shape in ((1, 1, 1), (1, 8, 1), (4, 1, 2)):
        saver = Checkpoints(tmp_path)
        abstract = abstract_state(tiny_config, OPTIMIZER, mesh_of(*shape))
        restored, progress = saver.restore(abstract)
        saver.close()
        assert progress == Progress(64, {"aa": 4})
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        gate = restored.params["layers"]["mlp"]["gate"]
        assert gate.sharding == abstract.params["layers"]["mlp"]["gate"].sharding


def test_keeps_the_latest_and_the_best(tmp_path, state):
    saver = save_steps(tmp_path, state, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.6}, keep=2, keep_best=1)
    assert saver.steps() == [2, 5, 6]
    saver.close()


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoint_is_passed_over(tmp_path, tiny_config, state, caplog):
    save_steps(tmp_path, state, {1: 1.0, 2: 1.0}).close()
    for file in pathlib.Path(tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:50])
    saver = Checkpoints(tmp_path)
    abstract = abstract_state(tiny_config, OPTIMIZER, mesh_of(1, 1, 1))
    restored, progress = saver.restore(abstract)
    assert progress.sequences == 16
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert "checkpoint 2 cannot be restored" in caplog.text
    saver.save(2, state, Progress(32, {}), {})  # the step is free again
    saver.wait()
    assert saver.steps() == [1, 2] and (tmp_path / "damaged_checkpoints" / "2").exists()
    assert saver.restore(abstract)[1].sequences == 32
    with pytest.raises(InputError, match="XX"):
        other = optimizers.adamw(optimizers.constant(1.0), clip_norm=None)
        wider = dataclasses.replace(tiny_config, mlp_dim=64)
        saver.restore(abstract_state(wider, other, mesh_of(1, 1, 1)))
    saver.close()


def test_parameters_alone(tmp_path, tiny_config, state):
    save_steps(tmp_path, state, {1: 1.0, 2: 1.0}).close()
    abstract = abstract_params(tiny_config, mesh_of(1, 1, 1))
    params, step = checkpoints.restore_params(tmp_path, abstract)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    with pytest.raises(InputError, match=r"no checkpoint 7; there is \[1, 2\]"):
        checkpoints.restore_params(tmp_path, abstract, 7)
    with pytest.raises(InputError, match="no checkpoints"):
        checkpoints.restore_params(tmp_path / "elsewhere", abstract)


def test_another_model_or_vocabulary_is_refused(tmp_path, tiny_config):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"one")
    run = tmp_path / "run"
    checkpoints.save_model(run, tiny_config, tokenizer)
    assert checkpoints.load_model(run) == tiny_config
    checkpoints.save_model(run, dataclasses.replace(tiny_config, remat="full", dtype="bfloat16"), tokenizer)
    with pytest.raises(InputError, match=r"mlp_dim=48, the configuration 64"):
        checkpoints.save_model(run, dataclasses.replace(tiny_config, mlp_dim=64), tokenizer)
    tokenizer.write_bytes(b"two")
    with pytest.raises(InputError, match="another vocabulary"):
        checkpoints.save_model(run, tiny_config, tokenizer)
