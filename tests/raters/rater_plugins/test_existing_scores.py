"""Scores and verdicts made elsewhere."""

import json

import numpy as np
import pytest

from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.errors import InputError
from raters.rater_plugins.base import record_fields
from raters.rater_plugins.existing_scores import ExistingScores, PairJudgements


def judgements(tmp_path, *verdicts):
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("a", "b", "winner"), verdict))) + "\n" for verdict in verdicts))
    return PairJudgements(path)


def test_a_column_is_read_and_what_is_no_number_is_missing(tmp_path):
    values = [3, -0.5, "4", None, True, [1], float("nan"), float("inf")]
    records = [{"text": "x", "edu": value} for value in values] + [{"text": "x"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    rater = ExistingScores("edu")
    documents = read_documents(tmp_path / "d.jsonl", extra=record_fields([rater]))
    nan = np.nan
    np.testing.assert_array_equal(rater.score(list(documents)), [3, -0.5, nan, nan, nan, nan, nan, np.inf, nan])
    assert rater.name == "edu" and np.isnan(rater.score([Document("a", "x", "", "")])).all()


def test_a_judge_that_always_takes_the_first_prefers_neither(tmp_path):
    rater = judgements(tmp_path, ("x", "y", "a"), ("y", "x", "a"))
    np.testing.assert_array_equal(rater.prefers([("x", "y"), ("y", "x")]), [0.5, 0.5])
    assert rater.first_place == 1 and rater.one_order == []


def test_the_orders_weigh_the_same_however_often_each_was_asked(tmp_path):
    """Nine votes one way round and one the other: a mean over votes would keep the bias."""
    rater = judgements(tmp_path, *[("x", "y", "b")] * 6, *[("x", "y", "a")] * 2, ("x", "y", "tie"), ("y", "x", "a"))
    expected = (6.5 / 9 + 1) / 2
    np.testing.assert_allclose(rater.prefers([("x", "y"), ("y", "x")]), [expected, 1 - expected])
    assert rater.pairs == [("x", "y")]
    assert rater.first_place == pytest.approx((2.5 / 9 + 1) / 2)


def test_pairs_of_one_order_are_told_and_unknown_ones_are_missing(tmp_path):
    rater = judgements(tmp_path, ("x", "y", "b"), ("y", "x", "b"), (1, "z", "tie"))
    assert rater.one_order == [("1", "z")] and rater.first_place == 0
    np.testing.assert_array_equal(rater.prefers([("z", "1"), ("x", "z"), ("x", "y")]), [0.5, np.nan, 0.5])
    assert rater.prefers([]).shape == (0,)


@pytest.mark.parametrize("verdict, message", [
    (("x", "y", "c"), 'j.jsonl:2: not {"a": id'),
    (("x", None, "a"), 'j.jsonl:2: not {"a": id'),
    (("x", "x", "a"), "j.jsonl:2: 'x' is compared with itself"),
])
def test_bad_verdicts_are_refused_with_their_line(tmp_path, verdict, message):
    good, bad = (json.dumps(dict(zip(("a", "b", "winner"), v))) for v in (("x", "y", "a"), verdict))
    (tmp_path / "j.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(InputError) as error:
        PairJudgements(tmp_path / "j.jsonl")
    assert message in str(error.value)


def test_no_verdicts_are_refused(tmp_path):
    (tmp_path / "j.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no judgement"):
        PairJudgements(tmp_path / "j.jsonl")
