"""Stores that are filled row by row, and resume after a kill."""

import json

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from video.frames.row_store import RowStore, RowWriter

ARRAYS = {"x": ((2, 3), np.dtype(np.float32)), "n": ((), np.dtype(np.uint8))}


def writer(path, settings=None, items=3):
    return RowWriter(path, "tests", {"seed": 1} if settings is None else settings, items, ARRAYS)


def row(n):
    return {"x": np.full((2, 3), n, np.float32), "n": np.uint8(n)}


def test_goes_on_where_it_was_and_reads_back(tmp_path):
    first = writer(tmp_path)
    first.add("a", row(5), video="one")
    first.reject("b", "broken")
    with pytest.raises(InputError, match="was it interrupted"):
        RowStore(tmp_path, "tests")
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"id": "c", "ro')  # killed while writing
    second = writer(tmp_path)
    assert second.done == {"a", "b"}
    second.add("c", row(7), video="two")
    second.complete(seconds=3)
    store = RowStore(tmp_path, "tests")
    assert [line["id"] for line in store.rows] == ["a", "c"] and store.rows[1]["video"] == "two"
    assert store.rejected == {"b": "broken"} and store.manifest["seconds"] == 3
    np.testing.assert_array_equal(store.read("x"), np.stack([row(5)["x"], row(7)["x"]]))
    np.testing.assert_array_equal(store.read("n", [1]), [7])


def test_other_settings_or_items_are_refused(tmp_path):
    writer(tmp_path)
    with pytest.raises(InputError, match=r"exists, made with seed = 1 \(now 2\); name another output"):
        writer(tmp_path, {"seed": 2})
    with pytest.raises(InputError, match=r"made with items = 3 \(now 4\)"):
        writer(tmp_path, items=4)


def test_settings_that_were_more_or_are_no_object_are_refused(tmp_path):
    writer(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "crop": True}))
    with pytest.raises(InputError, match=r"exists, made with crop = true \(now null\)"):
        writer(tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(InputError, match=r"settings\.json: not a JSON object of settings"):
        writer(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"settings\.json: not a JSON object of settings"):
        RowStore(tmp_path, "tests")


def test_another_type_or_a_damaged_store_is_refused(tmp_path):
    whole = writer(tmp_path)
    whole.add("a", row(1))
    whole.complete()
    with pytest.raises(InputError, match="holds tests, not frames"):
        RowStore(tmp_path, "frames")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="0 rows, the manifest says 1"):
        RowStore(tmp_path, "tests")


def test_rows_of_an_older_version_are_neither_read_nor_added_to(tmp_path):
    """Version 1 had other frames of some videos under the same names, times and numbers."""
    whole = writer(tmp_path)
    whole.add("a", row(1))
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "version": 1}))
    with pytest.raises(InputError, match=r"exists, made with version = 1 \(now 2\); name another output"):
        writer(tmp_path)
    whole.complete()
    with pytest.raises(InputError, match=r"tests of version 1, now it is 2; make them again") as error:
        RowStore(tmp_path, "tests")
    assert "\n" not in str(error.value)
