"""What is kept obeys its quotas, whatever the files; and what the report says of a score is right."""

import dataclasses
import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlx_pretrain.errors import InputError
from raters.filtering import quotas, score_statistics
from raters.filtering.score_table import ScoreTable, aligned, document_key, read_scores
from tests.raters.rated import write_scores


def make_scores(score, tokens, language=None, source=None, seed: int = 0) -> ScoreTable:
    n = len(score)
    language = np.zeros(n, np.int32) if language is None else np.asarray(language, np.int32)
    source = np.zeros(n, np.int32) if source is None else np.asarray(source, np.int32)
    key = np.array([document_key(seed, str(l), str(s), str(i)) for i, (l, s) in enumerate(
        zip(language, source))], np.uint64)
    names = lambda codes: tuple(f"n{i}" for i in range(int(codes.max(initial=0)) + 1))  # noqa: E731
    return ScoreTable("tested", ("a",), np.zeros(n, np.int32), np.arange(1, n + 1), key, names(language), language,
                  names(source), source, np.asarray(score, np.float64), np.asarray(tokens, np.int64))


@st.composite
def rated(draw) -> ScoreTable:
    """Documents with ties, empty ones and some without a score."""
    rows = draw(st.lists(st.tuples(
        st.one_of(st.just(math.nan), st.integers(-4, 4).map(float), st.floats(-5, 5)), st.integers(0, 50),
        st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
    return make_scores(*zip(*rows))


def total(scores: ScoreTable) -> np.ndarray:
    known = np.isfinite(scores.score)
    return np.bincount(scores.language[known], scores.tokens[known], len(scores.languages))


@settings(deadline=None)
@given(rated(), st.floats(0, 1), st.sampled_from([0.0, 0.5]))
def test_the_quota_is_exceeded_by_less_than_one_document_and_nothing_left_out_is_better(scores, fraction, temperature):
    targets = fraction * total(scores)
    preference = quotas.preferences(scores, temperature)
    kept = quotas.choose(scores, preference, targets)
    assert not kept[~np.isfinite(scores.score)].any()
    for language, quota in enumerate(targets):
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
    targets = fraction * total(scores)
    caps = dict(enumerate(caps))
    kept = quotas.choose(scores, scores.score, targets, caps=caps)
    for language, quota in enumerate(targets):
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
    targets = fraction * total(scores)
    kept = quotas.choose(scores, scores.score, targets, per_source=True)
    for language, quota in enumerate(targets):
        sizes = scores.tokens[kept & (scores.language == language)]
        assert sizes.sum() - sizes.max(initial=0) <= quota * (1 + 1e-9)
        known = np.isfinite(scores.score) & (scores.language == language)
        for source in range(3):
            left, taken = (scores.score[known & (scores.source == source) & mask] for mask in (~kept, kept))
            assert not len(left) or not len(taken) or taken.min() >= left.max()


def test_caps_let_the_next_best_source_in():
    scores = make_scores([9, 8, 7, 3, 2, 1], [10] * 6, source=[0, 0, 0, 1, 1, 1])
    kept = quotas.choose(scores, scores.score, [40], caps={0: 0.5})
    assert kept.tolist() == [True, True, False, True, True, False]


def test_a_quota_for_each_source_keeps_the_mixture_of_sources():
    """The complaint: raters sort by domain."""
    rng = np.random.default_rng(0)
    source = np.repeat([0, 1, 2], [700, 200, 100])
    scores = make_scores(rng.normal(size=1000) + 10 * source, np.full(1000, 10), source=source)
    assert set(source[quotas.choose(scores, scores.score, [1000])]) == {2}
    kept = quotas.choose(scores, scores.score, [1000], per_source=True)
    assert np.bincount(source[kept]).tolist() == [70, 20, 10]
    assert scores.score[kept & (source == 0)].min() >= scores.score[~kept & (source == 0)].max()


def test_quotas_of_sources_that_are_no_whole_numbers_add_up():
    """10/3 tokens of each source: the first is given 4, for which the others owe it 2/3."""
    source = np.repeat([0, 1, 2], 5)
    scores = make_scores(np.arange(15.0), [1] * 15, source=source)
    kept = quotas.choose(scores, scores.score, [10], per_source=True)
    assert np.bincount(source[kept]).tolist() == [4, 3, 3]


def test_half_a_surrogate_pair_has_a_key_of_its_own():
    """An id of such a document, which JSON can spell, is compared with those that were rated."""
    assert document_key(0, "de", "s", "\ud800") != document_key(0, "de", "s", "?")


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
        kept = quotas.choose(scores, quotas.preferences(scores, temperature), [quota] * len(scores.languages))
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
        wins += quotas.choose(scores, quotas.preferences(scores, 0.8), [1])
    assert stats.chisquare(wins, 4000 * weights / weights.sum()).pvalue > 1e-4


def test_preferences_are_standardised_scores_with_gumbel_noise_from_the_key():
    """Keys at both ends too: a document's noise is never infinite, which would leave it out."""
    scores = make_scores([1, 3, 5, 7, 9, math.nan], [1] * 6, [0, 0, 0, 1, 1, 1])
    keys = [0, 1 << 63, (1 << 64) - 1, 1 << 62, 3 << 62, 5]
    found = quotas.preferences(dataclasses.replace(scores, key=np.array(keys, np.uint64)), 0.5)
    uniform = np.array([0.5**53, 0.5, 1 - 0.5**53, 0.25, 0.75])
    standardised = np.array([-math.sqrt(1.5), 0, math.sqrt(1.5), -1, 1])
    assert found[:5] == pytest.approx(standardised / 0.5 - np.log(-np.log(uniform)), rel=1e-12)
    assert np.isnan(found[5])


def test_equal_scores_of_a_language_are_drawn_by_noise_alone():
    scores = make_scores([4.0, 4.0], [1, 1])
    found = quotas.preferences(dataclasses.replace(scores, key=np.array([1 << 63, 1 << 62], np.uint64)), 1.0)
    assert found == pytest.approx([-math.log(math.log(2)), -math.log(math.log(4))])


def adjusted_r2(values, *factors) -> float:
    """Residual variance by least squares on indicator columns."""
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
    assert score_statistics.explained(values, language) == pytest.approx(
        1 - adjusted_r2(values, language) / adjusted_r2(values, every))
    assert score_statistics.explained(values, source, language) == pytest.approx(
        1 - adjusted_r2(values, joint) / adjusted_r2(values, language))


def test_many_groups_do_not_explain_noise():
    rng = np.random.default_rng(2)
    found = [score_statistics.explained(rng.normal(size=400), rng.integers(0, 100, 400)) for _ in range(20)]
    assert np.mean(found) < 0.06
    assert score_statistics.explained(np.ones(9), np.arange(9) % 3) is None
    assert score_statistics.explained(np.arange(3.0), np.arange(3)) is None


def test_a_rater_of_length_is_seen_as_one():
    rng = np.random.default_rng(3)
    tokens = rng.integers(10, 1000, 2000)
    scores = make_scores(np.log(tokens), tokens, rng.integers(0, 3, 2000), rng.integers(0, 4, 2000))
    table = score_statistics.variance_table(scores)
    assert table["within_languages"]["length"] > 0.9
    assert table["within_languages"]["source"] < 0.02 and table["over_all"]["language"] < 0.02


def test_the_table_of_variance_is_that_of_linear_models():
    rng = np.random.default_rng(5)
    language, source, tokens = rng.integers(0, 2, 600), rng.integers(0, 3, 600), rng.integers(1, 500, 600)
    # An effect in one cell of all three, which no sum of the three factors has.
    length = np.searchsorted(np.sort(tokens)[59::60], tokens)
    values = language + source + 0.1 * length + 3 * ((language == 1) & (source == 2) & (length == 9))
    values = values + rng.normal(size=600)
    scores = make_scores([*values, math.nan], [*tokens, 10**6], [*language, 0], [*source, 0])
    every, cell = np.zeros(600), 3 * language + source
    expected = {
        "over_all": {"language": (language, every), "source": (source, every), "length": (length, every),
                     "all three": (10 * cell + length, every)},
        "within_languages": {"source": (cell, language), "length": (10 * language + length, language),
                             "source and length": (10 * cell + length, language)}}
    assert score_statistics.variance_table(scores) == {
        part: {name: pytest.approx(1 - adjusted_r2(values, groups) / adjusted_r2(values, within))
               for name, (groups, within) in factors.items()} for part, factors in expected.items()}


def test_lengths_fall_into_tenths():
    tokens = np.random.default_rng(6).permutation(np.arange(1, 101))
    groups, upper = score_statistics.length_groups(tokens)
    assert upper == list(range(10, 101, 10))
    assert groups.tolist() == ((tokens - 1) // 10).tolist()


def test_distributions_count_the_rated_documents_and_the_ends_hold_the_rest():
    values = np.arange(1001.0)
    scores = make_scores([*values, math.nan], [1] * 1002, [0] * 1000 + [1, 0])
    edges = score_statistics.score_bins(scores)
    np.testing.assert_allclose(edges, np.linspace(5, 995, 49))
    rows, kept = scores.language == 0, scores.score >= 900
    found = score_statistics.distribution(scores, kept, rows, edges)
    expected = [int(((values[:1000] >= low) & (values[:1000] < high)).sum()) for low, high in zip(
        [-1, *edges[1:-1]], [*edges[1:-1], 2000])]
    assert found["histogram"] == expected and sum(expected) == 1000
    assert sum(found["kept_histogram"]) == 100 and found["kept_histogram"][-1] == expected[-1]
    assert found["quantiles"] == pytest.approx([999 * q for q in (0.05, 0.25, 0.5, 0.75, 0.95)])


def test_distributions_of_no_scores_and_of_equal_ones():
    nothing, equal = make_scores([math.nan], [1]), make_scores([3, 3], [1, 1])
    assert score_statistics.score_bins(nothing)[[0, -1]].tolist() == [0, 1]
    assert score_statistics.score_bins(equal)[[0, -1]].tolist() == [3, 4]
    assert score_statistics.distribution(nothing, np.zeros(1, bool), np.ones(1, bool), np.array([0, 1, 2.0])) == {
        "quantiles": None, "histogram": [0, 0], "kept_histogram": [0, 0]}


def test_agreement_is_that_of_the_documents_that_both_have_rated():
    scores = make_scores([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60])
    raters = {"a": scores.score, "b": np.array([2, 1, 3, math.nan, 5, 4])}
    kept = {"a": np.arange(6) >= 3, "b": np.isin(np.arange(6), (2, 4))}
    found, = score_statistics.agreement(scores, raters, kept)
    assert found["raters"] == ["a", "b"] and found["documents"] == 5
    # Ranks 1 2 3 4 5 and 2 1 3 5 4: 1 - 6 * 4 / (5 * 24).
    assert found["spearman"] == found["spearman_within"] == found["spearman_by_language"]["n0"] == pytest.approx(0.8)
    assert found["overlap"] == pytest.approx(50 / 150) and found["chance"] == pytest.approx(80 / 210)
    nothing, = score_statistics.agreement(scores, raters, dict.fromkeys(kept, np.zeros(6, bool)))
    assert nothing["overlap"] is None and nothing["chance"] is None


def test_the_mean_over_languages_is_of_those_with_three_documents():
    scores = make_scores([1, 2, 3, 4, 5, 6, 7, 8], [1] * 8, [0, 0, 0, 1, 1, 1, 2, 2])
    raters = {"a": scores.score, "b": np.array([1, 2, 3, 6, 5, 4, 7, 8.0])}
    found, = score_statistics.agreement(scores, raters, dict.fromkeys(raters, np.ones(8, bool)))
    assert found["spearman_by_language"] == {"n0": pytest.approx(1), "n1": pytest.approx(-1), "n2": None}
    assert found["spearman_within"] == pytest.approx(0)


def test_agreement_of_raters():
    rng = np.random.default_rng(4)
    score, language = rng.normal(size=1000), np.repeat([0, 1], 500)
    scores = make_scores(score, np.full(1000, 7), language)
    others = {"tested": score, "shifted": score + 5 * language, "noise": rng.normal(size=1000)}
    targets = 0.2 * total(scores)
    kept = {name: quotas.choose(dataclasses.replace(scores, score=one), one, targets) for name, one in others.items()}
    same, noise, _ = score_statistics.agreement(scores, others, kept)
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
    np.testing.assert_array_equal(aligned(a, b), [np.nan, 20, np.nan, np.nan, 50, 60, 70, 80])


def test_rows_of_a_score_file(tmp_path):
    """Keys are those of seed 0 unless another is given; a score may be missing, too."""
    records = [{"id": "d0", "lang": "", "source": "s", "text": "ab"}, {"id": "d1", "lang": "th", "text": "c"}]
    write_scores(tmp_path, "x.jsonl", records, pa.array([1.5, None], pa.float32()))
    scores = read_scores(tmp_path, ["x.jsonl"])
    assert (scores.languages, scores.language.tolist()) == (("th", "und"), [1, 0])
    assert (scores.sources, scores.source.tolist()) == (("", "s"), [1, 0])
    assert (scores.number.tolist(), scores.tokens.tolist()) == ([1, 2], [2, 1])
    np.testing.assert_array_equal(scores.score, [1.5, np.nan])
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in (b"0\0und\0s\0d0", b"0\0th\0\0d1")]
    assert scores.key.tolist() == [int.from_bytes(digest, "little") for digest in digests]


@pytest.mark.parametrize(("columns", "message"), [
    ({"n_tokens": None}, "no column 'n_tokens'"),
    ({"n_tokens": pa.array([3, None], pa.int32())}, "no token counts"),
    ({"quality_score": pa.array(["1", "2"])}, "no column 'quality_score' of type float"),
    ({"number": pa.array([2, 1], pa.int64())}, "not ascending"),
    ({"number": pa.array([1, None], pa.int64())}, r"x\.jsonl\.scores\.parquet: rows without a number"),
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
