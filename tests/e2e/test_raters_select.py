"""Selection and its stages as a user runs them, on the sample text: one after the other, killed, and misused."""

import json
import lzma
import pathlib
import signal
import zlib

import pytest

from mlx_pretrain.data.corpus import Corpus
from raters.select import SelectConfig, main
from tests.e2e.conftest import REPOSITORY, run, started
from tests.raters.rated import read_removed, write_documents, write_scores

LANGUAGES = ("en", "id", "zh")
DOCUMENTS = "--gin.DOCUMENTS=corpus/*.jsonl"
SELECT = ("raters.select", "--gin_file=gin/raters/select.gin", DOCUMENTS, "--gin.SCORES=scores")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Sample text with two duplicates, a mislabelled document and a leaked item, scored by its compression ratio."""
    folder = tmp_path_factory.mktemp("corpus")
    english = ""
    for language in LANGUAGES:
        with lzma.open(REPOSITORY / f"samples/text/heldout/{language}.jsonl.xz", "rt") as lines:
            records = [json.loads(line) | {"lang": language} for line, _ in zip(lines, range(30))]
        if language == "en":
            english = records[0]["text"][:900]
            near = {"id": "near", "text": records[3]["text"] + " (1)"}
            records[10:10] = [records[2] | {"id": "twin"}, records[3] | near]
        if language == "id":
            records.append({"id": "stray", "lang": "id", "source": "web", "text": english})
        write_documents(folder / f"corpus/{language}.jsonl", records)
        sizes = [(len(record["text"].encode()), len(zlib.compress(record["text"].encode()))) for record in records]
        write_scores(folder / "scores", f"{language}.jsonl", records, [small / size for size, small in sizes])
    zh = [json.loads(line) for line in (folder / "corpus/zh.jsonl").read_text().splitlines()]
    write_documents(folder / "items.jsonl", [{"id": "leak", "question": zh[4]["text"][20:80]},
                                             {"id": "clean", "question": "no such words " * 20}])
    return folder


@pytest.fixture(scope="module")
def finished(corpus) -> pathlib.Path:
    """The folder after all commands."""
    for module, *flags in (
        ("raters.duplicates", "--gin_file=gin/raters/duplicates.gin", "--gin.DUPLICATES=twins",
         "--gin.duplicates.scores=scores"),
        ("raters.languages", "--gin_file=gin/raters/languages.gin", "--gin.MISLABELLED=strays"),
        ("raters.decontaminate", "--gin_file=gin/raters/decontaminate.gin", "--gin.CONTAMINATED=leaks",
         "--gin.ITEMS=['items.jsonl']", "--gin.decontaminate.item_fields=['question']"),
        (*SELECT, "--gin.SELECTED=kept", "--gin.select.fraction=0.5",
         "--gin.select.exclude=['twins', 'strays', 'leaks']"),
    ):
        ended = run(module, *flags, *((DOCUMENTS,) if module != "raters.select" else ()), folder=corpus)
        assert ended.code == 0, ended.err
    return corpus


def removed(folder: pathlib.Path, name: str) -> set[tuple[str, str]]:
    return {(entry["file"], entry["id"]) for entry in read_removed(folder / name)}


def test_each_stage_finds_what_was_planted(finished):
    twins = removed(finished, "twins")
    assert len(twins) >= 2 and {"twin", "near"} & {name for _, name in twins}
    assert removed(finished, "strays") == {("id.jsonl", "stray")}
    assert {file for file, _ in removed(finished, "leaks")} == {"zh.jsonl"}
    items = [json.loads(line) for line in (finished / "leaks/items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == ["leak"]


def test_the_selection_leaves_out_what_the_stages_found(finished):
    manifest = json.loads((finished / "kept/selection.json").read_text())
    out = set.union(*(removed(finished, name) for name in ("twins", "strays", "leaks")))
    assert manifest["excluded"] == len(out)
    for one in manifest["languages"]:
        assert 0.5 * one["quota"] <= one["kept_tokens"] < one["tokens"]
    assert sorted(path.name for path in (finished / "kept/train").iterdir()) == list(LANGUAGES)


def test_the_report_is_written(finished):
    ended = run("raters.selection_report", "--gin.selection_report.folder=kept", folder=finished)
    assert ended.code == 0, ended.err
    assert "Texts to read" in (finished / "kept/report.html").read_text()


def test_killed_while_it_writes_it_leaves_nothing_that_could_be_read(tmp_path):
    """The next run writes the same as an undisturbed one."""
    records = [{"id": f"d{i}", "lang": "en", "text": f"{i} " * 40} for i in range(20_000)]
    write_documents(tmp_path / "corpus/en.jsonl", records)
    write_scores(tmp_path / "scores", "en.jsonl", records, [i % 977 for i in range(len(records))])
    settings = {"scores": str(tmp_path / "scores"), "fraction": 0.9}
    flags = [f"--gin.select.{name}={value}" for name, value in settings.items()]
    flags += ["--gin_file=gin/raters/select.gin", "--gin.DOCUMENTS=corpus/*", "--gin.select.output=kept"]
    with started("raters.select", *flags, folder=tmp_path) as process:
        process.wait_for((tmp_path / ".kept.parts/done/decide").exists)
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    assert not (tmp_path / "kept").exists() and (tmp_path / ".kept.parts").exists()
    assert run("raters.select", *flags, folder=tmp_path).code == 0
    assert not (tmp_path / ".kept.parts").exists()
    main(SelectConfig(Corpus(tmp_path / "corpus", "*"), **settings, output=str(tmp_path / "whole")))
    files = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")}
    assert len(files) == 3
    for path, content in files.items():
        assert (tmp_path / "kept" / path).read_bytes() == content, path


@pytest.mark.parametrize(("flags", "message"), [
    ((*SELECT[:-1], "--gin.SCORES=elsewhere"), "elsewhere/en.jsonl.scores.parquet: no such score file; the documents "
     "were not rated by this rater"),
    (("raters.duplicates", "--gin.Corpus.files=corpus/*", "--gin.duplicates.corpus=@Corpus()"),
     "Required bindings for `duplicates` not provided in config: ['output']"),
])
def test_mistakes_are_one_line(corpus, flags, message):
    before = sorted(corpus.rglob("*"))
    ended = run(*flags, folder=corpus)
    assert (ended.code, ended.err) == (1, f"error: {message}\n")
    assert sorted(corpus.rglob("*")) == before
