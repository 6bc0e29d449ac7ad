"""Checksums of arrays and of files: against another implementation, on any sharding, and that they notice."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from mlx_pretrain.training.checksums import (
    DIGESTS,
    RunningChecksum,
    _compiled,
    changed_arrays,
    changed_files,
    checksums,
    write_digests,
)


def reference(array: np.ndarray) -> str:
    """Computes the definition in `checksums.checksums` with Python's integers, one word at a time."""
    raw = np.ascontiguousarray(array)
    words = raw.view(f"<u{min(raw.itemsize, 4)}").ravel().tolist()
    mask, first_sum, second_sum = 2**32 - 1, 0, 0
    for index, word in enumerate(words):
        x = word ^ (index * 0x9E3779B1 & mask)
        x = (x ^ x >> 16) * 0x85EBCA6B & mask
        x = (x ^ x >> 13) * 0xC2B2AE35 & mask
        x ^= x >> 16
        first_sum += x
        x = (x ^ x >> 15) * 0x2C1B3C6D & mask
        second_sum += x ^ x >> 12
    return f"{first_sum & mask:08x}{second_sum & mask:08x}"


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(8, 6, 16)).astype(np.float32)
    normal[0, 0, :4] = np.nan, np.inf, -0.0, 1e-45
    return {"float32": normal, "bfloat16": jnp.asarray(normal, jnp.bfloat16), "bool": normal > 0,
            "int8": rng.integers(-128, 128, (8, 8), np.int8), "count": np.int32(7),
            "empty": np.zeros((0, 4), np.float32),
            "list": [np.arange(24, dtype=np.uint32).reshape(4, 6), np.float16(0.1)]}


def test_is_as_defined(tree):
    sums = checksums(tree | {"key": jax.random.key(3)})
    expected = jax.tree.map(reference, jax.tree.map(np.asarray, tree))
    assert sums.pop("key") == reference(np.asarray(jax.random.key_data(jax.random.key(3))))
    assert sums == {**{name: x for name, x in expected.items() if name != "list"},
                     "list/0": expected["list"][0], "list/1": expected["list"][1]}


@pytest.mark.parametrize("shape, dtype", [
    ((8, 6, 16), np.float32), ((50, 3), np.float16), ((9,), np.int64), ((7, 2), np.float64)])
def test_rows_may_come_in_parts_and_in_any_order(shape, dtype, monkeypatch):
    monkeypatch.setattr("mlx_pretrain.training.checksums._BLOCK", 64)  # a part is copied in several blocks
    x = (100 * np.random.default_rng(4).normal(size=shape)).astype(dtype)
    with jax.enable_x64(True):
        running = RunningChecksum()
        for begin in reversed(range(0, len(x), 4)):
            running.add(x[begin : begin + 4], begin)
    assert running.digits() == reference(x)


@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", None, "a"), (("a", "b"),)])
def test_does_not_depend_on_the_sharding(tree, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = tree["float32"]
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    scalar = jax.device_put(tree["count"], NamedSharding(mesh, PartitionSpec()))
    assert checksums({"x": divided, "count": scalar}) == {"x": reference(x), "count": reference(tree["count"])}


def test_notices_every_bit_and_every_exchange():
    x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    halves = lambda x: (reference(x)[:8], reference(x)[8:])  # noqa: E731
    for element in range(x.size):
        for bit in range(32):
            changed = x.copy()
            changed.view(np.uint32).flat[element] ^= np.uint32(1 << bit)
            assert all(a != b for a, b in zip(halves(changed), halves(x)))  # each of the two sums alone
    signs = x * np.where(np.arange(5) < 2, -1, 1).astype(np.float32)
    swapped = x[[1, 0, 2, 3]]
    assert len({checksums({"x": y})["x"] for y in (x, signs, swapped, x.reshape(5, 4).T.copy())}) == 4
    message = changed_arrays({"x": reference(x), "y": "0"}, checksums({"x": swapped}))
    assert message == "1 of 1 arrays are not those that were saved, the first is x"
    assert changed_arrays({"x": reference(x), "y": "0"}, checksums({"x": x})) is None
    assert changed_arrays({}, checksums({"x": x}))


def test_arrays_of_more_elements_than_words():
    """Strides beyond 2^32 are taken modulo 2^32; only the shapes are traced."""
    shape = jax.ShapeDtypeStruct((2, 1 << 17, 1 << 17), jnp.float32)
    assert jax.eval_shape(_compiled(None), [shape]).shape == (1, 2)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, size in (("a", 5), ("b/c", 3000), ("b/d/e", 0), ("b/d/f", 100)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(np.random.default_rng(size).bytes(size))
    write_digests(epath.Path(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name, content, message", [
    ("a", b"12345", "a does not hold the bytes that were written"),
    ("b/c", b"", "b/c has 0 bytes, 3000 were written"),
    ("b/d/f", None, "b/d/f is missing"),
    (DIGESTS, b'{"a":[5,', f"{DIGESTS} is malformed"),
    (DIGESTS, b'{"a":[1e999,2]}', f"{DIGESTS} is malformed"),
    (DIGESTS, b"[1]", f"{DIGESTS} is malformed"),
    (DIGESTS, b'{"a/b":[5,2]}', "a/b is missing"),
])
def test_changed_files_are_named(folder, name, content, message):
    assert changed_files(epath.Path(folder)) is None
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert changed_files(epath.Path(folder)).startswith(message)


def test_shards_share_the_files_and_large_ones_can_be_left_out(folder):
    path = epath.Path(folder)
    (folder / "b/c").write_bytes(b"x" * 3000)
    assert [changed_files(path, None, shard, 3) is None for shard in range(3)] == [True, False, True]
    assert changed_files(path, 2999) is None and changed_files(path, 3000)
    write_digests(path, 2999)  # without the large one's
    (folder / "b/c").write_bytes(b"y" * 3000)
    assert changed_files(path) is None
    (folder / "b/c").write_bytes(b"y" * 2999)
    assert "b/c has 2999 bytes" in changed_files(path)
    (folder / DIGESTS).unlink()
    assert changed_files(path) is None
