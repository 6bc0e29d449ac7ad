"""Proxy runs equal runs of the normal trainer, however they are packed, stopped and started again."""

import dataclasses
import json
import pathlib
import shutil

import gin
import jax
import numpy as np
import pytest

from data_mixtures.climb import proxies, train_proxies
from data_mixtures.climb.proxies import ProxiesConfig
from data_mixtures.climb.proxy_folder import ProxyFolder
from data_mixtures.climb.proxy_plan import ProxyRun
from data_mixtures.climb.proxy_table import proxy_runs
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.train import TrainConfig
from mlx_pretrain.train import train as pretrain
from mlx_pretrain.training import optimizers
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
        "max_epochs": 8.0,  # of 'only'
        "compilation_cache": None,
    }


def lines(output) -> list[str]:
    """Rows of all tables in a folder, without headers."""
    return [line for path in sorted(pathlib.Path(output).glob("*.csv")) for line in path.read_text().splitlines()[1:]]


def train(**settings) -> str:
    proxies.main(ProxiesConfig(**settings))
    return settings["output"]


@pytest.fixture(scope="module")
def table(settings, tmp_path_factory):
    return train(**settings, output=str(tmp_path_factory.mktemp("proxies") / "runs"))


def test_the_table_has_a_row_for_every_run_and_token_count(table, tiny_config):
    runs = proxy_runs(table)
    assert runs.languages == runs.targets == ("aa", "bb", "cc")
    assert sorted(runs.run) == sorted(2 * [f"{name}-0.0217M-seed0" for name in MIXTURES])
    assert set(runs.tokens) == {1024, 2304} and set(runs.n_params) == {tiny_config.parameters()}
    rows = runs.run == "all-0.0217M-seed0"
    np.testing.assert_array_equal(runs.ratios[rows], [[0.25, 0.25, 0.5]] * 2)
    # It learns the language it sees, so comparing losses is a real test.
    only = runs.losses[runs.run == "only-0.0217M-seed0"]
    assert only[1, 2] < only[0, 2] - 0.1 and only[1, 2] < only[1, 0] - 0.5


def test_epochs_of_the_most_repeated_language_are_in_the_table(table):
    """Runs take 32 and 72 sequences; aa, bb and cc have 40, 24 and 9."""
    rows = [line.split(",") for line in lines(table)]
    epochs = {(row[0].split("-")[0], int(row[1])): float(row[4]) for row in rows}
    expected = {("half", 4): 16 / 24, ("half", 9): 36 / 24, ("all", 4): 16 / 9, ("all", 9): 4, ("only", 4): 32 / 9,
                ("only", 9): 8}
    assert epochs == pytest.approx(expected, rel=1e-3)


def test_runs_end_before_they_repeat_text_too_often(table, settings, tmp_path, capsys):
    """The other runs are the same, packed or not, and a note lists the mixtures that end early or are left out."""
    plan = {**MIXTURES, "once": {"cc": 0.1, "aa": 0.9}}
    capped = {key: value for key, value in settings.items() if key != "max_epochs"} | {"plan": lambda counts: plan}
    first = train(**capped, output=str(tmp_path / "packed"), pack=2)
    assert "max_epochs = 4: 1 of 4 mixtures end early: only" in capsys.readouterr().err
    runs, alone = proxy_runs(first), proxy_runs(table)
    assert runs.tokens[runs.run == "only-0.0217M-seed0"].tolist() == [1024] and len(runs) == 7
    losses = dict(zip(zip(alone.run, alone.tokens), alone.losses))
    for name, tokens, packed in zip(runs.run, runs.tokens, runs.losses):
        if not name.startswith("once"):
            np.testing.assert_allclose(packed, losses[name, tokens], rtol=2e-4)
    train(**capped, output=first)
    assert "4 runs of 2,304 tokens, 4 of them done" in capsys.readouterr().err
    second = train(**{**capped, "max_epochs": 1.79}, output=str(tmp_path / "two"))
    said = capsys.readouterr().err
    assert "1 of 4 mixtures end early: all" in said
    assert "1 of 4 mixtures are left out: too little text for the first evaluation: only" in said
    assert len(proxy_runs(second)) == 5


def test_a_run_of_another_mixture_is_not_taken_for_the_plans(table, settings):
    other = {**MIXTURES, "all": {"aa": 0.5, "bb": 0.25, "cc": 0.25}}
    with pytest.raises(InputError, match=r"all-0\.0217M-seed0\.csv: run 'all-0\.0217M-seed0' at step 4 had another"):
        train(**{**settings, "plan": lambda counts: other}, output=table)


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


def test_finished_runs_are_skipped_and_others_added(table, settings, tmp_path, capsys):
    output = tmp_path / "runs"
    shutil.copytree(table, output, ignore=shutil.ignore_patterns("only*"))
    train(**settings, output=str(output))
    assert "3 runs of 2,304 tokens, 2 of them done" in capsys.readouterr().err
    assert lines(output) == lines(table)


@pytest.mark.parametrize("change, cause", [
    (lambda path: path.unlink(), "settings.json: no such settings"),
    (lambda path: path.write_text("{"), "settings.json: not a valid JSON settings"),
    (lambda path: path.write_text("[]"), "settings.json: not a JSON object of settings"),
    (lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": 0.1})),
     r"runs: exists, made with dropout = 0.1 \(now null\); choose another proxies.output$"),
])
def test_runs_whose_settings_are_unknown_or_more_are_not_added_to(table, settings, tmp_path, capsys, change, cause):
    output = tmp_path / "runs"
    shutil.copytree(table, output, ignore=shutil.ignore_patterns("only*"))
    change(output / "settings.json")
    with pytest.raises(InputError, match=cause):
        train(**settings, output=str(output))
    assert "made again" not in capsys.readouterr().err


def test_a_table_in_one_file_is_extended_in_a_folder(table, settings, tmp_path, capsys):
    """Writes a table as older versions did, one file for all runs, with its last run cut off."""
    output = tmp_path / "runs"
    output.mkdir()
    header = next(pathlib.Path(table).glob("*.csv")).read_text().splitlines()[0]
    (output / "proxies.csv").write_text("\n".join([header, *lines(table)[:-1]]) + "\n")
    (output / "settings.json").write_text((pathlib.Path(table) / "settings.json").read_text())
    train(**settings, output=str(output))
    assert "3 runs of 2,304 tokens, 2 of them done" in capsys.readouterr().err
    assert lines(output / "") == [*lines(table)[-1:], *lines(table)[:-1]]
    other = (output / "proxies.csv").read_text().replace("step", "at").replace("seed0", "seed1")
    (output / "other.csv").write_text(other)
    with pytest.raises(InputError, match=r"other\.csv:2: no whole number under 'step'"):
        train(**settings, output=str(output))
    with pytest.raises(InputError, match=r"proxies\.csv: a single table; proxies\.output is a folder"):
        train(**settings, output=str(output / "proxies.csv"))


def test_commands_that_share_a_folder_lose_no_row(table, settings, monkeypatch, tmp_path, capsys):
    """Each process began before the other had a row; with --shard each trains its part."""
    mixed = ProxyRun("mix", settings["models"][0], {"aa": 1.0}, 0, (4, 9), 0.01)
    common = (tmp_path / "runs", {"batch_size": 8}, ("aa", "bb"), ("aa",))
    first, second = ProxyFolder(*common), ProxyFolder(*common)
    for step in (4, 9):
        first.add(mixed, step, step * 10, {"aa": 3.0})
        second.add(dataclasses.replace(mixed, mixture="other"), step, step * 10, {"aa": 4.0})
    runs = proxy_runs(tmp_path / "runs")
    assert [name.split("-")[0] for name in runs.run] == ["mix", "mix", "other", "other"]
    assert runs.tokens.tolist() == [40, 90, 40, 90]
    late = ProxyFolder(tmp_path / "late", {"batch_size": 8}, *common[2:])
    early = ProxyFolder(tmp_path / "late", {"batch_size": 16}, *common[2:])
    early.add(mixed, 4, 40, {"aa": 3.0})
    with pytest.raises(InputError, match=r"late: exists, made with batch_size = 16 \(now 8\)"):
        late.add(mixed, 4, 40, {"aa": 3.0})
    output = str(tmp_path / "shared")
    for number in range(2):
        monkeypatch.setattr(proxies.cluster, "shard", lambda: (number, 2))  # noqa: B023
        train(**settings, output=output)
        said = capsys.readouterr().err
        assert f"{2 - number} runs in shard {number} of 2 of 2,304 tokens, 0 of them done" in said
    assert lines(output) == lines(table)
    assert not (tmp_path / "shared.work").exists()


def test_a_run_goes_on_from_its_last_evaluation(table, settings, monkeypatch, tmp_path):
    output = str(tmp_path / "runs")
    only = {**settings, "plan": lambda counts: {"all": MIXTURES["all"]}, "output": output}
    step, calls = train_proxies.make_train_step, []

    def counting(*arguments, **options):
        def counted(state, tokens):
            jax.debug.callback(lambda s: calls.append(int(s)), state.step)
            return step(*arguments, **options)(state, tokens)

        return counted

    def failing(self, proxy, step, *arguments):
        if step == 9:
            raise InputError("the power fails")
        add(self, proxy, step, *arguments)

    add = ProxyFolder.add
    with monkeypatch.context() as patch:
        patch.setattr(ProxyFolder, "add", failing)
        with pytest.raises(InputError, match="the power fails"):
            train(**only)
    assert [int(line.split(",")[1]) for line in lines(output)] == [4]
    monkeypatch.setattr(train_proxies, "make_train_step", counting)
    train(**only)
    jax.effects_barrier()
    assert sorted(set(calls)) == [4, 5, 6, 7, 8]
    assert lines(output) == [line for line in lines(table) if line.startswith("all")]


@pytest.fixture(scope="module")
def work(settings, tmp_path_factory):
    """The checkpoint of two runs trained together that had been evaluated once of twice."""
    add, folder = ProxyFolder.add, tmp_path_factory.mktemp("work")

    def failing(self, proxy, step, *arguments):
        if step == 9:
            raise InputError("the power fails")
        add(self, proxy, step, *arguments)

    plan = {name: MIXTURES[name] for name in ("half", "all")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProxyFolder, "add", failing)
        with pytest.raises(InputError, match="the power fails"):
            train(**{**settings, "plan": lambda counts: plan}, output=str(folder / "runs"), pack=2)
    return folder / "runs.work"


@pytest.fixture
def half_done(settings, work, tmp_path):
    """Settings of a command whose table was deleted when its runs were half done."""
    shutil.copytree(work, tmp_path / "runs.work")
    plan = {name: MIXTURES[name] for name in ("half", "all")}
    return {**settings, "output": str(tmp_path / "runs"), "plan": lambda counts: plan, "pack": 2}


@pytest.mark.parametrize("change, cause", [
    ({"tokens": [1024, 2048]}, r"tokens = \[1024, 2304\] \(now \[1024, 2048\]\)"),
    ({"batch_size": 16, "tokens": [1024, 4096]}, r"batch_size = 8 \(now 16\)"),
    ({"learning_rate": optimizers.constant(1e-3)}, "learning_rate"),
    ({"optimizer": optimizers.muon}, 'optimizer = "adamw" \\(now "muon"\\)'),
    ({"plan": lambda counts: {"half": MIXTURES["half"], "all": {"aa": 0.5, "cc": 0.5}}}, "rates all-0.* aa = 0.25"),
    ({"model": {"rope_theta": 500.0}}, "rope_theta"),
    ({"model": {"segment_attention": True}}, "segment_attention"),
    ({"token_store": None}, "other token_store"),
])
def test_a_half_done_run_of_other_settings_does_not_go_on(half_done, tmp_path, change, cause):
    """Only the checkpoint records how it was made; each change would train other rows under the same names."""
    changed = {**half_done, **change}
    (model,) = changed["models"]
    fields = changed.pop("model", {})
    changed["models"] = [dataclasses.replace(model, **{
        name: (not model.segment_attention if name == "segment_attention" else value)
        for name, value in fields.items()})]
    if changed["token_store"] is None:
        changed["token_store"] = shutil.copytree(half_done["token_store"], tmp_path / "store")
        manifest = json.loads((tmp_path / "store/manifest.json").read_text())
        (tmp_path / "store/manifest.json").write_text(json.dumps(manifest, indent=7))
    with pytest.raises(InputError, match=rf"runs\.work/half-.*: exists, made with .*{cause}") as error:
        train(**changed)
    assert "\n" not in str(error.value) and "delete" in str(error.value)
    assert not list(tmp_path.glob("runs/*.csv"))


def test_a_pack_of_other_members_starts_anew(half_done, table, tmp_path):
    """The checkpoint has the parameters of the members that it was made of."""
    plan = {name: MIXTURES[name] for name in ("half", "only")}
    train(**{**half_done, "plan": lambda counts: plan})
    packed, alone = proxy_runs(half_done["output"]), proxy_runs(table)
    for name in plan:
        rows, expected = (runs.losses[runs.run == f"{name}-0.0217M-seed0"] for runs in (packed, alone))
        np.testing.assert_allclose(rows, expected, rtol=2e-4)


def test_a_table_of_other_settings_is_not_extended(table, settings):
    with pytest.raises(InputError, match=r"runs: exists, made with batch_size"):
        train(**{**settings, "batch_size": 16}, output=table)
    with pytest.raises(InputError, match="exists, made with learning_rate"):
        train(**{**settings, "learning_rate": optimizers.constant(1e-3)}, output=table)
    gin.bind_parameter("adamw.weight_decay", 0.2)
    with pytest.raises(InputError, match=r"made with optimizer_settings weight_decay = null \(now 0.2\)"):
        train(**settings, output=table)
    gin.clear_config()
    # The same number of parameters, so that its runs have the same names.
    (model,) = settings["models"]
    other = dataclasses.replace(model, rope_theta=500.0)
    with pytest.raises(InputError, match=r"runs: exists, made with rope_theta = 10000.0 \(now 500.0\)"):
        train(**{**settings, "models": [other]}, output=table)
    train(**{**settings, "models": [dataclasses.replace(model, unroll=2, remat="full")]}, output=table)
    with pytest.raises(InputError, match=r"3 names of runs appear twice, e\.g\. 'half-0.0217M-seed0'"):
        train(**{**settings, "models": [model, other]}, output=table)
    with pytest.raises(InputError, match=r"runs: these runs were made with other languages \(cc\)"):
        train(**{**settings, "languages": ["aa", "bb"]}, output=table)


def test_a_diverging_proxy_is_an_error_with_its_name(settings, tmp_path):
    exploding = {**settings, "learning_rate": optimizers.constant(1e30)}
    with pytest.raises(InputError, match=r"run 'half-0.0217M-seed0': the loss or gradient was not finite in \d of 4"):
        train(**exploding, output=str(tmp_path / "runs"))


@pytest.mark.parametrize("change, cause", [
    ({"tokens": [100, 50]}, "ascending"),
    ({"tokens": [10, 2304]}, "not distinct multiples of a step's 256 tokens"),
    ({"models": []}, "list of models"),
    ({"pack": 0}, "proxies.pack = 0: must be a positive integer"),
    ({"threads": 2}, "with 8 devices use proxies.pack"),
    ({"languages": ["aa", "zz"]}, "no train text in 'zz'"),
    ({"max_epochs": 0}, "max_epochs = 0: must be positive"),
    ({"max_epochs": 0.1}, "no mixture has text for 1,024 tokens"),
    ({"batch_size": 7}, "does not divide over the mesh"),
])
def test_settings_that_cannot_work(settings, tmp_path, change, cause):
    with pytest.raises(InputError, match=cause):
        train(**{**settings, **change}, output=str(tmp_path / "runs"))
    assert not list(tmp_path.glob("runs/*.csv"))


def test_the_settings_stand_beside_the_tables(table):
    recorded = json.loads((pathlib.Path(table) / "settings.json").read_text())
    model = json.loads((pathlib.Path(table) / "model-0.0217M.json").read_text())
    assert model["rope_theta"] == 10_000 and "unroll" not in model
    assert recorded["optimizer_settings"] == {} and recorded["batch_size"] == BATCH
    assert recorded["learning_rate"] == pytest.approx([0.01] * 3)
