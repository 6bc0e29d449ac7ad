"""Exports documents to a token store: tokens of every split and language, in rows of one length.

    python -m data_mixtures.export --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The manifest is written last, so that an export that was killed leaves no store. Run again, it keeps the parts that are
whole. A part is a language of a split or, with `group_bytes`, a group of its files, which becomes an array of its own.

Several processes that see the same folders can share the parts (`--shard=I/N`, or a SLURM array). The process that
finds all parts whole writes the manifest. The command without `--shard` exports the parts that are left.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import gin
import numpy as np
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.artifacts import is_current, read_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data import token_store
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.token_store import EOS_ID, PAD_ID, Manifest, Part, PartWriter, TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, read_json, sha256, write_atomic, write_json
from mlx_pretrain.parallel import cluster

HELDOUT = "heldout"
RECORDS = ".export"  # folder in an unfinished store with a record of each whole part
_BATCH_BYTES = 1 << 20  # of text tokenised at a time
_EOS = np.array([EOS_ID], np.int32)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Yields groups of texts of about _BATCH_BYTES, each with its size in UTF-8 bytes."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= _BATCH_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def export_part(
    documents: Iterable[Document], tokenizer: Tokenizer, path: epath.PathLike, sequence_length: int,
    dtype: np.dtype, num_threads: int = 2, name: str = "",
) -> Part:
    """Writes one language: documents, each followed by EOS, joined and cut into rows; the last row is padded.

    Args:
      documents: texts, in order.
      tokenizer: tokenizer that gives the ids.
      path: folder of the array.
      sequence_length: tokens per row.
      dtype: type of the array.
      num_threads: threads that tokenise.
      name: name of the part in the progress lines on stderr.
    """
    writer = PartWriter(path, sequence_length, dtype)
    n_tokens = n_bytes = n_documents = 0
    rest = np.empty(0, np.int32)
    start = last = time.perf_counter()
    for texts, size in _batches(documents):
        ids = tokenizer.encode_batch(texts, num_threads)
        tokens = np.concatenate([rest, *(piece for document in ids for piece in (document, _EOS))])
        n_tokens += len(tokens) - len(rest)
        n_bytes += size
        n_documents += len(texts)
        whole = len(tokens) // sequence_length * sequence_length
        writer.append(tokens[:whole].reshape(-1, sequence_length).astype(dtype))
        rest = tokens[whole:]
        if (now := time.perf_counter()) - last > 10:
            _report(name, n_documents, n_tokens, now - start)
            last = now
    if len(rest):
        row = np.full((1, sequence_length), PAD_ID, dtype)
        row[0, : len(rest)] = rest
        writer.append(row)
    part = writer.close(n_tokens, n_bytes, n_documents)
    _report(name, n_documents, n_tokens, time.perf_counter() - start)
    return part


def _report(name: str, documents: int, tokens: int, seconds: float) -> None:
    cluster.log(f"{name:<16} {documents:>10,} documents {tokens:>14,} tokens {tokens / seconds / 1e6:6.2f}M tokens/s")


class Unit(NamedTuple):
    """What is exported at once: a language of a split, or a group of its files.

    Attributes:
      split, language: see above.
      group: number of the group; "" for all files.
    """

    split: str
    language: str
    group: str = ""

    @property
    def folder(self) -> str:
        """Folder of its array, relative to the store."""
        return "/".join(filter(None, self))


class PartRecords:
    """Records of the whole parts of an unfinished store, one file each: STORE/.export/SPLIT/LANGUAGE.json.

    The record of a group of files is LANGUAGE.GROUP.json.

    A process compares the documents of its own parts by their hashes. Those of other processes' parts it compares by
    size and time of change, which are the same for all processes that see the same folder.
    """

    def __init__(self, store: epath.Path, files_of: Callable[[Unit], Mapping[str, epath.Path]],
                 settings: Mapping[str, Any]):
        """Stores the files of each part, and the settings on which all parts depend in addition to their documents."""
        self._store, self._files_of, self._settings = store, files_of, settings

    def add(self, unit: Unit, hashes: Mapping[str, str], files: list[list], part: Part) -> None:
        """Records that a part is whole; `hashes` and `files` (see `fingerprint`) are those before it was made."""
        write_json(self._path(unit), {
            "settings": self._settings, "hashes": hashes, "files": files, "part": dataclasses.asdict(part)})

    def remove(self, unit: Unit) -> None:
        """Removes the record of a part."""
        self._path(unit).unlink(missing_ok=True)

    def find(self, unit: Unit, hashes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """Returns the record of a whole part made from the documents as they are now; None without such a part.

        Documents are compared by `hashes`, or, where these are None, by size and time of change.
        """
        path = self._path(unit)
        if not any(other.name == path.name for other in _children(path.parent)):
            return None  # network file systems remember that a file was absent, but list folders afresh
        try:
            record = read_json(path)
            part = record["part"] = Part(**record["part"])
        except (InputError, KeyError, TypeError):  # removed since, as the store is complete, or of another version
            return None
        unchanged = (record["files"] == self.fingerprint(unit) if hashes is None
                     else record["hashes"] == hashes)
        if not unchanged or record["settings"] != self._settings:
            return None
        return record if part.files.items() <= file_sizes(self._store / unit.folder).items() else None

    def fingerprint(self, unit: Unit) -> list[list]:
        """Returns [path relative to the corpus's root, size, time of change] of each file of a part."""
        stats = {name: path.stat() for name, path in self._files_of(unit).items()}
        return [[name, stat.length, stat.mtime] for name, stat in stats.items()]

    def clear(self) -> None:
        """Removes all records, once the store is complete."""
        with contextlib.suppress(OSError):  # another process may be removing them too
            if (self._store / RECORDS).exists():
                (self._store / RECORDS).rmtree()

    def _path(self, unit: Unit) -> epath.Path:
        split, *names = filter(None, unit)
        return self._store / RECORDS / split / f"{'.'.join(names)}.json"


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _recorded(store: epath.Path) -> dict[str, Any] | None:
    """Returns what a store's manifest records of its making; None without a readable manifest."""
    manifest = read_record(store / token_store.MANIFEST)
    if manifest is None:
        return None
    provenance = manifest.get("provenance")
    return {**{name: manifest.get(name) for name in ("sequence_length", "tokenizer_sha256")},
            **(provenance if isinstance(provenance, dict) else {})}


def _damage(store: epath.Path) -> str | None:
    """Returns what is missing from a store or cannot be read; None for a whole one."""
    try:
        existing = TokenStore(store)
        for split in existing.manifest.splits:
            existing.arrays(split, existing.parts(split))
    except InputError as error:
        return str(error)
    return None


@gin.configurable("export_tokens")
@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Parameters of the export.

    Attributes:
      corpus: documents, e.g. @Corpus().
      tokenizer: SentencePiece model file; a copy goes into the store.
      store: folder of the store, local or gs://.
      sequence_length: tokens per row.
      num_threads: threads that tokenise.
      group_bytes: bytes of input files, in order, that make up a group. Each becomes an array of its own, so that
        processes can share a language, and a restart makes less again; None: one array a language.
      overwrite: replaces a store that was made from other documents or settings.
      heldout: corpus of the split "heldout", where that is another one than `corpus`, e.g. as `corpus` holds only the
        training documents that a filter kept.
    """

    corpus: Corpus = gin.REQUIRED
    tokenizer: epath.PathLike = gin.REQUIRED
    store: epath.PathLike = gin.REQUIRED
    sequence_length: int = gin.REQUIRED
    num_threads: int = 2
    group_bytes: int | None = None
    overwrite: bool = False
    heldout: Corpus | None = None

    def corpus_of(self, split: str) -> Corpus:
        """Returns the corpus of a split."""
        return self.heldout if self.heldout is not None and split == HELDOUT else self.corpus

    @functools.cached_property
    def parts(self) -> dict[Unit, dict[str, epath.Path]]:
        """All parts, with their files: path relative to the root -> path.

        Raises InputError where `heldout` has no such split.
        """
        splits = self.corpus.all_splits
        if self.heldout is not None and HELDOUT not in splits:
            splits.append(HELDOUT)
        parts: dict[Unit, dict[str, epath.Path]] = {}
        for split in splits:
            for language in self.corpus_of(split).languages_of(split):
                groups = self._groups(self.corpus_of(split).files_of(split, language))
                for number, files in enumerate(groups):
                    parts[Unit(split, language, str(number) if len(groups) > 1 else "")] = files
        return parts

    def _groups(self, files: Mapping[str, epath.Path]) -> list[dict[str, epath.Path]]:
        groups, size = [{}], 0
        for name, path in files.items():
            length = path.stat().length
            if self.group_bytes is not None and groups[-1] and size + length > self.group_bytes:
                groups.append({})
                size = 0
            groups[-1][name] = path
            size += length
        return groups

    def documents(self, unit: Unit) -> Iterator[Document]:
        """Streams the documents of a part. Raises InputError as `Corpus.documents`; a group may be without text."""
        corpus = self.corpus_of(unit.split)
        if not unit.group:
            return corpus.documents(unit.split, unit.language)
        return itertools.chain.from_iterable(map(corpus.read, self.parts[unit]))

    @property
    def record_settings(self) -> dict[str, Any]:
        """Settings of the reading of records, and of the groups, that a store records."""
        heldout = {} if self.heldout is None else {"heldout": self.heldout.record_settings}
        groups = {} if self.group_bytes is None else {"group_bytes": self.group_bytes}
        return {**self.corpus.record_settings, **heldout, **groups}

    def __post_init__(self):
        if not isinstance(self.sequence_length, int) or self.sequence_length < 1:
            raise InputError(f"export_tokens.sequence_length: {self.sequence_length!r} is no positive number of tokens")
        if self.group_bytes is not None and not (isinstance(self.group_bytes, int) and self.group_bytes > 0):
            raise InputError(f"export_tokens.group_bytes: {self.group_bytes!r} is no positive number of bytes")


def export_tokens(config: ExportConfig) -> None:
    """Exports all splits and languages of a corpus to a token store, or this process's share of them.

    A whole store made before from the same files and settings is kept; an interrupted export resumes with the
    parts that are not whole.

    Raises:
      InputError: documents or tokenizer cannot be read, or another store is in the way.
    """
    store, model = epath.Path(config.store), Tokenizer(config.tokenizer)
    parts = config.parts
    number, count = cluster.shard()
    bytes_of = {part: sum(path.stat().length for path in files.values()) for part, files in parts.items()}
    # The largest first, dealt out in turn.
    own_parts = sorted(parts, key=lambda part: (-bytes_of[part], part))[number::count]
    start = time.perf_counter()
    settings = {"program": "data_mixtures.export", "version": __version__, **config.record_settings}
    # All documents are hashed where a store is in the way, those of this process's parts otherwise.
    exists = (store / token_store.MANIFEST).exists()
    hashes = {part: {name: sha256(path) for name, path in parts[part].items()}
              for part in (parts if exists else own_parts)}
    planned = Manifest(config.sequence_length, model.vocab_size, model.sha256, {}, {})
    records = PartRecords(
        store, parts.__getitem__, {**settings, "sequence_length": config.sequence_length, "tokenizer": model.sha256})
    if exists:
        made_from = {"sequence_length": config.sequence_length, "tokenizer_sha256": model.sha256,
                     **_with_inputs(planned, settings, hashes).provenance}
        if is_current(store, _recorded(store), made_from, overwrite=config.overwrite, damage=lambda: _damage(store)):
            records.clear()
            return
        (store / token_store.MANIFEST).unlink(missing_ok=True)
    for part in own_parts:
        if records.find(part, hashes[part]):
            continue
        records.remove(part)
        files = records.fingerprint(part)
        written = export_part(config.documents(part), model, store / part.folder, config.sequence_length,
                              planned.dtype, config.num_threads, part.folder)
        records.add(part, hashes[part], files, written)
    whole = {part: record for part in parts
             if (record := records.find(part, hashes.get(part) if part in own_parts else None))}
    if len(whole) < len(parts):
        if (store / token_store.MANIFEST).exists():
            cluster.log(f"{store}: completed by another process")
            return
        cluster.log(f"{store}: {len(whole)} of {len(parts)} parts are complete; the process of the last one completes "
                    "the store")
        return
    _complete(store, model, _with_inputs(planned, settings, {part: record["hashes"] for part, record in whole.items()}),
              {part: record["part"] for part, record in whole.items()})
    records.clear()
    _report(f"{store}:", sum(record["part"].documents for record in whole.values()),
            sum(record["part"].tokens for record in whole.values()), time.perf_counter() - start)


def _with_inputs(planned: Manifest, settings: Mapping[str, Any], hashes: Mapping[Unit, Mapping[str, str]]) -> Manifest:
    """Returns `planned` with its provenance: `settings` and, as "inputs", the documents' hashes by split, language."""
    inputs: dict[str, dict[str, Any]] = {}
    for unit, of_unit in hashes.items():
        inputs.setdefault(unit.split, {}).setdefault(unit.language, {}).update(of_unit)
    return dataclasses.replace(planned, provenance={**settings, "inputs": inputs})


def _complete(store: epath.Path, model: Tokenizer, planned: Manifest, parts: Mapping[Unit, Part]) -> None:
    """Makes a store of whole parts; several processes may do so at once, as they write the same.

    Raises:
      InputError: a language whose files are in groups has no text.
    """
    by_language: dict[tuple[str, str], list[Part]] = {}
    for unit, part in parts.items():
        by_language.setdefault(unit[:2], []).append(part)
    splits: dict[str, dict[str, Part]] = {}
    for (split, language), groups in by_language.items():
        part = token_store.join_parts(groups) if len(groups) > 1 else groups[0]
        if not part.bytes:
            raise InputError(f"{store}: no document has any text; leave {language!r} out of {split!r}")
        splits.setdefault(split, {})[language] = part
    for split, languages in splits.items():
        children = [(path, languages) for path in _children(store / split)]
        children += [(path, part.arrays) for language, part in languages.items() if part.groups
                     for path in _children(store / split / language)]
        for path, expected in children:
            if path.name not in expected:  # part of an earlier store
                with contextlib.suppress(OSError):
                    path.rmtree() if path.is_dir() else path.unlink()
    write_atomic(store / token_store.TOKENIZER, model.model)
    token_store.write_manifest(store, dataclasses.replace(planned, splits=splits))


if __name__ == "__main__":
    run(export_tokens, ExportConfig, "data_mixtures.export", shards=True)
