"""A run whose token store, rates and folder are on gs://, killed and resumed; commands that read it; no TensorFlow."""

import json
import pathlib
import shutil
import signal

import pytest

from mlx_pretrain.data.token_store import MANIFEST, TOKENIZER
from mlx_pretrain.files import sha256
from mlx_pretrain.generate import GenerateConfig, generate
from mlx_pretrain.report import ReportConfig, report
from tests.e2e.conftest import run, started
from tests.e2e.test_train import computed

TRAIN = "mlx_pretrain.train"
STEPS = 20
SHORT = (f"--gin.train.steps={STEPS}", "--gin.train.checkpoint_every=8")
ON_GCS = ("--gin.train.run_dir=gs://bucket/run", "--gin.train.token_store=gs://bucket/store",
          "--gin.train.rates=gs://bucket/store/rates.json", *SHORT)


@pytest.fixture(scope="module")
def store(store_dir, tmp_path_factory) -> pathlib.Path:
    """The small token store with a tokenizer that works."""
    import sentencepiece

    folder = pathlib.Path(shutil.copytree(store_dir, tmp_path_factory.mktemp("gcs") / "store"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h i j k l m n o p q r s t u v w x y z"] * 20),
        model_prefix=str(folder / "tokenizer"), vocab_size=40, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=3,
    )
    (folder / "tokenizer.vocab").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"tokenizer_sha256": sha256(folder / TOKENIZER)}))
    return folder


def test_a_run_on_gcs_is_the_run_on_disk_through_kill_9_and_can_be_read(gcs, store, tiny_gin, tmp_path):
    gcs.put_folder(store, "bucket", "store")
    objects = gcs.buckets["bucket"]
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow is not for gs://')")  # comes first there

    with started(TRAIN, tiny_gin, *ON_GCS, folder=tmp_path) as process:
        process.wait_for(lambda: "run/checkpoints/16/commit_success.txt" in objects)
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    ended = run(TRAIN, tiny_gin, *ON_GCS, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert "resumed after step" in ended.out

    local = run(TRAIN, tiny_gin, f"--gin.train.token_store={store}", *SHORT, folder=tmp_path)
    assert local.code == 0, local.err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "metrics.jsonl").write_bytes(objects["run/metrics.jsonl"].content)
    for kind in ("train", "eval"):
        assert computed(tmp_path / "copy", kind) == computed(tmp_path / "run", kind)

    names = {name.split("/")[1] for name in objects if name.startswith("run/")}
    assert names == {path.name for path in (tmp_path / "run").iterdir()}

    # The commands that read a run, in this process, to save time.
    for run_dir in ("gs://bucket/run", str(tmp_path / "run")):
        generate(GenerateConfig(run_dir, ["a b"], ["aa"], max_new_tokens=8, temperature=0.0,
                                output=f"{run_dir}/samples.jsonl"))
    assert objects["run/samples.jsonl"].content == (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert json.loads(objects["run/samples.jsonl"].content)["step"] == STEPS
    report(ReportConfig("gs://bucket/run"))
    assert objects["run/report.html"].content_type == "text/html"
    assert b"a b" in objects["run/report.html"].content


def test_without_the_extra_the_command_that_installs_it_is_named(tmp_path):
    (tmp_path / "gcsfs.py").write_text("raise ImportError('no gcsfs')")
    ended = run("mlx_pretrain.report", "--gin.report.run_dir=gs://bucket/run", folder=tmp_path)
    assert ended.code == 1
    assert ended.err == (
        "error: gs://bucket/run/run.json: gs:// needs the extra `gcs`: pip install 'mlx-pretrain[gcs]'\n")
