"""safetensors files: the library reads what is written, the same tensors are read, and malformed files are named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mlx_pretrain.convert.safetensors_files import read_header, write_file
from mlx_pretrain.errors import InputError

SHAPES = {"b": (5, 3), "a": (7,), "ü/long": (2, 3, 4)}


def tensors(dtype):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_the_library_and_the_reader_give_what_was_written(tmp_path, dtype):
    expected, path = tensors(dtype), tmp_path / "a.safetensors"
    write_file(path, SHAPES, dtype, expected.__getitem__)
    for read in (safetensors.numpy.load_file(path), {name: t.view() for name, t in read_header(path).items()}):
        assert set(read) == set(expected)
        for name, array in expected.items():
            assert read[name].dtype == dtype and np.array_equal(read[name], array)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers needs it
    safetensors.numpy.save_file(expected, tmp_path / "library.safetensors")
    for name, tensor in read_header(tmp_path / "library.safetensors").items():
        assert np.array_equal(tensor.view(), expected[name])


def test_large_tensors_are_converted_in_blocks(tmp_path, monkeypatch):
    """Transposed, and a number of rows that the blocks do not divide."""
    monkeypatch.setattr("mlx_pretrain.convert.safetensors_files._BLOCK", 1000)
    x = np.random.default_rng(1).normal(size=(33, 101)).astype(np.float32)
    write_file(tmp_path / "a.safetensors", {"x": (101, 33)}, ml_dtypes.bfloat16, lambda _: x.T)
    [read] = safetensors.numpy.load_file(tmp_path / "a.safetensors").values()
    np.testing.assert_array_equal(read, x.T.astype(ml_dtypes.bfloat16))


def test_views_leave_the_file_alone(tmp_path):
    write_file(tmp_path / "a.safetensors", SHAPES, np.float32, tensors(np.float32).__getitem__)
    view = read_header(tmp_path / "a.safetensors")["a"].view()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def file_of(header, data=b"\0" * 16, length=None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = json.dumps({"a": entry()})[:-1].encode() + b', "a": ' + json.dumps(entry()).encode() + b"}"


@pytest.mark.parametrize("content, message", [
    (b"", "its header is cut off"),
    (b"\x10\0\0", "its header is cut off"),
    (file_of({"a": entry()}, length=1 << 40), "its header is cut off"),
    (file_of({"a": entry()}, length=0), "its header is cut off"),
    (file_of(b"\xff\xfe"), "can't decode"),
    (file_of(b"[1, 2]"), "its header is no JSON object"),
    (file_of(b"[" * 100_000), "recursion"),
    (file_of(TWICE), "its header has a twice"),
    (file_of({"a": {"dtype": "F32"}}), "its header does not describe a"),
    (file_of({"a": entry(shape=(-4,))}), "its header does not describe a"),
    (file_of({"a": entry(shape=(4.0,))}), "its header does not describe a"),
    (file_of({"a": entry(8, 0)}), "its header does not describe a"),
    (file_of({"a": entry(shape=(5,))}), r"a has 16 bytes, F32\[5\] needs another number"),
    (file_of({"a": entry(0, 8, (2,))}), "bytes, its header describes"),
    (file_of({"a": entry(0, 1 << 50, (1 << 48,))}), "bytes, its header describes"),
    (file_of({"a": entry()}, data=b"\0" * 12), "bytes, its header describes"),
    (file_of({"a": entry(), "b": entry(8, 16, (2,))}), "overlap or leave a gap"),
    (file_of({"a": entry(8, 16, (2,))}), "overlap or leave a gap"),
])
def test_malformed_files_are_named(tmp_path, content, message):
    """The library refuses each of them too, but for a name that occurs twice."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.safetensors: not a safetensors file \(.*({message})"):
        read_header(path)
    if content != file_of(TWICE):
        with pytest.raises((safetensors.SafetensorError, OSError, ValueError)):
            safetensors.numpy.load_file(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors: no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match=r"cannot be read|not a safetensors"):
        read_header(tmp_path)
