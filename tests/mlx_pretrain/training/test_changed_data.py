"""A run that resumes with other training data: changes are logged and recorded, or refused."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from mlx_pretrain.data import token_store as token_store
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.train import Pretraining, TrainConfig, train
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.checkpoints import DataState
from mlx_pretrain.training.run_state import continued_mixture
from tests.conftest import RATES

OTHER_RATES = {"cc": 0.6, "bb": 0.2, "aa": 0.2}


@pytest.fixture(scope="module")
def stopped(tiny_config, store_dir, tmp_path_factory) -> TrainConfig:
    """Settings of a run of two steps of 8 sequences that was trained."""
    folder = tmp_path_factory.mktemp("stopped")
    save_rates(folder / "rates.json", RATES, {})
    save_rates(folder / "other.json", OTHER_RATES, {})
    config = TrainConfig(
        run_dir=str(folder / "run"), model=tiny_config, token_store=store_dir, rates=str(folder / "rates.json"),
        steps=2, batch_size=8, learning_rate=optimizers.constant(1e-3), eval_batch_size=8, compilation_cache=None,
    )  # fmt: skip
    train(config)
    return config


@pytest.fixture
def config(stopped, tmp_path) -> TrainConfig:
    """Settings with which a copy of that run resumes."""
    shutil.copytree(stopped.run_dir, tmp_path / "run")
    return dataclasses.replace(stopped, run_dir=str(tmp_path / "run"), steps=4)


def changes(config):
    return json.loads((pathlib.Path(config.run_dir) / "run.json").read_text())["changes"]


def test_changes_are_told_and_recorded(config, capsys):
    config = dataclasses.replace(config, rates=config.rates.replace("rates.json", "other.json"), batch_size=16)
    train(config)
    expected = [
        {"step": 2, "change": "batch_size 8 -> 16"},
        {"step": 2, "change": "rates aa 0.5 -> 0.2, bb 0.3 -> 0.2, cc 0.2 -> 0.6; each goes on where it was",
         "rates": pytest.approx({"aa": 0.5, "bb": 0.3, "cc": 0.2}), "sequences": 16},
    ]
    assert changes(config) == expected
    told = capsys.readouterr().out
    for change in expected:
        assert told.count(f"changed after step 2: {change['change']}\n") == 1

    # The rows read count from there: a change is recorded only once.
    train(dataclasses.replace(config, steps=5))
    assert changes(config) == expected and "changed after" not in capsys.readouterr().out
    [meta] = (pathlib.Path(config.run_dir) / "checkpoints" / "5" / "meta").glob("metadata")
    saved = DataState(0, {}, (), json.loads(meta.read_text())["mixture"]).mixture
    assert (saved.read_before_change, saved.read_since_change) == ({"aa": 8, "bb": 5, "cc": 3}, 48)
    store = token_store.TokenStore(config.token_store)
    assert saved.rates == pytest.approx(OTHER_RATES) and saved.data == store.fingerprints("train", RATES)


def other_store(store_dir, folder):
    """Copies a token store, without two sequences of one language."""
    shutil.copytree(store_dir, folder)
    manifest = token_store.read_manifest(store_dir)
    rows = token_store.TokenStore(store_dir).read("train", "bb")[2:]
    writer, old = token_store.PartWriter(folder / "train" / "bb", 32, rows.dtype), manifest.splits["train"]["bb"]
    writer.append(rows)
    part = writer.close(old.tokens - 64, old.bytes, old.documents - 2)
    splits = {**manifest.splits, "train": {**manifest.splits["train"], "bb": part}}
    token_store.write_manifest(folder, dataclasses.replace(manifest, splits=splits))
    return str(folder)


@pytest.mark.parametrize("what", ["seed", "store"])
def test_what_cannot_be_honoured_is_refused(config, tmp_path, what):
    if what == "seed":
        wrong = dataclasses.replace(config, seed=1)
        message = ("this run shuffles its data with seed=0, the configuration says 1; set it back or use a new run "
                   "folder")
    else:
        wrong = dataclasses.replace(config, token_store=other_store(config.token_store, tmp_path / "store"))
        message = ("5 training sequences of 'bb' have been read from other data (24 rows) than are configured now "
                   "(22 rows); go on with those or use a new run folder")
    before = (pathlib.Path(config.run_dir) / "run.json").read_bytes()
    with pytest.raises(InputError) as error:
        train(wrong)
    assert str(error.value) == f"{config.run_dir}: {message}"
    assert (pathlib.Path(config.run_dir) / "run.json").read_bytes() == before
    train(config)  # set back, it resumes
    assert changes(config) == []


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_word(config):
    mixture, told = continued_mixture(Pretraining(config).mixture, DataState(16, {}), 2, config.run_dir)
    assert told == ["the checkpoint is of an earlier version, which read the data in another order"]
    assert mixture.changes == ({"step": 2, "change": told[0]},)
    assert mixture.sequences_read() == {"aa": 8, "bb": 5, "cc": 3}


def test_a_finished_run_does_not_pass_for_one_on_other_data(config, store_dir, tmp_path, capsys):
    finished = dataclasses.replace(config, steps=2)
    train(finished)
    assert "nothing left to do, 2 steps are done" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"run: its 2 steps are done, with other data \(rates aa 0.5 -> 0.2.*new run"):
        train(dataclasses.replace(finished, rates=finished.rates.replace("rates.json", "other.json")))
    with pytest.raises(InputError, match=r"bb"):
        train(dataclasses.replace(finished, token_store=other_store(store_dir, tmp_path / "store")))
