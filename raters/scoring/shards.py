"""Scores on disk, one set of files per input file (shard), written whole or not at all.

    OUT/corpus.json             {"root"}: absolute root of the corpus, which the names of all files here are relative to
    OUT/score.gin               the configuration of the latest run
    OUT/<name>.scores.parquet   number, id, language, source, quality_score, n_tokens, rater; rows in input order
    OUT/<name>.embeddings.parquet   if the rater gives embeddings: see `embedding_files`
    OUT/<name>.rejects.jsonl    {"number", "reason"} of every record that could not be read
    OUT/<name>.done.json        the marker, written last: counts, the input's fingerprint, settings, and the layout
                                (devices, batches), which is not compared

<name> is the input's path relative to the corpus's root. `number` is the line or row of the input, `n_tokens` counts
the whole document (null without a tokenizer), a score is nan where the rater has none. A file that cannot be read to
its end has no scores, a whole-file reject (number null) and a marker with status "failed".
"""

import concurrent.futures
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import tensorstore as ts
from etils import epath

from mlx_pretrain import __version__, gcs
from mlx_pretrain.artifacts import is_current
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer, file_sizes, kvstore, read_json, sha256, write_json
from mlx_pretrain.languages import UNDETERMINED
from raters.scoring import embedding_files

FORMAT = "mlx-rater-scores"
VERSION = 1
ROOT, CONFIG = "corpus.json", "score.gin"
SCORES, REJECTS, MARKER = ".scores.parquet", ".rejects.jsonl", ".done.json"
EMBEDDINGS = ".embeddings.parquet"
SCHEMA = pa.schema([
    ("number", pa.int64()), ("id", pa.string()), ("language", pa.string()), ("source", pa.string()),
    ("quality_score", pa.float32()), ("n_tokens", pa.int32()), ("rater", pa.string()),
])
_ROWS_PER_GROUP = 16_384
_PARTIAL = re.compile(r"\.(.*)\.\d+-[0-9a-f]{8}")  # names that `files.atomic_writer` gives unfinished files


@dataclasses.dataclass(frozen=True)
class Shard:
    """One input file and its outputs.

    Attributes:
      name: path of the input relative to the corpus's root.
      path: path of the input.
      output: folder of all scores.
      language: language of the input's records that name none.
      recorded: the input as the marker of its embeddings records it, where these are read in its place.
    """

    name: str
    path: epath.Path
    output: epath.Path
    language: str = UNDETERMINED
    recorded: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def scores(self) -> epath.Path:
        return self.output / (self.name + SCORES)

    @property
    def embeddings(self) -> epath.Path:
        return self.output / (self.name + EMBEDDINGS)

    @property
    def rejects(self) -> epath.Path:
        return self.output / (self.name + REJECTS)

    @property
    def marker(self) -> epath.Path:
        return self.output / (self.name + MARKER)

    def fingerprint(self) -> dict[str, int]:
        """Returns size and time of change of the input (nanoseconds; seconds on an object store); zeros without it."""
        if self.recorded is not None:
            return {key: self.recorded[key] for key in ("size", "modified")}
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

    def sha256(self) -> str:
        """Returns the SHA-256 of the input."""
        return sha256(self.path) if self.recorded is None else self.recorded["sha256"]


def find_shards(corpus: Corpus, output: epath.PathLike) -> list[Shard]:
    """Returns the input files of a corpus, sorted by name; outputs of an earlier run are skipped.

    Raises:
      InputError: all files are such outputs.
    """
    output = epath.Path(output)
    own = [output / ROOT, output / CONFIG]
    shards = [Shard(name, path, output, corpus.language_of_path(name))
              for name, path in sorted(corpus.paths().items())
              if path not in own and not name.endswith((SCORES, EMBEDDINGS, REJECTS, MARKER))]
    if not shards:
        raise InputError(f"{corpus.location}: no file matches that is not a file of scores")
    return shards


def absolute_root(folder: epath.PathLike) -> str:
    """Returns the root of a corpus as scores record it: the same from every working folder."""
    return str(folder) if gcs.is_gs(folder) else os.path.abspath(folder)


def scored_root(output: epath.PathLike) -> str | None:
    """Returns the root of the corpus whose scores are in a folder; None where it is not recorded."""
    path = epath.Path(output) / ROOT
    record = read_json(path, "record of the corpus's root") if path.exists() else {}
    return record.get("root") if isinstance(record, dict) else None


def check_root(output: epath.PathLike, own_root: str, shards: Sequence[Shard]) -> None:
    """Refuses a folder with the scores of another corpus: files of the same name below its root may be others.

    A corpus that was moved is the same: all files of `shards` that have scores have their content still. A root below
    which nothing was scored binds nobody.

    Raises:
      InputError: the folder holds scores of the documents below another root.
    """
    root = scored_root(output)
    if root in (None, own_root):
        return
    scored = [shard for shard in shards if shard.marker.exists()]
    if scored:
        same = all(has_input(shard, read_json(shard.marker, "completion marker")) for shard in scored)
    else:
        same = not any(name.endswith(MARKER) for name in file_sizes(output))
    if not same:
        raise InputError(f"{epath.Path(output) / ROOT}: the scores here are of documents below {root}, these are below "
                         f"{own_root}: set Corpus.root to a folder above both, with Corpus.files below it, or "
                         "choose another score.output")


def claim_root(output: epath.PathLike, root: str, shards: Sequence[Shard]) -> None:
    """Records the root of the corpus whose scores go to a folder.

    Of several processes the first writes the record, on condition that nobody did meanwhile; the others check it.

    Raises:
      InputError: as `check_root`.
    """
    content = json.dumps({"root": root}, indent=1) + "\n"
    with gcs.named_errors(output):
        store = ts.KvStore.open(kvstore(output)).result()
        while scored_root(output) != root:
            generation = store.read(ROOT).result().stamp.generation
            check_root(output, root, shards)
            if store.write(ROOT, content, if_equal=generation).result().generation:
                return


def unfinished(shards: Sequence[Shard], settings: Mapping[str, Any], overwrite: bool) -> list[Shard]:
    """Returns the shards to score: those without a marker, whose input has changed since, or that failed.

    A shard whose path tells a language now, and told none when it was scored, is scored again, too.

    Raises:
      InputError: a shard was scored with other settings or another language, and may not be overwritten.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # object stores are slow to answer
        whole = list(pool.map(lambda shard: _is_whole(shard, settings, overwrite), shards))
    return [shard for shard, is_whole in zip(shards, whole) if not is_whole]


def _is_whole(shard: Shard, settings: Mapping[str, Any], overwrite: bool) -> bool:
    if not shard.marker.exists():
        return False
    marker = read_json(shard.marker, "completion marker")
    if not isinstance(marker, dict) or (marker.get("format"), marker.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{shard.marker}: not the marker of scores of version {VERSION}")
    # Scores of earlier versions do not know languages from paths.
    language = marker["input"].get("language", UNDETERMINED)
    recorded = marker["settings"]
    if language != UNDETERMINED:  # documents without a language may get one unasked
        recorded, settings = {**recorded, "language": language}, {**settings, "language": shard.language}
    return (is_current(shard.marker, recorded, settings, overwrite=overwrite, quiet=True)
            and language == shard.language and marker["status"] == "done"
            and shard.scores.exists() and shard.rejects.exists() and has_input(shard, marker)
            and (not settings.get("embeddings") or shard.embeddings.exists()))


def has_input(shard: Shard, marker: Mapping[str, Any]) -> bool:
    """Returns whether a shard's input is the one that its marker records."""
    recorded, now = marker["input"], shard.fingerprint()
    if recorded["size"] != now["size"]:
        return False
    # Times differ between copies of the same file, so the hash decides.
    return recorded["modified"] == now["modified"] or recorded["sha256"] == shard.sha256()


def sweep(shards: Sequence[Shard]) -> None:
    """Removes the unfinished files that a killed run has left of the outputs of these shards."""
    names_in: dict[epath.Path, set[str]] = {}
    for shard in shards:
        for path in (shard.scores, shard.embeddings, shard.rejects, shard.marker):
            names_in.setdefault(path.parent, set()).add(path.name)
    for folder, names in names_in.items():
        for path in folder.iterdir() if folder.exists() else ():
            if (match := _PARTIAL.fullmatch(path.name)) and match[1] in names:
                path.unlink(missing_ok=True)


class _Partial:
    """A file that gets its name when it is complete."""

    def __init__(self, path: epath.Path):
        self._writer = atomic_writer(path)
        self.file = self._writer.__enter__()

    def commit(self) -> None:
        self._writer.__exit__(None, None, None)

    def discard(self) -> None:
        error = InterruptedError()
        self._writer.__exit__(type(error), error, None)


class _Table:
    """A parquet file that gets its name when it is complete."""

    def __init__(self, path: epath.Path, schema: pa.Schema):
        options = embedding_files.WRITE_OPTIONS if embedding_files.COLUMN in schema.names else {"compression": "zstd"}
        self._partial, self._names = _Partial(path), schema.names
        self._writer = pa.parquet.ParquetWriter(self._partial.file, schema, **options)

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.select(self._names), row_group_size=_ROWS_PER_GROUP)

    def close(self) -> None:
        self._writer.close()

    def commit(self) -> None:
        self._partial.commit()

    def discard(self) -> None:
        self._writer.close()  # otherwise it would close itself later, and write to a closed file
        self._partial.discard()


class ShardWriter:
    """Writes the outputs of one shard, until `finish`, `fail` or `discard`. Memory: one row group.

    Attributes:
      shard: the shard.
      documents, tokens, rejected: counts of what was written so far.
    """

    def __init__(self, shard: Shard, settings: Mapping[str, Any], rater: str, layout: Mapping[str, Any] | None = None,
                 embeddings: pa.Schema | None = None, program: str = "raters.score"):
        """Writes nothing yet.

        Args:
          shard: the shard.
          settings: settings that scores depend on, for the marker.
          rater: name@version, for every row.
          layout: devices and batches, for the marker.
          embeddings: schema of the embeddings, which all documents have then; None: there are none.
          program: name of the command, for the marker.
        """
        self.shard, self._settings, self._rater, self._layout = shard, settings, rater, layout or {}
        self._program = f"{program} {__version__}"
        self._input = shard.fingerprint()
        self.documents = self.tokens = self.rejected = 0
        metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(self._settings)}
        self._schemas = {shard.scores: SCHEMA.with_metadata(metadata)}
        self._schema = SCHEMA
        if embeddings is not None:
            self._schemas[shard.embeddings] = embeddings
            self._schema = SCHEMA.append(embeddings.field(embedding_files.COLUMN))
        self._rows: list[pa.Table] = []  # not written yet
        self._rejects: _Partial | None = None
        self._tables: list[_Table] = []

    def reject(self, number: int | None, reason: str) -> None:
        """Notes a record that cannot be scored, with its number; None: the whole file."""
        for prefix in (f"{self.shard.path}:{number}: ", f"{self.shard.path}: "):
            reason = reason.removeprefix(prefix)
        if self._rejects is None:
            self._rejects = _Partial(self.shard.rejects)
        # A reason may quote half a surrogate pair.
        line = json.dumps({"number": number, "reason": reason}, ensure_ascii=False)
        self._rejects.file.write(line.encode(errors="backslashreplace") + b"\n")
        self.rejected += 1

    def add(self, documents: Sequence[Document], n_tokens: np.ndarray | None, scores: np.ndarray,
            embeddings: np.ndarray | None = None) -> None:
        """Appends scored documents, in input order.

        Args:
          documents: the documents.
          n_tokens: int `[documents]` or None.
          scores: `[documents]`.
          embeddings: `[documents, width]` in the type and width of the writer's schema.
        """
        columns = {
            "number": [d.number for d in documents], "id": [d.id for d in documents],
            "language": [d.language for d in documents], "source": [d.source for d in documents],
            "n_tokens": [None] * len(documents) if n_tokens is None else n_tokens,
        }
        if embeddings is not None:
            columns[embedding_files.COLUMN] = embedding_files.as_column(embeddings)
        self.add_rows(columns, scores)

    def add_rows(self, columns: Mapping[str, Any], scores: np.ndarray) -> None:
        """Appends scored documents as columns of `SCHEMA`, but for score and rater, in input order."""
        rows = pa.table({**columns, "quality_score": np.asarray(scores, np.float32),
                         "rater": pa.repeat(self._rater, len(scores))}, self._schema)
        self._rows.append(rows)
        self.documents += len(rows)
        self.tokens += pa.compute.sum(rows["n_tokens"]).as_py() or 0
        # Groups of one size, so that the bytes do not depend on the calls.
        while sum(map(len, self._rows)) >= _ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if not self._tables:
            self._tables = [_Table(path, schema) for path, schema in self._schemas.items()]
        rows = pa.concat_tables(self._rows or [self._schema.empty_table()]).combine_chunks()
        for table in self._tables:
            table.write(rows.slice(0, _ROWS_PER_GROUP))
        self._rows = [rows.slice(_ROWS_PER_GROUP)] if len(rows) > _ROWS_PER_GROUP else []

    def finish(self) -> str | None:
        """Completes the outputs, the marker last; or returns a reason to call `fail`."""
        digest = self.shard.sha256()
        if self._input != self.shard.fingerprint():
            return "changed while it was scored"
        if self._rows or not self._tables:
            self._write_group()
        for table in self._tables:
            table.close()
        self.shard.marker.unlink(missing_ok=True)
        if self.shard.embeddings not in self._schemas:  # of an earlier run with other settings
            self.shard.embeddings.unlink(missing_ok=True)
        for table in self._tables:
            table.commit()
        self._commit_rejects()
        self._write_marker("done", digest)
        return None

    def fail(self, reason: str) -> None:
        """Leaves only the rejects, the whole file among them, and a marker with the status "failed"."""
        self.reject(None, reason)
        self._discard_tables()
        for path in (self.shard.marker, self.shard.scores, self.shard.embeddings):
            path.unlink(missing_ok=True)
        self._commit_rejects()
        self.documents = self.tokens = 0
        self._write_marker("failed", None)

    def _commit_rejects(self) -> None:
        rejects = self._rejects or _Partial(self.shard.rejects)
        rejects.commit()

    def _write_marker(self, status: str, digest: str | None) -> None:
        write_json(self.shard.marker, {
            "format": FORMAT, "version": VERSION, "status": status, "program": self._program,
            "rater": self._rater,
            "documents": self.documents, "rejected": self.rejected, "tokens": self.tokens,
            "input": {"name": self.shard.name, **self._input, "sha256": digest, "language": self.shard.language},
            "settings": self._settings, "layout": self._layout,
        })

    def discard(self) -> None:
        """Removes what has been written so far."""
        self._discard_tables()
        if self._rejects is not None:
            self._rejects.discard()

    def _discard_tables(self) -> None:
        for table in self._tables:
            table.discard()
