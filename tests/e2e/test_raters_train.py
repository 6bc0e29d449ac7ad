"""Training of a rater as one job of two processes."""

import dataclasses

import pytest

from mlx_pretrain.training import optimizers
from raters import train as rater_training
from tests.e2e.conftest import lines
from tests.e2e.hosts import run_job
from tests.raters.test_train import settings  # noqa: F401  a fixture

GIN = """
import mlx_pretrain.training.optimizers
import raters.train

train_rater.run_dir = 'job'
train_rater.pairs = '{pairs}'
train_rater.validation = '{validation}'
train_rater.tokenizer = '{tokenizer}'
train_rater.model = @QualityConfig()
train_rater.steps = 3
train_rater.batch_size = 8
train_rater.eval_batch_size = 8
train_rater.learning_rate = @constant_schedule()
train_rater.optimizer = @adamw
train_rater.log_every = 1
train_rater.eval_every = 3
train_rater.compilation_cache = None
constant_schedule.value = 3e-3
QualityConfig.vocab_size = 512
QualityConfig.embed_dim = 32
QualityConfig.n_layers = 1
QualityConfig.n_heads = 2
QualityConfig.mlp_dim = 64
QualityConfig.max_length = 24
QualityConfig.pooling = 'mean'
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(settings, tmp_path):  # noqa: F811
    (tmp_path / "train.gin").write_text(GIN.format(**settings))
    job = run_job("raters.train", "--gin_file=train.gin", folder=tmp_path)
    assert [process.code for process in job] == [0, 0], job
    rater_training.train(rater_training.TrainRaterConfig(**settings | {
        "run_dir": str(tmp_path / "alone"), "model": dataclasses.replace(settings["model"], n_layers=1), "steps": 3,
        "batch_size": 8, "eval_batch_size": 8, "log_every": 1, "eval_every": 3, "optimizer": optimizers.adamw}))
    for kind, count in (("train", 3), ("eval", 2)):
        one, two = (lines(tmp_path / folder, kind) for folder in ("alone", "job"))
        assert len(one) == len(two) == count
        for a, b in zip(one, two):
            keys = {key for key in a if key.startswith(("loss", "pair_", "accuracy", "grad_norm", "tokens/"))}
            assert keys and {key: a[key] for key in keys} == pytest.approx({key: b[key] for key in keys}, rel=1e-5)
