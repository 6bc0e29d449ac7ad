"""Parameters that are read when they are indexed."""

import tracemalloc

import ml_dtypes
import numpy as np

from mlx_pretrain.convert.weights import StoredParameter


def test_layers_are_read_and_converted_one_by_one():
    """The peak is the parameter itself in the dtype it is wanted in, and the tensor of one layer."""
    read, layer = [], np.random.default_rng(0).normal(size=(256, 256)).astype(np.float16)

    def one(number):
        read.append(number)
        return layer * np.float16(number)

    parameter = StoredParameter(layer.shape, one, 32).astype(ml_dtypes.bfloat16)
    assert parameter.shape == (32, 256, 256) and not read
    tracemalloc.start()
    whole = parameter[...]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole.dtype == ml_dtypes.bfloat16 and whole.nbytes == 32 * 256 * 256 * 2
    assert peak < 1.2 * whole.nbytes
    expected = np.stack([layer * np.float16(number) for number in range(32)]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(whole, expected)
    read.clear()
    np.testing.assert_array_equal(parameter[3:5, :, 7:9], expected[3:5, :, 7:9])
    np.testing.assert_array_equal(parameter[30, 1:2], expected[30, 1:2])
    assert read == [3, 4, 30]


def test_a_parameter_of_no_layer():
    values = np.arange(12.0).reshape(3, 4)
    parameter = StoredParameter(values.shape, lambda number: values)
    assert parameter.shape == (3, 4)
    np.testing.assert_array_equal(parameter[...], values)
    np.testing.assert_array_equal(parameter[1:, 2], values[1:, 2])
    assert parameter[...].dtype == np.float32
