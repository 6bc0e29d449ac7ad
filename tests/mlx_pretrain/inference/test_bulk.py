"""Bulk inference: every sequence once, at its own place, with few programs and little padding."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.bulk import BulkInference, default_buckets, pack
from mlx_pretrain.parallel.partitioning import make_mesh

LENGTHS = np.load(pathlib.Path(__file__).parent / "bench_lengths.npy")
BUCKETS = [8, 16, 24]


def score(params, tokens, segment_ids):
    """Two numbers per row that depend only on the order of its tokens: `[batch, 2]`."""
    own = (segment_ids != 0).astype(jnp.float32)
    x = params["embedding"][tokens] * own[..., None]
    weights = jnp.cos(jnp.arange(tokens.shape[1], dtype=jnp.float32))
    return jnp.stack([jnp.einsum("btd,t->b", jnp.tanh(x), weights), x.sum((1, 2)) / own.sum(1)], axis=1)


def reference(params, sequence):
    """The same for one sequence, with numpy in float64."""
    x = np.asarray(params["embedding"], np.float64)[sequence]
    return [(np.tanh(x).sum(1) * np.cos(np.arange(len(x)))).sum(), x.sum() / len(x)]


@pytest.fixture(scope="module")
def params():
    return {"embedding": jax.random.normal(jax.random.key(0), (50, 4))}


def make_bulk(params, devices=1, tokens=96, function=score, **more):
    mesh = make_mesh(devices=jax.devices()[:devices])
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    return BulkInference(function, params, mesh, BUCKETS, tokens, **more)


def make_windows(seed, sizes):
    rng = np.random.default_rng(seed)
    return [(key, [rng.integers(1, 50, rng.integers(1, 25)).astype(np.int32) for _ in range(size)])
            for key, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 9))
def test_every_sequence_is_packed_once_into_a_bucket_that_holds_it(lengths, rows):
    rows = {16: rows * 3, 24: rows * 2, 40: rows}
    batches = pack(lengths, rows)
    assert sorted(np.concatenate([batch.rows for batch in batches], dtype=int) if batches else []) == list(
        range(len(lengths)))
    for batch in batches:
        assert max(lengths[row] for row in batch.rows) <= batch.length
        assert 0 < len(batch.rows) <= rows[batch.length]


def fewest_batches(lengths, rows):
    """By trying every way to put the sequences into batches."""
    best = len(lengths)
    for assignment in itertools.product(range(len(lengths)), repeat=len(lengths)):
        groups = [[lengths[i] for i, g in enumerate(assignment) if g == group] for group in set(assignment)]
        if all(len(group) <= rows[min(b for b in rows if b >= max(group))] for group in groups):
            best = min(best, len(groups))
    return best


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_no_other_way_takes_fewer_batches(lengths):
    rows = {1: 4, 2: 2, 4: 1}
    assert len(pack(lengths, rows)) == fewest_batches(lengths, rows)


def test_default_buckets_end_at_the_longest_and_waste_at_most_an_eighth():
    for longest in (1, 31, 512, 514, 8192):
        buckets = default_buckets(longest)
        assert buckets[-1] == longest and buckets == sorted(set(buckets))
        steps = np.diff([0, *buckets])
        assert all(step <= max(32, bucket / 8) for step, bucket in zip(steps, buckets))
    assert len(default_buckets(512)) == 16 and len(default_buckets(8192)) == 48


def test_little_of_what_is_computed_is_padding():
    """Defaults of the bulk scorer on 4096 documents of 16 to 512 tokens."""
    rows = {length: 8192 // length for length in default_buckets(512)}
    computed = total = 0
    start = 0
    while start < len(LENGTHS):  # windows of 64 batches
        stop = start + np.searchsorted(np.cumsum(LENGTHS[start:]), 64 * 8192) + 1
        batches = pack(LENGTHS[start:stop], rows)
        computed += sum(rows[batch.length] * batch.length for batch in batches)
        total += LENGTHS[start:stop].sum()
        start = stop
    assert total == LENGTHS.sum() and total / computed >= 0.93


@pytest.mark.parametrize("devices", [1, 8])
def test_outputs_come_back_in_order_and_are_those_of_each_sequence_alone(params, devices):
    bulk = make_bulk(params, devices, tokens=256)
    windows = make_windows(1, [0, 45, 1, 0, 0, 80])
    finished = list(bulk(iter(windows)))
    assert [key for key, _ in finished] == [key for key, _ in windows]
    for (_, sequences), (_, outputs) in zip(windows, finished):
        assert outputs.shape == (len(sequences), 2)
        for sequence, output in zip(sequences, outputs):
            np.testing.assert_allclose(output, reference(params, sequence), rtol=1e-4, atol=1e-5)
    assert bulk.sequences == 126
    assert bulk.tokens == sum(len(sequence) for _, sequences in windows for sequence in sequences)
    assert 0.5 < bulk.padding_efficiency <= 1 and bulk.busy_seconds > 0


def test_one_program_per_bucket_and_none_after_the_warm_up(params):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None)
    bulk = make_bulk(params)
    list(bulk(make_windows(0, [3])))  # whatever else JAX compiles on the way
    warm = make_bulk(params)
    compiled.clear()
    warm.warm_up()
    assert len(compiled) == warm.compilations == len(BUCKETS)
    list(warm(make_windows(2, [50, 7, 33, 1])))
    assert len(compiled) == warm.compilations == len(BUCKETS)


def test_rows_are_spread_over_the_devices(params):
    shardings = []

    def watched(params, tokens, segment_ids):
        jax.debug.inspect_array_sharding(tokens, callback=shardings.append)
        return score(params, tokens, segment_ids)

    bulk = make_bulk(params, devices=8, tokens=100, function=watched)
    assert all(rows % 8 == 0 for rows in bulk.rows.values())
    list(bulk(make_windows(3, [20])))
    assert shardings
    assert all(len(sharding.device_set) == 8 and not sharding.is_fully_replicated for sharding in shardings)


def test_a_window_gives_the_same_bits_whatever_ran_before(params):
    (_, sequences), *others = make_windows(4, [40, 11, 64])
    alone = next(iter(make_bulk(params)([("x", sequences)])))[1]
    among = dict(make_bulk(params)([*others, ("x", sequences), *others]))["x"]
    assert alone.tobytes() == among.tobytes()


def test_the_host_does_not_wait_for_a_result_before_it_hands_out_the_next_batch(params):
    def slow(params, tokens, segment_ids):
        # On a CPU, JAX runs programs without matrix products synchronously.
        x = jax.lax.fori_loop(0, 300, lambda i, x: jnp.tanh(x @ x), jnp.ones((256, 256)) * params["embedding"][0, 0])
        return score(params, tokens, segment_ids) + x[0, 0]

    arrived = []
    bulk = make_bulk(params, tokens=BUCKETS[-1], function=slow, in_flight=3)
    bulk.warm_up()

    def feed():
        for window in make_windows(5, [1] * 6):
            arrived.append(bulk.sequences)
            yield window

    assert len(list(bulk(feed()))) == 6
    # Three are on the devices and a fourth is ready before the first result must be there; never more than that.
    assert arrived[:4] == [0] * 4 and arrived[5] >= 1


@pytest.mark.parametrize("more", [{"tokens": 0}, {"in_flight": 0}])
def test_sizes_that_make_no_sense_are_refused(params, more):
    with pytest.raises(InputError, match="all must be positive"):
        make_bulk(params, **more)


def test_a_sequence_beyond_the_largest_bucket_is_an_error(params):
    with pytest.raises(ValueError, match="a sequence of 25 tokens, the largest bucket holds 24"):
        list(make_bulk(params)([("x", [np.ones(25, np.int32)])]))
