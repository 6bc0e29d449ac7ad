"""Deciding on cells of documents keeps what deciding on all documents keeps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raters.filtering import quotas
from raters.filtering.cells import bins_of, cells_of, join_cells, lowest_of, reduced_table, undecided
from tests.raters.rated import make_score_table


def choose_by_cells(scores, preference, quota, per_source, caps) -> tuple[np.ndarray, int]:
    """Returns (mask of the documents kept, number of documents looked at)."""
    rows = np.flatnonzero(np.isfinite(preference))
    of_rows = cells_of(scores.rows(rows), preference[rows], per_source or caps is not None)
    parts = [of_rows.rows(slice(start, None, 3)) for start in range(3)]
    cells = join_cells(parts)
    cut = undecided(cells, quota, per_source, caps)
    single = rows[cells.rows(cut).contain(of_rows)]
    whole = cells.rows(~cut)
    table, joined = reduced_table(whole, scores.rows(single), preference[single])
    kept = quotas.choose(table, joined, quota, per_source, caps)
    mask = np.zeros(len(scores), bool)
    mask[rows] = whole.rows(kept[: len(whole)]).contain(of_rows)
    mask[single] = kept[len(whole) :]
    return mask, len(single)


@given(st.integers(0, 2**32), st.integers(0, 60), st.sampled_from([1, 1e-3, 1e3]), st.booleans(),
       st.sampled_from([None, {0: 0.3, 2: 0.5}, {0: 0.0, 1: 0.25}]), st.floats(0, 1.3))
def test_the_same_documents_are_kept(seed, n, width, per_source, caps, fraction):
    rng = np.random.default_rng(seed)
    score = np.round(rng.normal(size=n) * width + rng.integers(-1, 2), 3)  # with ties
    score[rng.random(n) < 0.1] = np.nan
    scores = make_score_table(score, rng.integers(0, 30, n), rng.integers(0, 2, n), rng.integers(0, 3, n))
    caps = None if per_source else caps
    quota = [fraction * scores.tokens[scores.language == i].sum() for i in range(2)]
    for preference in (scores.score, quotas.preferences(scores, 2.0)):
        expected = quotas.choose(scores, preference, quota, per_source, caps)
        kept, _ = choose_by_cells(scores, preference, quota, per_source, caps)
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("per_source, caps", [(False, None), (True, None), (False, {0: 0.2, 1: 0.3})])
def test_few_documents_are_looked_at(per_source, caps):
    rng = np.random.default_rng(0)
    n = 100_000
    scores = make_score_table(np.zeros(1), [1])
    scores = dataclasses.replace(
        scores, file=np.zeros(n, np.int32), number=np.arange(n), key=rng.integers(0, 2**63, n).astype(np.uint64),
        language=rng.integers(0, 2, n).astype(np.int32), source=rng.integers(0, 3, n).astype(np.int32),
        score=rng.normal(size=n), tokens=rng.integers(1, 1000, n), languages=("a", "b"), sources=("x", "y", "z"))
    quota = [0.3 * scores.tokens[scores.language == i].sum() for i in range(2)]
    kept, n_single = choose_by_cells(scores, scores.score, quota, per_source, caps)
    np.testing.assert_array_equal(kept, quotas.choose(scores, scores.score, quota, per_source, caps))
    assert 0 < n_single < 0.02 * n


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_bins_are_in_order(values):
    values = np.sort(np.array(values))[::-1]
    bins = bins_of(values)
    assert (np.diff(bins) >= 0).all()
    lowest = lowest_of(bins)
    assert (lowest <= values).all() and (bins_of(lowest) == bins).all()
