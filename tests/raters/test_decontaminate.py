"""Leaked evaluation items are found in any formatting, short ones are skipped, and the report names their places."""

import dataclasses
import json
import pathlib
import re

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters.decontaminate import DecontaminateConfig, main
from tests.raters.rated import read_removed, write_documents

QUESTION = "Which of the seven hills of Rome was, according to legend, the one on which Romulus founded the city?"
CHINESE = "北京市位于华北平原的北部边缘，是中华人民共和国的首都，也是全国的政治中心、文化中心和国际交往中心。"
FILLER = "Plain sentences about nothing in particular stand before it and behind it in a longer document. "


def run(
    folder: pathlib.Path, documents: list[str], items: list[dict] | str, **more
) -> tuple[list[dict], list[dict], dict]:
    """Returns (removal list, items found, report)."""
    records = [{"id": f"d{i}", "lang": "en", "text": text} for i, text in enumerate(documents, 1)]
    write_documents(folder / "in/en.jsonl", records)
    name = "items.txt" if isinstance(items, str) else "items.jsonl"
    (folder / name).write_text(items) if isinstance(items, str) else write_documents(folder / name, items)
    main(DecontaminateConfig(Corpus(folder / "in", "*"), str(folder / "out"), items=[str(folder / name)], **more))
    found = [json.loads(line) for line in (folder / "out/items.jsonl").read_text().splitlines()]
    return read_removed(folder / "out"), found, json.loads((folder / "out/report.json").read_text())


def test_a_leak_is_found_whatever_its_dress(tmp_path):
    dressed = "which of the SEVEN hills\nof Rome was -- according to legend -- the one on which Romulus"
    items = [{"id": "q7", "question": QUESTION, "answer": "Palatine"}, {"id": "q8", "question": "Who?"}]
    removed, found, report = run(tmp_path, [FILLER * 3, FILLER + dressed + ". " + FILLER, FILLER + QUESTION[:60]],
                                 items, item_fields=("question", "answer"))
    assert [one["number"] for one in removed] == [2]
    hit = removed[0]["items"][0]
    assert hit["id"] == "q7" and hit["ngrams"] == 4
    assert hit["first_ngram"] == "which of the seven hills of rome was according to legend the one"
    assert found == [{"file": str(tmp_path / "items.jsonl"), "id": "q7", "n_documents": 1,
                      "documents": [{"file": "en.jsonl", "number": 2, "id": "d2"}]}]
    assert report["items"][str(tmp_path / "items.jsonl")] == {"items": 2, "found": 1, "too_short": 1}
    assert report["hit"] == 1 and report["languages"] == {"en": {"documents": 3, "hit": 1}}


def test_scripts_without_spaces_need_twice_as_many_characters(tmp_path):
    letters = re.sub(r"\W", "", CHINESE)
    removed, _, _ = run(tmp_path, [f"前言。{letters[3:29]}后记", f"前言。{letters[3:28]}后记", CHINESE], CHINESE + "\n")
    assert [one["number"] for one in removed] == [1, 3]
    assert removed[0]["items"][0] == {"file": str(tmp_path / "items.txt"), "id": "1", "ngrams": 1,
                                      "first_ngram": " ".join(letters[3:29])}


def test_shorter_items_are_looked_for_whole_and_the_shortest_not_at_all(tmp_path):
    items = "one two three four five six seven eight\none two three four five six seven\n"
    documents = ["zero one two three four five six seven eight nine", "one two three four five six seven",
                 "two three four five six seven eight"]
    removed, _, report = run(tmp_path, documents, items)
    assert [one["number"] for one in removed] == [1] and [x["id"] for x in removed[0]["items"]] == ["1"]
    assert report["items"][str(tmp_path / "items.txt")]["too_short"] == 1


def test_set_phrases_show_in_the_report(tmp_path):
    phrase = "all rights reserved no part of this publication may be reproduced in any form"
    _, _, report = run(tmp_path, [f"text {i} {phrase} {FILLER}" for i in range(5)], phrase + "\n")
    assert report["most_frequent_ngrams"][0]["documents"] == 5
    assert report["most_frequent_ngrams"][0]["ngram"] in phrase


def test_items_that_cannot_be_read_are_refused(tmp_path):
    write_documents(tmp_path / "in.jsonl", [{"id": "a", "text": "t"}])
    write_documents(tmp_path / "items.jsonl", [{"prompt": "long enough"}])
    config = DecontaminateConfig(Corpus(tmp_path, "in.jsonl"), str(tmp_path / "out"),
                                 items=[str(tmp_path / "items.jsonl")])
    with pytest.raises(InputError, match=r"items.jsonl: no item has a text in text; set decontaminate.item_fields"):
        main(config)
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        main(dataclasses.replace(config, items=[str(tmp_path / "none.jsonl")]))
    with pytest.raises(InputError, match=r"decontaminate.least_words = 14"):
        dataclasses.replace(config, least_words=14)
    assert not (tmp_path / "out").exists()
