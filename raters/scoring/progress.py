"""Progress of bulk scoring: a line on stderr every few seconds, a summary at the end."""

import contextlib
import datetime
import threading
import time
from collections.abc import Sequence
from typing import Any

from mlx_pretrain.inference.bulk import BulkInference
from mlx_pretrain.parallel.cluster import log
from raters.scoring.shards import Shard, ShardWriter

# Characters per byte of a file, as assumed until the first file is finished.
_CHARACTERS_PER_BYTE = {".gz": 3.0, ".zst": 3.0, ".xz": 4.0, ".parquet": 2.0}


def joint_summary(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary of a job: the sums of its processes' counts and rates, and the longest time.

    Shares of time and tokens are means over the processes that computed.
    """
    joint = dict(summaries[0])
    for name in ("files", "scored", "skipped", "failed", "documents", "rejected", "tokens", "documents_per_s",
                 "tokens_per_s", "compilations"):
        joint[name] = sum(summary[name] for summary in summaries)
    joint["seconds"] = max(summary["seconds"] for summary in summaries)
    for name in ("padding_efficiency", "device_busy"):
        values = [summary[name] for summary in summaries if summary[name] is not None]
        joint[name] = round(sum(values) / len(values), 4) if values else None
    return joint


class Progress(contextlib.AbstractContextManager):
    """Counts what is read and scored, and logs it; the clock runs inside the `with` block.

    Attributes:
      failed: shards that could not be scored.
    """

    def __init__(self, shards: Sequence[Shard], skipped: int, bulk: BulkInference | None, log_every: float):
        """Starts nothing yet.

        Args:
          shards: shards to score.
          skipped: number of shards that were scored before.
          bulk: runs the model; None: no model runs on the devices.
          log_every: seconds between lines.
        """
        self._sizes = {shard: shard.fingerprint()["size"] for shard in shards}
        self._skipped, self._bulk, self._every = skipped, bulk, log_every
        self._begun: dict[ShardWriter, int] = {}  # characters read
        self.failed: list[Shard] = []
        self._scored = self._read = self._documents = self._tokens = self._rejected = self._bytes = self._characters = 0
        self._start = time.perf_counter()
        self._seconds: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log, daemon=True)

    def __enter__(self):
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()

    def read(self, writer: ShardWriter, documents: int, characters: int) -> None:
        """Notes documents and characters of a shard as read."""
        self._begun[writer] = self._begun.get(writer, 0) + characters
        self._read += documents

    def finish(self, writer: ShardWriter, failed: bool) -> None:
        """Notes that a shard is scored, or failed."""
        self._characters += self._begun.pop(writer, 0)
        self._bytes += self._sizes[writer.shard]
        self._documents += writer.documents
        self._tokens += writer.tokens
        self._rejected += writer.rejected
        if failed:
            self.failed.append(writer.shard)
            log(f"{writer.shard.name}: failed, see {writer.shard.rejects}", every_process=True)
        else:
            self._scored += 1

    def _log(self) -> None:
        while not self._stop.wait(self._every):
            log(self._line(), every_process=True)

    def _rates(self, documents: float) -> dict[str, float | None]:
        seconds = self._seconds or time.perf_counter() - self._start
        tokens = self._tokens + sum(writer.tokens for writer in list(self._begun))
        rates = {"seconds": seconds, "documents_per_s": documents / seconds,
                 "tokens_per_s": (self._bulk.tokens if self._bulk else tokens) / seconds,
                 "padding_efficiency": None, "device_busy": None}
        if self._bulk and self._bulk.computed_tokens:
            rates["padding_efficiency"] = self._bulk.padding_efficiency
            rates["device_busy"] = min(self._bulk.busy_seconds / seconds, 1.0)
        return rates

    def _computed(self) -> float:
        """Returns the share of the tokens read that are scored, too; small where reading is fast and the model slow."""
        return self._bulk.tokens / max(self._bulk.received, 1) if self._bulk else 1.0

    def _line(self) -> str:
        rates = self._rates(self._read * self._computed())
        line = f"{self._scored + len(self.failed)}/{len(self._sizes)} files"
        line += f"  {rates['documents_per_s']:,.1f} documents/s  {rates['tokens_per_s']:,.0f} tokens/s"
        if rates["device_busy"] is not None:
            line += f"  padding efficiency {rates['padding_efficiency']:.3f}  device {rates['device_busy']:.0%} busy"
        if (share := self._read_share() * self._computed()) > 0:
            line += f"  {datetime.timedelta(seconds=round(rates['seconds'] * (1 / share - 1)))} left"
        return line

    def _read_share(self) -> float:
        """Returns the share of the bytes that are read, estimated within files from the text read so far."""
        read = self._bytes
        for writer, characters in list(self._begun.items()):
            ratio = (self._characters / self._bytes if self._bytes and self._characters
                     else _CHARACTERS_PER_BYTE.get(writer.shard.path.suffix, 1.0))
            read += min(characters / ratio, self._sizes[writer.shard])
        return read / max(sum(self._sizes.values()), 1)

    def summary(self) -> dict[str, Any]:
        """Returns counts and rates of the whole run; rates of the model are None for plug-ins."""
        rates = {name: value and round(value, 4) for name, value in self._rates(self._documents).items()}
        return {
            "files": len(self._sizes) + self._skipped, "scored": self._scored, "skipped": self._skipped,
            "failed": len(self.failed), "documents": self._documents, "rejected": self._rejected,
            "tokens": self._tokens, **rates,
            "compilations": self._bulk.compilations if self._bulk else 0,
        }
