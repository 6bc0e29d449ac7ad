"""Duplicates are found in every script, one of each group stays, and unlike texts are left alone."""

import collections
import dataclasses
import gzip
import itertools
import json
import math
import pathlib
import random

import numpy as np
import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters import duplicates
from raters.duplicates import DuplicatesConfig, main
from raters.filtering import minhash
from tests.raters.filtering.test_near_duplicates import greedy
from tests.raters.rated import read_removed, write_documents, write_removed, write_scores

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru", "ta") for b in ("bel", "dor", "fin", "gas", "hum", "jot")]
HAN = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜金生麗水玉出崑岡"


def text(rng: random.Random, words: int = 120) -> list[str]:
    return [rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(words)]


def changed(rng: random.Random, words: list[str], share: float) -> list[str]:
    """Returns the words with a share of them, side by side, replaced."""
    size = round(share * len(words))
    start = rng.randrange(len(words) - size + 1)
    return words[:start] + text(rng, size) + words[start + size :]


def run(folder: pathlib.Path, texts: list[str], **more) -> tuple[dict[int, dict], dict]:
    """Returns (number -> entry of the removal list, report) of documents numbered from 1."""
    write_documents(folder / "en.jsonl", [{"id": f"d{i}", "text": t, "lang": "en"} for i, t in enumerate(texts, 1)])
    main(DuplicatesConfig(Corpus(folder, "*.jsonl"), str(folder / "out"), **more))
    entries = read_removed(folder / "out")
    return {entry["number"]: entry for entry in entries}, json.loads((folder / "out/report.json").read_text())


def jaccard(a: str, b: str, n: int = 5) -> float:
    """Returns the similarity of the sets of word n-grams, counted directly."""
    first, second = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def test_case_punctuation_width_and_spaces_make_no_difference(tmp_path):
    removed, report = run(tmp_path, [
        "The cat — it sat, on the mat!", "the  CAT it sat\non the mat", "ｔｈｅ cat it sat on the mat.",
        "The cat sat on the mat", "हिन्दी में लिखा है", "हिन्दी मे लिखा हे", "...", "!!!", "!!! "])
    assert {n: (entry["of"]["number"], entry["reason"]) for n, entry in removed.items()} == {
        2: (1, "exact duplicate"), 3: (1, "exact duplicate"), 9: (8, "exact duplicate")}
    assert report["exact"] == 3 and report["near"] == 0 and report["languages"]["en"]["documents"] == 9


def test_near_duplicates_against_counted_similarities(tmp_path):
    """Pairs well above the threshold are found, pairs well below are not, and no other document is."""
    rng = random.Random(0)
    texts, pairs = [], []
    for share in np.linspace(0, 0.5, 60):
        original = text(rng)
        pairs.append((len(texts) + 1, len(texts) + 2))
        texts += [" ".join(original), " ".join(changed(rng, original, share))]
    removed, report = run(tmp_path, texts)
    for first, second in pairs:
        similarity = jaccard(texts[first - 1], texts[second - 1])
        assert first not in removed
        if second in removed:
            assert removed[second]["of"]["number"] == first
            assert removed[second]["similarity"] == pytest.approx(similarity, abs=0.16)  # 4 standard deviations
        if similarity > 0.9:
            assert second in removed
        if similarity < 0.6:
            assert second not in removed
    assert report["groups"] == len(removed) > 10


def test_scripts_without_spaces(tmp_path):
    rng = random.Random(1)
    one, other = ("".join(rng.choice(HAN) for _ in range(300)) for _ in range(2))
    removed, _ = run(tmp_path, [one, other, one[:150] + "。" + one[150:290] + "龍"])
    assert list(removed) == [3] and removed[3]["reason"] == "near duplicate" and removed[3]["of"]["number"] == 1


def test_chains_do_not_carry_away_unlike_texts(tmp_path):
    """Neighbours in the chain are similar, its ends are not: parts stay, and each removed text is like one of them."""
    rng = random.Random(2)
    start, end = text(rng), text(rng)
    texts = [" ".join(end[:i] + start[i:]) for i in range(0, 121, 5)]
    assert jaccard(texts[0], texts[-1]) == 0
    assert all(jaccard(a, b) > 0.75 for a, b in itertools.pairwise(texts))
    removed, _ = run(tmp_path, texts)
    assert 3 <= len(texts) - len(removed) < len(texts) / 2
    for number, entry in removed.items():
        assert entry["of"]["number"] not in removed
        assert jaccard(texts[number - 1], texts[entry["of"]["number"] - 1]) > 0.6


@pytest.mark.parametrize(("seed", "scored", "bands", "rows"), [
    (5, True, 14, 8), (4, False, 2, 2)])  # in the second a document stays that has a leader, and gets another
def test_as_by_all_pairs_however_files_and_buckets_are_divided(tmp_path, monkeypatch, seed, scored, bands, rows):
    rng = random.Random(seed)
    texts = []
    for _ in range(12):  # families of texts, each a change of one before
        family = [text(rng, rng.choice([3, 20, 60]))]
        for _ in range(rng.randrange(12)):
            family.append(changed(rng, rng.choice(family), rng.choice([0, 0.02, 0.05, 0.1, 0.2])))
        texts += map(" ".join, family)
    rng.shuffle(texts)
    scores = np.array([rng.choice([0.0, 1.0, 2.0, math.nan]) if scored else 0.0 for _ in texts])
    sketches = minhash.Sketcher(5, bands, rows, seed=1).sketch(texts)
    alike = np.array([minhash.similarity(sketches.values, row[None]) for row in sketches.values])
    order = np.lexsort((np.arange(len(texts)), -np.nan_to_num(scores, nan=-1)))
    expected = greedy(sketches.keys, order, alike, 0.75)
    assert len(texts) / 4 < len(expected) < len(texts)

    records = [{"id": str(i), "text": t, "lang": "en"} for i, t in enumerate(texts)]
    for files in (1, 5):
        folder, size = tmp_path / str(files), -(-len(texts) // files)
        for i in range(files):
            part = slice(i * size, (i + 1) * size)
            write_documents(folder / f"in/{i}.jsonl", records[part])
            write_scores(folder / "scores", f"{i}.jsonl", records[part], scores[part])
        for part_bytes in (1 << 32, 10_000):
            monkeypatch.setattr(duplicates, "_PART_BYTES", part_bytes)
            output = folder / f"out{part_bytes}"
            main(DuplicatesConfig(Corpus(folder / "in", "*"), str(output), bands=bands, rows=rows,
                                  scores=str(folder / "scores") if scored else None))
            removed = read_removed(output)
            assert [int(entry["id"]) for entry in removed] == expected
            for entry in removed:
                document, kept = int(entry["id"]), int(entry["of"]["id"])
                assert kept not in expected and entry["similarity"] == round(float(alike[document, kept]), 4) >= 0.75
                assert (entry["reason"] == "exact duplicate") == (texts[document] == texts[kept])
            report = json.loads((output / "report.json").read_text())
            assert report["exact"] + report["near"] == len(expected) and report["crowded_buckets"] == 0
            assert report["largest_groups"][0]["documents"] == 1 + max(
                collections.Counter(entry["of"]["id"] for entry in removed).values())


def test_common_boilerplate_does_not_make_a_duplicate(tmp_path):
    rng = random.Random(3)
    boilerplate = text(rng, 40)
    texts = [" ".join(boilerplate + text(rng, 80)) for _ in range(50)]
    assert run(tmp_path, texts)[0] == {}


def test_the_best_scored_stays(tmp_path):
    words = " ".join(text(random.Random(4)))
    near = words + " and so on"
    texts = [words, near, "something else", words.upper()]
    records = [{"id": f"d{i}", "lang": "en", "text": t} for i, t in enumerate(texts, 1)]
    for scores, stays in (([1, 3, 0, 2], 2), ([1, np.nan, 0, 2], 4), ([5, 5, 5, 5], 1)):
        write_scores(tmp_path / "scores", "en.jsonl", records, scores)
        removed, _ = run(tmp_path, texts, scores=str(tmp_path / "scores"), overwrite=True)
        assert set(removed) == {1, 2, 4} - {stays} and all(one["of"]["number"] == stays for one in removed.values())


def test_the_documents_that_stay_and_removal_lists(tmp_path):
    write_documents(tmp_path / "in/a/en.jsonl.gz", [
        {"id": str(i), "lang": "en", "text": t, "url": "u"} for i, t in enumerate(["same text", "same text", "other"])])
    write_documents(tmp_path / "in/b/en.jsonl.gz", [{"id": "x", "text": "other"}, {"id": "\ud800", "text": "last"}])
    config = DuplicatesConfig(Corpus(files=tmp_path / "in/*/*"), str(tmp_path / "out"), write_documents=True)
    main(config)
    with gzip.open(tmp_path / "out/documents/a/en.jsonl.gz", "rt") as lines:
        assert [json.loads(line) for line in lines] == [
            {"id": "0", "lang": "en", "text": "same text", "url": "u"},
            {"id": "2", "lang": "en", "text": "other", "url": "u"}]
    with gzip.open(tmp_path / "out/documents/b/en.jsonl.gz", "rt") as lines:
        assert [json.loads(line)["id"] for line in lines] == ["\ud800"]
    # Documents removed by another stage are skipped: the first "other" was removed, so the second stays.
    lists = write_removed(tmp_path / "lists", [{"file": "a/en.jsonl.gz", "number": 3, "id": "2"}])
    main(dataclasses.replace(config, output=str(tmp_path / "out2"), exclude=(lists,)))
    entries = read_removed(tmp_path / "out2")
    assert [(one["file"], one["number"]) for one in entries] == [("a/en.jsonl.gz", 2)]
    # All documents of a file may be removed; `similarity=1` finds the same.
    lists = write_removed(tmp_path / "lists3", [{"file": "b/en.jsonl.gz", "number": 1, "id": "x"},
                                                {"file": "b/en.jsonl.gz", "number": 2, "id": "\ud800"}])
    for similarity in (0.75, 1.0):
        output = str(tmp_path / f"out{similarity}")
        main(dataclasses.replace(config, output=output, exclude=(lists,), similarity=similarity))
        assert [(one["file"], one["number"]) for one in read_removed(tmp_path / output)] == [("a/en.jsonl.gz", 2)]


def test_bad_records_are_counted_and_a_missing_list_is_refused(tmp_path):
    write_documents(tmp_path / "en.jsonl", [{"id": "a", "text": "t"}])
    with (tmp_path / "en.jsonl").open("a") as file:
        file.write('{"id": 3}\n')
    main(DuplicatesConfig(Corpus(tmp_path, "en.jsonl"), str(tmp_path / "out")))
    unreadable = json.loads((tmp_path / "out/report.json").read_text())["unreadable"]
    assert unreadable["count"] == 1 and 'en.jsonl:2: no "text" string' in unreadable["first"][0]
    with pytest.raises(InputError, match=r"gone: no folder with removal lists"):
        main(DuplicatesConfig(Corpus(tmp_path, "en.jsonl"), str(tmp_path / "out2"), exclude=("gone",)))
    with pytest.raises(InputError, match=r"duplicates.rows = 0"):
        DuplicatesConfig(None, "b", rows=0)
