"""Document commands whose files processes share: the output is that of one process, byte for byte."""

import json
import pathlib

import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.parallel import cluster
from raters import decontaminate, languages
from tests.raters.rated import write_documents

TEXT = ("Which of the seven hills of Rome was, according to legend, the one on which Romulus founded the city that "
        "became the capital of an empire?")
GERMAN = "Die Donau ist nach der Wolga der zweitlängste Fluss in Europa und fließt durch zehn Länder bis zum Meer."


@pytest.fixture
def shard():
    yield cluster.take_shard
    cluster.take_shard(None)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Five files with documents to remove, in two folders, one with lines that cannot be read."""
    for number in range(5):
        documents = [{"id": f"{number}-{n}", "lang": "en", "text": f"{n}: {(TEXT, GERMAN)[(n + number) % 2]}"}
                     for n in range(4 + number)]
        write_documents(tmp_path / f"in/{number % 2}/{number}.jsonl", documents)
    with (tmp_path / "in/1/3.jsonl").open("a") as file:
        file.write("no JSON\n" + json.dumps({"lang": "en", "id": "\ud800", "text": GERMAN}) + "\n")
    write_documents(tmp_path / "items.jsonl", [{"id": "seven", "text": TEXT}, {"id": "river", "text": GERMAN}])
    return tmp_path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["languages", "decontaminate"])
def test_shards_and_a_last_call_make_what_one_process_makes(folder, shard, monkeypatch, command):
    def run(output: str, **more) -> None:
        if command == "languages":
            languages.main(languages.LanguagesConfig(
                Corpus(folder / "in", "*/*"), str(folder / output), write_documents=True, **more))
        else:
            decontaminate.main(decontaminate.DecontaminateConfig(
                Corpus(folder / "in", "*/*"), str(folder / output), items=[str(folder / "items.jsonl")], **more))

    module, work = {"languages": (languages, "check_file"), "decontaminate": (decontaminate, "search_file")}[command]
    read, function = [], getattr(module, work)
    monkeypatch.setattr(module, work, lambda name, *rest, **more: read.append(name) or function(name, *rest, **more))
    run("alone")
    names = ["0/0.jsonl", "0/2.jsonl", "0/4.jsonl", "1/1.jsonl", "1/3.jsonl"]
    assert read == names and not (folder / ".alone.parts").exists()
    read.clear()
    for number in (1, 0, 1):  # one starts again
        shard((number, 3))
        run("out")
        assert not (folder / "out").exists()
    assert read == ["0/2.jsonl", "1/3.jsonl", "0/0.jsonl", "1/1.jsonl"]
    shard(None)
    run("out")  # does what is left
    assert read[4:] == ["0/4.jsonl"]
    assert contents(folder / "out") == contents(folder / "alone")
    assert not (folder / ".out.parts").exists()
    # A file that changes after its shard is read again.
    shard((0, 2))
    run("changed")
    write_documents(folder / "in/0/0.jsonl", [{"id": "x", "lang": "en", "text": GERMAN}])
    read.clear()
    shard(None)
    run("changed")
    assert read == ["0/0.jsonl", "0/2.jsonl", "1/1.jsonl"]
    run("alone", overwrite=True)
    assert contents(folder / "changed") == contents(folder / "alone")
