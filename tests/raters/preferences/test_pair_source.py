"""Pairs become batches: each pair once an epoch, kinds in exact shares, text cut as the encoder takes it."""

import json

import numpy as np
import pytest

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID
from mlx_pretrain.errors import InputError
from raters.preferences.pair_file import PARALLEL
from raters.preferences.pair_source import PairSource, pair_mixture
from raters.preferences.pair_table import read_pairs

HEADER = {"format": "mlx-rater-pairs", "version": 1, "provenance": {}}


class Letters:
    """A tokenizer whose ids are code points."""

    def encode_batch(self, texts, num_threads):
        return [np.array([ord(c) for c in text], np.int32) for text in texts]

    def wrap(self, ids):
        return np.concatenate([[BOS_ID], np.asarray(ids), [EOS_ID]]).astype(np.int32)


def document(number: int, language: str) -> dict[str, str]:
    return {"id": str(number), "lang": language, "source": "s", "text": f"{language} {number}" * (number + 1)}


def pair(kind, a, b, p_b, **raters):
    return {"kind": kind, "a": document(*a), "b": document(*b), "p_b": p_b, "raters": raters}


PAIRS = [
    pair("monolingual", (0, "fi"), (1, "fi"), 0.75, one=1, two=0.5),
    pair("monolingual", (1, "fi"), (2, "fi"), 0.0, one=0),
    pair("cross-lingual", (0, "fi"), (2, "ja"), 1.0, one=1, two=1),
    pair("cross-lingual", (2, "ja"), (1, "fi"), 0.5),
    pair("parallel", (2, "fi"), (2, "ja"), 0.5),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [HEADER, *PAIRS]))
    return path


def test_documents_are_read_once_and_cut_to_length(path):
    table = read_pairs(path, Letters(), 6)
    assert len(table) == 5 and len(table.language) == 4
    assert table.languages == ["fi", "ja"] and table.raters == ["one", "two"]
    rows = table.rows(table.documents, 8, PAD_ID)
    assert rows.shape == (5, 2, 8)
    np.testing.assert_array_equal(rows[0, 0], [BOS_ID, *map(ord, "fi 0"), EOS_ID, PAD_ID, PAD_ID])
    np.testing.assert_array_equal(rows[4, 1], [BOS_ID, *map(ord, "ja 2"), EOS_ID, PAD_ID, PAD_ID])
    np.testing.assert_array_equal(table.votes[:3], [[1, 0.5], [0, np.nan], [1, 1]])


def test_win_rates_are_means_over_the_pairs_of_a_document(path):
    table = read_pairs(path, Letters(), 6)
    by_name = dict(zip([(0, "fi"), (1, "fi"), (2, "fi"), (2, "ja")], table.win_rates()))
    # Document 1 in fi: wins .75 against 0, 1 against 2, .5 against the Japanese one.
    assert by_name == pytest.approx({(0, "fi"): 0.125, (1, "fi"): 0.75, (2, "fi"): 0.0, (2, "ja"): 0.75})


def test_every_pair_comes_once_an_epoch_and_resuming_changes_nothing(path):
    table = read_pairs(path, Letters(), 6)
    options, mixture = {"length": 6, "pad_id": PAD_ID}, pair_mixture(table, [0, 1, PARALLEL], batch_size=5, seed=3)
    source = PairSource(table, mixture, **options)
    for batch in range(4):
        positions = source.provenance(batch)
        assert sorted(p.pair for p in positions) == [0, 1, 2, 3, 4]
        assert {p.epoch for p in positions} == {batch}
        np.testing.assert_array_equal(
            source[batch]["preference"], [PAIRS[p.pair]["p_b"] for p in positions])
        assert [bool(x) for x in source[batch]["parallel"]] == [p.kind == "parallel" for p in positions]
    resumed = PairSource(table, mixture.advanced(10), **options)
    part = PairSource(table, mixture, rows=np.array([1, 3]), **options)
    for name, whole in source[2].items():
        np.testing.assert_array_equal(resumed[0][name], whole)
        np.testing.assert_array_equal(part[2][name], whole[[1, 3]])


def test_kinds_that_are_not_wanted_do_not_come(path):
    table = read_pairs(path, Letters(), 6)
    source = PairSource(table, pair_mixture(table, [0], batch_size=4, seed=0), length=6, pad_id=PAD_ID)
    assert sorted(p.pair for p in source.provenance(0)) == [0, 0, 1, 1]


@pytest.mark.parametrize(("lines", "message"), [
    ([], "no pairs"),
    (["{}"], "the first line is not that of 'mlx-rater-pairs' version 1"),
    ([json.dumps(HEADER)], "no pairs"),
    ([json.dumps(HEADER), "{cut"], "p.jsonl:2: malformed JSON"),
    ([json.dumps(HEADER), json.dumps(PAIRS[0]), json.dumps({**PAIRS[0], "p_b": 1.5})],
     "p.jsonl:3: not a pair: p_b is 1.5"),
    ([json.dumps(HEADER), json.dumps({**PAIRS[0], "kind": "other"})], "p.jsonl:2: not a pair"),
    ([json.dumps(HEADER), json.dumps({"kind": "parallel"})], "p.jsonl:2: not a pair: no 'a'"),
    ([json.dumps(HEADER), "[1]"], "p.jsonl:2: not a pair"),
])
def test_malformed_files_are_named(tmp_path, lines, message):
    (tmp_path / "p.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError) as error:
        read_pairs(tmp_path / "p.jsonl", Letters(), 6)
    assert message in str(error.value) and "\n" not in str(error.value)
