"""The n-gram classifier separates good from bad, is the same after a reload, and executes no code of its file."""

import json
import pathlib
import pickle

import numpy as np
import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.errors import InputError
from raters.ngrams import NgramClassifier, NgramsConfig, main
from raters.preferences.corruption import corrupt

SAMPLES = pathlib.Path(__file__).parents[2] / "samples" / "text"


def write(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(path)


def train(good, output, bad=None, **settings):
    main(NgramsConfig(Corpus(files=str(good)), str(output), bad and Corpus(files=str(bad)), **settings))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> pathlib.Path:
    """A classifier trained on good texts about cats (猫) and bad ones about dogs (犬)."""
    folder = tmp_path_factory.mktemp("ngrams")
    good = write(folder / "good.jsonl", [f"the cat number {i}. 猫が好き" for i in range(30)])
    bad = write(folder / "bad.jsonl", [f"the dog number {i}. 犬が好き" for i in range(10)])
    train(good, folder / "model.npz", bad, features=2**12)
    return folder / "model.npz"


def documents(*texts):
    return [Document(str(i), text, "", "") for i, text in enumerate(texts)]


def test_known_words_decide_and_unknown_ones_do_not(toy):
    cat, dog, neko, inu, other = NgramClassifier(toy).score(documents("cat", "dog", "猫", "犬", "zebra"))
    assert cat > other > dog and neko > other > inu
    assert abs(other - NgramClassifier(toy)._bias) < 1e-6


def test_log_odds_follow_the_formula(toy):
    """Against the weights read by hand: signed hashed counts, scaled to unit length."""
    from sklearn.feature_extraction.text import FeatureHasher

    with np.load(toy) as file:
        weights, bias = file["weights"], float(file["bias"])
    x = FeatureHasher(2**12, input_type="string").transform([["the", "cat", "the cat"]]).toarray()[0]
    expected = x @ weights / np.linalg.norm(x) + bias
    assert NgramClassifier(toy).score(documents("The  cat")) == pytest.approx([expected], rel=1e-6)


def test_classes_of_unlike_size_are_balanced(toy, tmp_path):
    """Thirty texts are good and ten bad: this imbalance must not raise the score of a neutral text by log 3."""
    train(toy.parent / "good.jsonl", tmp_path / "m.npz", toy.parent / "bad.jsonl", features=2**12, regularization=10.0)
    assert abs(NgramClassifier(tmp_path / "m.npz").score(documents("zebra"))[0]) < 0.1


def test_a_score_does_not_depend_on_the_company(toy):
    texts = documents("the cat", "a dog and 猫", "", "zebra")
    rater = NgramClassifier(toy)
    together = rater.score(texts)
    np.testing.assert_array_equal(together, np.concatenate([rater.score([text]) for text in texts]))
    assert np.isnan(together[2]) and rater.score([]).shape == (0,)


def test_the_same_files_give_the_same_bytes(toy, tmp_path):
    train(toy.parent / "good.jsonl", tmp_path / "m.npz", toy.parent / "bad.jsonl", features=2**12)
    assert (tmp_path / "m.npz").read_bytes() == toy.read_bytes()
    description = NgramClassifier(toy).description
    assert description["documents"] == {"good": 30, "bad": 10}
    assert {label: len(files) for label, files in description["provenance"]["inputs"].items()} == {"good": 1, "bad": 1}


def test_a_classifier_is_kept_refused_or_replaced(toy, tmp_path, capsys):
    files = toy.parent / "good.jsonl", tmp_path / "m.npz", toy.parent / "bad.jsonl"
    train(*files, features=2**12)
    train(*files, features=2**12)
    assert "m.npz: made before from the same inputs and settings, kept" in capsys.readouterr().err
    with pytest.raises(InputError, match="settings features = 4096 \\(now 2048\\); set overwrite=True to replace it"):
        train(*files, features=2**11)
    assert files[1].read_bytes() == toy.read_bytes()
    train(*files, features=2**11, overwrite=True)
    assert NgramClassifier(files[1]).description["features"] == 2**11
    files[1].write_text("something else")
    with pytest.raises(InputError, match="has no record of what it was made from"):
        train(*files)
    train(*files, overwrite=True)
    assert NgramClassifier(files[1])


def test_corrupted_copies_stand_in_for_bad_text(tmp_path):
    """On documents it has not seen."""
    train(SAMPLES / "train" / "de.jsonl.xz", tmp_path / "m.npz", features=2**14,
          corruptions=["shuffled-words", "ocr"])
    unseen = list(read_documents(SAMPLES / "heldout" / "de.jsonl.xz"))
    rater = NgramClassifier(tmp_path / "m.npz")
    for kind in ("shuffled-words", "ocr"):
        assert (rater.score(unseen) > rater.score([corrupt(d, kind, 0.6, seed=9) for d in unseen])).mean() > 0.9


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was executed",))


def damaged(toy, **changes) -> dict:
    with np.load(toy) as file:
        return {**file, **changes}


@pytest.mark.parametrize("damage, message", [
    (lambda toy: b"", "not an n-gram classifier"),
    (lambda toy: b"PK\x03\x04 not a zip", "not an n-gram classifier"),
    (lambda toy: toy.read_bytes()[:200], "not an n-gram classifier"),
    (lambda toy: pickle.dumps(Bomb()), "not an n-gram classifier"),
    (lambda toy: damaged(toy, weights=np.array([Bomb()], object)), "not an n-gram classifier"),
    (lambda toy: damaged(toy, weights=np.zeros(7, np.float32)), r"weights of shape \(7,\)"),
    (lambda toy: damaged(toy, bias=np.float64(np.nan)), "not finite"),
    (lambda toy: damaged(toy, description=np.frombuffer(b'{"format": "x", "version": 1}', np.uint8)), "x of version 1"),
    (lambda toy: damaged(toy, description=np.frombuffer(b"[]", np.uint8)), "not an n-gram classifier"),
])
def test_damaged_files_are_refused(toy, tmp_path, damage, message):
    content, path = damage(toy), tmp_path / "m.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        NgramClassifier(path)


def test_missing_files_and_bad_parameters_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such n-gram classifier"):
        NgramClassifier(tmp_path / "none.npz")
    good = write(tmp_path / "good.jsonl", ["a"])
    for change in ({"ngrams": (2, 1)}, {"features": 0}, {"regularization": 0}):
        with pytest.raises(InputError, match="train_ngrams: "):
            train(good, tmp_path / "m.npz", **change)
    assert not (tmp_path / "m.npz").exists()
