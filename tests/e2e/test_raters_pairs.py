"""Pairs as a user makes them: an n-gram classifier and rules on the sample text, two methods, one line for mistakes."""

import collections
import json
import pathlib
import re
import signal

import pytest

from tests.e2e.conftest import REPOSITORY, run, started

NGRAMS, PAIRS = "raters.ngrams", "raters.pairs"
SAMPLES = REPOSITORY / "samples" / "text" / "train"

FLAGS = (
    f"--gin_file={REPOSITORY}/gin/raters/pairs.gin",
    f"--gin.ENGLISH={SAMPLES}/en.jsonl.xz",
    f"--gin.DOCUMENTS={SAMPLES}/[aehv][rni].jsonl.xz",  # ar, en, hi, vi
    "--gin.NGRAMS=ngrams.npz", "--gin.PAIRS=pairs.jsonl", "--gin.VALIDATION_PAIRS=validation.jsonl",
    "--gin.train_ngrams.features=16384", "--gin.pairs.monolingual=120", "--gin.pairs.cross_lingual=120",
    "--gin.pairs.parallel=60", "--gin.pairs.heldout_languages=['hi']",
)


def read(path: pathlib.Path) -> tuple[dict, list[dict]]:
    header, *rows = map(json.loads, path.read_text().splitlines())
    return header, rows


def languages(rows: list[dict]) -> set[str]:
    return {row[side]["lang"] for row in rows for side in ("a", "b")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """Folder after both commands, and the output of the second."""
    folder = tmp_path_factory.mktemp("pairs")
    trained = run(NGRAMS, *FLAGS, folder=folder)
    assert trained.code == 0, trained.err
    ended = run(PAIRS, *FLAGS, folder=folder)
    assert ended.code == 0, ended.err
    return folder, ended.err


def test_the_files_hold_what_the_report_says(made):
    folder, report = made
    header, rows = read(folder / "pairs.jsonl")
    assert (header["format"], header["version"]) == ("mlx-rater-pairs", 1)
    provenance = header["provenance"]
    assert provenance["raters"] == ["heuristics", "ngrams"]
    assert list(provenance["inputs"]["documents"]) == ["en.jsonl.xz"]
    assert "NGRAMS = 'ngrams.npz'" in provenance["configuration"]
    counts = collections.Counter(row["kind"] for row in rows)
    for kind, count in counts.items():
        assert re.search(f"{count} {kind} pairs of", report)
        assert provenance["counts"][kind]["pairs"] == count
    assert counts["monolingual"] == counts["cross-lingual"] == 120 and counts["parallel"] > 20
    assert {name for row in rows for name in row["raters"]} == {"heuristics", "ngrams"}
    assert all(0 <= row["p_b"] <= 1 and row["a"]["text"] and row["b"]["text"] for row in rows)


def test_validation_has_other_documents_and_the_held_out_language(made):
    folder, _ = made
    train, validation = (read(folder / name)[1] for name in ("pairs.jsonl", "validation.jsonl"))
    assert languages(train) == {"ar", "en", "vi"} and "hi" in languages(validation)
    documents = [{(row[s]["source"], row[s]["id"]) for row in rows for s in "ab"} for rows in (train, validation)]
    assert all(documents) and not documents[0] & documents[1]


def test_the_multilingual_method(made):
    folder, _ = made
    flags = [flag for flag in FLAGS if "VALIDATION_PAIRS" not in flag]  # which nothing would read
    ended = run(PAIRS, *flags, "--gin.pairs.method=M", f"--gin.rated/Corpus.files={SAMPLES}/[av][ri].jsonl.xz",
                "--gin.pairs.heldout_languages=[]", "--gin.PAIRS=m.jsonl", "--gin.pairs.validation_output=None",
                folder=folder)
    assert ended.code == 0, ended.err
    assert "left out for lack of a translation" in ended.err
    header, rows = read(folder / "m.jsonl")
    assert header["provenance"]["settings"]["method"] == "M" and languages(rows) == {"ar", "vi"}


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_files_and_another_ends_the_same(made, tmp_path):
    folder, _ = made
    names = ("pairs.jsonl", "validation.jsonl")
    (tmp_path / "ngrams.npz").write_bytes((folder / "ngrams.npz").read_bytes())
    assert run(PAIRS, *FLAGS, "--gin.pairs.seed=1", folder=tmp_path).code == 0
    old = [(tmp_path / name).read_bytes() for name in names]
    refused = run(PAIRS, *FLAGS, folder=tmp_path)
    assert refused.code == 1 and "pairs.jsonl: exists, made with settings seed = 1 (now 0)" in refused.err
    overwrite = "--gin.pairs.overwrite=True"
    with started(PAIRS, *FLAGS, "--gin.pairs.monolingual=9000", overwrite, folder=tmp_path) as process:
        process.wait_for(lambda: any(tmp_path.glob(".pairs.jsonl.*")))
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    assert [(tmp_path / name).read_bytes() for name in names] == old
    assert run(PAIRS, *FLAGS, overwrite, folder=tmp_path).code == 0
    for name in names:
        assert read(tmp_path / name)[1] == read(folder / name)[1]


@pytest.mark.parametrize("module, flags, message", [
    (PAIRS, ["--gin.NGRAMS=none.npz"], r"none\.npz: no such n-gram classifier"),
    (PAIRS, ["import raters.rater_plugins.judge\npairs.raters = [@LanguageModelJudge()]",
             "--gin.LanguageModelJudge.model=none"],
     r"none/model\.json: no such model description: not the folder of a training run"),
    (PAIRS, ["import raters.rater_plugins.existing_scores\npairs.raters = [@ExistingScores()]"],
     r"Required bindings for `ExistingScores` not provided .*\['field'\]"),
    (NGRAMS, ["--gin.ENGLISH=none*.jsonl"], r"none\*\.jsonl: no file matches"),
])
def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, module, flags, message):
    if not flags[0].startswith("--"):
        (tmp_path / "own.gin").write_text(flags[0])
        flags = ["--gin_file=own.gin", *flags[1:]]
    before = list(tmp_path.iterdir())
    ended = run(module, *FLAGS, *flags, folder=tmp_path)
    assert ended.code == 1
    assert re.fullmatch(f"error: {message}", ended.err.splitlines()[-1]), ended.err
    assert list(tmp_path.iterdir()) == before
