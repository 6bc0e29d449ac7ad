"""Makes one job of the processes that run on several hosts.

A command calls `join` before it touches a device. Every process then holds a connection to process 0, over which
processes exchange small values (`gather`, `share`, `barrier`), agree on the moment of a stop (`request`, `boundary`),
and learn within moments that another process has died or failed. JAX's own coordination service, which joins the
devices, listens on another port of the same host and is found over this connection.

With a single process, which is the default, every function here returns at once.

    cluster.join(cluster.find())
    if cluster.is_main():
        write_json(path, value)
    cluster.barrier()
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

TIMEOUT = 300  # seconds that processes wait for one another at the start
RETRY = 0.5  # seconds between attempts to connect
MAX_MESSAGE = 1 << 24  # bytes

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Place:
    """The position of this process in a job.

    Attributes:
      coordinator: HOST:PORT on which process 0 listens.
      processes: number of processes in the job.
      process: number of this process, from 0.
      local_device_ids: accelerators of this host that belong to this process; None: all.
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


def find(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Place | None:
    """Returns the place of this process as told by the arguments, JAX_COORDINATOR_ADDRESS and its kin, or the platform.

    The platforms are those that JAX knows: TPU VMs (several slices too), GKE, SLURM and Open MPI.

    Returns:
      The place, or None for a process that is no part of a larger job.

    Raises:
      InputError: only some of the arguments are given, they do not fit each other, or the platform does not tell.
    """
    told = (coordinator, processes, process)
    if all(value is None for value in told) and all(name in os.environ for name in _ENVIRONMENT):
        told = (os.environ[_ENVIRONMENT[0]], *(_integer(name, os.environ[name]) for name in _ENVIRONMENT[1:]))
    if any(value is not None for value in told):
        if None in told:
            raise InputError("--coordinator, --processes and --process must be given together")
        return Place(*told)
    # The public `jax.distributed.initialize` cannot look at the environment without joining. Imported only here.
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, TIMEOUT)
    except Exception as error:  # of the platform's own interfaces: metadata servers, Kubernetes' API, environments
        raise InputError(f"the platform does not tell which process this is ({type(error).__name__}: {error}); "
                         "say it by --coordinator, --processes and --process") from None
    if None in found[:3] or found[1] == 1:
        return None
    # JAX gives every process of SLURM and Open MPI one device, also where the process is the only one of its node.
    alone = (
        os.environ.get("SLURM_STEP_NUM_NODES") == str(found[1])
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        or os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0 < len(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    )
    return Place(*found[:3], local_device_ids=None if alone else found[3])


# What launchers leave in the environment of the processes they start, and TPU VMs in the file system.
_MARKS = ("JAX_COORDINATOR_ADDRESS", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def may_have_others() -> bool:
    """False where no launcher has left a mark: `find` would find nothing, and import JAX to do so."""
    return any(name.startswith(_MARKS) for name in os.environ) or any(map(os.path.exists, _DEVICES))


def find_shard(text: str | None = None) -> tuple[int, int] | None:
    """Returns (number, count) of the part of the work that `text` "I/N" or a SLURM array gives this process, from 0.

    Processes with a shard need no connection to one another. None: there is no such division.

    Raises:
      InputError: `text` is not of that form.
    """
    if text is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, step, count = (
            _integer(name, os.environ.get(name, default))
            for name, default in (("SLURM_ARRAY_TASK_ID", ""), ("SLURM_ARRAY_TASK_MIN", "0"),
                                  ("SLURM_ARRAY_TASK_STEP", "1"), ("SLURM_ARRAY_TASK_COUNT", "1"))
        )
        return (task - first) // step, count
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise InputError(f"--shard={text}: must look like I/N, with I from 0 to N - 1")
    return int(number), int(count)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text}: not an integer") from None


class _Alone:
    """The only process of a job."""

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
        _exit(code, message)

    def leave(self) -> None:
        pass


class _Member:
    """One of several processes, connected to the hub of process 0."""

    def __init__(self, place: Place, timeout: float):
        """Connects and waits until all processes have; exits with one line when some do not come."""
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
            # The hub keeps the time and names who is missing.
            self._changed.wait_for(lambda: self._service or self._refusal, timeout + 10)
        if not self._service:
            self._leaving = True
            raise InputError(self._refusal or f"process 0 at {place.coordinator} accepts connections, but says nothing")

    def service_address(self) -> str:
        """HOST:PORT at which JAX's coordination service is to be, told by process 0."""
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
            with contextlib.suppress(OSError):  # the receiver notices, and says what happened
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
            _exit(message["code"], message["message"] if self.process == 0 else "")
        if message["type"] == "gone":
            if message["failed"]:
                time.sleep(1)  # an error that all processes find is better said by each of them
            self._end(message["message"])

    def _end(self, reason: str) -> None:
        """Ends this process at once: what it waits for, on the devices or elsewhere, will never come."""
        if self._leaving or not self._service:
            return
        print(f"error: {reason}; process {self.process} ends too; start the job again to go on after the last "
              "checkpoint", file=sys.stderr, flush=True)
        _run_cleanups()
        os._exit(1)


class _Hub:
    """The other end of all connections; a thread of process 0."""

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
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=MAX_MESSAGE)
        async with server:
            await asyncio.sleep(self._timeout)
            missing = sorted(set(range(self._place.processes)) - set(self._names))
            if missing:
                some = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
                self._broadcast({"type": "refused", "message": (
                    f"{self._place.coordinator}: {len(missing)} of {self._place.processes} processes did not come "
                    f"within {self._timeout:g} s: {some}")})
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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

    def _lose(self, process: int, what: str, failed: bool = False) -> None:
        self._left.add(process)
        message = f"process {process} ({self._names[process]}) {what}"
        self._broadcast({"type": "gone", "message": message, "failed": failed})

    def _broadcast(self, message: dict[str, Any]) -> None:
        for process, writer in self._writers.items():
            if process not in self._left:
                writer.write(_line(message))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _connect(place: Place, deadline: float, timeout: float) -> socket.socket:
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
    """The port after `used` where it is free (the easiest to open in a firewall), otherwise any free one."""
    for port in (used + 1, 0):
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("", port)) as server:
            return str(server.getsockname()[1])
    raise OSError("no free port")


_member: _Alone | _Member = _Alone()
_shard: tuple[int, int] | None = None
_cleanups: list[Callable[[], None]] = []


def take_shard(shard: tuple[int, int] | None) -> None:
    """Gives this process a part of the work (see `find_shard`) and says so; None: what `shard` says stays as it is."""
    global _shard
    _shard = shard
    if shard is not None:
        print(f"shard {shard[0]} of {shard[1]} (counted from 0)", file=sys.stderr, flush=True)


def shard() -> tuple[int, int]:
    """Returns (number, count): which part of work that needs no communication falls to this process.

    It is the shard given on the command line or by a SLURM array, otherwise (number of this process, processes).
    """
    return _shard or (_member.process, _member.processes)


def join(place: Place | None, timeout: float = TIMEOUT) -> None:
    """Joins this process and its devices to a job; None: it stays alone.

    Raises:
      InputError: the other processes did not come within `timeout` seconds (names them), or disagree about the job.
    """
    global _member
    if place is None or place.processes == 1:
        return
    print(f"process {place.process} of {place.processes}: waiting up to {timeout:g} s for the others at "
          f"{place.coordinator}", file=sys.stderr, flush=True)
    if place.process == 0:
        _Hub(place, timeout)
    _member = _Member(place, timeout)
    import jax  # commands that handle documents do without

    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        _member.service_address(), place.processes, place.process, local_device_ids=place.local_device_ids,
        initialization_timeout=int(timeout), shutdown_timeout_seconds=30, cluster_detection_method="deactivate",
    )


def size() -> int:
    """Number of processes in this job."""
    return _member.processes


def process() -> int:
    """Number of this process in its job, from 0."""
    return _member.process


def is_main() -> bool:
    """True in process 0, which alone writes what the job writes once."""
    return _member.process == 0


def gather(value: Any) -> list[Any]:
    """Returns the small JSON `value` of every process, in order of processes, to every process.

    All processes must call it, and in the same order.
    """
    return _member.gather(value)


def share(value: Any) -> Any:
    """Returns the small JSON `value` of process 0 to every process; see `gather`."""
    return _member.gather(value if is_main() else None)[0]


def barrier() -> None:
    """Waits until every process has come here; see `gather`."""
    _member.gather(None)


def on_main(action: Callable[[], object]) -> None:
    """Runs `action` in process 0 while the others wait for its end; its InputError is raised in all of them."""
    error = None
    if is_main():
        try:
            action()
        except InputError as raised:
            error = str(raised)
    if (error := share(error)) is not None:
        raise InputError(error)


def request(action: str) -> None:
    """Asks for an action at one of the next boundaries; may be called from any process, thread or signal handler."""
    _member.request(action)


def boundary() -> list[str]:
    """Returns the actions that are due now: the same at the same call in every process.

    Every process has to pass the same boundaries in the same order, e.g. one before each training step. An action is
    due at the first boundary that no process had passed when it was requested, so nobody has to wait for anybody as
    long as nothing is requested.
    """
    return _member.boundary()


def fail(message: str) -> None:
    """Tells the others that this process ends with an error; they end too, and show the message."""
    _member.fail(message)


def abandon(code: int, message: str) -> None:
    """Ends all processes at once with an exit code, whatever they are doing; process 0 prints the message."""
    _member.abandon(code, message)


def leave() -> None:
    """Ends the membership after the last common action of all processes."""
    global _member
    if isinstance(_member, _Member):
        import jax

        _member.leave()
        jax.distributed.shutdown()
        _member = _Alone()


@contextlib.contextmanager
def cleanup(action: Callable[[], None]):
    """Runs `action` at the end of the block, also when this process is ended there because another one is gone."""
    _cleanups.append(action)
    try:
        yield
    finally:
        _cleanups.remove(action)
        action()


def _exit(code: int, message: str) -> None:
    if message:
        print(message, flush=True)
    _run_cleanups()
    os._exit(code)


def _run_cleanups() -> None:
    for action in reversed(_cleanups):
        with contextlib.suppress(Exception):
            action()
