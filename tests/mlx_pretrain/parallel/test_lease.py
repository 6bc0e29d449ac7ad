"""A folder has one owner at a time, also after crashes."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import lease
from mlx_pretrain.parallel.lease import OWNER, own

HOLD = """
import sys, time
from mlx_pretrain.parallel import lease
lease.RENEWAL_SECONDS = 0.1
with lease.own(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(60)
"""


def write_owner(folder, **changes) -> None:
    owner = {"host": "elsewhere", "pid": 1, "process_started": 5, "since": "2026-01-01T00:00:00+00:00",
             "renewed": time.time(), "lease_seconds": 60.0}
    (folder / OWNER).write_text(json.dumps(owner | changes))


def test_the_owner_is_named_and_gives_the_folder_back(tmp_path):
    with own(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / OWNER).read_text())
        with pytest.raises(InputError) as error, own(tmp_path / "run"):
            pass
        assert str(error.value) == (
            f"{tmp_path / 'run'}: in use by process {os.getpid()} on {socket.gethostname()} since {owner['since']}; "
            "end that job first, or choose another run folder")
    assert not list((tmp_path / "run").iterdir())
    with own(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"renewed": 0.0},  # run out
        {"host": socket.gethostname(), "pid": 2**22 + 1},  # no such process
        {"host": socket.gethostname(), "pid": os.getpid()},  # the number of an ended process, used again
    ],
)
def test_a_lease_that_has_run_out_is_taken_over(tmp_path, capsys, changes):
    write_owner(tmp_path, **changes)
    with own(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert "ended without giving the folder back" in capsys.readouterr().err


def test_a_damaged_file_is_nobody_s(tmp_path):
    (tmp_path / OWNER).write_text('{"host": ')
    with own(tmp_path):
        pass


def test_another_host_s_lease_holds_until_it_runs_out(tmp_path):
    write_owner(tmp_path)
    with pytest.raises(InputError, match="in use by process 1 on elsewhere"), own(tmp_path):
        pass
    assert json.loads((tmp_path / OWNER).read_text())["host"] == "elsewhere"


def test_it_is_renewed_and_a_process_that_lost_it_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "owned\n"
            first = json.loads((tmp_path / OWNER).read_text())["renewed"]
            deadline = time.monotonic() + 20
            while json.loads((tmp_path / OWNER).read_text())["renewed"] == first:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            write_owner(tmp_path)  # as another job that thought it dead
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "another job has taken over this folder; nothing more is written" in err
    assert json.loads((tmp_path / OWNER).read_text())["host"] == "elsewhere"
    assert lease.RENEWAL_SECONDS < lease.LEASE_SECONDS / 3
