"""The owner of a run folder: a lease in a file, renewed while the job lives.

    RUN/owner.json   host, pid, process_started, since (ISO), renewed (Unix seconds), lease_seconds

A write succeeds only if no other process has changed the file since it was read, on local disks and on gs:// alike, so
one of two jobs that start at the same time wins. A lease has run out if it was not renewed for `lease_seconds`, or if
its process ran on this host and is dead.
"""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import tensorstore as ts
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import kvstore
from mlx_pretrain.parallel import cluster

OWNER = "owner.json"
LEASE_SECONDS = 60.0
RENEWAL_SECONDS = 15.0


@contextlib.contextmanager
def own(folder: epath.PathLike) -> Iterator[None]:
    """Holds the lease of `folder` during the block, on behalf of the whole job.

    Raises:
      InputError: another job owns the folder; the message names its host, process id and start.
    """
    lease = _Lease(folder)
    cluster.on_main(lease.acquire)
    with cluster.cleanup(lease.release):
        yield


class _Lease:
    """The lease that process 0 holds for its job."""

    def __init__(self, folder: epath.PathLike):
        self._folder = folder
        self._generation: bytes | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the lease if nobody holds it or it has run out. Raises InputError while another job holds it."""
        self._store = ts.KvStore.open(kvstore(self._folder)).result()
        self._content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "lease_seconds": LEASE_SECONDS,
        }
        while self._generation is None:
            current = self._store.read(OWNER).result()
            if current.state == "value":
                owner = _parse(current.value)
                if _alive(owner):
                    raise InputError(
                        f"{self._folder}: in use by process {owner['pid']} on {owner['host']} since {owner['since']}; "
                        "end that job first, or choose another run folder"
                    )
                cluster.log(f"{self._folder}: the job of process {owner.get('pid')} on {owner.get('host')} ended "
                            "without giving the folder back (was it killed?); this job goes on with it")
            # None if another job was quicker: look again.
            self._generation = self._write(current.stamp.generation)
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _write(self, generation: bytes) -> bytes | None:
        """Writes the file if it is still of `generation`; returns the new generation, None if it was not."""
        content = json.dumps({**self._content, "renewed": time.time()}, indent=1).encode()
        return self._store.write(OWNER, content, if_equal=generation).result().generation or None

    def _renew(self) -> None:
        """Renews the lease until it is given back; ends the process when another job has taken it."""
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                renewed = self._write(self._generation)
            except Exception as error:  # TensorStore has no type for a network that is down for a while
                cluster.log(f"{self._folder}: the lease could not be renewed: {error}", every_process=True)
                continue
            if renewed is None and not self._released.is_set():
                message = f"{self._folder}: another job has taken over this folder; nothing more is written"
                cluster.log(f"error: {message}", every_process=True)
                cluster.fail(message)
                os._exit(1)
            self._generation = renewed

    def release(self) -> None:
        """Gives the folder back if it was taken."""
        self._released.set()
        if self._generation is not None:
            self._store.write(OWNER, None, if_equal=self._generation).result()
            self._generation = None


def _parse(content: bytes) -> dict[str, Any]:
    """Returns the owner that the file names; {} for a damaged file."""
    try:
        owner = json.loads(content)
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def _alive(owner: dict[str, Any]) -> bool:
    """Returns whether an owner's lease is still valid."""
    try:
        if time.time() - owner["renewed"] > owner["lease_seconds"]:
            return False
        on_this_host = owner["host"] == socket.gethostname() and owner["process_started"] is not None
        return not on_this_host or _process_started(owner["pid"]) == owner["process_started"]
    except (KeyError, TypeError):
        return False


def _process_started(pid: int) -> int | None:
    """Returns the clock ticks from the host's start to a process's, None if it is dead; process ids are used again."""
    try:
        return int(pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
