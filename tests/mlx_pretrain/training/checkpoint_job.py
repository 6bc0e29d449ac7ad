"""One of two processes of a job that saves and restores checkpoints, for test_checkpoints.py:

    python -m tests.mlx_pretrain.training.checkpoint_job PORT PROCESS FOLDER

FOLDER/single holds a checkpoint of one process, FOLDER/job gets those of this job. The arrays are those of `state`.
"""

import json
import logging
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.checkpoints import Checkpoints, DataState, restore_params
from mlx_pretrain.training.train_state import TrainState

SPECS = {"divided": ("x", None), "across": (None, "x"), "whole": ()}


def state(step: int, devices: list[jax.Device]) -> TrainState:
    """Returns arrays that follow from `step`, spread over all devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))

    def put(x: np.ndarray, *spec: str | None) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: x[i])

    rng = np.random.default_rng(step)
    params = {name: put(rng.normal(size=(8, 64)).astype(np.float32), *spec) for name, spec in SPECS.items()}
    scalar = put(np.array(step, np.int32))
    return TrainState(scalar, scalar, params, {"mu": params["divided"], "count": scalar})


def layout(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(found: Any, expected: Any) -> None:
    """Compares two states bit for bit, on the devices of this process."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(x.data), np.asarray(y.data))


def flip_a_bit(step_dir: pathlib.Path) -> None:
    file = max((step_dir / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def main(port: str, process: str, folder: pathlib.Path) -> None:
    logging.basicConfig(level=logging.WARNING)
    cluster.join(cluster.Place(f"localhost:{port}", 2, int(process)), timeout=60)
    states = {step: state(step, jax.devices()) for step in (1, 2, 3)}
    single = Checkpoints(folder / "single")
    restored, progress = single.restore(layout(states[3]))
    single.close()
    assert_same(restored, states[3])
    assert progress == DataState(48, {"aa": 3})
    params, step = restore_params(folder / "single", layout(states[3].params))
    assert_same(params, states[3].params)
    assert step == 3

    saver = Checkpoints(folder / "job")
    for step in (1, 2, 3):
        saver.save(step, states[step], DataState(16 * step, {"aa": step}), {"eval/loss": 1.0 / step})
    saver.wait()
    for step in (2, 3):
        cluster.on_main(lambda step=step: flip_a_bit(folder / f"job/checkpoints/{step}"))
    restored, progress = saver.restore(layout(states[1]))
    assert_same(restored, states[1])
    assert progress == DataState(16, {"aa": 1}) and saver.steps() == [1]
    saver.save(2, states[2], DataState(32, {"aa": 2}), {})  # again, where the damaged one was
    saver.close()
    print(json.dumps(cluster.gather([process, saver.steps()])), flush=True)
    cluster.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
