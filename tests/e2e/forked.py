"""Commands forked from a process that has imported the large libraries already, which spares each a second.

They are separate processes, with their own folder, environment and output, and run a module as `python -m` does:

    with Forker() as forker:
        with forker.start(["mlx_pretrain.train", "--help"], cwd=folder, env=os.environ) as process:
            out, err = process.communicate(timeout=60)
"""

import array
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import IO

REPOSITORY = pathlib.Path(__file__).parents[2]


class Forked:
    """A running command, in the manner of `subprocess.Popen`.

    Attributes:
      pid: its process id.
      returncode: None while it runs, negative for a signal.
    """

    def __init__(self, status: int, out: IO[str], err: IO[str]):
        self._status, self._out, self._err = os.fdopen(status), out, err
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_) -> None:
        """Kills it if it runs."""
        self.send_signal(signal.SIGKILL)
        for file in (self._status, self._out, self._err):
            file.close()

    def poll(self, timeout: float = 0.0) -> int | None:
        """Returns the return code, or None when the command still runs after `timeout` seconds."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for the end, and returns stdout and stderr."""
        if self.poll(timeout) is None:
            raise TimeoutError(f"process {self.pid} runs after {timeout} s")
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()


class Forker:
    """The process that commands are forked from."""

    def __enter__(self) -> "Forker":
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.forked", str(other.fileno())], cwd=REPOSITORY,
                pass_fds=[other.fileno()], stdin=subprocess.DEVNULL,
            )
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, arguments: Sequence[str], cwd: os.PathLike, env: Mapping[str, str]) -> Forked:
        """Starts `python -m arguments`."""
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  the command's
        status, write = os.pipe()
        request = json.dumps([list(arguments), str(cwd), dict(env)]).encode()
        # The request may be larger than a message between processes may be.
        with tempfile.TemporaryFile() as file:
            file.write(request)
            file.flush()
            descriptors = array.array("i", [file.fileno(), out.fileno(), err.fileno(), write])
            self._socket.sendmsg([b"start"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            os.close(write)
            return Forked(status, out, err)


def _serve(requests: socket.socket) -> list[str]:
    """Forks for every request; returns the request in the command's process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 16, 4)
        if not descriptors:
            os._exit(0)  # the tests are over
        if not _fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    request, out, err, status = descriptors
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := _fork():
        os.write(status, f"{pid}\n".encode())
        os.write(status, f"{os.waitpid(pid, 0)[1]}\n".encode())
        os._exit(0)
    os.close(status)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request) as file:
        arguments, cwd, env = json.load(file)
    os.close(out)
    os.close(err)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return arguments


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # jax warns of forking with threads, but has started none yet
        return os.fork()


if __name__ == "__main__":
    import flax.linen  # noqa: F401
    import grain  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.optimize
    import scipy.stats  # noqa: F401

    gc.freeze()
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.getcwd()
    sys.path[1:1] = os.environ["PYTHONPATH"].split(os.pathsep)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
