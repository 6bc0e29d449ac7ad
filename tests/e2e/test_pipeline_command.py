"""`python -m pipeline` on a user's own documents: interrupted, refused, and from the first stage to the start page."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from mlx_pretrain.data.corpus import Corpus
from tests.e2e.conftest import REPOSITORY, run, started

GIN = """
pipeline.documents = 'documents'
pipeline.output = 'out'
pipeline.files = '{language}.jsonl'
pipeline.model = @DecoderConfig()
pipeline.sequence_length = 32
pipeline.batch_size = 4
pipeline.steps = 6
pipeline.prompts = {'de': 'Um eine'}
pipeline.rater_documents = 'documents/{language}.jsonl'
pipeline.tasks = ['tasks/CompletionDataset/lighteval_*_test.jsonl']
DecoderConfig.vocab_size = 600
DecoderConfig.embed_dim = 32
DecoderConfig.n_layers = 2
DecoderConfig.n_heads = 2
DecoderConfig.n_kv_heads = 1
DecoderConfig.head_dim = 16
DecoderConfig.mlp_dim = 48
DecoderConfig.max_length = 256
DecoderConfig.tie_embeddings = True
pipeline.settings = {
    'rater': {
        'STEPS': 6, 'warmup_cosine.warmup_steps': 2, 'train_rater.length': 32, 'QualityConfig.embed_dim': 16,
        'QualityConfig.n_layers': 1, 'QualityConfig.mlp_dim': 32, 'train_rater.eval_every': 6,
        'train_rater.checkpoint_every': 6},
    'pairs': {'pairs.monolingual': 200, 'pairs.cross_lingual': 200, 'pairs.parallel': 100},
    'proxies': {'proxies.tokens': [512, 1024], 'planned_mixtures.mixtures': 4, 'proxies.eval_sequences': 2},
    'allocate': {'allocate.replicates': 0, 'allocate.compared': [], 'allocate.allow_poor_law': True},
}
"""


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A user's folder: documents in two languages, tasks, and a gin file."""
    (tmp_path / "documents").mkdir()
    for language in ("en", "de"):
        documents = Corpus(REPOSITORY / "samples/text").documents("train", language)
        records = [{"id": document.id, "source": document.source, "text": document.text}
                   for document, _ in zip(documents, range(60))]
        (tmp_path / f"documents/{language}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        items = (REPOSITORY / f"samples/tasks/CompletionDataset/lighteval_{language}_test.jsonl").read_text()
        (tmp_path / "tasks/CompletionDataset").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"tasks/CompletionDataset/lighteval_{language}_test.jsonl").write_text(
            "".join(items.splitlines(keepends=True)[:4]))
    (tmp_path / "my.gin").write_text(GIN)
    return tmp_path


ONLY = "--gin.pipeline.only=['hold_out', 'tokenizer']"


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_interrupted_at_any_stage_it_goes_on_there(folder):
    flags = ("--gin_file=my.gin", ONLY)
    ended_ = run("pipeline", *flags, "--gin.pipeline.dry_run=True", folder=folder)
    assert ended_.code == 0 and "[tokenizer]: about" in ended_.out and "Left: about" in ended_.out
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["stages"]
    typo = run("pipeline", *flags, "--gin.pipeline.settings={'select': {'select.temprature': 1}}", folder=folder)
    assert typo.code == 1 and re.fullmatch(
        r"error: pipeline\.settings and gin_files of 'select': .*temprature.*\n", typo.err), typo.err

    with started("pipeline", *flags, folder=folder) as process:  # killed: its stage must not run on
        process.wait_for(lambda: children(process.pid) != [])
        (stage,) = children(process.pid)
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not ended(stage):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    with started("pipeline", *flags, folder=folder) as process:
        process.wait_for(lambda: children(process.pid) != [])
        (stage,) = children(process.pid)
        os.kill(stage, signal.SIGSTOP)  # so that it does not end meanwhile
        refused = run("pipeline", *flags, folder=folder)
        assert (refused.code, refused.err) == (1, "error: out: another pipeline is at work here\n")
        process.signal(signal.SIGTERM)  # passed on to the stage
        os.kill(stage, signal.SIGCONT)
        stopped = process.end()
    assert stopped.code == 143 and "goes on there" in stopped.err.splitlines()[-1], stopped.err

    # In the background of a script, SIGINT is ignored from the start.
    command = f"{sys.executable} -m pipeline {' '.join(map(shlex.quote, flags))} & echo $!; wait $!"
    with subprocess.Popen(["sh", "-c", command], cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shell:
        pipeline = int(shell.stdout.readline())
        while not children(pipeline):
            time.sleep(0.05)
        os.kill(pipeline, signal.SIGINT)
        assert "goes on there" in shell.stderr.read() and shell.wait() == 130

    whole = run("pipeline", *flags, folder=folder)
    assert whole.code == 0 and "Done in" in whole.err, whole.err
    again = run("pipeline", *flags, folder=folder)
    assert again.code == 0 and again.err.count("done before") == 2
    page = (folder / "out/index.html").read_text()
    assert "data_mixtures.tokenizer" in page and "bits per byte" not in page

    changed = run("pipeline", *flags, "--gin.DecoderConfig.vocab_size=500", folder=folder)
    assert changed.code == 1 and "vocab_size = 600 (now 500)" in changed.err
    assert "the stage tokenizer ended with exit code 1" in changed.err and "pipeline.overwrite=True" in changed.err


@pytest.mark.slow
def test_from_documents_to_the_start_page(folder):
    """All stages, as their commands are started by hand too."""
    flags = ("--gin_file=my.gin", "--gin.pipeline.videos=True")
    done = run("pipeline", *flags, folder=folder, deadline=1200)
    assert done.code == 0, done.err[-2000:]
    page = (folder / "out/index.html").read_text()
    assert "in another language" in page
    for report in ("selected", "climb", "pretrain", "evals"):
        assert f'href="{report}/report.html"' in page and (folder / f"out/{report}/report.html").exists()
    sheets = os.listdir(folder / "out/video/selected/sheets")
    assert f'src="video/selected/sheets/{min(name for name in sheets if name.endswith(".png"))}"' in page
    kept = json.loads((folder / "out/selected/selection.json").read_text())["languages"]
    random = json.loads((folder / "out/control/selected/selection.json").read_text())["languages"]
    for a, b in zip(kept, random):
        assert abs(a["kept_tokens"] - b["kept_tokens"]) <= 0.2 * a["kept_tokens"]  # a document more or less
    again = run("pipeline", *flags, folder=folder)
    assert again.code == 0 and again.err.count("done before") == 21
