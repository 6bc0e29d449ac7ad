"""Exports documents to a token store: tokens of every split and language, in rows of one length.

    python -m data_mixtures.export --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The work is done in phases of tasks (see `make_plan` and `mlx_pretrain.parallel.phases`), so the store appears whole or
not at all, and a killed export goes on with the tasks that are left. A task writes one array: the rows of a language of
a split or, with `group_bytes`, of a group of its files. With `shuffle_seed` the documents of each language are shuffled
over all its files first (see `document_shuffle`), and each bucket of the shuffle becomes an array. Memory does not grow
with the number of documents.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.document_shuffle import TokenisedDocument, document_key, read_bucket, write_run
from mlx_pretrain.artifacts import provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data import token_store
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.token_store import EOS_ID, PAD_ID, Manifest, Part, PartWriter, TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import fingerprint, write_atomic
from mlx_pretrain.parallel import cluster
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan, complete

HELDOUT = "heldout"
_PROGRAM = "data_mixtures.export"
ROWS, SCATTER, MANIFEST = "rows", "scatter", "manifest"  # phases
_EARLIER_RECORDS = ".export"  # folder in stores that an earlier version was killed at
_BATCH_BYTES = 1 << 20  # of text tokenised at a time
_SCATTER_BYTES = 1 << 30  # of files that a task of the shuffle reads, where `group_bytes` does not say otherwise
_TEXT_PER_COMPRESSED_BYTE = 4
_DOCUMENT_BYTES = 256  # of memory that a document takes besides its tokens
_DOCUMENTS_JOINED = 1000
_EOS = np.array([EOS_ID], np.int32)


@gin.configurable("export_tokens")
@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Parameters of the export.

    Attributes:
      corpus: documents, e.g. @Corpus().
      tokenizer: SentencePiece model file; a copy goes into the store.
      store: folder of the store, local or gs://.
      sequence_length: tokens per row.
      num_threads: threads that tokenise, in each process.
      group_bytes: bytes of input files, in order, that make up a group, the work of one task. Each becomes an array of
        its own, so that processes can share a language, and a restart makes less again; None: one array a language.
        Arrays of shuffled documents do not depend on it.
      overwrite: replaces a store that was made from other documents or settings.
      heldout: corpus of the split "heldout", where that is another one than `corpus`, e.g. as `corpus` holds only the
        training documents that a filter kept.
      workers: processes that share the work on this machine; 1: the command does it itself.
      shuffle_seed: shuffles the documents of each language before they are joined into rows; None: they stay in the
        order of the files.
      bucket_bytes: bytes of text, about, that are sorted in memory at a time by the shuffle, and become an array.
    """

    corpus: Corpus = gin.REQUIRED
    tokenizer: epath.PathLike = gin.REQUIRED
    store: epath.PathLike = gin.REQUIRED
    sequence_length: int = gin.REQUIRED
    num_threads: int = 2
    group_bytes: int | None = None
    overwrite: bool = False
    heldout: Corpus | None = None
    workers: int = 1
    shuffle_seed: int | None = None
    bucket_bytes: int = 1 << 29

    def __post_init__(self):
        for name, unit in (("sequence_length", "tokens"), ("group_bytes", "bytes"), ("workers", "processes"),
                           ("bucket_bytes", "bytes")):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and (name, value) != ("group_bytes", None):
                raise InputError(f"export_tokens.{name}: {value!r} is no positive number of {unit}")
        if not (self.shuffle_seed is None or isinstance(self.shuffle_seed, int)):
            raise InputError(f"export_tokens.shuffle_seed: {self.shuffle_seed!r} is no whole number")

    def corpus_of(self, split: str) -> Corpus:
        """Returns the corpus of a split."""
        return self.heldout if self.heldout is not None and split == HELDOUT else self.corpus

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the store depends on."""
        settings = {"sequence_length": self.sequence_length, **self.corpus.record_settings}
        if self.heldout is not None:
            settings["heldout"] = self.heldout.record_settings
        if self.shuffle_seed is not None:
            return settings | {"shuffle_seed": self.shuffle_seed, "bucket_bytes": self.bucket_bytes}
        return settings if self.group_bytes is None else settings | {"group_bytes": self.group_bytes}


class RowWriter:
    """Joins tokens, and writes them in rows of one length, of which the last is padded.

        writer = RowWriter("tokens/train/en", 256, np.uint16)
        writer.add(tokens, n_bytes=4000, n_documents=1)        # [tokens], EOS after each document
        part = writer.close()
    """

    def __init__(self, path: epath.PathLike, sequence_length: int, dtype: np.dtype):
        """Creates the array at `path`."""
        self._writer, self._length = PartWriter(path, sequence_length, dtype), sequence_length
        self._rest = np.empty(0, dtype)
        self._tokens = self._bytes = self._documents = 0

    def add(self, tokens: np.ndarray, n_bytes: int, n_documents: int) -> None:
        """Appends the tokens of whole documents, with their bytes of text and number."""
        self._tokens += len(tokens)
        self._bytes += n_bytes
        self._documents += n_documents
        tokens = np.concatenate([self._rest, tokens.astype(self._rest.dtype)])
        whole = len(tokens) // self._length * self._length
        self._writer.append(tokens[:whole].reshape(-1, self._length))
        self._rest = tokens[whole:]

    def close(self) -> Part:
        """Writes the last row and returns the counts."""
        if len(self._rest):
            row = np.full((1, self._length), PAD_ID, self._rest.dtype)
            row[0, : len(self._rest)] = self._rest
            self._writer.append(row)
        return self._writer.close(self._tokens, self._bytes, self._documents)


class _Progress:
    """Logs the speed of a task, every 10 seconds and at its end."""

    def __init__(self, name: str):
        self._name, self._start = name, time.perf_counter()
        self._last = self._start

    def update(self, documents: int, tokens: int, *, ends: bool = False) -> None:
        now = time.perf_counter()
        if ends or now - self._last > 10:
            seconds, self._last = max(now - self._start, 1e-9), now
            cluster.log(f"{self._name:<16} {documents:>10,} documents {tokens:>14,} tokens "
                        f"{tokens / seconds / 1e6:6.2f}M tokens/s")


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[list[tuple[str, Document]], list[int]]]:
    """Yields groups of documents with about _BATCH_BYTES of text, each with the sizes of its texts in UTF-8 bytes."""
    batch, sizes, size = [], [], 0
    for named in documents:
        batch.append(named)
        sizes.append(len(named[1].text.encode()))
        size += sizes[-1]
        if size >= _BATCH_BYTES:
            yield batch, sizes
            batch, sizes, size = [], [], 0
    if batch:
        yield batch, sizes


def _sizes(paths: Iterable[epath.Path]) -> list[int]:
    """Returns the files' sizes in bytes; on gs:// each is a request, of which many are made at once."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return [size for size, _ in pool.map(fingerprint, paths)]


class Export:
    """The tasks of an export, see `make_plan`.

    A task that reads documents, or that writes an array, is named after its part of the store: SPLIT/LANGUAGE, or
    SPLIT/LANGUAGE/NUMBER.

    Attributes:
      plan: the phases.
    """

    def __init__(self, config: ExportConfig):
        """Finds the files. Raises InputError as `Tokenizer`, or where `heldout` has no such split."""
        self._config = config
        self._tokenizer = Tokenizer(config.tokenizer)
        self._manifest = Manifest(config.sequence_length, self._tokenizer.vocab_size, self._tokenizer.sha256, {}, {})
        shuffles = config.shuffle_seed is not None
        self._reading: dict[str, dict[str, epath.Path]] = {}  # task -> its files, by their paths below the root
        self._readers: dict[str, list[str]] = {}  # SPLIT/LANGUAGE -> tasks that read its files, in order
        self._arrays: dict[str, list[str]] = {}  # SPLIT/LANGUAGE -> tasks that write its arrays, in order
        sizes: dict[str, int] = {}  # task -> bytes
        for part, files in self._files().items():
            of_files = dict(zip(files, _sizes(files.values())))
            groups = _groups(of_files, config.group_bytes or (_SCATTER_BYTES if shuffles else None))
            self._readers[part] = _numbered(part, len(groups))
            for task, names in zip(self._readers[part], groups):
                self._reading[task] = {name: files[name] for name in names}
                sizes[task] = sum(of_files[name] for name in names)
            self._arrays[part] = self._readers[part]
            if shuffles:
                text = sum(_text_bytes(name, size) for name, size in of_files.items())
                self._arrays[part] = _numbered(part, -(-text // config.bucket_bytes))
        # The largest first, so that no process begins a long task when the others are at the end.
        reading = sorted(self._reading, key=lambda task: (-sizes[task], task))
        arrays = [task for tasks in self._arrays.values() for task in tasks]
        phases = ([Phase(SCATTER, reading, self._scatter, self._inputs), Phase(ROWS, arrays, self._write_bucket)]
                  if shuffles else [Phase(ROWS, reading, self._write_rows, self._inputs)])
        self.plan = Plan(
            config.store, token_store.MANIFEST, self._contents(),
            provenance(_PROGRAM, config.settings, {"tokenizer": self._tokenizer.sha256}),
            [*phases, Phase(MANIFEST, ["all"], self._describe)], config.overwrite,
            recorded=self._recorded, damage=self._damage)

    def _files(self) -> dict[str, dict[str, epath.Path]]:
        """Returns SPLIT/LANGUAGE -> path below the root -> path."""
        config = self._config
        splits = config.corpus.all_splits
        if config.heldout is not None and HELDOUT not in splits:
            splits.append(HELDOUT)
        return {f"{split}/{language}": config.corpus_of(split).files_of(split, language)
                for split in splits for language in config.corpus_of(split).languages_of(split)}

    def _inputs(self, task: str) -> dict[str, epath.Path]:
        return {_label(_part_of(task), name): path for name, path in self._reading[task].items()}

    def _contents(self) -> set[str]:
        """Returns the names of all that this store, and the one that is there, consist of."""
        there = read_folder_record(self._config.store, token_store.MANIFEST, key=None) or {}
        splits = there.get("splits")
        return {token_store.MANIFEST, token_store.TOKENIZER, _EARLIER_RECORDS,
                *(part.split("/")[0] for part in self._arrays), *(splits if isinstance(splits, dict) else ())}

    def _recorded(self) -> dict[str, Any] | None:
        """Returns the provenance of the store that is there; earlier versions wrote it in another layout."""
        manifest = read_folder_record(self._config.store, token_store.MANIFEST, key=None)
        if not manifest:
            return manifest
        recorded = manifest.get("provenance")
        if not isinstance(recorded, dict):
            return {}
        if recorded.get("program") != _PROGRAM or "settings" in recorded:
            return recorded
        inputs = {_label(f"{split}/{language}", name): digest for split, languages in recorded["inputs"].items()
                  for language, files in languages.items() for name, digest in files.items()}
        settings = {name: value for name, value in recorded.items() if name not in ("program", "version", "inputs")}
        return {"program": _PROGRAM, "version": recorded["version"],
                "settings": {"sequence_length": manifest["sequence_length"], **settings},
                "inputs": {"tokenizer": manifest["tokenizer_sha256"], **inputs}}

    def _damage(self) -> str | None:
        """Returns what is missing from the store or cannot be read; None for a whole one."""
        try:
            store = TokenStore(self._config.store)
            for split in store.manifest.splits:
                store.arrays(split, store.parts(split))
        except InputError as error:
            return str(error)
        return None

    def _documents(self, task: str) -> Iterator[tuple[str, Document]]:
        corpus = self._config.corpus_of(task.split("/")[0])
        for name in self._reading[task]:
            for document in corpus.read(name):
                yield name, document

    def _tokenised(self, task: str) -> Iterator[tuple[list[tuple[str, Document]], list[int], list[np.ndarray]]]:
        """Yields batches of a task's documents: (file, document), sizes in bytes, and int32 ids of each text."""
        progress, n_documents, n_tokens = _Progress(task), 0, 0
        for batch, sizes in _batches(self._documents(task)):
            ids = self._tokenizer.encode_batch([document.text for _, document in batch], self._config.num_threads)
            yield batch, sizes, ids
            n_documents += len(batch)
            n_tokens += sum(map(len, ids)) + len(ids)
            progress.update(n_documents, n_tokens)
        progress.update(n_documents, n_tokens, ends=True)

    def _row_writer(self, task: str, folder: epath.Path) -> RowWriter:
        return RowWriter(folder / OUTPUT / task, self._config.sequence_length, self._manifest.dtype)

    def _write_rows(self, task: str, folder: epath.Path) -> dict[str, Any]:
        """Writes an array of documents in the order of the files.

        Returns:
          JSON: "part", its counts; "has_text", whether any text is not blank.
        """
        rows, has_text = self._row_writer(task, folder), False
        for batch, sizes, ids in self._tokenised(task):
            has_text = has_text or any(document.text.strip() for _, document in batch)
            rows.add(np.concatenate([piece for of_text in ids for piece in (of_text, _EOS)]), sum(sizes), len(batch))
        return {"part": dataclasses.asdict(rows.close()), "has_text": has_text}

    def _scatter(self, task: str, folder: epath.Path) -> dict[str, Any]:
        """Writes runs of tokenised documents, sorted by key.

        Returns:
          JSON: "runs", their number; "has_text", whether any text is not blank.
        """
        config, buckets = self._config, len(self._arrays[_part_of(task)])
        run, size, runs, has_text = [], 0, 0, False

        def write() -> None:
            write_run(folder / _run_path(task, runs), run, buckets, self._manifest.dtype)

        for batch, sizes, ids in self._tokenised(task):
            has_text = has_text or any(document.text.strip() for _, document in batch)
            run += [TokenisedDocument(document_key(config.shuffle_seed, name, document.number), n_bytes,
                                      np.concatenate([of_text, _EOS]).astype(self._manifest.dtype))
                    for (name, document), n_bytes, of_text in zip(batch, sizes, ids)]
            size += sum(sizes) + _DOCUMENT_BYTES * len(batch)
            if size >= config.bucket_bytes:
                write()
                run, size, runs = [], 0, runs + 1
        if run:
            write()
            runs += 1
        return {"runs": runs, "has_text": has_text}

    def _write_bucket(self, task: str, folder: epath.Path) -> dict[str, Any]:
        """Writes an array of the documents of a bucket, sorted by key; returns JSON: "part", its counts."""
        part = _part_of(task)
        bucket = self._arrays[part].index(task)
        documents = [document for reader in self._readers[part]
                     for run in range(self.plan.result(SCATTER, reader)["runs"])
                     for document in read_bucket(self.plan.files / _run_path(reader, run), bucket,
                                                 self._manifest.dtype)]
        documents.sort(key=lambda document: document.key)
        rows = self._row_writer(task, folder)
        for start in range(0, len(documents), _DOCUMENTS_JOINED):
            batch = documents[start : start + _DOCUMENTS_JOINED]
            rows.add(np.concatenate([document.tokens for document in batch]),
                     sum(document.n_bytes for document in batch), len(batch))
        return {"part": dataclasses.asdict(rows.close())}

    def _describe(self, _: str, folder: epath.Path) -> dict[str, Any]:
        """Copies the tokenizer; returns the content of the manifest, without its provenance.

        Raises:
          InputError: no document of a language has any text.
        """
        reading = SCATTER if self._config.shuffle_seed is not None else ROWS
        splits: dict[str, dict[str, Part]] = {}
        for name, tasks in self._arrays.items():
            split, language = name.split("/")
            if not any(self.plan.result(reading, task)["has_text"] for task in self._readers[name]):
                paths = [str(path) for task in self._readers[name] for path in self._reading[task].values()]
                more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
                raise InputError(f"{', '.join(paths[:3])}{more}: no document has any text; leave {language!r} out of "
                                 f"{split!r}")
            parts = [Part(**self.plan.result(ROWS, task)["part"]) for task in tasks]
            splits.setdefault(split, {})[language] = token_store.join_parts(parts) if len(parts) > 1 else parts[0]
        write_atomic(folder / OUTPUT / token_store.TOKENIZER, self._tokenizer.model)
        return dataclasses.replace(self._manifest, splits=splits).as_json()


def _label(part: str, name: str) -> str:
    """Returns the name of an input file in the provenance; two corpora may have files of one name."""
    return f"{part}: {name}"


def _part_of(task: str) -> str:
    """Returns SPLIT/LANGUAGE of a task."""
    return "/".join(task.split("/")[:2])


def _run_path(task: str, run: int) -> str:
    return f"{SCATTER}/{task}.{run}"


def _numbered(part: str, count: int) -> list[str]:
    """Returns the names of the tasks of a part of the store that is divided into so many."""
    return [f"{part}/{number}" for number in range(count)] if count > 1 else [part]


def _groups(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Divides files, in order, into groups of at most `limit` bytes, or of one file."""
    groups, size = [[]], 0
    for name, of_file in sizes.items():
        if limit is not None and groups[-1] and size + of_file > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += of_file
    return groups


def _text_bytes(name: str, size: int) -> int:
    """Returns about how many bytes of text a file holds; nothing but its name and size may decide."""
    return size * (_TEXT_PER_COMPRESSED_BYTE if name.endswith((".xz", ".gz", ".zst", ".parquet")) else 1)


def make_plan(config: ExportConfig) -> Plan:
    """Returns the work of an export.

    `rows` writes the arrays, a task for each group of files. Of documents that are shuffled, `scatter` tokenises each
    group of files first, and `rows` has a task for each bucket of keys. `manifest` puts the counts together.
    """
    return Export(config).plan


def export_tokens(config: ExportConfig) -> None:
    """Exports all splits and languages of a corpus to a token store, or does this process's share of the work.

    A whole store made before from the same files and settings is kept; an interrupted export goes on with the tasks
    that are left.

    Raises:
      InputError: documents or tokenizer cannot be read, or another store is in the way.
    """
    progress = _Progress(f"{config.store}:")
    plan = complete(make_plan, config, config.workers)
    if plan is None:
        return
    manifest = plan.result(MANIFEST, "all")
    plan.finish(manifest)
    parts = [part for languages in manifest["splits"].values() for part in languages.values()]
    progress.update(sum(part["documents"] for part in parts), sum(part["tokens"] for part in parts), ends=True)


if __name__ == "__main__":
    run(export_tokens, ExportConfig, "data_mixtures.export", has_phases=True)
