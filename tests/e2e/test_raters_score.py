"""Bulk scoring as a user runs it: killed, interrupted, with broken input, on several hosts."""

import gzip
import json
import pathlib
import signal
import time

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import run, started
from tests.e2e.hosts import run_job
from tests.raters.test_score import make_run, outputs, records, write_jsonl

SCORE = "raters.score"
FILES, DOCUMENTS = 8, 600

GIN = """
import raters.score

Corpus.files = '{input}/*.jsonl.gz'
score.corpus = @Corpus()
score.output = 'scores'
score.rater = @QualityScorer()
score.workers = 2
score.log_every = 0.02
score.compilation_cache = None
QualityScorer.run_dir = '{run}'
QualityScorer.buckets = [12, 24]
QualityScorer.tokens_per_batch = 480
QualityScorer.window_tokens = 1920
"""


@pytest.fixture(scope="module")
def score_gin(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("score")
    for i in range(FILES):
        lines = records(i, DOCUMENTS)
        lines[i] = "no JSON"
        write_jsonl(folder / "in" / f"{i}.jsonl.gz", lines)
    text = GIN.format(input=folder / "in", run=make_run(folder))
    (folder / "score.gin").write_text(text)
    return f"--gin_file={folder / 'score.gin'}"


@pytest.fixture(scope="module")
def undisturbed(score_gin, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(SCORE, score_gin, folder=folder)
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out.splitlines()[-1])
    assert summary["documents"] == FILES * (DOCUMENTS - 1) and summary["rejected"] == FILES
    assert summary["compilations"] == 2 and summary["padding_efficiency"] > 0.6 and 0 < summary["device_busy"] <= 1
    assert "documents/s" in ended.err and "tokens/s" in ended.err and "left" in ended.err
    found = outputs(folder / "scores")
    assert len(found) == 3 * FILES + 2
    return found


def children(pid: int) -> set[int]:
    return {int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def gone(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_run_that_is_stopped_twice_ends_with_the_same_bytes(score_gin, undisturbed, tmp_path):
    scores, whole = tmp_path / "scores", 0
    for number in (signal.SIGINT, signal.SIGKILL):
        with started(SCORE, score_gin, folder=tmp_path) as process:
            # Some more files are whole, another is being written.
            process.wait_for(lambda before=whole: len(list(scores.glob("*.done.json"))) > before
                             and any(scores.glob(".*.rejects.jsonl.*")))
            workers = children(process.pid)
            process.signal(number)
            ended = process.end()
        assert whole < len(list(scores.glob("*.done.json"))) < FILES and len(workers) >= 2
        whole = len(list(scores.glob("*.done.json")))
        if number == signal.SIGINT:
            assert ended.code == 130 and ended.err.splitlines()[-1] == "interrupted" and "Traceback" not in ended.err
            assert not list(scores.glob(".*"))
        else:
            assert ended.code == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while not all(map(gone, workers)):
            assert time.monotonic() < deadline, "workers outlive the command"
            time.sleep(0.02)
    last = run(SCORE, score_gin, folder=tmp_path)
    assert last.code == 0, last.err
    assert json.loads(last.out.splitlines()[-1])["skipped"] == whole
    assert outputs(scores) == undisturbed


def test_processes_share_the_files(score_gin, undisturbed, tmp_path):
    ended = run_job(SCORE, score_gin, folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    summary = json.loads(ended[0].out.splitlines()[-1])
    assert summary["scored"] == summary["files"] == FILES
    assert summary["documents"] == FILES * (DOCUMENTS - 1) and summary["rejected"] == FILES
    assert "documents" not in ended[1].out and all("/4 files  " in process.err for process in ended)
    assert outputs(tmp_path / "scores") == undisturbed


@pytest.mark.slow
def test_shards_need_no_connection_and_each_scores_its_own_again(score_gin, undisturbed, tmp_path):
    scores = tmp_path / "scores"
    first = run(SCORE, score_gin, "--shard=1/2", folder=tmp_path)
    assert first.code == 0 and json.loads(first.out.splitlines()[-1])["scored"] == FILES // 2
    own = outputs(scores)
    shared = {name: content for name, content in undisturbed.items()
              if name.split(".")[0] in ("1", "3", "5", "7", "corpus")}
    assert own == shared
    (scores / "3.jsonl.gz.done.json").unlink()
    again = run(SCORE, score_gin, "--shard=1/2", folder=tmp_path)
    summary = json.loads(again.out.splitlines()[-1])
    assert (summary["files"], summary["scored"], summary["skipped"]) == (4, 1, 3) and outputs(scores) == own
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TASK_ID": "5", "TASK_MIN": "5", "TASK_STEP": "1", "TASK_COUNT": "2"}.items():
            patch.setenv(f"SLURM_ARRAY_{name}", value)
        ended = run(SCORE, score_gin, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert outputs(scores) == undisturbed


def test_a_broken_file_ends_the_command_with_one_line_and_nothing_else(score_gin, undisturbed, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl.gz", records(0, 20))
    whole = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records(1, DOCUMENTS)))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(whole[:-9])
    flags = [score_gin, "--gin.Corpus.files=in/*.jsonl.gz"]
    ended = run(SCORE, *flags, folder=tmp_path)
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == ("error: 1 of 2 files could not be scored: b.jsonl.gz; the reasons are in "
                                          "their *.rejects.jsonl")
    assert pq.read_table(tmp_path / "scores" / "a.jsonl.gz.scores.parquet").num_rows == 20
    assert not (tmp_path / "scores" / "b.jsonl.gz.scores.parquet").exists()
    refused = run(SCORE, *flags, "--gin.QualityScorer.chunk_length=12", folder=tmp_path)
    assert refused.code == 1
    assert refused.err.splitlines()[-1].endswith("; set overwrite=True to replace it, or name another output")
