"""Held-out documents are a share of every language, whichever files they come from."""

import json

import pytest

from data_mixtures.hold_out import HoldOutConfig, hold_out
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError


def write(folder, language, ids, name="a.jsonl"):
    (folder / language).mkdir(parents=True, exist_ok=True)
    records = [{"id": i, "text": f"text {i}", "stars": 3} for i in ids]
    (folder / language / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def ids(output, split, language):
    corpus = Corpus(output, "{split}/{language}/*")
    return {document.id for document in corpus.documents(split, language)}


def test_splits_are_a_division_and_depend_on_ids_alone(tmp_path):
    write(tmp_path / "one", "de", range(200))
    write(tmp_path / "one", "th", ["x", "y", "x"])  # two documents of one id stay together
    write(tmp_path / "cut", "de", range(150, 200), "a.jsonl")
    write(tmp_path / "cut", "de", reversed(range(150)), "b.jsonl")
    write(tmp_path / "cut", "th", ["y", "x", "x"])
    for name in ("one", "cut"):
        hold_out(HoldOutConfig(Corpus(tmp_path / name, "{language}/*"), str(tmp_path / f"{name}-out"), share=0.1))
        train, heldout = (ids(tmp_path / f"{name}-out", split, "de") for split in ("train", "heldout"))
        assert len(heldout) == 20 and train | heldout == {str(i) for i in range(200)} and not train & heldout
        assert sorted(map(len, (ids(tmp_path / f"{name}-out", s, "th") for s in ("train", "heldout")))) == [1, 1]
    assert ids(tmp_path / "one-out", "heldout", "de") == ids(tmp_path / "cut-out", "heldout", "de")
    (document, *_) = Corpus(tmp_path / "one-out", "{split}/{language}/*").read("heldout/de/de-a.jsonl.gz", extra=None)
    assert document.extra == {"stars": 3}
    hold_out(HoldOutConfig(Corpus(tmp_path / "one", "{language}/*"), str(tmp_path / "few"), share=0.5, largest=7))
    assert len(ids(tmp_path / "few", "heldout", "de")) == 7


def test_kept_refused_and_wrong_inputs(tmp_path, capsys):
    write(tmp_path / "in", "de", range(10))
    corpus, output = Corpus(tmp_path / "in", "{language}/*"), str(tmp_path / "out")
    hold_out(HoldOutConfig(corpus, output))
    hold_out(HoldOutConfig(corpus, output))
    assert "kept" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"share = 0.02 \(now 0.3\).*overwrite"):
        hold_out(HoldOutConfig(corpus, output, share=0.3))
    write(tmp_path / "single", "de", ["a"])
    with pytest.raises(InputError, match="de has a single document"):
        hold_out(HoldOutConfig(Corpus(tmp_path / "single", "{language}/*"), str(tmp_path / "none")))
    write(tmp_path / "unknown", "texts", ["a", "b"])
    with pytest.raises(InputError, match=r"a.jsonl:\d: the language of this document is not known"):
        hold_out(HoldOutConfig(Corpus(tmp_path / "unknown", "*/*"), str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="share"):
        hold_out(HoldOutConfig(corpus, output, share=1.5))
