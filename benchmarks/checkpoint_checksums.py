"""Measures what checksums cost: saves and restores of one state with and without them, in turn.

    python benchmarks/checkpoint_checksums.py [--megabytes 500] [--rounds 3] [--folder DIR]

Without means: no checksums of arrays, no digests of files, nothing compared. `blocks` is the time that training stands
still, `save` the time until the checkpoint is complete.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp

from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.checksums import _compiled, checksums
from mlx_pretrain.training.train_state import TrainState


@contextlib.contextmanager
def without():
    with contextlib.ExitStack() as stack:
        for name, nothing in (("checksums", lambda tree: {}), ("write_digests", lambda *_: None),
                              ("changed_files", lambda *_: None), ("changed_arrays", lambda *_: None)):
            stack.enter_context(mock.patch.object(checkpoints, name, nothing))
        yield


def make_state(megabytes: int) -> TrainState:
    """Parameters and two moments, 24 arrays of one size."""
    keys = jax.random.split(jax.random.key(0), 24)
    rows = megabytes * 1_000_000 // (24 * 4 * 1024)
    arrays = [jax.random.normal(key, (rows, 1024)) for key in keys]
    scalar = jnp.int32(1)
    return TrainState(scalar, scalar, arrays[:8], {"mu": arrays[8:16], "nu": arrays[16:]})


def measure(folder: pathlib.Path, state: TrainState) -> dict[str, float]:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    saver, times, start = checkpoints.Checkpoints(folder), {}, time.perf_counter()
    saver.save(1, state, checkpoints.DataState(0, {}), {})
    times["blocks"] = time.perf_counter() - start
    saver.wait()
    times["save"] = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(saver.restore(abstract))
    times["restore"] = time.perf_counter() - start
    saver.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's for temporary files")
    args = parser.parse_args()
    state = make_state(args.megabytes)
    leaves = jax.tree.leaves(state)
    n_bytes = sum(x.nbytes for x in leaves)
    checksums(state)  # compiled once in a run
    start = time.perf_counter()
    checksums(state)
    seconds = time.perf_counter() - start
    temporary = _compiled(None).lower(leaves).compile().memory_analysis().temp_size_in_bytes
    print(f"{n_bytes / 1e6:.0f} MB: checksums of the arrays take {1000 * seconds:.0f} ms "
          f"({n_bytes / seconds / 1e9:.1f} GB/s) and {temporary / 1e6:.3f} MB of temporaries")
    rounds = {True: [], False: []}
    for number in range(args.rounds + 1):
        for checked in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder, \
                    contextlib.nullcontext() if checked else without():
                times = measure(pathlib.Path(folder), state)
            if number:  # the first warms up
                rounds[checked].append(times)
                print(f"round {number} {'with' if checked else 'without':7}", *(
                    f"{name} {value:.2f} s" for name, value in times.items()))
    for name in ("blocks", "save", "restore"):
        differences = [a[name] - b[name] for a, b in zip(rounds[True], rounds[False], strict=True)]
        print(f"{name}: with minus without {statistics.mean(differences):+.2f} s "
              f"({', '.join(f'{x:+.2f}' for x in differences)}), "
              f"without {statistics.mean(times[name] for times in rounds[False]):.2f} s")


if __name__ == "__main__":
    main()
