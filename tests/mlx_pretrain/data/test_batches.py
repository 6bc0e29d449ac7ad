"""Splitting packed rows into inputs, positions, segments and weights, against a plain loop."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.data.batches import decoder_batch

ROWS = st.lists(st.lists(st.sampled_from([0, 1, 1, 5, 6, 7, 8]), min_size=9, max_size=9), min_size=1, max_size=3)


@settings(max_examples=60)
@given(ROWS)
def test_equals_plain_loop(rows):
    batch = decoder_batch(jnp.asarray(rows, jnp.int32))
    for i, row in enumerate(rows):
        position = segment = 0
        for t, token in enumerate(row):
            starts = t == 0 or row[t - 1] == 1
            position = 0 if starts else position + 1
            segment += starts
            assert batch.inputs[i, t] == (3 if starts else row[t - 1])
            assert batch.positions[i, t] == position
            assert batch.segment_ids[i, t] == segment
            assert batch.weights[i, t] == float(token != 0)
    np.testing.assert_array_equal(batch.targets, rows)
