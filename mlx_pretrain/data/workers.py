"""Worker processes beside a main process that runs JAX: results in order, bounded read-ahead, no orphans."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mlx_pretrain.errors import InputError

Tag = TypeVar("Tag")

_function: Callable[[Any], Any] | None = None


class Workers(contextlib.AbstractContextManager):
    """Processes that apply one function.

    They are spawned, as forking a process in which JAX has started its threads can deadlock. They ignore Ctrl-C, which
    the main process handles, and end when it ends, even when it is killed.

        with Workers(str.upper, processes=2) as workers:
            dict(workers.map([("a", "x"), ("b", "y")]))        # {"a": "X", "b": "Y"}
    """

    def __init__(self, function: Callable[[Any], Any], processes: int, ahead: int | None = None):
        """Starts the processes.

        Args:
          function: picklable function; sent to each process once.
          processes: number of processes.
          ahead: items in work before the result of the first of them is awaited; None: four per process.
        """
        self._ahead = 4 * processes if ahead is None else ahead
        self._pool = concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(function,)
        )
        for _ in range(processes):  # each call that finds no idle process starts one
            self._submit(None)

    def _submit(self, argument: Any) -> concurrent.futures.Future:
        with _bare_start():
            return self._pool.submit(_apply, argument)

    def map(self, items: Iterable[tuple[Tag, Any]]) -> Iterator[tuple[Tag, Any]]:
        """Yields (tag, function(argument)) for pairs (tag, argument), in their order; tags stay in this process.

        Raises:
          InputError: a process was killed. Errors of `function` are raised as they are.
        """
        running: collections.deque[tuple[Tag, concurrent.futures.Future]] = collections.deque()
        try:
            for tag, argument in items:
                running.append((tag, self._submit((argument,))))
                if len(running) > self._ahead:
                    yield running[0][0], running.popleft()[1].result()
            while running:
                yield running[0][0], running.popleft()[1].result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError("a worker process was ended from outside (out of memory?)") from None

    def __exit__(self, *_):
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _bare_start() -> Iterator[None]:
    """Lets processes that are started in the block ignore Ctrl-C and not import the command's main module.

    The imports of that module, JAX among them, would cost each process seconds and hundreds of megabytes.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.modules["__main__"] = main


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Otherwise a process would wait for work for ever after the main process was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _apply(argument: tuple[Any] | None) -> Any:
    return argument and _function(*argument)
