"""MuRater(E) and MuRater(M): the documents rated, the preferences carried over, the documents held out."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer
from raters.pairs import PairsConfig, choose_pairs, heldout_mask, main, read_documents, write_pairs
from raters.preferences.pair_file import FORMAT, PAIR_TYPES
from raters.preferences.translation import AlignedDocuments, Translator
from raters.rater_plugins.base import Rater
from raters.rater_plugins.existing_scores import ExistingScores, PairJudgements

LANGUAGES = ("de", "en", "fi", "ja")
COUNT = 40  # documents; those of Finnish are the first 30


class Longest(Rater):
    """Rates by length, and records the languages of the documents."""

    name = "longest"

    def __init__(self):
        self.languages = collections.Counter()

    def score(self, documents):
        self.languages.update(document.language for document in documents)
        return np.array([float(len(document.text)) for document in documents])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """English document i has i + 1 letters, its translations are as long in reverse; "grade" is a given score."""
    folder = tmp_path_factory.mktemp("corpus")
    for language in LANGUAGES:
        rows = range(30 if language == "fi" else COUNT)
        with (folder / f"{language}.jsonl").open("w") as file:
            for i in rows:
                length = i + 1 if language == "en" else COUNT - i
                record = {"id": f"{i}", "source": "s", "lang": language, "text": language[0] * length, "grade": i % 3}
                file.write(json.dumps(record) + "\n")
    return str(folder)


def config(folder, **changes) -> PairsConfig:
    settings = {
        "corpus": Corpus(files=f"{folder}/en.jsonl"), "raters": [Longest()],
        "translator": AlignedDocuments(Corpus(files=f"{folder}/*.jsonl")),
        "output": "unused", "monolingual": 200, "cross_lingual": 240, "parallel": 60, "heldout_documents": 0.3,
        "validation": 0.5, "margins": {0.0: 1.0},
    }
    return PairsConfig(**{**settings, **changes})


def written(made: PairsConfig, tmp_path, validation=False) -> list[dict]:
    documents = read_documents(made)
    heldout = heldout_mask(made, documents)
    with atomic_writer(tmp_path / "pairs.jsonl") as file:
        write_pairs(file, made, {}, documents, choose_pairs(made, documents, heldout, validation))
    header, *rows = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert (header["format"], header["version"]) == (FORMAT, 1)
    return rows


def of(kind, rows):
    return [row for row in rows if row["kind"] == kind]


def key(document):
    return document["source"], document["id"]


def test_english_preferences_are_carried_to_every_language(corpus, tmp_path):
    """The translations are long where the English is short: rating them instead would turn every preference."""
    made = config(corpus)
    rows = written(made, tmp_path)
    assert set(made.raters[0].languages) == {"en"}
    assert len(of("monolingual", rows)) == 200 and len(of("cross-lingual", rows)) == 240
    for row in of("monolingual", rows) + of("cross-lingual", rows):
        assert row["p_b"] == row["raters"]["longest"] == (int(row["b"]["id"]) > int(row["a"]["id"]))
        for side in (row["a"], row["b"]):
            length = int(side["id"]) + 1 if side["lang"] == "en" else COUNT - int(side["id"])
            assert side["text"] == side["lang"][0] * length


def test_kinds_are_what_they_are_called_and_balanced_over_languages(corpus, tmp_path):
    rows = written(config(corpus), tmp_path)
    for row in rows:
        same_language, same_document = row["a"]["lang"] == row["b"]["lang"], key(row["a"]) == key(row["b"])
        assert (same_language, same_document) == {
            "monolingual": (True, False), "cross-lingual": (False, False), "parallel": (False, True),
        }[row["kind"]]
        if row["kind"] == "parallel":
            assert row["p_b"] == 0.5 and row["raters"] == {}
    for kind in PAIR_TYPES:
        chosen = of(kind, rows)
        counts = collections.Counter(side["lang"] for row in chosen for side in (row["a"], row["b"]))
        assert set(counts) == set(LANGUAGES) and max(counts.values()) - min(counts.values()) <= 2
        sides = {frozenset((row[s]["lang"], *key(row[s])) for s in "ab") for row in chosen}
        assert len(sides) == len(chosen)
        first = collections.Counter(row["a"]["lang"] for row in chosen)
        assert min(first.values()) > 0.6 * max(first.values())  # neither side belongs to a language


def test_validation_documents_are_in_no_training_pair(corpus, tmp_path):
    made = config(corpus, heldout_languages=["ja"])
    train, validation = (written(made, tmp_path, split) for split in (False, True))

    def parts(rows):
        return {key(row[s]) for row in rows for s in "ab"}, {row[s]["lang"] for row in rows for s in "ab"}

    assert not parts(train)[0] & parts(validation)[0]
    assert parts(train)[1] == {"de", "en", "fi"} and parts(validation)[1] == set(LANGUAGES)
    assert [len(of(kind, validation)) for kind in PAIR_TYPES[:2]] == [100, 120]


def test_named_documents_are_held_out_too(corpus, tmp_path):
    (tmp_path / "ids").write_text("3\n17\n")
    made = config(corpus, heldout_documents=0.0, heldout_ids=str(tmp_path / "ids"), monolingual=4, cross_lingual=0,
                  parallel=2)
    assert {row[s]["id"] for row in written(made, tmp_path, validation=True) for s in "ab"} == {"3", "17"}
    assert not {row[s]["id"] for row in written(made, tmp_path) for s in "ab"} & {"3", "17"}


def test_multilingual_documents_are_rated_through_english(corpus, tmp_path):
    made = config(corpus, method="M", corpus=Corpus(files=[f"{corpus}/de.jsonl", f"{corpus}/fi.jsonl"]))
    rows = written(made, tmp_path)
    assert set(made.raters[0].languages) == {"en"}
    assert {side["lang"] for row in rows for side in (row["a"], row["b"])} == {"de", "fi"}
    assert [len(of(kind, rows)) for kind in PAIR_TYPES[:2]] == [200, 240] and of("parallel", rows)
    for row in rows:
        assert all(row[s]["text"] == row[s]["lang"][0] * (COUNT - int(row[s]["id"])) for s in "ab")
        assert (key(row["a"]) == key(row["b"])) == (row["kind"] == "parallel")
        if row["kind"] != "parallel":
            assert row["p_b"] == (int(row["b"]["id"]) > int(row["a"]["id"]))


def test_documents_without_a_translation_are_left_out_and_counted(corpus, tmp_path):
    made = config(corpus, method="M", corpus=Corpus(files=f"{corpus}/ja.jsonl"), rated_language="fi",
                  raters=[ExistingScores("grade")])
    documents = read_documents(made)
    assert len(documents) == 30 and documents.left_out == 10
    # The field of the document, not of its translation.
    np.testing.assert_array_equal(documents.scores[0], np.arange(30) % 3)


def test_raters_of_pairs_and_of_documents_stand_together_in_their_order(corpus, tmp_path):
    lines = [{"a": f"{i}", "b": f"{i + 1}", "winner": "a"} for i in range(39)]
    (tmp_path / "j.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = config(corpus, raters=[PairJudgements(tmp_path / "j.jsonl"), ExistingScores("grade"), Longest()],
                  heldout_documents=0.0, monolingual=800)
    judged = 0
    for row in of("monolingual", written(made, tmp_path)):
        a, b = int(row["a"]["id"]), int(row["b"]["id"])
        expected = {"grade": 0.5 if a % 3 == b % 3 else float(b % 3 > a % 3), "longest": float(b > a)}
        if abs(a - b) == 1:
            expected["judgements"] = float(b < a)
            judged += 1
        assert row["raters"] == expected and row["p_b"] == pytest.approx(np.mean(list(expected.values())))
    assert judged > 100  # 39 neighbours in each of four languages, 30 in one: random pairs would hold 5 %


def test_the_same_seed_gives_the_same_bytes_and_kinds_do_not_disturb_each_other(corpus, tmp_path):
    def rows(**changes):
        return written(config(corpus, **changes), tmp_path)

    first = rows()
    assert first == rows() != rows(seed=1)
    fewer = rows(cross_lingual=12)
    assert sorted(map(json.dumps, of("monolingual", first))) == sorted(map(json.dumps, of("monolingual", fewer)))


class Counting(Translator):
    """A translator that makes its translations, and counts them."""

    languages = ("fi", "ja")

    def __init__(self):
        self.made = []

    def covers(self, documents, language):
        return np.full(len(documents), language in self.languages)

    def translate(self, documents, language):
        self.made += [(document.id, language) for document in documents]
        return [dataclasses.replace(d, language=language, text=f"{language}:{d.text}") for d in documents]


def test_a_translator_is_asked_once_for_each_text_that_is_used(corpus, tmp_path):
    translator = Counting()
    made = config(corpus, translator=translator, monolingual=6, cross_lingual=3, parallel=3)
    sides = [row[s] for row in written(made, tmp_path) for s in "ab"]
    used = {(side["id"], side["lang"]) for side in sides}
    assert sorted(translator.made) == sorted(pair for pair in used if pair[1] != "en")
    assert {side["lang"] for side in sides} == {"en", "fi", "ja"}
    assert all(side["text"].startswith(f"{side['lang']}:") == (side["lang"] != "en") for side in sides)


def test_what_is_missing_is_reported(corpus, tmp_path):
    made = config(corpus, monolingual=10_000, parallel=10_000)
    documents = read_documents(made)
    heldout = heldout_mask(made, documents)
    counts = choose_pairs(made, documents, heldout, False).counts
    kept = int((~heldout).sum())
    assert counts["monolingual"]["wanted"] == 10_000 > counts["monolingual"]["pairs"] > 0
    assert counts["monolingual"]["languages"]["en"] <= kept * (kept - 1) / 2
    assert counts["parallel"]["pairs"] == sum(
        int((documents.available[~heldout][:, [i, j]].all(axis=1)).sum()) for i in range(4) for j in range(i)
    )


@pytest.mark.parametrize("changes, message", [
    ({"method": "X"}, "pairs.method = 'X'"),
    ({"monolingual": -1}, "pairs.monolingual = -1"),
    ({"heldout_documents": 2}, "pairs.heldout_documents = 2"),
    ({"raters": []}, "pairs.raters = []"),
    ({"raters": "[@Heuristics()]"}, "pairs.raters = '[@Heuristics()]': must be a list of raters"),
    ({"raters": [ExistingScores("x"), ExistingScores("x")]}, "names must differ, but are x, x"),
    ({"margins": {0.1: 1}}, "pairs.margins"),
    ({"languages": ["de", "xx"]}, "pairs.languages: no document is available in xx"),
    ({"heldout_languages": LANGUAGES}, "no language is left for training"),
    ({"heldout_ids": "none"}, "none: no such list of ids"),
])
def test_impossible_settings_are_refused(corpus, changes, message):
    with pytest.raises(InputError) as error:
        made = config(corpus, **changes)
        heldout_mask(made, read_documents(made))
    assert message in str(error.value)


def test_documents_in_another_language_are_refused_where_english_is_rated(corpus):
    with pytest.raises(InputError, match=r"de\.jsonl:1: a document in 'de'; the method 'E' rates documents in 'en'"):
        read_documents(config(corpus, corpus=Corpus(files=f"{corpus}/de.jsonl")))


def test_ids_that_do_not_tell_documents_apart_are_refused_with_judgements(tmp_path):
    for name, content in (("d", [{"id": "1", "source": s, "text": "x"} for s in "st"]),
                          ("j", [{"a": "1", "b": "2", "winner": "a"}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    made = {"corpus": Corpus(files=f"{tmp_path}/d.jsonl"), "translator": Counting(), "output": "unused"}
    assert len(read_documents(PairsConfig(**made, raters=[Longest()]))) == 2
    with pytest.raises(InputError, match="id '1' is in two sources"):
        read_documents(PairsConfig(**made, raters=[PairJudgements(tmp_path / "j.jsonl")]))


def test_pairs_are_kept_refused_or_replaced(corpus, tmp_path, capsys):
    paths = {"output": str(tmp_path / "train.jsonl"), "validation_output": str(tmp_path / "validation.jsonl")}

    def contents():
        return [pathlib.Path(path).read_bytes() for path in paths.values()]

    main(config(corpus, **paths))
    first = contents()
    capsys.readouterr()
    main(config(corpus, **paths))
    assert contents() == first and capsys.readouterr().err.count("made before from the same inputs") == 2
    pathlib.Path(paths["validation_output"]).unlink()
    main(config(corpus, **paths))
    assert contents() == first
    for change, message in (({"seed": 1}, r"settings seed = 0 \(now 1\)"),
                            ({"raters": [ExistingScores("grade")]}, "settings raters"),
                            ({"corpus": Corpus(files=f"{corpus}/[e]n.jsonl"), "method": "M"}, "settings method")):
        with pytest.raises(InputError, match=message):
            main(config(corpus, **paths, **change))
        assert contents() == first
    main(config(corpus, **paths, seed=1, overwrite=True))
    assert contents() != first
    pathlib.Path(paths["output"]).write_text("something else")
    with pytest.raises(InputError, match=r"train\.jsonl: has no record of what it was made from; set overwrite=True"):
        main(config(corpus, **paths, seed=1))
    main(config(corpus, **paths, seed=1, overwrite=True))
    assert "something else" not in pathlib.Path(paths["output"]).read_text()


def test_pairs_depend_on_the_languages_of_paths(corpus, tmp_path):
    for folder in ("x1", "x2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("".join(
            json.dumps({"id": f"{i}", "source": folder, "text": "t" * (i + 1)}) + "\n" for i in range(4)))

    def made(pattern):
        return config(corpus, corpus=Corpus(tmp_path, pattern), translator=Counting(), method="M", rated_language="und",
                      output=str(tmp_path / "pairs"), heldout_documents=0.0)

    main(made("*/a.jsonl"))
    with pytest.raises(InputError, match=r"pairs: exists, made with settings that lack corpus languages"):
        main(made("{language}/a.jsonl"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "p").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_writer(tmp_path / "p") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p", "old")]
