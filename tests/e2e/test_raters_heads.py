"""Documents embedded once and judged by several heads, as a user runs it: killed, in shards, with other documents."""

import json
import pathlib
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import run, started
from tests.e2e.test_raters_score import GIN
from tests.raters.test_score import make_run, outputs, records, write_jsonl

FILES, DOCUMENTS = 6, 300
HEADS = ("--gin_file=gin/raters/heads.gin", f"--gin_search_path={pathlib.Path(__file__).parents[2]}",
         "--gin.SCORES=scores", "--gin.HEADS=heads", "--gin.JUDGED=judged")


@pytest.fixture(scope="module")
def score_gin(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("embed")
    for i in range(FILES):
        lines = [{**record, "id": f"{i}/{record['id']}"} for record in records(i, DOCUMENTS)]
        write_jsonl(folder / "in" / f"{i}.jsonl.gz", lines)
    text = GIN.format(input=folder / "in", run=make_run(folder)) + "QualityScorer.embeddings = 'float16'\n"
    (folder / "score.gin").write_text(text)
    return f"--gin_file={folder / 'score.gin'}"


def test_documents_are_embedded_once_and_judged_by_several_heads(score_gin, tmp_path):
    whole, scores = tmp_path / "whole", tmp_path / "scores"
    whole.mkdir()
    assert run("raters.score", score_gin, folder=whole).code == 0
    with started("raters.score", score_gin, folder=tmp_path) as process:
        process.wait_for(lambda: list(scores.glob("*.done.json")) and any(scores.glob(".*")))
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    assert 0 < len(list(scores.glob("*.done.json"))) < FILES
    ended = run("raters.score", score_gin, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert outputs(scores) == outputs(whole / "scores") and len(outputs(scores)) == 4 * FILES + 2

    rows = [row for path in sorted(scores.glob("*.scores.parquet")) for row in pq.read_table(path).to_pylist()]
    write_jsonl(tmp_path / "labels.jsonl", [
        {"id": row["id"], "quality": row["quality_score"], "long": int(row["n_tokens"] > 30)}
        for row in rows if np.isfinite(row["quality_score"])])
    ended = run("raters.train_heads", *HEADS, "--gin.train_heads.labels=labels.jsonl", folder=tmp_path)
    assert ended.code == 0, ended.err
    heads = json.loads((tmp_path / "heads/heads.json").read_text())["heads"]
    assert heads["quality"]["spearman"] > 0.99 and heads["long"]["label_type"] == "binary"
    assert "heads: quality: spearman 0.99" in ended.err or "heads: quality: spearman 1.0" in ended.err

    judged = tmp_path / "judged"
    with started("raters.apply_heads", *HEADS, folder=tmp_path) as process:
        process.wait_for(lambda: any(judged.glob("*/*.done.json")))
        process.signal(signal.SIGKILL)
        process.end()
    for shard in ("0/2", "1/2"):
        ended = run("raters.apply_heads", *HEADS, f"--shard={shard}", folder=tmp_path)
        assert ended.code == 0, ended.err
        assert json.loads(ended.out.splitlines()[-1])["files"] == FILES // 2
    ended = run("raters.apply_heads", *HEADS, "--gin.JUDGED=at_once", folder=tmp_path)
    assert json.loads(ended.out.splitlines()[-1])["documents"] == FILES * DOCUMENTS
    assert outputs(judged) == outputs(tmp_path / "at_once") and len(outputs(judged)) == 2 * (3 * FILES + 1)
    first, again = (np.concatenate([pq.read_table(path)["quality_score"].to_numpy()
                                    for path in sorted(folder.glob("*.scores.parquet"))])
                    for folder in (scores, judged / "quality"))
    known = np.isfinite(first)
    assert np.corrcoef(first[known], again[known])[0, 1] > 0.999

    stale = scores / "3.jsonl.gz.done.json"
    marker = json.loads(stale.read_text())
    marker["input"] |= {"size": 1, "sha256": "0" * 64}
    stale.write_text(json.dumps(marker))
    ended = run("raters.apply_heads", *HEADS, "--gin.JUDGED=third", folder=tmp_path)
    assert ended.code == 1 and len(ended.err.splitlines()) == 1 and not (tmp_path / "third").exists()
    assert ended.err.startswith("error: ") and "in/3.jsonl.gz: has changed since its embeddings were made" in ended.err
