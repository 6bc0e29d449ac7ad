"""The estimated similarity against counted sets, and the shared buckets against the law of the bands."""

import numpy as np
import pytest

from raters.filtering import minhash

BANDS, ROWS = 14, 8


def pairs(shared: int, alone: int, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Returns texts that share so many words and have as many alone: sets of 1-grams of similarity
    shared / (shared + 2 alone)."""
    words = np.random.default_rng(seed).permuted(np.tile(np.arange(10**4), (count, 1)), axis=1)[:, : shared + 2 * alone]
    texts = [[f"w{word}" for word in row] for row in words.tolist()]
    return ([" ".join(row[: shared + alone]) for row in texts],
            [" ".join(row[:shared] + row[shared + alone :]) for row in texts])


@pytest.mark.parametrize(("shared", "alone"), [(6, 1), (40, 2), (60, 10), (60, 30), (300, 50)])
def test_estimates_are_as_good_as_permutations_and_buckets_follow_the_bands(shared, alone):
    count = 400
    sketcher = minhash.Sketcher(1, BANDS, ROWS, seed=1)
    first, second = (sketcher.sketch(texts) for texts in pairs(shared, alone, count, seed=shared))
    true = shared / (shared + 2 * alone)
    error = minhash.similarity(first.values, second.values) - true
    standard = np.sqrt(true * (1 - true) / (BANDS * ROWS))  # of as many permutations
    assert abs(error.mean()) < 4 * standard / np.sqrt(count)
    assert np.sqrt((error**2).mean()) < standard
    share = (first.keys == second.keys).any(axis=0).mean()
    expected = 1 - (1 - true**ROWS) ** BANDS
    assert share == pytest.approx(expected, abs=0.08)


def test_sketches_do_not_depend_on_the_batch_but_on_the_seed():
    texts = ["", "...", "one", "one two three four five", "One, two three: four FIVE!", "six " * 300,
             " ".join(str(i) for i in range(2000))]
    sketcher = minhash.Sketcher(5, BANDS, ROWS, seed=1)
    together = sketcher.sketch(texts)
    for i, text in enumerate(texts):
        alone = sketcher.sketch([text])
        assert (alone.digests[0] == together.digests[i]).all() and (alone.values[0] == together.values[i]).all()
        assert (alone.keys[:, 0] == together.keys[:, i]).all()
    assert (together.digests[3] == together.digests[4]).all() and (together.keys[:, 3] == together.keys[:, 4]).all()
    assert len(np.unique(together.digests, axis=0)) == len(texts) - 1
    assert (together.values != minhash.EMPTY).any(axis=1).all()
    other = minhash.Sketcher(5, BANDS, ROWS, seed=2).sketch(texts)
    assert not (other.keys == together.keys).any() and (other.digests == together.digests).all()


@pytest.mark.parametrize(("bands", "rows"), [(1, 1), (3, 1), (256, 4)])
def test_other_shapes(bands, rows):
    sketches = minhash.Sketcher(5, bands, rows, seed=1).sketch(["a b c d e f", "a b c d e f", "g"])
    assert sketches.values.shape == (3, bands * rows) and sketches.keys.shape == (bands, 3)
    similarity = minhash.similarity(sketches.values[[0, 0]], sketches.values[[1, 2]])
    assert similarity[0] == 1 and (similarity[1] == 0 or bands == 1)
