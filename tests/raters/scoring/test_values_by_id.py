"""Labels and scores of documents are found by id and language."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_pretrain.errors import InputError
from raters.scoring.values_by_id import ValuesById, read_ratings
from tests.raters.test_score import write_jsonl


def test_a_row_is_of_its_language_or_of_all_and_several_count_with_their_mean(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [
        {"id": "1", "lang": "zh-Hant", "x": 1, "y": True, "text": "t"}, {"id": "1", "x": 5},
        {"id": 2, "x": None, "y": 0}, {"id": "1", "language": "cmn_Hani", "x": 3}])
    pq.write_table(pa.table({"id": ["2", "3"], "x": [4.5, np.nan], "other": [1, 1]}), tmp_path / "b.parquet")
    values = ValuesById([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")])
    assert values.properties == ["other", "x", "y"] and len(values.keys) == 4
    rows = values.rows(["1", "1", "2", "3", "4"], ["zh", "de", "de", "und", "de"])
    assert rows[4] == -1
    np.testing.assert_equal(values.values[rows[:4]], [
        [np.nan, 2, 1], [np.nan, 5, np.nan], [1, 4.5, 0], [1, np.nan, np.nan]])
    used = np.isin(np.arange(4), rows[[0, 2]])
    assert values.names_without(used, 5) == ["1", "3"] and values.names_without(used, 1) == ["1"]
    only = ValuesById(str(tmp_path / "a.jsonl"), ["y"])
    assert only.values.shape == (3, 1)


def test_people_s_ratings_are_the_property_educational(tmp_path):
    write_jsonl(tmp_path / "fineweb_c.jsonl", [
        {"id": "1", "text": "a", "language_code": "dan_Latn", "annotator_ids": ["p", "q"],
         "educational_value_labels": ["Minimal", "Excellent"]},
        {"id": "2", "text": "b", "language_code": "dan_Latn", "annotator_ids": ["p"],
         "educational_value_labels": ["❗ Problematic Content ❗"]}])
    values = ValuesById(str(tmp_path / "*.jsonl"), read=read_ratings)
    assert values.properties == ["educational"]
    rows = values.rows(["1", "2", "1"], ["da", "da", "sv"])
    np.testing.assert_equal(values.values[rows[:2], 0], [2.5, np.nan])
    assert rows[2] == -1


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"1", r"a\.txt: unknown type of file; known are \.parquet and \.jsonl"),
    ("a.parquet", b"PAR1", r"a\.parquet: cannot be read \(truncated or damaged\?\)"),
    ("a.jsonl", b'{"id": 1.5, "x": 1}\n', r"every row needs an id, a string or a whole number, row 1 has 1\.5"),
    ("a.jsonl", b'{"x": 1}\n', r"every row needs an id, a string or a whole number$"),
    ("a.jsonl", b'{"id": 1, "x": "1"}\n', r"no column of numbers beside the ids"),
])
def test_files_without_ids_or_numbers_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        ValuesById(str(tmp_path / name))
