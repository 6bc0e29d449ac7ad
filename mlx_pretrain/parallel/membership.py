"""The connection that holds the processes of a job together: a hub in process 0, a member in every process.

Messages are lines of JSON over TCP. A member whose connection ends without a farewell is dead, and the hub informs the
others; a member that loses the hub knows that process 0 is dead.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_pretrain.errors import InputError

RETRY = 0.5  # seconds between attempts to connect
MAX_MESSAGE = 1 << 24  # bytes

cleanups: list[Callable[[], None]] = []  # run before another process ends this one


@dataclasses.dataclass(frozen=True)
class Place:
    """The position of this process in a job.

    Attributes:
      coordinator: HOST:PORT on which process 0 listens.
      processes: number of processes in the job.
      process: number of this process, from 0.
      local_device_ids: accelerators of this host that belong to this process; None stands for all.
    """

    coordinator: str
    processes: int
    process: int
    local_device_ids: Sequence[int] | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator={self.coordinator}: must look like HOST:PORT")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise InputError(f"--processes={self.processes} --process={self.process}: processes are numbered from 0")


class Alone:
    """A process that is alone in its job; answers as `Member` does."""

    process, processes = 0, 1

    def __init__(self):
        self._requested: queue.SimpleQueue[str] = queue.SimpleQueue()

    def request(self, action: str) -> None:
        self._requested.put(action)

    def boundary(self) -> list[str]:
        actions = []
        while not self._requested.empty():
            actions.append(self._requested.get())
        return list(dict.fromkeys(actions))

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def fail(self, message: str) -> None:
        pass

    def abandon(self, code: int, message: str) -> None:
        exit_at_once(code, message)

    def leave(self) -> None:
        pass


class Member:
    """A process among several, connected to the hub of process 0; `parallel.cluster` describes its methods."""

    def __init__(self, place: Place, timeout: float):
        """Connects, and waits until all processes have.

        Raises:
          InputError: some processes did not come within `timeout` seconds, or they disagree about the job.
        """
        self.process, self.processes = place.process, place.processes
        self._place, self._changed = place, threading.Condition()
        self._values: dict[int, list[Any]] = {}
        self._gathers = self._boundary = 0
        self._votes: dict[str, int | None] = {}  # action -> agreed boundary, None while processes vote
        self._service: str | None = None
        self._refusal: str | None = None
        self._leaving = False
        self._outbox: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._socket = _connect(place, time.monotonic() + timeout, timeout)
        self._sender = threading.Thread(target=self._send, name="cluster-sender", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="cluster-receiver", daemon=True).start()
        self._outbox.put({"type": "hello", "process": place.process, "processes": place.processes,
                          "host": socket.gethostname(), "pid": os.getpid()})
        with self._changed:
            # The hub keeps the time and names the missing processes.
            self._changed.wait_for(lambda: self._service or self._refusal, timeout + 10)
        if not self._service:
            self._leaving = True
            raise InputError(self._refusal or f"process 0 at {place.coordinator} accepts connections, but is silent")

    def service_address(self) -> str:
        """Returns the HOST:PORT that process 0 has chosen for JAX's coordination service."""
        return f"{self._place.coordinator.rpartition(':')[0]}:{self._service}"

    def request(self, action: str) -> None:
        self._outbox.put({"type": "request", "action": action})

    def boundary(self) -> list[str]:
        with self._changed:
            self._wait(lambda: None not in self._votes.values())
            self._boundary += 1
            due = [action for action, boundary in self._votes.items() if boundary == self._boundary]
            for action in due:
                del self._votes[action]
            return due

    def gather(self, value: Any) -> list[Any]:
        self._gathers += 1
        number = self._gathers
        self._outbox.put({"type": "value", "number": number, "value": value})
        with self._changed:
            self._wait(lambda: number in self._values)
            return self._values.pop(number)

    def fail(self, message: str) -> None:
        self._leaving = True
        self._outbox.put({"type": "failed", "message": message})
        self._close()

    def abandon(self, code: int, message: str) -> None:
        self._outbox.put({"type": "abandon", "code": code, "message": message})

    def leave(self) -> None:
        self.gather(None)
        self._leaving = True
        self._outbox.put({"type": "bye"})
        self._close()

    def _close(self) -> None:
        self._outbox.put(None)
        self._sender.join(5)

    def _wait(self, condition: Callable[[], bool]) -> None:
        # With a time limit, so that signals are handled meanwhile.
        while not self._changed.wait_for(condition, 1.0):
            pass

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):  # the receiver notices, and reports it
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as file:
            for line in file:
                self._handle(json.loads(line))
        self._end(f"process 0 at {self._place.coordinator} is gone")

    def _handle(self, message: dict[str, Any]) -> None:
        with self._changed:
            match message["type"]:
                case "start":
                    self._service = message["port"]
                case "refused":
                    self._refusal = message["message"]
                case "values":
                    self._values[message["number"]] = message["values"]
                case "vote":
                    self._votes[message["action"]] = None
                    self._outbox.put({**message, "boundary": self._boundary + 1})
                case "agreed":
                    self._votes[message["action"]] = message["boundary"]
            self._changed.notify_all()
        if message["type"] == "abandon":
            exit_at_once(message["code"], message["message"] if self.process == 0 else "")
        if message["type"] == "gone":
            if message["failed"]:
                time.sleep(1)  # each process reports an error that all of them find
            self._end(message["message"])

    def _end(self, reason: str) -> None:
        """Ends this process at once, whatever it waits for: the answer of a dead process never comes."""
        if self._leaving or not self._service:
            return
        print(f"error: {reason}; process {self.process} ends too; start the job again to go on after the last "
              "checkpoint", file=sys.stderr, flush=True)
        _run_cleanups()
        os._exit(1)


class Hub:
    """The other end of all members' connections, in a thread of process 0."""

    def __init__(self, place: Place, timeout: float):
        self._place, self._timeout = place, timeout
        self._started = False
        self._names: dict[int, str] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._left: set[int] = set()
        self._values: dict[int, dict[int, Any]] = collections.defaultdict(dict)
        self._votes: dict[str, dict[int, int]] = {}
        host, _, port = place.coordinator.rpartition(":")
        local = host in ("localhost", "127.0.0.1", "::1")
        try:
            self._listener = socket.create_server((host if local else "", int(port)), backlog=place.processes + 8)
        except OSError as error:
            raise InputError(f"{place.coordinator}: process 0 cannot listen there: {error.strerror}") from None
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="cluster-hub", daemon=True).start()

    async def _serve(self) -> None:
        """Accepts connections, and refuses the job if some processes do not come in time."""
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=MAX_MESSAGE)
        async with server:
            await asyncio.sleep(self._timeout)
            missing = sorted(set(range(self._place.processes)) - set(self._names))
            if missing:
                names = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
                self._broadcast({"type": "refused", "message": (
                    f"{self._place.coordinator}: {len(missing)} of {self._place.processes} processes did not come "
                    f"within {self._timeout:g} s: {names}")})
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves the connection of one process until it ends."""
        _keep_alive(writer.get_extra_info("socket"))
        process = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            hello = json.loads(await reader.readline())
            if (refusal := self._refuse(hello)) is not None:
                writer.write(_line({"type": "refused", "message": refusal}))
                writer.close()
                return
            process = hello["process"]
            self._names[process], self._writers[process] = f"{hello['host']}, pid {hello['pid']}", writer
            if len(self._writers) == self._place.processes:
                self._started = True
                self._broadcast({"type": "start", "port": _free_port(int(self._place.coordinator.rpartition(":")[2]))})
            while line := await reader.readline():
                self._handle(process, json.loads(line))
        if process is None or process in self._left:
            return
        if self._started:
            self._lose(process, "is gone")
        else:  # it may come again
            del self._names[process], self._writers[process]

    def _refuse(self, hello: dict[str, Any]) -> str | None:
        """Returns the reason for which a process cannot join; None if it can."""
        process, processes = hello["process"], hello["processes"]
        if processes != self._place.processes:
            return (f"{self._place.coordinator}: process {process} was told of {processes} processes, process 0 of "
                    f"{self._place.processes}")
        if process in self._names:
            return f"{self._place.coordinator}: process {process} has joined already ({self._names[process]})"
        return None

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        match message["type"]:
            case "value":
                values = self._values[message["number"]]
                values[process] = message["value"]
                if len(values) == self._place.processes:
                    ordered = [values[i] for i in range(self._place.processes)]
                    del self._values[message["number"]]
                    self._broadcast({"type": "values", "number": message["number"], "values": ordered})
            case "request":
                if message["action"] not in self._votes:
                    self._votes[message["action"]] = {}
                    self._broadcast({"type": "vote", "action": message["action"]})
            case "vote":
                votes = self._votes[message["action"]]
                votes[process] = message["boundary"]
                if len(votes) == self._place.processes:
                    del self._votes[message["action"]]
                    self._broadcast({"type": "agreed", "action": message["action"], "boundary": max(votes.values())})
            case "failed":
                self._left.add(process)
                self._lose(process, f"ended: {message['message']}", failed=True)
            case "abandon":
                self._broadcast(message)
            case "bye":
                self._left.add(process)

    def _lose(self, process: int, event: str, failed: bool = False) -> None:
        """Informs the other processes that one has died or failed."""
        self._left.add(process)
        message = f"process {process} ({self._names[process]}) {event}"
        self._broadcast({"type": "gone", "message": message, "failed": failed})

    def _broadcast(self, message: dict[str, Any]) -> None:
        for process, writer in self._writers.items():
            if process not in self._left:
                writer.write(_line(message))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _connect(place: Place, deadline: float, timeout: float) -> socket.socket:
    """Returns a connection to process 0, which may start later. Raises InputError at the deadline."""
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{place.coordinator}: process 0 did not answer within {timeout:g} s: {error}"
                ) from None
            time.sleep(RETRY)
    connection.settimeout(None)
    _keep_alive(connection)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    """Lets the kernel close a connection about 15 s after the other host vanished; a dead process closes its own."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _free_port(used: int) -> str:
    """Returns the port after `used` if it is free (the easiest to open in a firewall), otherwise any free one."""
    for port in (used + 1, 0):
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("", port)) as server:
            return str(server.getsockname()[1])
    raise OSError("no free port")


def exit_at_once(code: int, message: str) -> None:
    """Ends this process with an exit code, whatever its main thread does; prints `message` if it is not empty."""
    if message:
        print(message, flush=True)
    _run_cleanups()
    os._exit(code)


def _run_cleanups() -> None:
    for action in reversed(cleanups):
        with contextlib.suppress(Exception):
            action()
