"""Worker processes: order, bounded read-ahead, and no process left behind."""

import functools
import operator
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]

# A main process with its own module, as commands have, and workers that report their process ids.
MAIN = """
import os, sys, time
open("imported", "a").write("x")
from mlx_pretrain.data.workers import Workers
if __name__ == "__main__":
    with Workers(eval, 2) as pool:
        ask = "(__import__('time').sleep(0.1), __import__('os').getpid())[1]"
        print(*{pid for _, pid in pool.map((i, ask) for i in range(6))}, flush=True)
        time.sleep(600)
"""


def test_results_keep_the_order_and_tags_stay_here():
    tags = [object() for _ in range(20)]
    with Workers(functools.partial(operator.mul, 3), 2) as pool:
        results = list(pool.map((tag, i) for i, tag in enumerate(tags)))
        assert [tag for tag, _ in results] == tags and [x for _, x in results] == [3 * i for i in range(20)]
        assert list(pool.map([])) == []


def test_no_more_is_read_ahead_than_asked_for():
    taken = []
    with Workers(abs, 1, ahead=3) as pool:
        results = pool.map((taken.append(i), i) for i in range(50))
        for n in range(1, 11):
            next(results)
            assert len(taken) == n + 3


def test_errors_of_the_function_come_through():
    with Workers(len, 1) as pool, pytest.raises(TypeError, match="has no len"):
        list(pool.map([(0, "a"), (1, 7)]))


def test_a_killed_worker_is_one_clear_error():
    with Workers(os._exit, 1) as pool, pytest.raises(InputError, match="a worker process was ended from outside"):
        list(pool.map([(0, 1)]))


def alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_main_process(tmp_path, number):
    (tmp_path / "main.py").write_text(MAIN)
    command = [sys.executable, "-m", "main"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as main:
        pids = [int(pid) for pid in main.stdout.readline().split()]
        assert len(pids) in (1, 2)  # on a busy machine one worker may do all
        assert (tmp_path / "imported").read_text() == "x"  # imported by no worker
        if number == signal.SIGINT:  # Ctrl-C reaches the whole group
            os.killpg(main.pid, number)
        else:
            main.send_signal(number)
        err = main.communicate(timeout=60)[1]
        assert main.returncode == -number
    assert err.count("Traceback") == (number == signal.SIGINT)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
