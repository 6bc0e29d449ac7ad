"""Climb as a user runs it: proxies, allocation, report, and training on the rates that came out."""

import json
import pathlib
import re
import shutil
import signal
import xml.etree.ElementTree

import numpy as np
import pytest

from data_mixtures.climb.proxy_table import proxy_runs
from mlx_pretrain.data.rates import load_rates
from tests.conftest import LENGTH
from tests.e2e.conftest import Ended, lines, run, started
from tests.e2e.hosts import end_all, run_job, started_job

PROXIES, ALLOCATE = "data_mixtures.climb.proxies", "data_mixtures.climb.allocate"
STEP_TOKENS = 8 * LENGTH

CLIMB = """
import data_mixtures.climb.proxies
import data_mixtures.climb.allocate

DecoderConfig.vocab_size = 96
DecoderConfig.embed_dim = 16
DecoderConfig.n_layers = 1
DecoderConfig.n_heads = 1
DecoderConfig.n_kv_heads = 1
DecoderConfig.head_dim = 16
DecoderConfig.mlp_dim = 32
DecoderConfig.max_length = 64

proxies.output = 'proxies'
proxies.token_store = '{store}'
proxies.models = [@DecoderConfig()]
proxies.tokens = [{short}, {long}]
proxies.batch_size = 8
proxies.optimizer = @adamw
proxies.learning_rate = @constant_schedule()
proxies.compilation_cache = None
proxies.threads = 2
proxies.max_epochs = None
constant_schedule.value = 1e-2
planned_mixtures.mixtures = 6

allocate.runs = @proxy_runs()
proxy_runs.path = 'proxies'
allocate.output = 'climb'
allocate.n_params = 5000
allocate.tokens = 20000
allocate.token_store = '{store}'
allocate.floor = 0.1
allocate.max_epochs = 30.0
allocate.compared = ['msl']
allocate.replicates = 3
allocate.folds = 2
Climb.family = 'saturating_fading'
Climb.starts = 1
MSL.starts = 1
"""


def rows(folder: pathlib.Path) -> list[str]:
    """Rows of all tables in a folder, without headers."""
    return sorted(line for path in folder.glob("*.csv") for line in path.read_text().splitlines()[1:])


@pytest.fixture(scope="module")
def climb_gin(store_dir, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("climb_gin")
    text = CLIMB.format(store=store_dir, short=10 * STEP_TOKENS, long=30 * STEP_TOKENS)
    (folder / "climb.gin").write_text(text)
    return f"--gin_file={folder / 'climb.gin'}"


@pytest.fixture(scope="module")
def finished(climb_gin, tmp_path_factory) -> tuple[pathlib.Path, Ended]:
    """Folder after proxies and allocation, and the output of the allocation."""
    folder = tmp_path_factory.mktemp("climb")
    ended = run(PROXIES, climb_gin, folder=folder)
    assert ended.code == 0, ended.err
    allocated = run(ALLOCATE, climb_gin, folder=folder)
    assert allocated.code == 0, allocated.err
    return folder, allocated


def test_the_proxies_are_complete(finished):
    runs = proxy_runs(finished[0] / "proxies")
    assert len(runs) == 2 * (3 + 3 + 3 + 6) and not (finished[0] / "proxies.work").exists()


def test_the_rates_keep_the_constraints_and_carry_their_evidence(finished):
    folder, ended = finished
    content = json.loads((folder / "climb" / "rates.json").read_text())
    assert min(content["rates"].values()) >= 0.1 - 1e-12 and sum(content["rates"].values()) == pytest.approx(1)
    assert max(content["epochs"].values()) <= 30 + 1e-9
    for language, rate in content["rates"].items():
        low, high = content["rates_interval"][language]
        assert 0.1 - 1e-12 <= low <= high <= 1
        assert 0 < content["expected_loss_interval"][language][0] < 20
        assert f"{rate:.4%}" in ended.err
    assert content["provenance"]["law"]["name"] == "climb" and content["provenance"]["runs"] == 15
    allocation = json.loads((folder / "climb" / "allocation.json").read_text())
    assert allocation["methods"]["climb-joint"]["kkt"] < 1e-6
    assert allocation["methods"]["climb-two-step"]["joint_gap"] >= -1e-9
    baselines = {"natural", "uniform", "temperature", "unimax", "msl"}
    assert set(allocation["methods"]) == {"climb-joint", "climb-two-step", *baselines}
    for name, method in allocation["methods"].items():
        rates = load_rates(folder / "climb" / "methods" / f"{name}.json")
        np.testing.assert_allclose([rates.get(l, 0) for l in allocation["languages"]], method["ratios"], atol=1e-12)


def test_the_report_stands_alone(finished):
    folder = finished[0]
    ended = run("data_mixtures.climb.report", "--gin.climb_report.folder=climb", folder=folder)
    assert ended.code == 0, ended.err
    page = (folder / "climb" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"https?:", page) and "climb" in page
    figures = sorted(path.name for path in (folder / "climb" / "figures").iterdir())
    assert len(figures) >= 12 and {path.rsplit(".")[1] for path in figures} == {"svg", "png"}
    for path in (folder / "climb" / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(path)


@pytest.mark.slow
def test_the_trainer_takes_the_rates(finished, tiny_gin, tmp_path):
    rates = finished[0] / "climb" / "rates.json"
    ended = run("mlx_pretrain.train", tiny_gin, f"--gin.train.rates={rates}", "--gin.train.steps=4",
                "--gin.warmup_cosine.total_steps=4", "--gin.warmup_cosine.warmup_steps=1", folder=tmp_path)
    assert ended.code == 0, ended.err
    tokens = {name: value for name, value in lines(tmp_path / "run", "train")[-1].items() if name.startswith("tokens/")}
    share = {name.removeprefix("tokens/"): value / sum(tokens.values()) for name, value in tokens.items()}
    assert share == pytest.approx(load_rates(rates), abs=0.06)  # 32 sequences


@pytest.mark.slow  # tests/data_mixtures/climb/test_proxies.py stops runs within a process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_plan_goes_on_and_ends_the_same(finished, climb_gin, tmp_path, number):
    whole = rows(finished[0] / "proxies")
    table = tmp_path / "proxies"
    with started(PROXIES, climb_gin, folder=tmp_path) as process:
        process.wait_for(lambda: len(rows(table)) > 4)
        process.signal(number)
        ended = process.end()
    assert ended.code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert 4 < len(rows(table)) < len(whole)
    again = run(PROXIES, climb_gin, folder=tmp_path)
    assert again.code == 0, again.err
    assert rows(table) == whole


@pytest.mark.parametrize("flags, message", [
    (["--gin.allocate.floor=0.5", "--gin.allocate.max_epochs=None"],
     r"constraints: the floors sum to 1\.5 .*: more than 1"),
    (["--gin.proxy_runs.path=none.csv"], r"none\.csv: no such table of proxy runs"),
])
def test_impossible_allocations_are_refused_in_one_line(finished, climb_gin, tmp_path, flags, message):
    shutil.copytree(finished[0] / "proxies", tmp_path / "proxies")
    ended = run(ALLOCATE, climb_gin, *flags, folder=tmp_path)
    assert ended.code == 1
    assert re.fullmatch(f"error: {message}", ended.err.splitlines()[-1]), ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["proxies"]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_same_table(climb_gin, tmp_path):
    flags = (climb_gin, "--gin.proxies.threads=1")
    (tmp_path / "alone").mkdir()
    alone = run(PROXIES, *flags, folder=tmp_path / "alone")
    assert alone.code == 0, alone.err
    table = tmp_path / "proxies"
    with started_job(PROXIES, *flags, folder=tmp_path) as job:
        job[0].wait_for(lambda: len(rows(table)) > 2)
        job[1].signal(signal.SIGTERM)
        ended = end_all(job)
    assert [process.code for process in ended] == [143, 143], ended
    assert "SIGTERM: " in ended[0].err and "SIGTERM: " not in ended[1].err
    ended = run_job(PROXIES, *flags, folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    ours, theirs = proxy_runs(table), proxy_runs(tmp_path / "alone" / "proxies")
    order = [np.lexsort((runs.tokens, runs.run)) for runs in (ours, theirs)]
    assert list(ours.run[order[0]]) == list(theirs.run[order[1]])
    np.testing.assert_allclose(ours.losses[order[0]], theirs.losses[order[1]], rtol=1e-4)
    assert not (tmp_path / "proxies.work").exists()
