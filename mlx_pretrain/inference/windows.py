"""The queue of batches on the devices, which finishes windows of inputs in their order."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")
Window = TypeVar("Window")


def run_windows(
    windows: Iterable[tuple[Iterable[Batch], Window]],
    *,
    finish: Callable[[Batch], None],
    is_ready: Callable[[Batch], bool],
    in_flight: int,
) -> Iterator[Window]:
    """Keeps the devices busy across windows.

    Args:
      windows: (batches, window) pairs; taking a batch from them starts it on the devices. The next batch or window is
        taken while earlier batches are computed.
      finish: fetches the result of a batch and stores it; called in the order in which batches were started.
      is_ready: function that returns True once a result is computed, so that it is fetched early.
      in_flight: batches on the devices before the first one's result is waited for.

    Yields:
      The windows in order, each once its last batch is finished.
    """
    queue: collections.deque[tuple[str, Batch | Window]] = collections.deque()
    unfinished = 0

    def finish_batches(limit: int) -> Iterator[Window]:
        nonlocal unfinished
        while queue:
            entry_type, entry = queue[0]
            if entry_type == "window":
                queue.popleft()
                yield entry
                continue
            if unfinished <= limit and not is_ready(entry):
                return
            queue.popleft()
            unfinished -= 1
            finish(entry)

    for batches, window in windows:
        for batch in batches:
            queue.append(("batch", batch))
            unfinished += 1
            yield from finish_batches(in_flight)
        queue.append(("window", window))
        yield from finish_batches(in_flight)
    yield from finish_batches(0)
