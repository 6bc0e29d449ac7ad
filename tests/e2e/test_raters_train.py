"""Training of a rater as one job of two processes."""

import pytest

from tests.e2e.conftest import lines, run
from tests.e2e.hosts import run_job
from tests.raters.test_train import settings  # noqa: F401  a fixture

GIN = """
import mlx_pretrain.optimizers
import raters.train

train_rater.pairs = '{pairs}'
train_rater.validation = '{validation}'
train_rater.tokenizer = '{tokenizer}'
train_rater.model = @QualityConfig()
train_rater.steps = 4
train_rater.batch_size = 8
train_rater.eval_batch_size = 8
train_rater.learning_rate = @constant_schedule()
train_rater.optimizer = @adamw
train_rater.log_every = 1
train_rater.eval_every = 2
train_rater.compilation_cache = None
constant_schedule.value = 3e-3
QualityConfig.vocab_size = 512
QualityConfig.embed_dim = 32
QualityConfig.n_layers = 2
QualityConfig.n_heads = 2
QualityConfig.mlp_dim = 64
QualityConfig.max_length = 24
QualityConfig.pooling = 'mean'
"""


def test_two_processes_train_as_one_does(settings, tmp_path):  # noqa: F811
    (tmp_path / "train.gin").write_text(GIN.format(**settings))
    alone = run("raters.train", "--gin_file=train.gin", "--gin.train_rater.run_dir=alone", folder=tmp_path)
    job = run_job("raters.train", "--gin_file=train.gin", "--gin.train_rater.run_dir=job", folder=tmp_path)
    assert [alone.code, *(process.code for process in job)] == [0, 0, 0], (alone, job)
    for kind, count in (("train", 4), ("eval", 3)):
        one, two = (lines(tmp_path / folder, kind) for folder in ("alone", "job"))
        assert len(one) == len(two) == count
        for a, b in zip(one, two):
            keys = {key for key in a if key.startswith(("loss", "pair_", "accuracy", "grad_norm", "tokens/"))}
            assert keys and {key: a[key] for key in keys} == pytest.approx({key: b[key] for key in keys}, rel=1e-5)
