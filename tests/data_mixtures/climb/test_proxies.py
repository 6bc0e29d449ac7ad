"""Proxy runs: what the normal trainer computes, whichever way they are packed, stopped and started again."""

import json
import pathlib

import jax
import numpy as np
import pytest

from data_mixtures.climb import proxies
from data_mixtures.climb.proxies import ProxiesConfig, train_proxies
from data_mixtures.climb.runs import proxy_runs
from mlx_pretrain import optimizers
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.train import TrainConfig
from mlx_pretrain.train import train as pretrain
from tests.conftest import LENGTH

BATCH = 8
MIXTURES = {"half": {"aa": 0.5, "bb": 0.5}, "all": {"aa": 0.25, "bb": 0.25, "cc": 0.5}, "only": {"cc": 1.0}}


@pytest.fixture(scope="module")
def settings(store_dir, tiny_config):
    return {
        "token_store": store_dir,
        "models": [tiny_config],
        "tokens": [4 * BATCH * LENGTH, 9 * BATCH * LENGTH],
        "batch_size": BATCH,
        "learning_rate": optimizers.constant(1e-2),
        "optimizer": optimizers.adamw,
        "plan": lambda counts: MIXTURES,
        "eval_batch_size": 8,
        "compilation_cache": None,
    }


def train(monkeypatch, **settings) -> str:
    monkeypatch.setattr(proxies, "ProxiesConfig", lambda: ProxiesConfig(**settings))
    train_proxies()
    return settings["output"]


@pytest.fixture(scope="module")
def table(settings, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        output = str(tmp_path_factory.mktemp("proxies") / "runs.csv")
        return train(patch, **settings, output=output)


def test_the_table_has_a_row_for_every_run_and_token_count(table, tiny_config):
    runs = proxy_runs(table)
    assert runs.languages == runs.targets == ("aa", "bb", "cc")
    assert sorted(runs.run) == sorted(2 * [f"{name}-0.0217M-seed0" for name in MIXTURES])
    assert set(runs.tokens) == {1024, 2304} and set(runs.n_params) == {tiny_config.parameters()}
    rows = runs.run == "all-0.0217M-seed0"
    np.testing.assert_array_equal(runs.ratios[rows], [[0.25, 0.25, 0.5]] * 2)
    # It learns the language it sees, so the losses say something.
    only = runs.losses[runs.run == "only-0.0217M-seed0"]
    assert only[1, 2] < only[0, 2] - 0.1 and only[1, 2] < only[1, 0] - 0.5


def test_a_proxy_is_a_run_of_the_normal_trainer(table, settings, tmp_path):
    save_rates(tmp_path / "rates.json", MIXTURES["all"], {})
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), model=settings["models"][0], token_store=settings["token_store"],
        rates=str(tmp_path / "rates.json"), steps=9, batch_size=BATCH, learning_rate=settings["learning_rate"],
        optimizer=settings["optimizer"], eval_every=4, eval_batch_size=8, compilation_cache=None,
    )  # fmt: skip
    loss = pretrain(config)
    runs = proxy_runs(table)
    last = (runs.run == "all-0.0217M-seed0") & (runs.tokens == 9 * BATCH * LENGTH)
    np.testing.assert_array_equal(runs.losses[last][0], [loss[f"loss/{l}"] for l in runs.targets])


def test_packed_runs_are_the_same_runs(table, settings, monkeypatch, tmp_path):
    packed = proxy_runs(train(monkeypatch, **settings, output=str(tmp_path / "packed.csv"), pack=2))
    alone = proxy_runs(table)
    order = [np.lexsort((runs.tokens, runs.run)) for runs in (packed, alone)]
    assert list(packed.run[order[0]]) == list(alone.run[order[1]])
    np.testing.assert_allclose(packed.losses[order[0]], alone.losses[order[1]], rtol=2e-4)


def test_finished_runs_are_skipped_and_others_added(table, settings, monkeypatch, tmp_path, capsys):
    text = pathlib.Path(table).read_text()
    output = tmp_path / "runs.csv"
    output.write_text("".join(line for line in text.splitlines(True) if not line.startswith("only")))
    (tmp_path / "runs.json").write_text(pathlib.Path(table).with_suffix(".json").read_text())
    train(monkeypatch, **settings, output=str(output))
    assert "3 runs of 2,304 tokens, 2 of them done" in capsys.readouterr().err
    assert sorted(output.read_text().splitlines()) == sorted(text.splitlines())


def test_a_run_goes_on_from_its_last_evaluation(table, settings, monkeypatch, tmp_path):
    output = str(tmp_path / "runs.csv")
    only = {**settings, "plan": lambda counts: {"all": MIXTURES["all"]}, "output": output}
    step, calls = proxies.make_train_step, []

    def counting(*arguments, **options):
        def counted(state, tokens):
            jax.debug.callback(lambda s: calls.append(int(s)), state.step)
            return step(*arguments, **options)(state, tokens)

        return counted

    def failing(self, proxy, step, *arguments):
        if step == 9:
            raise InputError("the power fails")
        add(self, proxy, step, *arguments)

    add = proxies.Table.add
    with monkeypatch.context() as patch:
        patch.setattr(proxies.Table, "add", failing)
        with pytest.raises(InputError, match="the power fails"):
            train(patch, **only)
    assert [int(line.split(",")[1]) for line in pathlib.Path(output).read_text().splitlines()[1:]] == [4]
    monkeypatch.setattr(proxies, "make_train_step", counting)
    train(monkeypatch, **only)
    jax.effects_barrier()
    assert sorted(set(calls)) == [4, 5, 6, 7, 8]
    whole = [line for line in pathlib.Path(table).read_text().splitlines() if line.startswith("all")]
    assert pathlib.Path(output).read_text().splitlines()[1:] == whole


def test_a_table_of_other_settings_is_not_extended(table, settings, monkeypatch):
    with pytest.raises(InputError, match=r"runs\.csv: these runs were made with another batch_size"):
        train(monkeypatch, **{**settings, "batch_size": 16}, output=table)
    with pytest.raises(InputError, match="made with another learning_rate"):
        train(monkeypatch, **{**settings, "learning_rate": optimizers.constant(1e-3)}, output=table)


def test_a_diverging_proxy_is_an_error_with_its_name(settings, monkeypatch, tmp_path):
    exploding = {**settings, "learning_rate": optimizers.constant(1e30)}
    with pytest.raises(InputError, match=r"run 'half-0.0217M-seed0': the loss or gradient was not finite in \d of 4"):
        train(monkeypatch, **exploding, output=str(tmp_path / "runs.csv"))


@pytest.mark.parametrize("change, cause", [
    ({"tokens": [100, 50]}, "ascending"),
    ({"tokens": [10, 2304]}, "not distinct multiples of a step's 256 tokens"),
    ({"models": []}, "list of models"),
    ({"pack": 0}, "proxies.pack = 0: must be a positive integer"),
    ({"threads": 2}, "with 8 devices use proxies.pack"),
    ({"languages": ["aa", "zz"]}, "no train text in 'zz'"),
    ({"batch_size": 7}, "does not divide over the mesh"),
])
def test_settings_that_cannot_work(settings, monkeypatch, tmp_path, change, cause):
    with pytest.raises(InputError, match=cause):
        train(monkeypatch, **{**settings, **change}, output=str(tmp_path / "runs.csv"))
    assert not (tmp_path / "runs.csv").exists()


def test_the_settings_stand_beside_the_table(table):
    found = json.loads(pathlib.Path(table).with_suffix(".json").read_text())
    assert found["batch_size"] == BATCH and found["learning_rate"] == pytest.approx([0.01] * 3)
