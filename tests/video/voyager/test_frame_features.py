"""What Frame-Voyager reads of frames: averages over parts of them, and their store."""

import json

import ml_dtypes
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from video.voyager.frame_features import FeatureStore, open_feature_writer, pool_tokens


@pytest.mark.parametrize("side, parts", [(2, 1), (14, 2), (5, 2), (3, 3)])
def test_pooling_averages_equal_parts_of_a_frame(side, parts):
    features = np.random.default_rng(0).normal(size=(2, side * side, 3)).astype(np.float32)
    grid = features.reshape(2, side, side, 3)
    spans = [(part * side // parts, -(-(part + 1) * side // parts)) for part in range(parts)]
    expected = np.stack([grid[:, a:b, c:d].mean(axis=(1, 2)) for a, b in spans for c, d in spans], axis=1)
    np.testing.assert_allclose(pool_tokens(features, parts * parts), expected, atol=1e-6)


def test_any_number_of_tokens_has_a_mean():
    features = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    np.testing.assert_allclose(pool_tokens(features, 1), [[[5, 6]]])
    np.testing.assert_array_equal(pool_tokens(features, 6), features)


@pytest.mark.parametrize("tokens", [0, 2, 9, -1])
def test_parts_that_do_not_exist_are_refused(tokens):
    with pytest.raises(InputError, match=f"{tokens} features of a frame of 4 tokens"):
        pool_tokens(np.zeros((1, 4, 3)), tokens)


def test_store_keeps_bfloat16_and_reads_the_rows_asked_for(tmp_path):
    features = np.random.default_rng(0).normal(size=(3, 5, 2, 8)).astype(np.float32)
    writer = open_feature_writer(tmp_path, {"model": "a"}, 3, (5, 2, 8))
    for number, video in enumerate(("x.mp4", "y.mp4", "z.mp4")):
        writer.add(video, {"features": features[number].astype(ml_dtypes.bfloat16), "times": np.arange(5.0) + number},
                   duration=10.5 + number)
    writer.complete()
    store = FeatureStore(tmp_path)
    rows = [store.row[video] for video in ("z.mp4", "x.mp4", "z.mp4")]
    read = store.features_of(np.array(rows))
    assert store.shape == (5, 2, 8) and read.dtype == np.float32
    np.testing.assert_array_equal(read, features[rows].astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(store.times[1], np.arange(5.0) + 1)
    np.testing.assert_array_equal(store.durations, [10.5, 11.5, 12.5])
    files = [path for path in (tmp_path / "features" / "c").rglob("*") if path.is_file()]
    assert len(files) == 3 and max(path.stat().st_size for path in files) < 5 * 2 * 8 * 2 + 32  # noise hardly shrinks


def test_features_of_an_earlier_version_are_refused(tmp_path):
    open_feature_writer(tmp_path, {}, 1, (2, 1, 4)).complete()
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["feature_tokens"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="earlier version"):
        FeatureStore(tmp_path)
