"""The selection as a command: its output can be read at once, is whole or absent, and counts what it left out."""

import dataclasses
import datetime
import gzip
import json
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import read_documents
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster
from raters import select, selection_report
from raters.filtering import quotas
from raters.filtering.score_table import read_scores
from raters.scoring.shards import claim_root
from raters.select import SelectConfig, main
from tests.raters.rated import write_documents, write_removed, write_scores

RECORDS = {
    language: [{"id": f"{language}{i}", "lang": language, "source": ("web", "book")[i % 3 == 0],
                "text": letter * (20 + 7 * i % 40), "url": f"https://example.org/{i}"} for i in range(40)]
    for language, letter in (("de", "ä"), ("th", "ก"))
}


def make(folder: pathlib.Path, **more) -> SelectConfig:
    """Makes a rated corpus, German in two files of one name, Thai in one; returns the parameters of a selection."""
    rng = np.random.default_rng(0)
    parts = {"one/de.jsonl.gz": RECORDS["de"][:25], "more/de.jsonl": RECORDS["de"][25:], "one/th.jsonl": RECORDS["th"]}
    for name, records in parts.items():
        write_documents(folder / "corpus" / name, records)
        write_scores(folder / "scores", name, records, rng.normal(size=len(records)))
        write_scores(folder / "others", name, records, rng.normal(size=len(records)), rater="other@2")
    return SelectConfig(**{"corpus": Corpus(folder / "corpus", "*/*"), "scores": str(folder / "scores"),
                           "output": str(folder / "kept"), "fraction": 0.3, **more})


def scores_of(folder: pathlib.Path) -> dict[str, tuple[str, float, int]]:
    """Returns id -> (language, score, tokens)."""
    table = pa.concat_tables([pa.parquet.read_table(path) for path in sorted((folder / "scores").rglob("*.parquet"))])
    return {row["id"]: (row["language"], row["quality_score"], row["n_tokens"]) for row in table.to_pylist()}


def read(path: str | pathlib.Path) -> dict[str, dict]:
    """Returns id -> record."""
    with gzip.open(path, "rt") as lines:
        return {record["id"]: record for record in map(json.loads, lines)}


def written(output: str | pathlib.Path) -> dict[str, dict]:
    return {key: value for path in sorted(pathlib.Path(output).glob("train/*/*")) for key, value in read(path).items()}


def test_a_rated_record_that_cannot_be_read_is_named(tmp_path):
    """It was rated with Corpus.language_key = None, for example."""
    config = make(tmp_path)
    records = [record | {"lang": ["de"]} if i == 3 else record for i, record in enumerate(RECORDS["de"][:25])]
    write_documents(tmp_path / "corpus/one/de.jsonl.gz", records)
    with pytest.raises(InputError, match=r'one/de\.jsonl\.gz:4: "lang" is a list .*; it was rated, with other keys'):
        main(config)
    assert not (tmp_path / "kept").exists()


def test_the_corpus_reader_takes_what_was_kept(tmp_path):
    config = make(tmp_path)
    main(config)
    corpus = Corpus(config.output, "{split}/{language}/*")
    assert corpus.all_splits == ["train"] and corpus.languages_of("train") == ["de", "th"]
    assert {path.name for path in corpus.files_of("train", "de").values()} == {"one-de.jsonl.gz", "more-de.jsonl.gz"}
    for language in ("de", "th"):
        kept = {document.id: document for document in corpus.documents("train", language)}
        rated = {key: (score, tokens) for key, (code, score, tokens) in scores_of(tmp_path).items() if code == language}
        quota, expected = 0.3 * sum(tokens for _, tokens in rated.values()), set()
        for key in sorted(rated, key=lambda key: -rated[key][0]):
            if sum(rated[other][1] for other in expected) + rated[key][1] / 2 < quota:
                expected.add(key)
        assert set(kept) == expected
        originals = {record["id"]: record for record in RECORDS[language]}
        assert all(kept[key].text == originals[key]["text"] and kept[key].source == originals[key]["source"]
                   for key in kept)


def test_records_keep_their_fields_and_carry_their_score(tmp_path):
    config = make(tmp_path)
    main(config)
    rated = scores_of(tmp_path)
    for key, record in written(config.output).items():
        original = next(r for r in RECORDS[record["lang"]] if r["id"] == key)
        assert record == original | {"quality_score": pytest.approx(rated[key][1])}


def test_quotas_by_language_and_in_tokens(tmp_path):
    config = make(tmp_path, tokens={"de": 100, "th": 0})
    main(config)
    languages = json.loads((tmp_path / "kept/selection.json").read_text())["languages"]
    kept = {one["language"]: one["kept_tokens"] for one in languages}
    assert 100 <= kept["de"] < 160 and kept["th"] == 0
    with pytest.raises(InputError, match=r"tokens: the rated languages are de, th; the setting differs in th, xx"):
        main(dataclasses.replace(config, tokens={"de": 1, "xx": 1}, output=str(tmp_path / "other")))


def test_documents_without_a_score_are_counted_and_named(tmp_path):
    config = make(tmp_path, fraction=1.0)
    write_scores(tmp_path / "scores", "one/th.jsonl", RECORDS["th"][1:], [np.nan] + [1.0] * 38,
                 number=pa.array([2, *range(4, 42)], pa.int64()))
    lines = (tmp_path / "corpus/one/th.jsonl").read_text().splitlines()
    (tmp_path / "corpus/one/th.jsonl").write_text("\n".join([lines[0], lines[1], "{broken", *lines[2:]]) + "\n")
    main(config)
    named = [json.loads(line) for line in (tmp_path / "kept/unscored.jsonl").read_text().splitlines()]
    assert [(one["number"], one["id"]) for one in named] == [(1, "th0"), (2, "th1"), (3, None)]
    assert "malformed JSON" in named[2]["reason"]
    assert json.loads((tmp_path / "kept/selection.json").read_text())["unscored"] == {
        "not in the score file": 1, "the rater gave none": 1, "unreadable": 1}
    assert set(written(config.output)) == {r["id"] for r in [*RECORDS["de"], *RECORDS["th"][2:]]}


def test_removal_lists_are_obeyed_before_quotas_are_made(tmp_path):
    removed = write_removed(tmp_path / "lists", [
        {"file": "one/th.jsonl", "number": n, "id": f"th{n - 1}"} for n in range(1, 31)])
    config = make(tmp_path, exclude=(removed,), fraction=0.5)
    main(config)
    manifest = json.loads((tmp_path / "kept/selection.json").read_text())
    assert manifest["excluded"] == 30 and not manifest["unscored"]
    kept = [key for key in written(config.output) if key.startswith("th")]
    assert set(kept) <= {f"th{i}" for i in range(30, 40)} and 3 <= len(kept) <= 7
    (tmp_path / "lists/removed/one/th.jsonl.jsonl").write_text('{"file": "one/th.jsonl"}\n')
    with pytest.raises(InputError, match=r'th.jsonl.jsonl:1: not a JSON object with "file", "number" and "id"'):
        main(dataclasses.replace(config, output=str(tmp_path / "other")))


def test_a_second_run_changes_nothing_and_other_settings_are_noticed(tmp_path, capsys):
    config = make(tmp_path)
    main(config)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "kept").rglob("*.*")}
    main(config)
    assert "kept" in capsys.readouterr().err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "kept").rglob("*.*")} == before
    other = dataclasses.replace(config, fraction=0.5)
    with pytest.raises(InputError, match=r"exists, made with settings fraction = 0.3 \(now 0.5\); set overwrite=True"):
        main(other)
    assert {path: path.read_bytes() for path in before} == {path: content for path, (_, content) in before.items()}
    main(dataclasses.replace(other, overwrite=True))
    assert len(written(config.output)) > len(before) - 2
    assert json.loads((tmp_path / "kept/selection.json").read_text())["provenance"]["settings"]["fraction"] == 0.5


def test_equal_runs_write_equal_bytes(tmp_path):
    config = make(tmp_path, temperature=1.0)
    main(config)
    main(dataclasses.replace(config, output=str(tmp_path / "again")))
    files = sorted(path.relative_to(tmp_path / "kept") for path in (tmp_path / "kept").rglob("*.*"))
    assert files and all((tmp_path / "kept" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    main(dataclasses.replace(config, seed=1, output=str(tmp_path / "seed")))
    assert set(written(tmp_path / "seed")) != set(written(config.output))


def test_nothing_is_left_when_it_fails_and_a_strange_folder_is_not_touched(tmp_path):
    config = make(tmp_path)
    lines = (tmp_path / "corpus/one/th.jsonl").read_text().splitlines()
    (tmp_path / "corpus/one/th.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(InputError, match=r"th.jsonl:1: 'th1' is not the document that was rated here"):
        main(config)
    (tmp_path / "corpus/one/th.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match=r"th.jsonl: has no document 40, which has a score; rate the file"):
        main(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.parts", "corpus", "others", "scores"]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("precious")
    for overwrite, cause in ((False, "kept: has no record of what it was made from; set overwrite"),
                             (True, r"kept: holds mine\.txt besides what raters\.select makes")):
        with pytest.raises(InputError, match=cause):
            main(dataclasses.replace(config, overwrite=overwrite))
    assert (tmp_path / "kept/mine.txt").read_text() == "precious"


def test_files_that_could_not_be_rated_are_left_out_by_name(tmp_path):
    config = make(tmp_path)
    (tmp_path / "scores/one/th.jsonl.scores.parquet").unlink()
    with pytest.raises(InputError, match=r"th.jsonl.scores.parquet: no such score file"):
        main(config)
    (tmp_path / "scores/one/th.jsonl.done.json").write_text('{"status": "failed"}')
    (tmp_path / "scores/one/de.jsonl.gz.done.json").write_text('{"status": "done", "input": {"sha256": "0"}}')
    with pytest.raises(InputError, match=r"de.jsonl.gz: is not the file that was rated as one/de.jsonl.gz"):
        main(config)
    (tmp_path / "scores/one/de.jsonl.gz.done.json").write_text('{"status": "done", "input": {"sha256": null}}')
    main(config)
    manifest = json.loads((tmp_path / "kept/selection.json").read_text())
    assert manifest["failed_files"] == ["one/th.jsonl"] and [x["language"] for x in manifest["languages"]] == ["de"]


def test_parquet_documents(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = {key: [record[key] for record in RECORDS["de"]] for key in ("id", "lang", "text", "url")}
    table["date"] = [datetime.date(2026, 1, 1)] * 40
    pa.parquet.write_table(pa.table(table), folder / "de.parquet", row_group_size=7)
    write_scores(tmp_path / "scores", "de.parquet", [r | {"source": ""} for r in RECORDS["de"]], range(40))
    main(SelectConfig(Corpus(folder, "*.parquet"), str(tmp_path / "scores"), str(tmp_path / "kept")))
    documents = list(read_documents(tmp_path / "kept/train/de/de.jsonl.gz", extra=("url", "date", "quality_score")))
    assert [document.id for document in documents] == ["de36", "de37", "de38", "de39"]
    assert documents[0].extra == {"url": "https://example.org/36", "date": "2026-01-01", "quality_score": 36.0}


@pytest.mark.parametrize(("more", "message"), [
    ({"fraction": 1.5}, "select.fraction = 1.5: must be a number from 0 to 1"),
    ({"fraction": {"de": "all"}}, "select.fraction of de = 'all'"),
    ({"temperature": -1}, "select.temperature = -1"),
    ({"per_source": True, "source_caps": 0.5}, "source_caps cannot be set, too"),
    ({"split": "a/b"}, "select.split = 'a/b'"),
])
def test_settings_that_cannot_be_meant_are_refused(more, message):
    with pytest.raises(InputError, match=re.escape(message)):
        SelectConfig(None, "y", "z", **more)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> pathlib.Path:
    """A selection with its report, of documents with markup and long texts."""
    folder = tmp_path_factory.mktemp("reported")
    config = make(folder, others=(str(folder / "others"),))
    path = folder / "corpus/one/th.jsonl"
    nasty = '<script>alert(1)</script> & "ก" \x00'
    lines = [json.dumps(json.loads(line) | {"text": nasty + "x" * 1000}) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    main(config)
    selection_report.main(selection_report.SelectionReportConfig(config.output))
    return folder / "kept"


def test_the_report_stands_alone_and_runs_nothing(reported):
    page = (reported / "report.html").read_text()
    assert not re.search(r"<script|(src|href)=\"https?:|\x00", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "x" * 401 not in page
    figures = {path.name for path in (reported / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for kind in ("svg", "png") for name in (
        "languages", "sources", "kept", "variance", "lengths", "agreement")}
    for path in (reported / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(path)


def test_a_small_selection_is_drawn_without_empty_figures(reported, tmp_path, capsys):
    """One source: nothing to compare; tenths of equal length: one bar for all of them."""
    selection = json.loads((reported / "selection.json").read_text())
    source = selection["sources"][0]["source"]
    selection |= {"sources": selection["sources"][:1],
                  "cells": [cell for cell in selection["cells"] if cell["source"] == source]}
    selection["lengths"] = {"upper": [121.0, 121.0, 150.0, *[2000.0 + n for n in range(7)]],
                            "tokens": [100, 0, 50, *[10] * 7], "kept_tokens": [50, 0, 10, *[10] * 7]}
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    selection_report.main(selection_report.SelectionReportConfig(tmp_path))
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"languages", "variance", "lengths", "agreement"}
    axes = selection_report.Plots(selection).lengths().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["121", "150"]
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(list(range(9)))
    assert [bar.get_height() for bar in axes.patches][:3] == [50, 20, 100]


def test_the_report_says_what_the_manifest_says(reported):
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (reported / "report.html").read_text()))
    manifest = json.loads((reported / "selection.json").read_text())
    for one in manifest["languages"]:
        assert f"{one['kept_tokens']:,}" in page and f"{one['kept_documents']:,}" in page
    assert "tested@1, other@2" in page and "75 %" in page
    assert sum(cell["kept_tokens"] for cell in manifest["cells"]) == sum(
        one["kept_tokens"] for one in manifest["sources"]) == sum(manifest["lengths"]["kept_tokens"])
    assert len(manifest["examples"]) == 10 and all(len(one["text"]) <= 400 for one in manifest["examples"])
    by_quantile = [one["score"] for one in manifest["examples"] if one["language"] == "de"]
    assert by_quantile == sorted(by_quantile)


def test_a_file_that_is_no_selection_is_refused(tmp_path):
    (tmp_path / "selection.json").write_text("[]")
    with pytest.raises(InputError, match="not a selection of version 1"):
        selection_report.main(selection_report.SelectionReportConfig(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["selection.json"]


def test_documents_of_undetermined_language_are_refused_unless_allowed(tmp_path):
    config = make(tmp_path)
    languages = pa.array(["th"] * 30 + ["", "und"] + ["th"] * 8, pa.string())
    write_scores(tmp_path / "scores", "one/th.jsonl", RECORDS["th"], range(40), language=languages)
    with pytest.raises(InputError, match=r"scores: 2 documents were rated without a language, the first is "
                                         r"one/th\.jsonl:31; .*select\.allow_undetermined=True"):
        main(config)
    main(dataclasses.replace(config, fraction=1.0, allow_undetermined=True))
    assert {path.name for path in (tmp_path / "kept/train").iterdir()} == {"de", "th", "und"}
    assert set(read(tmp_path / "kept/train/und/one-th.jsonl.gz")) == {"th30", "th31"}


def test_scores_and_removal_lists_below_another_root_are_refused(tmp_path):
    config = make(tmp_path)
    with pytest.raises(InputError, match=r"de\.jsonl\.gz\.scores\.parquet: no such score file"):
        main(dataclasses.replace(config, corpus=Corpus(tmp_path / "corpus/one", "*")))
    claim_root(tmp_path / "scores", str(tmp_path / "corpus"), [])
    with pytest.raises(InputError, match=r"not under this Corpus\.root: the scores are of .*/corpus$"):
        main(dataclasses.replace(config, corpus=Corpus(tmp_path / "corpus/one", "*")))
    lists = write_removed(tmp_path / "lists", [{"file": "th.jsonl", "number": 1, "id": "th0"}])
    with pytest.raises(InputError, match=r"lists: has a removal list of no file of this corpus, but .*th\.jsonl\.js"):
        main(dataclasses.replace(config, exclude=[lists]))
    lists = write_removed(tmp_path / "others", [{"file": "one/th.jsonl", "number": 2, "id": "th0"}])
    with pytest.raises(InputError, match=r"one/th\.jsonl:2: 'th1' is not the document that the removal list"):
        main(dataclasses.replace(config, exclude=[lists]))
    assert not (tmp_path / "kept").exists()


@pytest.fixture
def shard():
    yield cluster.take_shard
    cluster.take_shard(None)


def test_shards_make_what_one_process_makes(tmp_path, shard):
    config = make(tmp_path, others=[str(tmp_path / "others")], temperature=2.0)
    main(config)
    for _ in range(8):  # a phase at a time
        for number in (1, 0):
            shard((number, 2))
            main(dataclasses.replace(config, output=str(tmp_path / "shared")))
    assert not (tmp_path / "shared").exists()
    shard(None)
    main(dataclasses.replace(config, output=str(tmp_path / "shared")))
    contents = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                for folder in (tmp_path / "kept", tmp_path / "shared")]
    assert contents[0] == contents[1] and len(contents[0]) == 5


@pytest.mark.parametrize("settings", [{}, {"per_source": True}, {"source_caps": {"web": 0.4, "book": 0.1, "": 1.0}},
                                      {"temperature": 1.5, "fraction": 0.6}])
def test_decided_in_phases_it_keeps_what_one_table_of_all_scores_decides(tmp_path, monkeypatch, settings):
    """The statistics are those of a sample, the counts exact."""
    rng = np.random.default_rng(1)
    names = [f"{i}/{language}.jsonl" for i in range(3) for language in ("de", "th")]
    for name in names:
        records = [{"id": f"{name}-{i}", "lang": name[2:4], "source": str(rng.choice(["web", "book", ""])), "text": "x"}
                   for i in range(700)]
        write_documents(tmp_path / "corpus" / name, records)
        write_scores(tmp_path / "scores", name, records, np.round(rng.normal(size=700), 2),
                     rng.integers(1, 900, 700))
    config = SelectConfig(**{"corpus": Corpus(tmp_path / "corpus", "*/*"), "scores": str(tmp_path / "scores"),
                             "output": str(tmp_path / "kept"), "fraction": 0.3, **settings})
    monkeypatch.setattr(select, "SAMPLE", 800)
    main(config)
    scores = read_scores(config.scores, names)
    preference = quotas.preferences(scores, config.temperature)
    quota = [config.fraction * scores.tokens[scores.language == i].sum() for i in range(2)]
    caps = {scores.sources.index(key): cap for key, cap in config.source_caps.items()} if config.source_caps else None
    kept = quotas.choose(scores, preference, quota, config.per_source, caps)
    expected = {f"{names[scores.file[row]]}-{scores.number[row] - 1}" for row in np.flatnonzero(kept)}
    assert set(written(config.output)) == expected
    manifest = json.loads((tmp_path / "kept/selection.json").read_text())
    for i, language in enumerate(manifest["languages"]):
        own = scores.language == i
        assert (language["documents"], language["kept_documents"]) == (2100, int((kept & own).sum()))
        assert language["kept_tokens"] == scores.tokens[kept & own].sum()
        assert language["threshold"] == pytest.approx(preference[kept & own].min())
        assert 250 < sum(language["histogram"]) < 550
    assert sum(cell["kept_tokens"] for cell in manifest["cells"]) == scores.tokens[kept].sum()
