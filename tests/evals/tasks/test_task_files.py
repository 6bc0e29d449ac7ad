"""MuBench's files: names, rows, alignment, and errors in them."""

import json

import numpy as np
import pytest
from lm_eval.api.model import TemplateLM

from evals.scoring.requests import encode_pairs, few_shot_prompt
from evals.tasks.alignment import align_items
from evals.tasks.language_families import FAMILIES, LANGUAGES, by_family, family
from evals.tasks.task_files import Item, Task, find_tasks, read_items, write_items
from mlx_pretrain.errors import InputError


def row(id, label=0, **more):
    return {"_id": id, "prompt": f"prompt {id}", "choices": ["one", "two", "three"], "label": label} | more


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in rows))


def test_the_languages_are_mubenchs():
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 61 and len(FAMILIES) == 20
    assert by_family(["xx", "sw", "en", "de"]) == ["en", "de", "sw", "xx"]
    assert (family("ceb"), family("xx")) == ("Austronesian", "other")


def test_files_are_found_by_task_and_language(tmp_path):
    for name in ("lighteval_en_test", "lighteval_sw_test", "lighteval_en_dev", "mix_de_2_test",
                 "mix_lighteval_de_2_test", "local_template_ceb_test"):
        write(tmp_path / "ARCEasyDataset", f"{name}.jsonl", [row(1)])
    found = find_tasks([str(tmp_path / "*" / "*_test.jsonl")])
    assert {task.mode: list(files) for task, files in found.items()} == {
        "lighteval": ["en", "sw"], "local_template": ["ceb"], "mix_2": ["de"], "mix_lighteval_2": ["de"]}
    assert next(iter(find_tasks([str(tmp_path / "*/lighteval_*")], split="dev").values())).keys() == {"en"}
    with pytest.raises(InputError, match=r"ARCEasyDataset_lighteval: no file for de; available: en, sw"):
        find_tasks([str(tmp_path / "*/lighteval_*")], languages=["en", "de"])
    write(tmp_path / "ARCEasyDataset", "other_en_test.jsonl", [row(1)])
    with pytest.raises(InputError, match=r"other_en_test\.jsonl: not named"):
        find_tasks([str(tmp_path / "*/*")])
    with pytest.raises(InputError, match="no file of the split 'train'"):
        find_tasks([str(tmp_path / "*/lighteval_*")], split="train")


@pytest.mark.parametrize("dataset, metric", [
    ("SNLIDataset", "acc"), ("MNLIDataset", "acc"), ("WinoGrandeDataset", "acc"), ("BMLAMA", "acc"),
    ("HellaswagDataset", "acc_norm"), ("MMLUProDataset", "acc_norm")])
def test_the_metric_is_mubenchs(dataset, metric):
    assert Task(dataset, "lighteval").main_metric == metric


def test_written_items_are_read_again(tmp_path):
    items = [Item("a", "prompt", ("one", "two\u2028lines"), 1, " "), Item("b", "", ("x", "y"), 0, "")]
    for mode, name in {"lighteval": "lighteval_zh_test", "mix_lighteval_2": "mix_lighteval_zh_2_test",
                       "en_template": "en_template_zh_test", "mix_3": "mix_zh_3_test"}.items():
        write_items(tmp_path, Task("BMLAMADataset", mode), "zh", items)
        path = tmp_path / "BMLAMADataset" / f"{name}.jsonl"
        found, rejected = read_items(path, "zh")
        assert list(found.values()) == items and not rejected
        assert list(find_tasks([str(path)])) == [Task("BMLAMADataset", mode)]


def test_rows_that_are_no_items_are_rejected_with_their_line_and_reason(tmp_path):
    bad = {
        "not json": "Expecting value", "[1]": "not a JSON object", json.dumps({"_id": 1}): "no prompt, choices, label",
        json.dumps(row(2, label=3)): "label 3 is not one of 0 to 2",
        json.dumps(row(2, label=True)): "label True is not one",
        json.dumps(row(2, choices=["one", " "])): "none may be empty",
        json.dumps(row(2, choices=["one"])): "two choices are needed",
        json.dumps(row(2, choices="ab")): "choices must be a list", json.dumps(row(2, prompt=5)): "must be text",
        json.dumps(row("good")): "appears twice",
    }
    write(tmp_path, "lighteval_en_test.jsonl", [row("good"), "", *bad])
    path = tmp_path / "lighteval_en_test.jsonl"
    items, rejected = read_items(path, "en")
    assert list(items) == ["good"] and len(rejected) == len(bad)
    for number, (where, reason), expected in zip(range(3, 99), rejected, bad.values()):
        assert where == f"{path}:{number}" and expected in reason


def test_an_item_missing_or_malformed_in_one_language_is_dropped_in_all(tmp_path):
    write(tmp_path, "lighteval_en_test.jsonl", [row(n) for n in range(8)])
    write(tmp_path, "lighteval_de_test.jsonl",
          [row(n) for n in (7, 6, 5, 0, 1)] + [row(2, label=9), row(3, label=1), row(4, choices=["a", "b"])])
    aligned = align_items(find_tasks([str(tmp_path / "*")])[Task(tmp_path.name, "lighteval")])
    assert aligned.languages == ("en", "de")
    for language in aligned.languages:
        assert [item.id for item in aligned.items[language]] == ["0", "1", "5", "6", "7"]
    assert aligned.dropped == {"2": ("de",), "3": ("en", "de"), "4": ("en", "de")}
    reasons = dict(aligned.rejected)
    assert reasons["3"] == reasons["4"] == "choices or label differ between languages" and len(reasons) == 3
    limited = align_items(find_tasks([str(tmp_path / "*")])[Task(tmp_path.name, "lighteval")], limit=2)
    assert [item.id for item in limited.items["de"]] == ["0", "5"]
    write(tmp_path, "lighteval_sw_test.jsonl", [row("other")])
    with pytest.raises(InputError, match="no item exists in all languages"):
        align_items(find_tasks([str(tmp_path / "*")])[Task(tmp_path.name, "lighteval")])


def test_what_joins_prompt_and_choice(tmp_path):
    write(tmp_path, "x.jsonl", [row(1), row(2, delimiter="\n"), row(3, prompt="")])
    for language, joins in {"en": " ", "ja": ""}.items():
        items, _ = read_items(tmp_path / "x.jsonl", language)
        assert [item.delimiter for item in items.values()] == [joins, "\n", ""]
    write(tmp_path, "y.jsonl", [
        row(1, choices=[" one", "two", "  three"]), row(2, prompt="prompt 2 ", choices=["one", "two"]),
        row(3, choices=[" a", "b"], delimiter=" "),
        row(4, choices=["  a", "b"], delimiter="\n"), row(5, prompt="  ", choices=[" a", "b"])])
    items, _ = read_items(tmp_path / "y.jsonl", "en")
    joined = [[item.prompt + item.delimiter + choice for choice in item.choices] for item in items.values()]
    assert joined == [["prompt 1 one", "prompt 1 two", "prompt 1 three"], ["prompt 2 one", "prompt 2 two"],
                      ["prompt 3 a", "prompt 3 b"], ["prompt 4\n  a", "prompt 4\nb"], ["a", "b"]]
    items, _ = read_items(tmp_path / "y.jsonl", "ja")  # without a delimiter, what is in the file
    assert items["1"].choices == (" one", "two", "  three") and items["2"].prompt == "prompt 2 "
    shown = Item("s", "two and two is", ("three", "four"), 1, " ")
    assert few_shot_prompt(Item("t", "one and one is", ("two", "one"), 0, " "), [shown]) == (
        "two and two is four\n\none and one is")


class Bytes:
    """A tokenizer that joins a space with the letter behind it, and "qu" across any border."""

    def encode_batch(self, texts, num_threads=1):
        merged = {" ": 300, "q": 400}
        found = []
        for text in texts:
            ids, at = [], 0
            while at < len(text):
                two = text[at : at + 2]
                if two[0] in merged and len(two) == 2 and (two[0] == " " or two[1] == "u"):
                    ids.append(merged[two[0]] + ord(two[1]))
                    at += 2
                else:
                    ids.append(ord(two[0]))
                    at += 1
            found.append(np.array(ids, np.int32))
        return found


class Model:
    def __init__(self, before):
        self.tokenizer, self.prefix_ids, self.bos_id = Bytes(), before, 1


PAIRS = [("a cat", " sat"), ("a cat ", "sat"), ("a cat  ", " sat"), ("", "x y"), ("a", "\n\nb"), ("ab", "c")]


@pytest.mark.parametrize("before", [(), (1,)])
def test_pairs_are_cut_as_the_harness_cuts_them(before):
    class Harness(TemplateLM):
        backend, tokenizer, eot_token_id, prefix_token_id = "causal", None, 1, 1
        _loglikelihood_tokens = generate_until = loglikelihood_rolling = None

        def tok_encode(self, text, add_special_tokens=None, **_):
            special = [] if add_special_tokens is False else list(before)
            return special + Bytes().encode_batch([text])[0].tolist()

    Harness.__abstractmethods__ = frozenset()
    harness = Harness()
    for (context, continuation), request in zip(PAIRS, encode_pairs(Model(before), PAIRS)):
        expected = harness._encode_pair(context, continuation) if context else ([1], harness.tok_encode(
            continuation, add_special_tokens=False))
        assert (request.context.tolist(), request.continuation.tolist()) == expected


def test_a_token_across_the_border_belongs_to_the_continuation():
    (request,) = encode_pairs(Model(()), [("aq", "u")])
    assert request.context.tolist() == [ord("a")] and len(request.continuation) == 1
    (request,) = encode_pairs(Model(()), [("q", "u")])
    assert request.context.tolist() == [1] and len(request.continuation) == 1
