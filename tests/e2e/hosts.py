"""Commands that run as one job of several processes, as on several hosts, here on loopback."""

import concurrent.futures
import contextlib
import pathlib
import random
import socket
from collections.abc import Iterator, Sequence

from tests.e2e.conftest import Ended, Process, started


def free_port() -> int:
    """Returns a free port below 32,768, from where outgoing connections take theirs."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port


@contextlib.contextmanager
def started_job(
    module: str, *flags: str, folder: pathlib.Path, processes: int = 2, devices: int = 1
) -> Iterator[list[Process]]:
    """Starts `python -m module flags` in `folder` as a job of several processes, each with `devices` simulated devices.

    All are killed at the end of the block if need be.
    """
    coordinator = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started(
                module, *flags, f"--coordinator={coordinator}", f"--processes={processes}", f"--process={process}",
                folder=folder, devices=devices,
            ))
            for process in range(processes)
        ]


def end_all(job: Sequence[Process]) -> list[Ended]:
    """Waits until all processes have ended, and reads from all of them meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(len(job)) as pool:
        return list(pool.map(Process.end, job))


def run_job(module: str, *flags: str, folder: pathlib.Path, processes: int = 2, devices: int = 1) -> list[Ended]:
    """Runs `python -m module flags` in `folder` as a job of several processes, to its end."""
    with started_job(module, *flags, folder=folder, processes=processes, devices=devices) as job:
        return end_all(job)
