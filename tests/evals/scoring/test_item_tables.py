"""Item tables are kept, refused, replaced or made again."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from evals.scoring.item_tables import load, load_current, save, table_of_answers, table_of_scores
from evals.tasks.task_files import Item
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.scoring import Score

ITEMS = [Item(str(n), "a", ("bb", "c"), n % 2, " ") for n in range(3)]
MADE_FROM = {"fingerprint": "0" * 64, "few_shot": 2, "limit": None}


@pytest.fixture
def path(tmp_path):
    scores = [Score(np.array([-x], np.float32), False, 0) for x in range(12)]
    save(tmp_path / "t/en.parquet", table_of_scores(ITEMS, scores, True), MADE_FROM)
    return tmp_path / "t/en.parquet"


def test_a_table_from_the_same_is_kept(path):
    table = load_current(path, dict(MADE_FROM), overwrite=False)
    assert table.equals(load(path)) and table["id"].to_pylist() == ["0", "0", "1", "1", "2", "2"]
    assert load_current(path.parent / "de.parquet", MADE_FROM, overwrite=False) is None


@pytest.mark.parametrize("change, message", [
    ({"few_shot": 5}, r"few_shot = 2 \(now 5\); set overwrite=True"),
    ({"fingerprint": "1" * 64}, "other fingerprint"),
    ({"few_shot": None}, r"few_shot = 2 \(now null\)"),
])
def test_a_table_from_something_else_is_refused(path, change, message):
    with pytest.raises(InputError, match=rf"en\.parquet: exists, made with {message}"):
        made_from = {key: value for key, value in (MADE_FROM | change).items() if value is not None}
        load_current(path, made_from, overwrite=False)
    assert load_current(path, MADE_FROM | change, overwrite=True) is None


def test_a_damaged_table_is_made_again(path, capsys):
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"en\.parquet: not a parquet file"):
        load(path)
    assert load_current(path, MADE_FROM, overwrite=False) is None
    assert re.search(r"en\.parquet: not a parquet file .*; made again", capsys.readouterr().err)


def test_a_file_without_a_record_is_refused_unless_overwrite(path):
    pq.write_table(table_of_answers(ITEMS, ["bb"] * 3, [0] * 3), path)
    with pytest.raises(InputError, match=r"en\.parquet: was not made by evals\.run"):
        load(path)
    with pytest.raises(InputError, match=r"en\.parquet: has no record of what it was made from; set overwrite=True"):
        load_current(path, MADE_FROM, overwrite=False)
    assert load_current(path, MADE_FROM, overwrite=True) is None
