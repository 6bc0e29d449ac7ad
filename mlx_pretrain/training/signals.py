"""Requests that reach a run from outside: to stop, to save a checkpoint, to record a profile."""

import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from mlx_pretrain.parallel import cluster

PATIENCE = 5.0  # seconds that a request to stop may wait for a boundary while there is nothing to save


class _Handlers(contextlib.AbstractContextManager):
    """Signal handlers that are installed during a `with` block."""

    def __init__(self, handlers: dict[signal.Signals, Callable[..., None]]):
        self._handlers = handlers

    def __enter__(self):
        self._previous = {number: signal.signal(number, handler) for number, handler in self._handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class StopRequest(_Handlers):
    """Passes SIGTERM and Ctrl-C on as requests to `parallel.cluster`; a second Ctrl-C interrupts at once.

    Python handles signals between two of its own instructions, so a compilation of minutes would keep them waiting.
    As long as there is nothing to save, a thread therefore ends the whole job when no boundary came within PATIENCE.

    Attributes:
      requested: name of the signal that came to this process, or None.
      nothing_to_save: True: the job may be ended like that; the owner of this object sets it to False.
    """

    def __init__(self, nothing_to_save: bool = False):
        super().__init__({signal.SIGTERM: self._note, signal.SIGINT: self._note})
        self.requested: str | None = None
        self.nothing_to_save = nothing_to_save

    def __enter__(self):
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return super().__enter__()

    def __exit__(self, *details):
        super().__exit__(*details)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # ends the thread

    def _watch(self, reader: socket.socket) -> None:
        """Reads the numbers of arriving signals, which the interpreter writes at once even while it compiles."""
        with reader:
            while number := reader.recv(1):
                if number[0] in (signal.SIGTERM, signal.SIGINT) and self.nothing_to_save:
                    time.sleep(PATIENCE)
                    if self.nothing_to_save:
                        name = signal.Signals(number[0]).name
                        cluster.abandon(STOP_CODES[name], f"{name}: nothing was trained yet; run again to go on")

    def _note(self, number: int, _) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        cluster.request(self.requested)


# Exit codes after a stop at which the state was saved: 128 + the signal, so that schedulers start the job again.
STOP_CODES = {"SIGTERM": 143, "SIGINT": 130}


class Stopped(Exception):
    """Cuts an evaluation short, at the same batch in every process."""


class AgreedRequests:
    """Requests that all processes of the job have agreed to meet from the last boundary on.

    Attributes:
      stop: name of the signal that ends the run, or None.
      save: True: a checkpoint is due by the clock.
    """

    def __init__(self, checkpoint_minutes: float | None):
        """`checkpoint_minutes`: age of the last checkpoint at which another is due; None: never."""
        self.stop: str | None = None
        self.save = False
        self._minutes, self._saved_at = checkpoint_minutes, time.monotonic()

    def poll(self) -> None:
        """Passes a boundary, see `cluster.boundary`."""
        age = (time.monotonic() - self._saved_at) / 60
        if self._minutes is not None and cluster.is_main() and age > self._minutes:
            self._saved_at = math.inf  # asked once
            cluster.request(_SAVE)
        for action in cluster.boundary():
            if action == _SAVE:
                self.save = True
            else:
                self.stop = self.stop or action

    def check(self) -> None:
        """Passes a boundary. Raises Stopped when the run is to end."""
        self.poll()
        if self.stop:
            raise Stopped

    def saved(self) -> None:
        """Notes that a checkpoint was saved."""
        self._saved_at, self.save = time.monotonic(), False


_SAVE = "checkpoint"


class Profiler(_Handlers):
    """Records a `jax.profiler` trace of a few steps, at step `at` or when SIGUSR1 comes."""

    def __init__(self, folder: epath.Path, at: int | None, steps: int = 5):
        super().__init__({signal.SIGUSR1: self._note})
        self._folder, self._at, self._steps = folder, at, steps
        self._until: int | None = None
        self._asked = False

    def _note(self, *_) -> None:
        self._asked = True

    def before_step(self, step: int, state: Any) -> None:
        """Starts or ends a trace, once the devices have finished the steps before."""
        if self._until is not None and step >= self._until:
            self._end(state)
        if self._until is None and (self._asked or step == self._at):
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._until, self._asked = step + self._steps, False

    def _end(self, state: Any = None) -> None:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._until = None

    def __exit__(self, *details):
        if self._until is not None:
            self._end()
        return super().__exit__(*details)
