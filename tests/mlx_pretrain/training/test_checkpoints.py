"""Checkpoints: the restore is tested, not only the save."""

import dataclasses
import errno
import gc
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints, checksums, optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.train_state import TrainState, abstract_params, abstract_state, initial_state
from tests.conftest import QUICK_COMPILES
from tests.mlx_pretrain.training import checkpoint_job

# A restore that fails leaves reads under way in Orbax; they complain when they end, to whichever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")

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
        saver.save(step, state, DataState(step * 16, {"aa": step}), metrics)
    saver.wait()
    return saver


def test_restores_bitwise_on_another_mesh(tmp_path, tiny_config, state):
    """Tests what failed in maxtext#1760; the data's state comes back too."""
    save_steps(tmp_path, state, {4: 1.0}).close()
    for shape in ((1, 1, 1), (1, 8, 1), (4, 1, 2)):
        saver = Checkpoints(tmp_path)
        abstract = abstract_state(tiny_config, OPTIMIZER, mesh_of(*shape))
        restored, progress = saver.restore(abstract)
        saver.close()
        assert progress == DataState(64, {"aa": 4})
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        gate = restored.params["layers"]["mlp"]["gate"]
        assert gate.sharding == abstract.params["layers"]["mlp"]["gate"].sharding


def test_keeps_the_latest_and_the_best(tmp_path, state):
    saver = save_steps(tmp_path, state, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.6}, keep=2, keep_best=1)
    assert saver.steps() == [2, 5, 6]
    saver.close()


def test_the_best_is_known_after_a_restart(tmp_path, state):
    save_steps(tmp_path, state, {1: float("nan"), 2: 1.0, 3: 2.0}, keep=2).close()
    saver = save_steps(tmp_path, state, {4: None, 5: 2.5, 6: 2.6}, keep=2)
    assert saver.steps() == [2, 5, 6]
    saver.close()


@pytest.fixture
def small_state() -> TrainState:
    rng = np.random.default_rng(0)
    params = {"layers": rng.normal(size=(4, 8, 16)).astype(np.float32), "head": np.ones(8, np.float32)}
    scalar = lambda value: jax.numpy.int32(value)  # noqa: E731
    return TrainState(scalar(1), scalar(0), jax.device_put(params), {"mu": jax.device_put(params), "count": scalar(1)})


def layout(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_any_changed_byte_is_noticed(tmp_path, small_state, caplog):
    """Changes 100 bytes, each in a random file at a random place, so that small files are chosen as often."""
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()
    rng, whole = np.random.default_rng(0), tmp_path / "whole"
    (tmp_path / "checkpoints" / "2").rename(whole)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    assert len(files) > 10
    for _ in range(100):
        shutil.copytree(whole, step_dir := tmp_path / "checkpoints" / "2")
        name = files[rng.integers(len(files))].relative_to(whole)
        content = bytearray((step_dir / name).read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (step_dir / name).write_bytes(content)
        caplog.clear()
        saver = Checkpoints(tmp_path)
        restored, progress = saver.restore(layout(small_state))
        saver.close()
        named = "" if name.name == checksums.DIGESTS else name  # which may name another file now
        assert progress.sequences == 16 and f"checkpoint 2 cannot be restored, it is damaged: {named}" in caplog.text
        assert not step_dir.exists()
    jax.tree.map(np.testing.assert_array_equal, restored, small_state)


def test_arrays_are_compared_too(tmp_path, small_state, caplog):
    """A whole file of other arrays, as a fault in memory would write: Orbax reads it, and the digests agree."""
    other = small_state.replace(params=jax.tree.map(lambda x: x.at[..., 3].add(1e-7), small_state.params))
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()
    save_steps(tmp_path / "other", other, {2: 1.0}).close()
    step_dir = tmp_path / "checkpoints" / "2"
    shutil.rmtree(step_dir / "state")
    shutil.copytree(tmp_path / "other/checkpoints/2/state", step_dir / "state")
    (step_dir / "files.json").unlink()
    checksums.write_digests(epath.Path(step_dir))
    with pytest.raises(InputError, match=r"2: damaged: 2 of 2 arrays are not those that were saved.* params/head"):
        checkpoints.restore_params(tmp_path, layout(small_state.params))
    saver = Checkpoints(tmp_path)
    assert saver.restore(layout(small_state))[1].sequences == 16
    saver.close()
    assert "2 of 7 arrays are not those that were saved, the first is params/head" in caplog.text


def truncate(step_dir: pathlib.Path) -> None:
    for file in (step_dir / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:50])


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoint_is_passed_over(tmp_path, tiny_config, state, caplog):
    save_steps(tmp_path, state, {1: 1.0, 2: 1.0}).close()
    truncate(tmp_path / "checkpoints" / "2")
    saver = Checkpoints(tmp_path)
    abstract = abstract_state(tiny_config, OPTIMIZER, mesh_of(1, 1, 1))
    restored, progress = saver.restore(abstract)
    assert progress.sequences == 16
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert "checkpoint 2 cannot be restored" in caplog.text
    saver.save(2, state, DataState(32, {}), {})  # the step is free again
    saver.wait()
    assert saver.steps() == [1, 2] and (tmp_path / "damaged_checkpoints" / "2").exists()
    assert saver.restore(abstract)[1].sequences == 32
    for step in ("1", "2"):
        truncate(tmp_path / "checkpoints" / step)
    with pytest.raises(InputError, match=r"none of the checkpoints \[1, 2\] can be read"):
        saver.restore(abstract)
    assert saver.steps() == [1, 2]  # nothing is moved
    saver.close()


@pytest.mark.parametrize("damage", ["truncated", "missing", "unreadable metadata"])
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_older_versions(tmp_path, small_state, caplog, damage):
    """Checkpoints without digests and checksums are restored with a warning, or skipped if Orbax cannot read them."""
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "files.json").unlink()
        meta = tmp_path / "checkpoints" / step / "meta" / "metadata"
        meta.write_text(json.dumps({"sequences": int(step), "tokens": {}}))
    saver = Checkpoints(tmp_path)
    restored, progress = saver.restore(layout(small_state))
    assert progress == DataState(2, {}) and "checkpoint 2 has no checksums" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, restored, small_state)
    state_dir = tmp_path / "checkpoints" / "2" / "state"
    if damage == "truncated":
        truncate(state_dir.parent)
    elif damage == "missing":
        (state_dir / "manifest.ocdbt").unlink()
    else:
        (state_dir / "_METADATA").write_text("{")
    assert saver.restore(layout(small_state))[1].sequences == 1
    assert (tmp_path / "damaged_checkpoints" / "2").exists()
    saver.close()
    gc.collect()  # of coroutines that Orbax leaves behind; they complain, which no other test should hear


def caused(error: Exception) -> Exception:
    """Raises an error of TensorStore as Orbax does."""
    outer = Exception("Encountered error while reading array index: (). See full TensorStore details")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("error", [
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError("barrier"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes."),
    caused(ValueError('UNAVAILABLE: Error opening "zarr" driver: HTTP response code: 503')),
    caused(ValueError("DEADLINE_EXCEEDED: Error reading \"params/0.0\"")),
    caused(ValueError("UNKNOWN: Error decoding the reply of local file: Input/output error [os_error_code='5']")),
    TypeError("a bug"),
], ids=lambda error: type(error).__name__ if isinstance(error, Exception) else None)
@pytest.mark.filterwarnings("ignore")
def test_other_errors_move_nothing(tmp_path, small_state, monkeypatch, error, old):
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()
    if old:
        (tmp_path / "checkpoints/2/files.json").unlink()

    def fail(*args, **kwargs):
        raise error

    saver = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(type(error)) as raised:
            saver.restore(layout(small_state))
        assert raised.value is error
        with pytest.raises(type(error)):
            checkpoints.restore_params(tmp_path, layout(small_state.params))
    assert saver.steps() == [1, 2] and not (tmp_path / "damaged_checkpoints").exists()
    assert saver.restore(layout(small_state))[1].sequences == 32
    saver.close()


def test_files_that_were_compared_are_not_damaged(tmp_path, small_state, monkeypatch):
    """A restore of undamaged files that fails has another cause, whatever its error message."""
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()

    def fail(*args, **kwargs):
        raise ValueError("DATA_LOSS: by a faulty driver, say")

    saver = Checkpoints(tmp_path)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(ValueError, match="DATA_LOSS"):
        saver.restore(layout(small_state))
    assert saver.steps() == [1, 2]
    saver.close()


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_be_read_is_no_damage(tmp_path, small_state):
    """A real error of the operating system, out of TensorStore: links that go in a circle."""
    save_steps(tmp_path, small_state, {1: 1.0, 2: 1.0}).close()
    (tmp_path / "checkpoints/2/files.json").unlink()
    for file in (tmp_path / "checkpoints/2/state/d").iterdir():
        file.unlink()
        file.symlink_to(file)
    saver = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="Too many levels of symbolic links"):
        saver.restore(layout(small_state))
    assert saver.steps() == [1, 2]
    saver.close()
    gc.collect()  # of coroutines that Orbax leaves behind; they complain, which no other test should hear


def test_another_model_or_optimizer_is_no_damage(tmp_path, tiny_config, state):
    save_steps(tmp_path, state, {1: 1.0}).close()
    saver, mesh = Checkpoints(tmp_path), mesh_of(1, 1, 1)
    wider = dataclasses.replace(tiny_config, mlp_dim=64)
    with pytest.raises(InputError, match=r"1: this checkpoint has float32\[2, 48, 32\] opt_state/.*mlp/down, the "
                                         r"configuration float32\[2, 64, 32\]"):
        saver.restore(abstract_state(wider, OPTIMIZER, mesh))
    with pytest.raises(InputError, match=r"this checkpoint has float32.* params/layers/mlp/down, the configuration"):
        checkpoints.restore_params(tmp_path, abstract_params(wider, mesh))
    muon = optimizers.muon(optimizers.constant(1e-3))
    with pytest.raises(InputError, match=r"this checkpoint has .* opt_state/.*, the configuration no;"):
        saver.restore(abstract_state(tiny_config, muon, mesh))
    abstract = abstract_state(tiny_config, OPTIMIZER, mesh)
    halved = jax.tree.map(lambda x: x.update(dtype=jax.numpy.bfloat16) if x.ndim else x, abstract.opt_state)
    with pytest.raises(InputError, match=r"has float32\[.*\] opt_state/.*, the configuration bfloat16\["):
        saver.restore(abstract.replace(opt_state=halved))
    assert saver.steps() == [1] and saver.restore(abstract)
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


@dataclasses.dataclass(frozen=True)
class Nested:
    """A model that contains a decoder, as those of `video` do."""

    decoder: DecoderConfig
    frames: int = 4

    def __post_init__(self):
        if isinstance(self.decoder, dict):
            object.__setattr__(self, "decoder", DecoderConfig(**self.decoder))


@pytest.mark.parametrize("nested", [False, True])
def test_fields_come_and_go(tmp_path, tiny_config, monkeypatch, nested):
    """Older runs have the default of a new field; a removed field must have had the value that all models have."""
    (tokenizer := tmp_path / "tokenizer.model").write_bytes(b"one")
    config, run = Nested(tiny_config) if nested else tiny_config, tmp_path / "run"
    checkpoints.save_model(run, config, tokenizer)
    description = json.loads((run / "model.json").read_text())
    decoder = description["model"]["decoder"] if nested else description["model"]
    for name in ("tie_embeddings", "rope_theta", "attention"):
        del decoder[name]
    decoder["biases"] = False
    (run / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"malformed: .* unexpected keyword argument 'biases'"):
        checkpoints.load_model(run, type(config))
    monkeypatch.setattr(checkpoints, "RETIRED_FIELDS", {"biases": True})
    with pytest.raises(InputError, match="unexpected keyword argument 'biases'"):
        checkpoints.save_model(run, config, tokenizer)
    monkeypatch.setattr(checkpoints, "RETIRED_FIELDS", {"biases": False})
    assert checkpoints.load_model(run, type(config)) == config
    checkpoints.save_model(run, config, tokenizer)
    changed = dataclasses.replace(tiny_config, rope_theta=1e6)
    with pytest.raises(InputError, match=r"rope_theta=10000\.0, the configuration 1000000\.0"):
        checkpoints.save_model(run, Nested(changed) if nested else changed, tokenizer)


def test_two_processes_save_restore_and_notice_together(tmp_path):
    """Restores 1 -> 2 and 2 -> 1 processes bit for bit; both skip what either finds damaged, and one moves it."""
    saver = Checkpoints(tmp_path / "single")
    single = checkpoint_job.state(3, jax.devices()[:4])
    saver.save(3, single, DataState(48, {"aa": 3}), {})
    saver.close()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3]), "JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": QUICK_COMPILES}
    job = [subprocess.Popen(
        [sys.executable, "-m", checkpoint_job.__name__, str(port), str(process), str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for process in range(2)]
    try:
        ended = [process.communicate(timeout=120) for process in job]
    finally:
        for process in job:
            process.kill()
    for (out, err), process in zip(ended, job):
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [["0", [1, 2]], ["1", [1, 2]]]
    for step in (2, 3):
        assert f"checkpoint {step} cannot be restored, it is damaged: state/" in ended[0][1]
        assert (tmp_path / f"job/damaged_checkpoints/{step}").exists()
    assert "cannot be restored" not in ended[1][1]
    saver = Checkpoints(tmp_path / "job")
    expected = checkpoint_job.state(2, jax.devices()[:1])
    restored, progress = saver.restore(checkpoint_job.layout(expected))
    saver.close()
    checkpoint_job.assert_same(restored, expected)
    assert progress == DataState(32, {"aa": 2})
