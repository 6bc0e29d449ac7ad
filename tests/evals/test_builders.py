"""Items made from aligned documents and from BMLAMA's tables."""

import json
import lzma
import pathlib

import numpy as np
import pytest

from evals import bmlama, code_switch, completion
from evals.tasks.alignment import align_items
from evals.tasks.task_files import Item, Task, find_tasks, write_items
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError

TABLE = """Prompt\tAns\tCandidate Ans\tSubject\r
The sun of {0} sets in <mask>.\tVenice\tRome, "Paris", Venice\tsun\r
One <mask> alone.\tx\tx\tone\r
<mask> is where {0} rose.\tOslo\tRome, Oslo\trose\r
""".replace('"Paris"', "Paris")


def tables(folder, **changes):
    for language in ("en", "zh"):
        text = changes.get(language, TABLE).format(language)
        if language == "zh":  # as published
            text = text.replace("Candidate Ans", "Candidate\tAns").replace("in <mask>", "in<mask>")
        (folder / f"{language}.tsv.xz").write_bytes(lzma.compress(text.encode()))
    return str(folder)


def read(folder):
    ((task, files),) = find_tasks([str(folder / "*/*_test.jsonl")]).items()
    return task, align_items(files)


def convert(source, output, **settings):
    return bmlama.main(bmlama.BmlamaConfig(source, output, **settings))


def test_bmlama_is_shuffled_alike_in_all_languages(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    assert convert(tables(source), str(tmp_path / "out"), seed=1) == {"en": 2, "zh": 2}
    task, aligned = read(tmp_path / "out")
    assert task == Task("BMLAMADataset", "lighteval") and task.main_metric == "acc" and not aligned.dropped
    for en, zh in zip(aligned.items["en"], aligned.items["zh"]):
        assert en.id == zh.id and en.label == zh.label and len(en.choices) == len(zh.choices)
    first, last = aligned.items["en"]
    assert (first.id, first.prompt, first.delimiter) == ("0", "The sun of en sets in", " ")
    assert sorted(first.choices) == ["Paris.", "Rome.", "Venice."] and first.choices[first.label] == "Venice."
    assert (last.id, last.prompt, last.delimiter) == ("2", "", "")
    assert last.choices[last.label] == "Oslo is where en rose."
    assert aligned.items["zh"][0].delimiter == ""
    orders = set()
    for seed in range(8):
        convert(str(source), str(tmp_path / str(seed)), seed=seed)
        orders.add(read(tmp_path / str(seed))[1].items["en"][0].choices)
    assert len(orders) > 2


def test_bmlama_keeps_what_was_made_of_the_same_table(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    convert(tables(source), str(out))
    files = {path.name: path for path in out.rglob("*.jsonl")}
    before = {name: path.read_bytes() for name, path in files.items()}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["lighteval_zh_test.jsonl"].unlink()
    assert convert(str(source), str(out)) == {"en": 2, "zh": 2}
    assert capsys.readouterr().err.endswith(
        f"{files['lighteval_en_test.jsonl']}: made before from the same inputs and settings, kept\n"
        "en: 2 items\nzh: 2 items\n")
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert files["lighteval_en_test.jsonl"].stat().st_mtime_ns == times["lighteval_en_test.jsonl"]
    tables(source, zh=TABLE.replace("rose", "stands"))
    with pytest.raises(InputError, match=r"lighteval_zh_test\.jsonl: exists, made with other inputs zh; set overwrite"):
        convert(str(source), str(out))
    assert {name: path.read_bytes() for name, path in files.items()} == before
    convert(str(source), str(out), overwrite=True)
    assert [name for name, path in files.items() if path.read_bytes() != before[name]] == ["lighteval_zh_test.jsonl"]


@pytest.mark.parametrize("text, message", [
    (TABLE.replace("<mask>.", "mask."), r"en\.tsv\.xz:2: <mask> occurs 0 times"),
    (TABLE.replace("Venice\tRome", "Rome\tRome"), "the last candidate is 'Venice', the answer 'Rome'"),
    (TABLE.replace("\tsun", ""), "3 columns, not 4"),
    (TABLE.replace("Prompt", "Text"), "the columns are not Prompt, Ans"),
])
def test_malformed_tables_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        convert(tables(tmp_path, en=text), str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    with pytest.raises(InputError, match="no <language>"):
        convert(str(tmp_path / "absent"), str(tmp_path / "out"))


def make_completion(documents, output, **settings):
    return completion.main(completion.CompletionConfig(Corpus(files=documents), str(output), **settings))


def corpus(folder, lines_of):
    for language, documents in lines_of.items():
        (folder / f"{language}.jsonl").write_text("".join(
            json.dumps({"id": str(n), "source": "s", "text": "\n".join(lines)}) + "\n"
            for n, lines in enumerate(documents)))
    return str(folder / "*.jsonl")


def test_completion_takes_the_same_lines_in_all_languages(tmp_path):
    text = lambda language, n, m: f"{language} document {n}, line number {m}"  # noqa: E731
    lines_of = {language: [[text(language, n, m) for m in range(3)] for n in range(6)] for language in ("en", "fr")}
    lines_of["fr"][4].append("one line more")
    lines_of["fr"][5][1] = "short"
    assert make_completion(corpus(tmp_path, lines_of), tmp_path / "out", prompt_characters=30) == 9
    task, aligned = read(tmp_path / "out")
    assert task.main_metric == "acc_norm"
    for language, items in aligned.items.items():
        for item in items:
            n, m = (int(x) for x in item.id.removeprefix("s/").split(":"))
            assert item.choices[item.label] == text(language, n, m) and item.delimiter == "\n"
            # Two lines are more than 30 characters.
            assert item.prompt == lines_of[language][n][m - 1]
            assert len(set(item.choices)) == 4 and not any("document 4" in choice for choice in item.choices)
            assert sum(f"document {n}," in choice for choice in item.choices) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    documents = str(tmp_path / "*.jsonl")
    assert make_completion(documents, tmp_path / "out", prompt_characters=30, languages=["en", "fr"]) == 9
    with pytest.raises(InputError, match=r"made with settings prompt_characters = 30 \(now 31\); set overwrite=True"):
        make_completion(documents, tmp_path / "out", prompt_characters=31)
    assert {path: path.read_bytes() for path in before} == before
    for en, fr in zip(aligned.items["en"], aligned.items["fr"]):
        assert [choice.replace("en", "fr", 1) for choice in en.choices] == list(fr.choices)


def test_completion_without_aligned_lines_is_refused(tmp_path):
    documents = corpus(tmp_path, {"en": [["a line of text", "another line of text"]], "fr": [["one line of text"]]})
    with pytest.raises(InputError, match="no line is left that is aligned in en, fr"):
        make_completion(documents, tmp_path / "out")
    with pytest.raises(InputError, match="no documents in sw; available: en, fr"):
        make_completion(documents, tmp_path / "out", languages=["en", "sw"])


def test_completion_reads_all_files_of_a_language(tmp_path):
    lines_of = {language: [[f"{language} document {n}, line {m}" for m in range(3)] for n in range(6)]
                for language in ("en", "fr")}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        corpus(folder, lines_of)
    lines = (parts / "en.jsonl").read_text().splitlines(keepends=True)
    (parts / "en.jsonl").unlink()
    for number, part in enumerate((lines[:2], lines[2:])):
        (parts / f"en.{number}.jsonl").write_text("".join(part))
    for folder in (whole, parts):
        assert make_completion(f"{folder}/*.jsonl", folder / "out") == 12
    written = [{path.name: path.read_bytes() for path in folder.rglob("*_test.jsonl")} for folder in (whole, parts)]
    assert written[0] == written[1] and len(written[0]) == 2


@pytest.fixture
def cloze(tmp_path):
    """Items in three languages, each part of which names its origin."""
    for language in ("en", "de", "zh"):
        items = [Item(str(n), f"{language} prompt {n}", tuple(f"{language} {n}.{c}" for c in range(5)), n % 5,
                      "" if language == "zh" else " ") for n in range(400)]
        write_items(tmp_path / "plain", Task("ARCEasyDataset", "lighteval"), language, items)
    return tmp_path


def mix(patterns, output, **settings):
    return code_switch.main(code_switch.CodeSwitchConfig(patterns, output, **settings))


def test_half_of_the_parts_are_in_another_language(cloze):
    glob = [str(cloze / "plain/*/*.jsonl")]
    for most in (1, 2):
        counts = mix(glob, str(cloze / "mixed"), max_languages=most, seed=3)
        assert counts == {f"ARCEasyDataset_mix_lighteval_{most}": 400}
        aligned = align_items(find_tasks([str(cloze / "mixed/*/*")])[Task("ARCEasyDataset", f"mix_lighteval_{most}")])
        shares = []
        for item in aligned.items["de"]:
            parts = [part.split()[0] for part in (item.prompt, *item.choices)]
            assert [part.split()[1] for part in item.choices] == [f"{item.id}.{c}" for c in range(5)]
            assert len(set(parts) - {"de"}) <= most and item.label == int(item.id) % 5
            assert item.delimiter == ("" if parts[0] == "zh" else " ")
            shares.append(np.mean([part != "de" for part in parts]))
        assert np.mean(shares) == pytest.approx(0.5, abs=0.04) and {0.0, 1.0} <= set(shares)
    before = {path: path.read_bytes() for path in cloze.glob("mixed/*/*")}
    mix(glob, str(cloze / "mixed"), max_languages=2, seed=3)
    assert {path: path.read_bytes() for path in cloze.glob("mixed/*/*")} == before
    with pytest.raises(InputError, match=r"made with settings seed = 3 \(now 4\); set overwrite=True"):
        mix(glob, str(cloze / "mixed"), max_languages=2, seed=4)
    assert {path: path.read_bytes() for path in cloze.glob("mixed/*/*")} == before
    mix(glob, str(cloze / "mixed"), max_languages=2, seed=4, overwrite=True)
    changed = {path.name for path in cloze.glob("mixed/*/*.jsonl") if path.read_bytes() != before[path]}
    assert changed == {f"mix_lighteval_{language}_2_test.jsonl" for language in ("en", "de", "zh")}


def test_what_cannot_be_mixed_is_refused(cloze):
    glob = [str(cloze / "plain/*/*.jsonl")]
    with pytest.raises(InputError, match="less than the 3 languages"):
        mix(glob, str(cloze / "mixed"), max_languages=3)
    mix(glob, str(cloze / "mixed"), max_languages=1)
    with pytest.raises(InputError, match="only modes that are not mixed yet can be"):
        mix([str(cloze / "mixed/*/*")], str(cloze / "again"), max_languages=1)


def test_the_shipped_tasks_are_those_of_the_sample_text(tmp_path):
    """The sample tasks are remade as samples/tasks/README.md describes."""
    shipped = pathlib.Path(__file__).parents[2] / "samples"
    make_completion(f"{shipped}/text/heldout/*.jsonl.xz", tmp_path,
                    languages=["en", "de", "nl", "fr", "es", "it", "pt", "pl", "cs", "id"])
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert made == {path.name: path.read_bytes() for path in (shipped / "tasks").rglob("*.jsonl")}
