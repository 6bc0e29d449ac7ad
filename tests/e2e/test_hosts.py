"""Training as one job of two processes, each with one device: results, stops, crashes and restarts."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest

from mlx_pretrain.data import token_store as token_store
from tests.conftest import LENGTH, make_tokens
from tests.e2e.conftest import STEPS, Ended, Process, last_step, lines, run, saved_steps, started
from tests.e2e.hosts import end_all, free_port, run_job, started_job

TRAIN = "mlx_pretrain.train"
COMPUTED = re.compile(r"step|loss(/.*)?|grad_norm|learning_rate|skipped|bits_per_byte(/.*)?|tokens/.*")


def computed(run_dir: pathlib.Path, kind: str) -> list[dict]:
    """Returns the lines of one event without their measurements of speed."""
    return [{k: v for k, v in line.items() if COMPUTED.fullmatch(k)} for line in lines(run_dir, kind)]


def assert_close(run_dir: pathlib.Path, reference: pathlib.Path) -> None:
    """Checks that both runs have the same lines; numbers may differ by the order of float32 sums."""
    for kind in ("train", "eval"):
        compared, expected = computed(run_dir, kind), computed(reference, kind)
        assert [line["step"] for line in compared] == [line["step"] for line in expected]
        for a, b in zip(compared, expected):
            assert a == pytest.approx(b, rel=2e-5)
            assert {k: a[k] for k in a if k.startswith("tokens/")} == {k: b[k] for k in b if k.startswith("tokens/")}


def codes(ended: list[Ended]) -> list[int]:
    return [process.code for process in ended]


def without_waiting(err: str) -> str:
    """Returns stderr without the line that says that a process waits for the others."""
    return re.sub(r"^process \d of 2: waiting up to [\d.]+ s for the others at \S+\n", "", err)


@pytest.fixture(scope="module")
def reference(tiny_gin, tmp_path_factory) -> pathlib.Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("reference")
    assert run(TRAIN, tiny_gin, folder=folder).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def pair(tiny_gin, tmp_path_factory) -> pathlib.Path:
    """The uninterrupted run in two processes."""
    folder = tmp_path_factory.mktemp("pair")
    ended = run_job(TRAIN, tiny_gin, folder=folder)
    assert codes(ended) == [0, 0]
    assert [without_waiting(process.err) for process in ended] == ["", ""]
    assert f"done: {STEPS} steps; goodput" in ended[0].out
    assert all(line.startswith("[Gloo]") for line in ended[1].out.splitlines())
    return folder / "run"


def test_two_processes_compute_what_one_does(pair, reference):
    """Compares losses, evaluations and counts of tokens, each of which is written once."""
    assert_close(pair, reference)
    facts = json.loads((pair / "run.json").read_text())
    assert (facts["processes"], facts["mesh"]["data"]) == (2, 2)


@pytest.mark.slow
def test_two_processes_stop_by_a_rule_and_write_each_metric_once(tiny_gin, tmp_path):
    """The learning rate is 0, so that no evaluation is better than the first."""
    pytest.importorskip("wandb")
    flags = ("--gin.train.learning_rate=@constant_schedule()", "--gin.constant_schedule.value=0.0",
             "--gin.train.stop_rules=[@EarlyStopping()]", "--gin.EarlyStopping.patience=2",
             "--gin.train.average=@WeightAverage()", "--gin_file=gin/runs/weights_and_biases.gin",
             "--gin.WeightsAndBiases.mode=offline")
    ended = run_job(TRAIN, tiny_gin, *flags, folder=tmp_path)
    assert codes(ended) == [0, 0], ended
    assert "stopped by a rule after step 16" in ended[0].out
    for event in ("eval", "eval_ema"):
        assert [line["step"] for line in lines(tmp_path / "run", event)] == [0, 8, 16]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped"]["step"] == 16
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    ended = run_job(TRAIN, tiny_gin, *flags, folder=tmp_path)
    assert codes(ended) == [0, 0] and "nothing left to do, stopped after step 16: eval/loss has not" in ended[0].out


def stopped(job: list[Process], run_dir: pathlib.Path, number: int, since: int) -> list[Ended]:
    """Sends a signal to the last process alone, a few steps after step `since`."""
    begun = time.time()
    job[0].wait_for(lambda: last_step(run_dir, begun) > since + 2)
    job[-1].signal(number)
    return end_all(job)


@pytest.mark.slow
def test_killed_and_stopped_on_one_host_then_on_other_numbers_of_hosts(tiny_gin, pair, reference, tmp_path):
    """kill -9 reaches one process of two, then SIGTERM; one process resumes, then two after a damaged checkpoint."""
    run_dir, often = tmp_path / "run", "--gin.train.checkpoint_every=4"
    with started_job(TRAIN, tiny_gin, often, folder=tmp_path) as job:
        job[0].wait_for(lambda: saved_steps(run_dir) and last_step(run_dir) >= 6)
        job[1].signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = end_all(job)
    assert time.monotonic() - killed < 20
    assert codes(ended) == [1, -signal.SIGKILL]
    assert re.fullmatch(
        r"error: process 1 \(\S+, pid \d+\) is gone; process 0 ends too; start the job again to go on after the last "
        r"checkpoint\n", without_waiting(ended[0].err)), ended[0].err
    saved, restarted = saved_steps(run_dir)[-1], time.time()

    # The restarted job owns the folder, and continues bit for bit.
    with started_job(TRAIN, tiny_gin, often, folder=tmp_path) as job:
        job[0].wait_for(lambda: last_step(run_dir, restarted) > saved)
        job[0].signal(signal.SIGSTOP)  # so that it is not done before the second job looks
        second = run(TRAIN, tiny_gin, folder=tmp_path)
        job[0].signal(signal.SIGCONT)
        assert second.code == 1 and re.fullmatch(
            r"error: run: in use by process \d+ on \S+ since \S+; end that job first, or choose another run folder\n",
            second.err), second.err
        ended = stopped(job, run_dir, signal.SIGTERM, last_step(run_dir))
    assert codes(ended) == [143, 143]
    assert [without_waiting(process.err) for process in ended] == ["", ""]
    assert f"resumed after step {saved} of {STEPS}" in ended[0].out
    step = last_step(run_dir)
    assert saved_steps(run_dir)[-1] == step < STEPS
    assert f"SIGTERM: saved after step {step} of {STEPS}; run again to go on" in ended[0].out
    for kind in ("train", "eval"):
        assert computed(run_dir, kind) == [line for line in computed(pair, kind) if line["step"] <= step]

    with started(TRAIN, tiny_gin, folder=tmp_path) as process:
        [ended] = stopped([process], run_dir, signal.SIGINT, step)
    assert ended.code == 130 and f"resumed after step {step} of" in ended.out
    saved = saved_steps(run_dir)

    # Damage to the last checkpoint: both processes notice, one moves it, both take the one before.
    data = max((run_dir / "checkpoints" / str(saved[-1]) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    ended = run_job(TRAIN, tiny_gin, folder=tmp_path)
    assert codes(ended) == [0, 0] and f"resumed after step {saved[-2]} of" in ended[0].out
    assert [path.name for path in (run_dir / "damaged_checkpoints").iterdir()] == [str(saved[-1])]
    assert_close(run_dir, reference)


@pytest.fixture(scope="module")
def long_evaluation(store_dir, tiny_gin, tmp_path_factory) -> tuple[str, ...]:
    """Flags of a run whose evaluations take a second or more: 1,000 held-out rows, two at a time."""
    folder = tmp_path_factory.mktemp("long") / "store"
    shutil.copytree(store_dir, folder)
    manifest = token_store.read_manifest(folder)
    rows = make_tokens(np.random.default_rng(1), 1000, 0)
    writer = token_store.PartWriter(folder / "heldout" / "aa", LENGTH, np.uint16)
    writer.append(rows)
    real = int((rows != token_store.PAD_ID).sum())
    splits = {**manifest.splits, "heldout": {"aa": writer.close(real, 3 * real, len(rows))}}
    token_store.write_manifest(folder, dataclasses.replace(manifest, splits=splits))
    return (tiny_gin, f"--gin.train.token_store={folder}", "--gin.train.eval_batch_size=2", "--gin.train.steps=10")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_in_the_middle_of_an_evaluation(long_evaluation, tmp_path, processes):
    """The evaluation is cut short in all processes at once, and made when the run resumes."""
    run_dir = tmp_path / "run"
    with started_job(TRAIN, *long_evaluation, folder=tmp_path, processes=processes) as job:
        job[0].wait_for(lambda: last_step(run_dir) >= 8)
        job[-1].signal(signal.SIGTERM)
        asked = time.monotonic()
        ended = end_all(job)
    assert time.monotonic() - asked < 10
    assert codes(ended) == [143] * processes
    assert saved_steps(run_dir) == [last_step(run_dir)] == [8]
    assert [line["step"] for line in lines(run_dir, "eval")] == [0]
    ended = run_job(TRAIN, *long_evaluation, "--gin.train.eval_batch_size=500", folder=tmp_path, processes=processes)
    assert codes(ended) == [0] * processes
    assert [line["step"] for line in lines(run_dir, "eval")] == [0, 8, 10]
    assert [line["step"] for line in lines(run_dir, "train")] == list(range(1, 11))


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(tiny_gin, tmp_path):
    address = f"localhost:{free_port()}"
    flags = (tiny_gin, f"--coordinator={address}", "--processes=3", "--join_timeout=3")
    with started(TRAIN, *flags, "--process=0", folder=tmp_path) as first, \
            started(TRAIN, *flags, "--process=2", folder=tmp_path) as third:
        ended = end_all([first, third])
    assert codes(ended) == [1, 1]
    for process in ended:
        assert process.err.endswith(f"error: {address}: 1 of 3 processes did not come within 3 s: 1\n")
    ended = run(TRAIN, *flags, "--process=1", folder=tmp_path)
    assert ended.code == 1 and "process 0 did not answer within 3 s" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_before_the_first_step(tiny_gin, tmp_path, processes):
    """Nothing is trained yet, so a stop does not wait for the end of a compilation."""
    flags = (tiny_gin, "--gin.train.compilation_cache=None", "--gin.DecoderConfig.n_layers=64",
             "--gin.DecoderConfig.unroll=64")  # compiles for minutes
    run_dir = tmp_path / "run"
    with started_job(TRAIN, *flags, folder=tmp_path, processes=processes) as job:
        job[0].wait_for((run_dir / "owner.json").exists)
        job[-1].signal(signal.SIGTERM)
        asked = time.monotonic()
        ended = end_all(job)
    assert time.monotonic() - asked < 10
    assert codes(ended) == [143] * processes
    assert "SIGTERM: nothing was trained yet; run again to go on" in ended[0].out
    assert not saved_steps(run_dir) and not (run_dir / "owner.json").exists()
