"""Score files are read as they were written, or refused."""

import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest

from mlx_pretrain.errors import InputError
from raters.filtering.score_table import aligned, document_key, read_scores
from tests.raters.rated import write_scores


def test_half_a_surrogate_pair_has_a_key_of_its_own():
    """An id of such a document, which JSON can spell, is compared with those that were rated."""
    assert document_key(0, "de", "s", "\ud800") != document_key(0, "de", "s", "?")


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
