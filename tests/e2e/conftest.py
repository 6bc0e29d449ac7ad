"""Real commands in separate processes, on the small token store."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import QUICK_COMPILES
from tests.e2e.forked import REPOSITORY, Forked, Forker

DEADLINE = 180  # seconds; generous, for busy machines
STEPS = 48

TINY = """
train.run_dir = 'run'
train.model = @DecoderConfig()
train.token_store = '{store}'
train.rates = '{store}/rates.json'
train.steps = {steps}
train.batch_size = 8
train.learning_rate = @warmup_cosine()
train.optimizer = @adamw
train.log_every = 1
train.eval_every = 8
train.checkpoint_every = 1000
train.compilation_cache = '{compiled}'

warmup_cosine.peak = 1e-2
warmup_cosine.total_steps = {steps}
warmup_cosine.warmup_steps = 4

DecoderConfig.vocab_size = 96
DecoderConfig.embed_dim = 32
DecoderConfig.n_layers = 2
DecoderConfig.n_heads = 4
DecoderConfig.n_kv_heads = 2
DecoderConfig.head_dim = 8
DecoderConfig.mlp_dim = 48
DecoderConfig.max_length = 64
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is negative for a signal."""

    code: int
    out: str
    err: str


class Process:
    """A running command."""

    def __init__(self, forked: Forked):
        self._forked, self.pid = forked, forked.pid

    def signal(self, number: int) -> None:
        self._forked.send_signal(number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Polls until `condition` holds while the process runs."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if self._forked.poll() is not None:
                raise AssertionError(f"ended before the condition held: {self.end()}")
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.002)

    def end(self, deadline: float = DEADLINE) -> Ended:
        out, err = self._forked.communicate(timeout=deadline)
        return Ended(self._forked.returncode, out, err)


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a command on simulated CPU devices."""
    return {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # commands are run many times
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILES}",
    }


_forker: Forker | None = None


@pytest.fixture(scope="session", autouse=True)
def forker() -> Iterator[None]:
    """Starts the process that the commands of all tests of a worker are forked from."""
    global _forker
    with Forker() as _forker:
        yield


@contextlib.contextmanager
def started(module: str, *flags: str, folder: pathlib.Path, devices: int = 1) -> Iterator[Process]:
    """Starts `python -m module flags` in `folder`, with simulated CPU devices; kills it at the end of the block."""
    with _forker.start([module, *flags], cwd=folder, env=os.environ | environment(devices)) as forked:
        yield Process(forked)


def run(module: str, *flags: str, folder: pathlib.Path, devices: int = 1, deadline: float = DEADLINE) -> Ended:
    """Runs `python -m module flags` in `folder` to its end, at most `deadline` seconds."""
    with started(module, *flags, folder=folder, devices=devices) as process:
        return process.end(deadline)


def assert_refused(message: str, folder: pathlib.Path, *flags: str, devices: int = 1) -> None:
    """Checks that training is refused with one line, `message` (a regular expression), and `folder` is unchanged."""
    before = sorted(folder.rglob("*"))
    ended = run("mlx_pretrain.train", *flags, folder=folder, devices=devices)
    assert ended.code == 1
    assert re.fullmatch(f"error: {message}\n", ended.err), ended.err
    assert sorted(folder.rglob("*")) == before


def lines(run_dir: pathlib.Path, event: str) -> list[dict]:
    """Returns the lines of one event in metrics.jsonl, without one that is still being written."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, (l for l in whole if l.endswith("\n"))) if line["kind"] == event]


def last_step(run_dir: pathlib.Path, since: float = 0.0) -> int:
    """Returns the step of the last training line written after `since` (Unix seconds); 0 when there is none."""
    return max((line["step"] for line in lines(run_dir, "train") if line["time"] >= since), default=0)


def saved_steps(run_dir: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, whose folders Orbax has renamed to their steps."""
    folder = run_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


@pytest.fixture(scope="session")
def tiny_gin(store_dir, tmp_path_factory) -> str:
    """Returns the flag for a gin file of a run of STEPS steps in the folder run/ of the current folder."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.gin"
    path.write_text(TINY.format(store=store_dir, steps=STEPS, compiled=os.environ["JAX_COMPILATION_CACHE_DIR"]))
    return f"--gin_file={path}"
