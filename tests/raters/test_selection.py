"""What is kept obeys its quotas, whatever the files; and what the report says of a score is right."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlx_pretrain.errors import InputError
from raters import selection
from raters.selection import Scores, read_scores
from tests.raters.rated import write_scores


def make_scores(score, tokens, language=None, source=None, seed: int = 0) -> Scores:
    n = len(score)
    language = np.zeros(n, np.int32) if language is None else np.asarray(language, np.int32)
    source = np.zeros(n, np.int32) if source is None else np.asarray(source, np.int32)
    key = np.array([selection.document_key(seed, str(l), str(s), str(i)) for i, (l, s) in enumerate(
        zip(language, source))], np.uint64)
    names = lambda codes: tuple(f"n{i}" for i in range(int(codes.max(initial=0)) + 1))  # noqa: E731
    return Scores("tested", ("a",), np.zeros(n, np.int32), np.arange(1, n + 1), key, names(language), language,
                  names(source), source, np.asarray(score, np.float64), np.asarray(tokens, np.int64))


@st.composite
def rated(draw) -> Scores:
    """Documents with ties, empty ones and some without a score."""
    rows = draw(st.lists(st.tuples(
        st.one_of(st.just(math.nan), st.integers(-4, 4).map(float), st.floats(-5, 5)), st.integers(0, 50),
        st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
    return make_scores(*zip(*rows))


def total(scores: Scores) -> np.ndarray:
    known = np.isfinite(scores.score)
    return np.bincount(scores.language[known], scores.tokens[known], len(scores.languages))


@settings(deadline=None)
@given(rated(), st.floats(0, 1), st.sampled_from([0.0, 0.5]))
def test_the_quota_is_exceeded_by_less_than_one_document_and_nothing_left_out_is_better(scores, fraction, temperature):
    quotas = fraction * total(scores)
    preference = selection.preferences(scores, temperature)
    kept = selection.select(scores, preference, quotas)
    assert not kept[~np.isfinite(scores.score)].any()
    for language, quota in enumerate(quotas):
        mine = scores.language == language
        taken = np.flatnonzero(mine & kept)
        left = np.flatnonzero(mine & ~kept & np.isfinite(scores.score))
        sizes = scores.tokens[taken]
        assert sizes.sum() - sizes.max(initial=0) < quota or not len(taken)
        assert sizes.sum() >= quota or not len(left)
        if len(taken) and len(left):
            assert preference[taken].min() >= preference[left].max()


@settings(deadline=None)
@given(rated(), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_no_source_takes_more_than_its_cap_but_for_one_document(scores, fraction, caps):
    quotas = fraction * total(scores)
    caps = dict(enumerate(caps))
    kept = selection.select(scores, scores.score, quotas, caps=caps)
    for language, quota in enumerate(quotas):
        for source, cap in caps.items():
            rows = kept & (scores.language == language) & (scores.source == source)
            sizes = scores.tokens[rows]
            assert not rows.any() or sizes.sum() - sizes.max() < cap * quota
            left = (scores.language == language) & (scores.source == source) & ~kept & np.isfinite(scores.score)
            if rows.any() and left.any():  # within a source, the best
                assert scores.score[rows].min() >= scores.score[left].max()


@settings(deadline=None)
@given(rated(), st.floats(0, 1))
def test_quotas_for_each_source_keep_the_quota_of_the_language(scores, fraction):
    quotas = fraction * total(scores)
    kept = selection.select(scores, scores.score, quotas, per_source=True)
    for language, quota in enumerate(quotas):
        sizes = scores.tokens[kept & (scores.language == language)]
        assert sizes.sum() - sizes.max(initial=0) <= quota * (1 + 1e-9)
        known = np.isfinite(scores.score) & (scores.language == language)
        for source in range(3):
            left, taken = (scores.score[known & (scores.source == source) & mask] for mask in (~kept, kept))
            assert not len(left) or not len(taken) or taken.min() >= left.max()


def test_caps_let_the_next_best_source_in():
    scores = make_scores([9, 8, 7, 3, 2, 1], [10] * 6, source=[0, 0, 0, 1, 1, 1])
    kept = selection.select(scores, scores.score, [40], caps={0: 0.5})
    assert kept.tolist() == [True, True, False, True, True, False]


def test_a_quota_for_each_source_keeps_the_mixture_of_sources():
    """The complaint: raters sort by domain."""
    rng = np.random.default_rng(0)
    source = np.repeat([0, 1, 2], [700, 200, 100])
    scores = make_scores(rng.normal(size=1000) + 10 * source, np.full(1000, 10), source=source)
    assert set(source[selection.select(scores, scores.score, [1000])]) == {2}
    kept = selection.select(scores, scores.score, [1000], per_source=True)
    assert np.bincount(source[kept]).tolist() == [70, 20, 10]
    assert scores.score[kept & (source == 0)].min() >= scores.score[~kept & (source == 0)].max()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_files_and_their_order_do_not_change_what_is_kept(data, tmp_path_factory):
    """Also among equal scores, and when sampling."""
    folder = tmp_path_factory.mktemp("scores")
    n = data.draw(st.integers(1, 14))
    records = [{"id": f"d{i}", "lang": data.draw(st.sampled_from(["de", "th"])), "source": "s", "text": "x" * (i % 5)}
               for i in range(n)]
    score = {f"d{i}": data.draw(st.integers(0, 2)) for i in range(n)}
    temperature, quota = data.draw(st.sampled_from([0.0, 1.0])), data.draw(st.floats(0, 20))

    def selected(place: str, order, sizes) -> set[str]:
        names, shuffled = [], [records[i] for i in order]
        for number, size in enumerate(sizes):
            part, shuffled = (shuffled[:size], shuffled[size:]) if number < len(sizes) - 1 else (shuffled, [])
            names.append(f"{number}.jsonl")
            write_scores(folder / place, names[-1], part, [score[r["id"]] for r in part])
        scores = read_scores(folder / place, names, seed=3)
        kept = selection.select(scores, selection.preferences(scores, temperature), [quota] * len(scores.languages))
        rows = iter(kept.tolist())
        return {records[i]["id"] for i in order if next(rows)}

    first = selected("a", range(n), [n])
    assert selected("b", data.draw(st.permutations(range(n))), data.draw(st.lists(
        st.integers(0, n), min_size=1, max_size=3))) == first


def test_sampling_follows_the_softmax_of_the_standardised_scores():
    score = np.array([0.0, 1.0, 2.0, 5.0])
    weights = np.exp((score - score.mean()) / score.std() / 0.8)
    wins = np.zeros(4)
    for seed in range(4000):
        scores = make_scores(score, [1] * 4, seed=seed)
        wins += selection.select(scores, selection.preferences(scores, 0.8), [1])
    assert stats.chisquare(wins, 4000 * weights / weights.sum()).pvalue > 1e-4


def adjusted_r2(values, *factors) -> float:
    """By least squares on indicator columns."""
    columns = [np.array([f == level for level in np.unique(f)], float).T for f in factors]
    design = np.concatenate(columns, axis=1)
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    freedom = len(values) - np.linalg.matrix_rank(design)
    return ((values - fitted) ** 2).sum() / freedom


def test_explained_variance_is_that_of_a_linear_model():
    rng = np.random.default_rng(1)
    language, source = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
    values = language + 0.5 * source * (language == 1) + rng.normal(size=300)
    every = np.zeros(300)
    joint = 3 * language + source
    assert selection.explained(values, language) == pytest.approx(
        1 - adjusted_r2(values, language) / adjusted_r2(values, every))
    assert selection.explained(values, source, language) == pytest.approx(
        1 - adjusted_r2(values, joint) / adjusted_r2(values, language))


def test_many_groups_do_not_explain_noise():
    rng = np.random.default_rng(2)
    found = [selection.explained(rng.normal(size=400), rng.integers(0, 100, 400)) for _ in range(20)]
    assert np.mean(found) < 0.06
    assert selection.explained(np.ones(9), np.arange(9) % 3) is None
    assert selection.explained(np.arange(3.0), np.arange(3)) is None


def test_a_rater_of_length_is_seen_as_one():
    rng = np.random.default_rng(3)
    tokens = rng.integers(10, 1000, 2000)
    scores = make_scores(np.log(tokens), tokens, rng.integers(0, 3, 2000), rng.integers(0, 4, 2000))
    table = selection.variance_table(scores)
    assert table["within_languages"]["length"] > 0.9
    assert table["within_languages"]["source"] < 0.02 and table["over_all"]["language"] < 0.02


def test_agreement_of_raters():
    rng = np.random.default_rng(4)
    score, language = rng.normal(size=1000), np.repeat([0, 1], 500)
    scores = make_scores(score, np.full(1000, 7), language)
    others = {"tested": score, "shifted": score + 5 * language, "noise": rng.normal(size=1000)}
    quotas = 0.2 * total(scores)
    kept = {name: selection.select(dataclasses.replace(scores, score=one), one, quotas) for name, one in others.items()}
    same, noise, _ = selection.agreement(scores, others, kept)
    assert same["spearman_within"] == pytest.approx(1) and same["overlap"] == pytest.approx(1)
    assert same["spearman"] == pytest.approx(stats.spearmanr(score, others["shifted"]).statistic) and same[
        "spearman"] < 0.95
    assert abs(noise["spearman"]) < 0.1 and noise["overlap"] == pytest.approx(0.2, abs=0.06)
    assert noise["chance"] == pytest.approx(0.2, abs=0.001)


def test_scores_of_two_raters_are_joined_by_file_and_number(tmp_path):
    records = [{"id": f"d{i}", "lang": "en", "text": "t"} for i in range(4)]
    write_scores(tmp_path / "a", "x.jsonl", records, [1, 2, 3, 4])
    write_scores(tmp_path / "a", "y.jsonl", records, [5, 6, 7, 8])
    write_scores(tmp_path / "b", "x.jsonl", records[1:3], [20, math.nan],
                 number=pa.array([2, 3], pa.int64()), rater="b")
    write_scores(tmp_path / "b", "y.jsonl", records, [50, 60, 70, 80], rater="b")
    a, b = (read_scores(tmp_path / name, ["x.jsonl", "y.jsonl"]) for name in "ab")
    assert a.rater == "tested@1" and b.rater == "b"
    np.testing.assert_array_equal(selection.aligned(a, b), [np.nan, 20, np.nan, np.nan, 50, 60, 70, 80])


@pytest.mark.parametrize(("columns", "message"), [
    ({"n_tokens": None}, "no column 'n_tokens'"),
    ({"n_tokens": pa.array([3, None], pa.int32())}, "no token counts"),
    ({"quality_score": pa.array(["1", "2"])}, "no column 'quality_score' of type float"),
    ({"number": pa.array([2, 1], pa.int64())}, "not ascending"),
    ({"rater": ["a", "b"]}, "several raters: a, b"),
])
def test_score_files_that_cannot_be_meant_are_refused(tmp_path, columns, message):
    records = [{"id": f"d{i}", "lang": "en", "text": "t"} for i in range(2)]
    write_scores(tmp_path, "x.jsonl", records, [1, 2], **columns)
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path, ["x.jsonl"])


def test_a_truncated_score_file_is_refused(tmp_path):
    write_scores(tmp_path, "x.jsonl", [{"id": "d", "lang": "en", "text": "t"}], [1])
    path = tmp_path / "x.jsonl.scores.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"x.jsonl.scores.parquet: cannot be read"):
        read_scores(tmp_path, ["x.jsonl"])
    with pytest.raises(InputError, match="no such score file"):
        read_scores(tmp_path, ["y.jsonl"])
