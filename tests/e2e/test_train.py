"""Training as a user starts it, and stopped in every way: a restarted run computes what an uninterrupted one does."""

import json
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from mlx_pretrain.data.loader import BatchSource, store_mixture
from mlx_pretrain.data.token_store import MANIFEST, TOKENIZER, TokenStore
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.goodput import read_goodput
from mlx_pretrain.training.train_state import abstract_params
from tests.conftest import RATES
from tests.e2e.conftest import STEPS, assert_refused, last_step, lines, run, saved_steps, started

TRAIN = "mlx_pretrain.train"
EXPLODING = ("--gin.train.learning_rate=@constant_schedule()", "--gin.constant_schedule.value=1e30")
# Names of results; all others are of speed.
COMPUTED = re.compile(r"step|loss(/.*)?|grad_norm|learning_rate|skipped|z_loss|bits_per_byte(/.*)?|tokens/.*")


def computed(run_dir: pathlib.Path, kind: str) -> list[dict]:
    return [{k: v for k, v in line.items() if COMPUTED.fullmatch(k)} for line in lines(run_dir, kind)]


def final_params(run_dir: pathlib.Path):
    config = checkpoints.load_model(run_dir)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params, step = checkpoints.restore_params(run_dir, abstract_params(config, mesh))
    assert step == STEPS
    return params


def assert_same_run(run_dir: pathlib.Path, reference: pathlib.Path) -> None:
    assert computed(run_dir, "train") == computed(reference, "train")
    assert computed(run_dir, "eval") == computed(reference, "eval")
    jax.tree.map(np.testing.assert_array_equal, final_params(run_dir), final_params(reference))


@pytest.fixture(scope="module")
def reference(tiny_gin, tmp_path_factory) -> pathlib.Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    ended = run(TRAIN, tiny_gin, folder=folder)
    assert (ended.code, ended.err) == (0, "")
    train = lines(folder / "run", "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(folder / "run", "eval")] == list(range(0, STEPS + 1, 8))
    assert train[-1]["loss"] < train[0]["loss"] - 0.3  # it learns, so equal losses are a real test
    return folder / "run"


@pytest.fixture(scope="module")
def terminated(tiny_gin, tmp_path_factory) -> pathlib.Path:
    """Folder of a run that SIGTERM ended before its last step."""
    folder = tmp_path_factory.mktemp("terminated")
    with started(TRAIN, tiny_gin, folder=folder) as process:
        process.wait_for(lambda: last_step(folder / "run") >= 3)
        process.signal(signal.SIGTERM)
        ended = process.end()
    assert (ended.code, ended.err) == (143, "")
    [step] = saved_steps(folder / "run")
    assert step == last_step(folder / "run") < STEPS
    assert f"SIGTERM: saved after step {step} of {STEPS}; run again to go on" in ended.out
    return folder / "run"


def continued(run_dir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Copies a stopped run into `folder`."""
    return pathlib.Path(shutil.copytree(run_dir, folder / "run"))


def writing(run_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints that are not complete."""
    return list((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def newest(run_dir: pathlib.Path) -> int:
    return max(saved_steps(run_dir), default=0)


def killed(folder: pathlib.Path, tiny_gin: str, checkpoint_every: int, moment: Callable[[int, int], bool]) -> None:
    """Starts or resumes the run in `folder`, kills it when `moment(first step, last step)` of this process holds."""
    run_dir, first, start = folder / "run", newest(folder / "run"), time.time()
    with started(TRAIN, tiny_gin, f"--gin.train.checkpoint_every={checkpoint_every}", folder=folder) as process:
        process.wait_for(lambda: moment(first, last_step(run_dir, start)))
        process.signal(signal.SIGKILL)
        ended = process.end()
    assert ended.code == -signal.SIGKILL
    assert (f"resumed after step {first} of" in ended.out) == (first > 0)


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(tiny_gin, reference, tmp_path):
    """kill -9 before the first checkpoint, while one is written, at a random moment, between two; then to the end."""
    run_dir, begun = tmp_path / "run", time.time()
    killed(tmp_path, tiny_gin, 1000, lambda _, last: last >= 3)
    assert not saved_steps(run_dir)

    killed(tmp_path, tiny_gin, 1, lambda _, last: last > newest(run_dir) >= 2 and writing(run_dir))
    assert writing(run_dir) and saved_steps(run_dir)

    delay, seen = random.Random(0).uniform(0, 0.25), []
    killed(tmp_path, tiny_gin, 2, lambda first, last: (
        last > first and seen.append(time.monotonic()) is None and seen[-1] >= seen[0] + delay
    ))

    killed(tmp_path, tiny_gin, 6, lambda first, last: (
        newest(run_dir) > first and last >= newest(run_dir) + 3 and not writing(run_dir)
    ))
    saved = newest(run_dir)
    assert saved < last_step(run_dir) < STEPS

    ended = run(TRAIN, tiny_gin, folder=tmp_path)
    assert ended.code == 0 and f"resumed after step {saved} of {STEPS}" in ended.out
    assert "ended without giving the folder back" in ended.err and ended.err.count("\n") == 1
    assert not writing(run_dir)
    assert_same_run(run_dir, reference)

    # Five processes, four of them killed: the record of where the time went covers all of it.
    record = read_goodput(run_dir / "goodput.jsonl")
    assert record.processes == 5 and record.repeated_steps > 0
    assert sum(record.seconds.values()) == pytest.approx(record.wall_s, rel=0.01)
    wall = (run_dir / "goodput.jsonl").stat().st_mtime - begun
    assert record.wall_s == pytest.approx(wall, rel=0.01, abs=0.5)


def test_ctrl_c_saves_too_and_two_stops_leave_no_trace(tiny_gin, reference, terminated, tmp_path):
    run_dir = continued(terminated, tmp_path)
    before = last_step(run_dir)
    with started(TRAIN, tiny_gin, folder=tmp_path) as process:
        process.wait_for(lambda: last_step(run_dir) > before)
        process.signal(signal.SIGINT)
        ended = process.end()
    step = last_step(run_dir)
    assert (ended.code, ended.err) == (130, "")
    assert f"SIGINT: saved after step {step} of {STEPS}" in ended.out
    assert before < step < STEPS and saved_steps(run_dir) == [before, step]
    assert run(TRAIN, tiny_gin, folder=tmp_path).code == 0
    assert_same_run(run_dir, reference)


@pytest.mark.slow
def test_goes_on_with_the_same_losses_on_another_mesh(tiny_gin, reference, terminated, tmp_path):
    run_dir = continued(terminated, tmp_path)
    mesh = ("--gin.make_mesh.fsdp=2", "--gin.make_mesh.tensor=2")
    ended = run(TRAIN, tiny_gin, *mesh, folder=tmp_path, devices=8)
    assert (ended.code, ended.err) == (0, "")
    assert json.loads((run_dir / "run.json").read_text())["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    for kind in ("train", "eval"):
        resumed, expected = computed(run_dir, kind), computed(reference, kind)
        assert [line["step"] for line in resumed] == [line["step"] for line in expected]
        for a, b in zip(resumed, expected):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9)


def test_non_finite_loss_stops_the_run_and_names_the_rows(tiny_gin, store_dir, terminated, tmp_path):
    run_dir = continued(terminated, tmp_path)
    [saved] = saved_steps(run_dir)
    ended = run(TRAIN, tiny_gin, *EXPLODING, folder=tmp_path)
    assert ended.code == 1
    provenance = sorted(run_dir.glob("non_finite_step_*.json"))
    assert len(provenance) == 1 and ended.err.count("\n") == 1
    content = json.loads(provenance[0].read_text())
    assert content["step"] > saved + 1 and "nan" in (content["loss"], content["grad_norm"])
    assert ended.err.startswith(
        f"error: run/{provenance[0].name}: loss {content['loss']}, gradient norm {content['grad_norm']} "
        f"at step {content['step']}; the file lists the batch's rows"
    )
    store = TokenStore(store_dir)
    positions = BatchSource(store, store_mixture(store, RATES, 8, seed=0)).provenance(content["step"] - 1)
    assert content["batch"] == [vars(position) for position in positions]
    assert saved_steps(run_dir) == [saved]
    assert last_step(run_dir) == content["step"] - 1


def test_non_finite_updates_are_skipped_and_counted(tiny_gin, terminated, tmp_path):
    run_dir = continued(terminated, tmp_path)
    [saved] = saved_steps(run_dir)
    ended = run(TRAIN, tiny_gin, *EXPLODING, "--gin.train.on_non_finite=skip", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    train = lines(run_dir, "train")
    assert train[-1]["step"] == STEPS
    skipped = [None in (line["loss"], line["grad_norm"]) for line in train]
    assert 0 < sum(skipped) < STEPS - saved
    np.testing.assert_array_equal([line["skipped"] for line in train], np.cumsum(skipped))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_params(run_dir)))


def test_too_many_skipped_updates_in_a_row_stop_the_run(tiny_gin, terminated, tmp_path):
    run_dir = continued(terminated, tmp_path)
    flags = (*EXPLODING, "--gin.train.on_non_finite=skip", "--gin.train.skip_limit=2")
    ended = run(TRAIN, tiny_gin, *flags, folder=tmp_path)
    assert ended.code == 1 and "2 such steps in a row were skipped, see train.skip_limit" in ended.err
    train = lines(run_dir, "train")
    assert [None in (line["loss"], line["grad_norm"]) for line in train[-1:]] == [True]


def test_another_vocabulary_is_refused(tiny_gin, store_dir, terminated, tmp_path):
    continued(terminated, tmp_path)
    store = shutil.copytree(store_dir, tmp_path / "store")
    (store / TOKENIZER).write_bytes(b"stands for another")
    manifest = json.loads((store / MANIFEST).read_text())
    (store / MANIFEST).write_text(json.dumps(manifest | {"tokenizer_sha256": sha256(store / TOKENIZER)}))
    message = "run/model.json: this run was trained with another vocabulary .*; use its token store or a new run folder"
    assert_refused(message, tmp_path, tiny_gin, "--gin.train.token_store=store")


def test_a_finished_run_is_left_as_it_is(tiny_gin, reference):
    content = lambda: {  # noqa: E731
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(reference.rglob("*"))
        if path.is_file()
    }
    before = content()
    ended = run(TRAIN, tiny_gin, folder=reference.parent)
    assert (ended.code, ended.err) == (0, "") and "nothing left to do" in ended.out
    assert content() == before


@pytest.mark.slow
def test_starts_from_another_run_s_weights(tiny_gin, reference, tmp_path):
    """Continued pretraining takes the weights alone; optimizer and schedule begin anew, a restart needs no source."""
    source = shutil.copytree(reference, tmp_path / "source")
    flags = (tiny_gin, f"--gin.train.init_from={source}")
    ended = run(TRAIN, *flags, "--gin.train.steps=4", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [1, 2, 3, 4]
    first, last = lines(tmp_path / "run", "eval")[0], lines(reference, "eval")[-1]
    assert first["step"] == 0 and first["loss"] == pytest.approx(last["loss"], rel=1e-6)
    description = json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]
    assert (description["path"], description["kind"]) == (str(source), "run")
    shutil.rmtree(source)
    ended = run(TRAIN, *flags, "--gin.train.steps=6", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "") and "resumed after step 4 of 6" in ended.out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init_from"] == description
    assert_refused(f"{source}: neither a training run .*", tmp_path, *flags, "--gin.train.run_dir=other")


def test_a_checkpoint_every_so_many_minutes(tiny_gin, tmp_path):
    flags = ("--gin.train.checkpoint_minutes=0.001", "--gin.train.steps=16")  # 60 ms, some steps
    ended = run(TRAIN, tiny_gin, *flags, folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    saved = saved_steps(tmp_path / "run")
    assert saved[-1] == 16 and len(saved) >= 3  # the latest three are kept


def test_speed_and_mfu_follow_from_the_time_of_a_step(tiny_gin, reference):
    """Compares tokens/s and MFU with sums by hand: 8 x 32 tokens, 2 layers of width 32, 3 products of 48, 96 ids."""
    facts = json.loads((reference / "run.json").read_text())
    weights = 2 * (32 * 4 * 8 * 2 + 32 * 2 * 8 * 2 + 3 * 32 * 48) + 96 * 32
    flops = 6 * weights + 2 * 6 * 4 * 8 * 32  # of one token of a sequence of 32, causal
    assert facts["flops_per_token"] == flops
    for line in lines(reference, "train"):
        assert line["tokens_per_s"] == pytest.approx(8 * 32 / line["seconds/step"])
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops / facts["peak_flops"])
    # The peak of one CPU device, measured: between a slow core and many fast ones.
    assert 1e9 < facts["peak_flops"] < 1e14
