"""Scores on disk, one set of files per input file (shard), written whole or not at all.

    OUT/<name>.scores.parquet   number, id, language, source, quality_score, n_tokens, rater; rows in input order
    OUT/<name>.rejects.jsonl    {"number", "reason"} of every record that could not be read
    OUT/<name>.done.json        the marker, written last: counts, the input's fingerprint, settings, and the layout
                                (devices, batches), which is not compared

<name> is the input's path below the wildcard-free part of its pattern. `number` is the line or row of the input,
`n_tokens` counts the whole document (null when no tokenizer was given), a score is nan where the rater has none. A file
that cannot be read to its end has no scores, a whole-file reject (number null) and a marker with status "failed".
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.data.documents import Document, refuse_twins
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_json
from raters.filtering.stages import input_files

FORMAT = "mlx-rater-scores"
VERSION = 1
SCORES, REJECTS, MARKER = ".scores.parquet", ".rejects.jsonl", ".done.json"
SCHEMA = pa.schema([
    ("number", pa.int64()), ("id", pa.string()), ("language", pa.string()), ("source", pa.string()),
    ("quality_score", pa.float32()), ("n_tokens", pa.int32()), ("rater", pa.string()),
])
_ROWS_PER_GROUP = 16_384
_PARTIAL = re.compile(r"\.(.*)\.\d+-[0-9a-f]{8}")  # as `files.write_atomic` and `_Partial` name them


@dataclasses.dataclass(frozen=True)
class Shard:
    """One input file and its outputs.

    Attributes:
      name: of the input, unique.
      path: of the input.
      output: folder of all scores.
    """

    name: str
    path: epath.Path
    output: epath.Path

    @property
    def scores(self) -> epath.Path:
        return self.output / (self.name + SCORES)

    @property
    def rejects(self) -> epath.Path:
        return self.output / (self.name + REJECTS)

    @property
    def marker(self) -> epath.Path:
        return self.output / (self.name + MARKER)

    def fingerprint(self) -> dict[str, int]:
        """Size and time of change of the input (nanoseconds; seconds on an object store); zeros when it has gone."""
        try:
            stat = os.stat(self.path)
            return {"size": stat.st_size, "modified": stat.st_mtime_ns}
        except OSError:
            pass
        try:
            stat = self.path.stat()
            return {"size": stat.length, "modified": int(stat.mtime)}
        except OSError:
            return {"size": 0, "modified": 0}


def find_shards(patterns: Iterable[epath.PathLike], output: epath.PathLike) -> list[Shard]:
    """The input files of paths and globs, sorted by name; outputs of an earlier run are passed over.

    Raises:
      InputError: a pattern matches nothing, two files would have the same outputs, or a file is there twice.
    """
    found: dict[str, epath.Path] = {}
    for pattern in patterns:
        for name, path in input_files(pattern).items():
            if name.endswith((SCORES, REJECTS, MARKER)):
                continue
            if found.setdefault(name, path) != path:
                raise InputError(f"{path}: its scores would go where those of {found[name]} go; score one of them into "
                                 "another folder, or use one pattern with a common parent")
    for path, times in collections.Counter(found.values()).items():
        if times > 1:
            raise InputError(f"{path}: matches two patterns, which name its scores differently; narrow one of them")
    refuse_twins(found.values())
    return [Shard(name, path, epath.Path(output)) for name, path in sorted(found.items())]


def unfinished(shards: Sequence[Shard], settings: Mapping[str, Any], overwrite: bool) -> list[Shard]:
    """The shards to score: those without a marker, whose input has changed since, or that failed.

    Raises:
      InputError: a shard was scored with other settings, and may not be overwritten.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # object stores are slow to answer
        whole = list(pool.map(lambda shard: _is_whole(shard, settings, overwrite), shards))
    return [shard for shard, done in zip(shards, whole) if not done]


def _is_whole(shard: Shard, settings: Mapping[str, Any], overwrite: bool) -> bool:
    if not shard.marker.exists():
        return False
    marker = read_json(shard.marker, "completion marker")
    if not isinstance(marker, dict) or (marker.get("format"), marker.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{shard.marker}: not the marker of scores of version {VERSION}")
    if different := [name for name in settings if marker["settings"].get(name) != settings[name]]:
        if overwrite:
            return False
        name = different[0]
        raise InputError(f"{shard.marker}: scored with another {name} ({marker['settings'].get(name)!r}, now "
                         f"{settings[name]!r}); choose another score.output, or set score.overwrite=True")
    if marker["status"] != "done" or not (shard.scores.exists() and shard.rejects.exists()):
        return False
    found, now = marker["input"], shard.fingerprint()
    if found["size"] != now["size"]:
        return False
    # Times differ between copies of the same file, so the hash has the last word.
    return found["modified"] == now["modified"] or found["sha256"] == sha256(shard.path)


def sweep(shards: Sequence[Shard]) -> None:
    """Removes what a killed run has left behind of the outputs of these shards."""
    names: dict[epath.Path, set[str]] = {}
    for shard in shards:
        for path in (shard.scores, shard.rejects, shard.marker):
            names.setdefault(path.parent, set()).add(path.name)
    for folder, own in names.items():
        for path in folder.iterdir() if folder.exists() else ():
            if (match := _PARTIAL.fullmatch(path.name)) and match[1] in own:
                path.unlink(missing_ok=True)


class _Partial:
    """A file that gets its name when it is complete."""

    def __init__(self, path: epath.Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.file = self._scratch.open("wb")

    def commit(self) -> None:
        self.file.close()
        self._scratch.replace(self._path)

    def discard(self) -> None:
        self.file.close()
        self._scratch.unlink(missing_ok=True)


class ShardWriter:
    """Writes the outputs of one shard; to be ended with `finish`, `fail` or `discard`. Memory: one row group."""

    def __init__(self, shard: Shard, settings: Mapping[str, Any], rater: str, layout: Mapping[str, Any] | None = None):
        """Writes nothing yet. `settings` and `layout` go into the marker; `rater` (name@version) into every row."""
        self.shard, self._settings, self._rater, self._layout = shard, settings, rater, layout or {}
        self._input = shard.fingerprint()
        self.documents = self.tokens = self.rejected = 0
        self._rows: dict[str, list] = {name: [] for name in SCHEMA.names[:-1]}
        self._rejects: _Partial | None = None
        self._scores: _Partial | None = None
        self._table: pa.parquet.ParquetWriter | None = None

    def reject(self, number: int | None, reason: str) -> None:
        """Notes a record that cannot be scored; None: the whole file."""
        for prefix in (f"{self.shard.path}:{number}: ", f"{self.shard.path}: "):
            reason = reason.removeprefix(prefix)
        if self._rejects is None:
            self._rejects = _Partial(self.shard.rejects)
        # A reason may quote half a surrogate pair.
        line = json.dumps({"number": number, "reason": reason}, ensure_ascii=False)
        self._rejects.file.write(line.encode(errors="backslashreplace") + b"\n")
        self.rejected += 1

    def add(self, documents: Sequence[Document], n_tokens: np.ndarray | None, scores: np.ndarray) -> None:
        """Appends scored documents, in input order: n_tokens int `[documents]` or None, scores `[documents]`."""
        counts = [None] * len(documents) if n_tokens is None else n_tokens.tolist()
        columns = (
            [d.number for d in documents], [d.id for d in documents], [d.language for d in documents],
            [d.source for d in documents], np.asarray(scores, np.float32).tolist(), counts,
        )
        for rows, column in zip(self._rows.values(), columns):
            rows += column
        self.documents += len(documents)
        self.tokens += 0 if n_tokens is None else int(n_tokens.sum())
        # Groups of one size, so that the bytes do not depend on how the documents came in.
        while len(self._rows["number"]) >= _ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self._scores is None:
            self._scores = _Partial(self.shard.scores)
            metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(self._settings)}
            self._table = pa.parquet.ParquetWriter(self._scores.file, SCHEMA.with_metadata(metadata),
                                                   compression="zstd")
        group = {name: rows[:_ROWS_PER_GROUP] for name, rows in self._rows.items()}
        n = len(group["number"])
        self._table.write_table(pa.table(group | {"rater": [self._rater] * n}, SCHEMA), row_group_size=_ROWS_PER_GROUP)
        self._rows = {name: rows[_ROWS_PER_GROUP:] for name, rows in self._rows.items()}

    def finish(self) -> str | None:
        """Completes the outputs, the marker last; or tells why not, and they are to be failed."""
        digest = sha256(self.shard.path)
        if self._input != self.shard.fingerprint():
            return "changed while it was scored"
        if self._rows["number"] or self._scores is None:
            self._write_group()
        self._table.close()
        self.shard.marker.unlink(missing_ok=True)
        self._scores.commit()
        self._commit_rejects()
        self._write_marker("done", digest)
        return None

    def fail(self, reason: str) -> None:
        """Leaves nothing but the rejects, the whole file among them, and a marker that says so."""
        self.reject(None, reason)
        self._discard_scores()
        self.shard.marker.unlink(missing_ok=True)
        self.shard.scores.unlink(missing_ok=True)
        self._commit_rejects()
        self.documents = self.tokens = 0
        self._write_marker("failed", None)

    def _commit_rejects(self) -> None:
        rejects = self._rejects or _Partial(self.shard.rejects)
        rejects.commit()

    def _write_marker(self, status: str, digest: str | None) -> None:
        write_json(self.shard.marker, {
            "format": FORMAT, "version": VERSION, "status": status, "program": f"raters.score {__version__}",
            "rater": self._rater,
            "documents": self.documents, "rejected": self.rejected, "tokens": self.tokens,
            "input": {"name": self.shard.name, **self._input, "sha256": digest}, "settings": self._settings,
            "layout": self._layout,
        })

    def discard(self) -> None:
        """Removes what has been written so far."""
        self._discard_scores()
        if self._rejects is not None:
            self._rejects.discard()

    def _discard_scores(self) -> None:
        if self._scores is not None:
            self._table.close()  # it would close itself later, into a file that is closed
            self._scores.discard()
