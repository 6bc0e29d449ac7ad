"""Mistakes of a user end in one line that names the file and the cause; nothing is left half-written."""

import shutil

import pytest

from mlx_pretrain.data import token_store as token_store
from tests.e2e.conftest import assert_refused

RATES_FILE = '{"format": "mlx-rates", "version": 1, "rates": %s}'


@pytest.mark.parametrize(
    "rates, message",
    [
        ('{"aa": 1, "xx": 1}', "unknown language 'xx'; there is text for aa, bb, cc"),
        ('{"aa": 1, "bb": -0.5}', r"the rate of 'bb' is negative \(-0.5\)"),
        ('{"aa": 0, "bb": 0}', "the rates sum to 0.0, not to something positive"),
    ],
)
def test_rates_that_make_no_mixture(tiny_gin, tmp_path, rates, message):
    (tmp_path / "rates.json").write_text(RATES_FILE % rates)
    assert_refused(f"rates.json: {message}", tmp_path, tiny_gin, "--gin.train.rates=rates.json")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_truncated_token_store(tiny_gin, store_dir, tmp_path, split):
    shutil.copytree(store_dir, tmp_path / "store")
    part = token_store.TokenStore(store_dir).part(split, "bb")
    [(name, size)] = part.files.items()
    with (tmp_path / "store" / split / "bb" / name).open("r+b") as file:
        file.truncate(size - 100)
    message = f"store/{split}/bb/{name}: {size - 100} bytes where the manifest says {size}; export the token store"
    assert_refused(f"{message} again", tmp_path, tiny_gin, "--gin.train.token_store=store")


@pytest.mark.parametrize(
    "text, message",
    [
        ("train.step = 3", "my.gin.*'train'.*'step'.*"),
        ("train.optimizer = @adam", "my.gin:2: .*@adam.*"),
        ("train.steps = %MANY", ".*MANY.*"),
        ("train.optimizer = @adamw()", ".*missing .*'learning_rate'"),
        ("train.learning_rate = 0.1", r"train.learning_rate = 0.1: must be a schedule, e.g. @warmup_cosine\(\)"),
        ("train.eval_every = 0", "train.eval_every = 0: must be a positive integer"),
        ("train.eval_sequences = 0", "train.eval_sequences = 0: must be a positive integer"),
    ],
)
def test_gin_typos(tiny_gin, tmp_path, text, message):
    (tmp_path / "my.gin").write_text(f"# what a user wrote\n{text}\n")
    assert_refused(message, tmp_path, tiny_gin, "--gin_file=my.gin")


def test_a_batch_that_does_not_divide_over_the_mesh(tiny_gin, tmp_path):
    message = "batch of 12 sequences does not divide over the mesh {'data': 8, 'fsdp': 1, 'tensor': 1}"
    assert_refused(message, tmp_path, tiny_gin, "--gin.train.batch_size=12", devices=8)


def test_a_model_that_does_not_fit_the_store(tiny_gin, tmp_path):
    message = ".*: 96 token ids, the model has vocab_size=95"
    assert_refused(message, tmp_path, tiny_gin, "--gin.DecoderConfig.vocab_size=95")
