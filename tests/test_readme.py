"""The examples of README.md run, on data of seconds in the place of hours."""

import pathlib
import re
import shutil

import jax
import numpy as np
import optax
import pytest
import sentencepiece

from mlx_pretrain.files import write_json
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_state, initial_state
from tests.raters.test_score import make_run, records, write_jsonl
from tests.video.conftest import write_video
from video.llm.loading import load_video_llm
from video.llm.model import VideoLLMConfig
from video.voyager.frame_voyager import VoyagerConfig

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
TRAIN, SCORE, CHOOSE_FRAMES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """The current folder, with an empty runs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "video").mkdir(parents=True)
    return tmp_path


def run_example(code: str, capsys) -> list[str]:
    """Runs an example; returns the lines it printed."""
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.splitlines()


def save_run(folder: pathlib.Path, config, tokenizer: pathlib.Path | None) -> None:
    """Saves a model with drawn parameters as a run's only checkpoint."""
    checkpoints.save_model(folder, config, tokenizer)
    abstract = abstract_state(config, optax.sgd(0.1), partitioning.make_mesh(devices=jax.devices()[:1]))
    keeper = checkpoints.Checkpoints(folder)
    keeper.save(1, initial_state(config, optax.sgd(0.1), 0, abstract), checkpoints.DataState(0, {}), {})
    keeper.wait()
    keeper.close()


def test_train_on_a_rates_file(folder, store_dir, capsys):
    shutil.copytree(store_dir, folder / "runs" / "sample" / "tokens")
    shutil.copy(f"{store_dir}/rates.json", folder / "runs" / "sample")
    short = TRAIN.replace("steps = 600", "steps = 2")
    assert short != TRAIN
    printed = run_example(short, capsys)
    assert "loss" in printed[-1] and (folder / "runs" / "small" / "checkpoints" / "2").exists()


def test_score_documents(folder, capsys):
    make_run(folder / "runs")
    for seed, language in enumerate(("de", "th")):
        lines = [record | {"text": record["text"] or "river"} for record in records(seed, 20)]
        write_jsonl(folder / "corpus" / language / "a.jsonl.gz", lines)
    printed = [line.split() for line in run_example(SCORE, capsys)[-2:]]
    assert [name for name, _ in printed] == ["de/a.jsonl.gz", "th/a.jsonl.gz"]
    assert np.isfinite([float(mean) for _, mean in printed]).all()


def test_choose_frames(folder, capsys):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what colour was the star", "was the star before the circle"]), vocab_size=40,
        model_prefix=str(folder / "tokenizer"), pad_id=0, eos_id=1, unk_id=2, bos_id=3, hard_vocab_limit=False,
        minloglevel=2)
    vision = VisionConfig(image_size=28, patch_size=7, embed_dim=16, n_layers=1, n_heads=2, mlp_dim=24)
    decoder = DecoderConfig(vocab_size=96, embed_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, mlp_dim=48,
                            max_length=256)
    save_run(folder / "runs" / "video" / "llm", VideoLLMConfig(vision, decoder, pooled_side=2),
             folder / "tokenizer.model")
    save_run(folder / "runs" / "video" / "voyager", VoyagerConfig(decoder), None)
    trained_for = load_video_llm("runs/video/llm").fingerprint()
    write_json(folder / "runs" / "video" / "voyager" / "run.json", {"labels": {"model": trained_for}})
    write_video("clip.mp4", "h264", np.arange(140) / 30)
    printed = run_example(CHOOSE_FRAMES, capsys)
    frames = [int(number) for number in printed[0].strip("[]").split(",")]
    assert len(frames) == 8 and frames == sorted(set(frames)) and frames[-1] < 140
    assert len(printed) >= 3 and printed[1].startswith("[")
