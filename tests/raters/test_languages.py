"""Mislabelled and half translated documents are found; real text in 19 languages is left alone, Indonesian too."""

import itertools
import json
import lzma
import pathlib

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters.languages import Identifier, LanguagesConfig, language_subtag, main, pieces
from tests.raters.rated import read_removed, write_documents

SAMPLES = pathlib.Path(__file__).parents[2] / "samples/text/heldout"
LANGUAGES = sorted(path.name.split(".")[0] for path in SAMPLES.glob("*.jsonl.xz"))


def sample(language: str, number: int = 4) -> list[dict]:
    with lzma.open(SAMPLES / f"{language}.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(number))]


def run(folder: pathlib.Path, **more) -> tuple[list[dict], dict]:
    """Returns (removal list, report)."""
    main(LanguagesConfig(Corpus(folder / "in", "*"), str(folder / "out"), **more))
    return read_removed(folder / "out"), json.loads((folder / "out/report.json").read_text())


def test_real_text_in_many_languages_is_left_alone(tmp_path):
    for language in LANGUAGES:
        write_documents(tmp_path / f"in/{language}.jsonl", [
            {"id": record["id"], "text": record["text"]} for record in sample(language)])  # by the file's name
    removed, report = run(tmp_path)
    assert len(LANGUAGES) == 19 and not removed
    assert report["confirmed"] >= 0.95 * report["documents"] and "unknown_to_the_identifier" not in report


def test_a_wrong_label_and_a_half_translated_document_are_found(tmp_path, capsys):
    german, english = ("\n".join(record["text"] for record in sample(code)) for code in ("de", "en"))
    write_documents(tmp_path / "in/x.jsonl", [
        {"id": "german", "lang": "de", "text": german[:900]},
        {"id": "english", "lang": "de", "text": english[:900]},
        {"id": "untranslated", "lang": "de", "text": german[:300] + english[:900]},
        {"id": "quotes", "lang": "de", "text": german[:900] + english[:300]},
        {"id": "short", "lang": "de", "text": "OK 12"},
        {"id": "region", "lang": "de_AT", "text": german[:900]},
        {"id": "constructed", "lang": "tlh", "text": english[:900]},
        {"id": "swahili", "lang": "sw", "text": english[:900]},
    ])
    removed, report = run(tmp_path)
    assert [(one["id"], one["declared"], one["found"]) for one in removed] == [
        ("english", "de", "en"), ("untranslated", "de", "en"), ("swahili", "sw", "en")]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "sw: all its documents are removed, as they were identified as en (1)" in notes[0]
    assert report["languages"]["de"] == {"confirmed": 2, "removed": 2, "undecided": 1}
    assert report["languages"]["tlh"] == {"unknown_to_the_identifier": 1}
    assert report["removed_examples"]["de as en"][0]["text"] == english[:200]


def test_indonesian_is_not_lost_to_malay(tmp_path):
    """Short Indonesian texts are identified as Malay, or as neither surely."""
    with lzma.open(SAMPLES.parent / "train/id.jsonl.xz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    documents = [{"id": str(i), "lang": "id", "text": text[:80]} for i, text in enumerate(texts[:60])]
    write_documents(tmp_path / "in/id.jsonl", documents)
    removed, report = run(tmp_path)
    assert not removed and report["confirmed"] > 45
    strict, alone = run(tmp_path, confusable=(), overwrite=True)
    assert alone["confirmed"] < report["confirmed"] and {one["found"] for one in strict} <= {"ms"}


def test_pieces_are_spread_over_the_text_and_do_not_overlap():
    text = "".join(chr(0x4E00 + i) for i in range(1234))
    found = pieces(text, 4, 100)
    assert len(found) == 4 and found[0] == text[:100] and found[-1] == text[1200:]
    starts = [text.index(piece) for piece in found]
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert pieces("abcde", 4, 2) == ["ab", "cd", "e"] and pieces("", 4, 2) == []


def test_codes_of_scripts_and_regions_are_of_their_language():
    identifier = Identifier((("id", "ms"), ("zh", "wuu", "yue")))
    assert identifier.group("zh-Hant") == identifier.group("zh_TW") == identifier.group("YUE") == "zh"
    assert identifier.knows("ms") and not identifier.knows("tlh")


@pytest.mark.parametrize("code, subtag", [
    ("fra_Latn", "fr"), ("fra", "fr"), ("fre", "fr"), ("FR", "fr"), ("fr-CA", "fr"), ("deu", "de"), ("ger_Latn", "de"),
    ("cmn_Hani", "zh"), ("cmn", "zh"), ("zho_Hant", "zh"), ("zh_TW", "zh"), ("arb_Arab", "ar"), ("arz_Arab", "arz"),
    ("zsm_Latn", "ms"), ("ind_Latn", "id"), ("ekk_Latn", "et"), ("lvs_Latn", "lv"), ("swh_Latn", "sw"),
    ("npi_Deva", "ne"), ("pes_Arab", "fa"), ("als_Latn", "sq"), ("ory_Orya", "or"), ("khk_Cyrl", "mn"),
    ("srp_Cyrl", "sr"), ("nob_Latn", "nb"), ("iw", "he"), ("tlh", "tlh"), ("kin_Latn", "rw"),
])
def test_codes_of_other_standards_are_mapped(code, subtag):
    assert language_subtag(code) == subtag


@pytest.mark.parametrize("code", ["xx", "xyz", "english", "part-0", "train", "data", "c4", "", "['en']", "1"])
def test_what_is_no_language_is_refused(tmp_path, code):
    with pytest.raises(InputError, match="is no code of a language"):
        language_subtag(code)


def test_documents_under_names_of_fineweb_2_are_checked(tmp_path):
    french, english, chinese = ("\n".join(record["text"] for record in sample(code)) for code in ("fr", "en", "zh"))
    write_documents(tmp_path / "in/fra_Latn.jsonl", [{"id": "good", "text": french[:900]},
                                                     {"id": "wrong", "text": english[:900]}])
    write_documents(tmp_path / "in/x.jsonl", [{"id": "zh", "language": "cmn_Hani", "text": chinese[:900]},
                                              {"id": "no", "language": "nob_Latn", "text": english[:900]}])
    removed, report = run(tmp_path)
    assert [(one["id"], one["declared"], one["found"]) for one in removed] == [
        ("wrong", "fra_Latn", "en"), ("no", "nob_Latn", "en")]
    assert report["languages"]["fra_Latn"] == {"confirmed": 1, "removed": 1}
    assert report["languages"]["cmn_Hani"] == {"confirmed": 1}


@pytest.mark.parametrize("record, message", [
    ({"lang": "xx"}, r"c4-train\.00000\.json:2: 'xx' is no code of a language.*; the record says so"),
    ({}, r"c4-train\.00000\.json:2: 'c4-train' is no code of a language.*; the path says so"),
])
def test_a_language_that_nobody_knows_is_refused_and_nothing_written(tmp_path, record, message):
    write_documents(tmp_path / "in/c4-train.00000.json", [{"text": "x", "lang": "en"}, {"text": "x", **record}])
    with pytest.raises(InputError, match=message):
        main(LanguagesConfig(Corpus(tmp_path / "in", "{language}.*.json"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_document_whose_language_nothing_tells_is_not_judged(tmp_path):
    write_documents(tmp_path / "in/c4-train.00000.json", [{"text": "The quick brown fox jumps over the lazy dog."}])
    removed, report = run(tmp_path)
    assert not removed and report["languages"] == {"und": {"unknown_to_the_identifier": 1}}


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(InputError, match=r"languages.least_share = 2"):
        LanguagesConfig(None, "b", least_share=2)
    with pytest.raises(InputError, match=r"languages.chunks = 0"):
        LanguagesConfig(None, "b", chunks=0)
