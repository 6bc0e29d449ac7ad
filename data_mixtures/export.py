"""Exports documents to a token store: tokens of every split and language, in rows of one length.

    python -m data_mixtures.export --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The manifest is written last: an export that was killed leaves no store, and is simply run again; parts (a language of a
split) that are whole are kept.

Several processes share the parts (`--shard=I/N`, or a SLURM array), each seeing the same folders. Whichever finds that
all parts are there writes the manifest. The command without `--shard` does what is left, and the same.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data import token_store as token_store
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.token_store import EOS_ID, PAD_ID, Manifest, Part, PartWriter, TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, read_json, write_atomic, write_json
from mlx_pretrain.parallel import cluster

RECORDS = ".export"  # folder in an unfinished store: what is known of each part that is whole
_BATCH_BYTES = 1 << 20  # of text tokenised at a time
_EOS = np.array([EOS_ID], np.int32)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Groups texts to about _BATCH_BYTES, with their UTF-8 bytes."""
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
    """Writes one language: documents, each followed by EOS, joined and cut; the last row is padded.

    Args:
      documents: the texts, in order.
      tokenizer: for the ids.
      path: folder of the array.
      sequence_length: tokens per row.
      dtype: of the array.
      num_threads: threads that tokenise.
      name: names the part in the progress lines on stderr.
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
    print(f"{name:<16} {documents:>10,} documents {tokens:>14,} tokens {tokens / seconds / 1e6:6.2f}M tokens/s",
          file=sys.stderr, flush=True)


class Records:
    """Notes on the parts of an unfinished store, one file each: STORE/.export/SPLIT/LANGUAGE.json.

    A process knows the content of the documents it exports itself by their hashes. Of the others' documents it compares
    sizes and times of change, which are the same for all processes that see the same folder.
    """

    def __init__(self, store: epath.Path, corpus: Corpus, settings: Mapping[str, Any]):
        """`settings`: what all parts depend on besides the documents."""
        self._store, self._corpus, self._settings = store, corpus, settings

    def add(self, split: str, language: str, hashes: Mapping[str, str], files: list[list], part: Part) -> None:
        """Notes that a part is whole: `hashes` and `files` (see `fingerprint`) of its documents before it was made."""
        write_json(self._path(split, language), {
            "settings": self._settings, "hashes": hashes, "files": files, "part": dataclasses.asdict(part)})

    def remove(self, split: str, language: str) -> None:
        self._path(split, language).unlink(missing_ok=True)

    def find(self, split: str, language: str, hashes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """What is noted of a part made from the documents as they are, whole; None: there is no such part.

        `hashes` are those of the documents; None: they are known by size and time of change.
        """
        path = self._path(split, language)
        if not any(other.name == path.name for other in _children(path.parent)):
            return None  # a listing is fresh where network file systems keep the absence of a file in mind
        try:
            record = read_json(path)
            part = record["part"] = Part(**record["part"])
        except (InputError, KeyError, TypeError):  # gone since, for the store is complete, or of another version
            return None
        same = (record["files"] == self.fingerprint(split, language) if hashes is None else record["hashes"] == hashes)
        if not same or record["settings"] != self._settings:
            return None
        return record if part.files.items() <= file_sizes(self._store / split / language).items() else None

    def fingerprint(self, split: str, language: str) -> list[list]:
        """[file, relative to the corpus, size, time of change] of each file of documents."""
        found = []
        for name, path in self._corpus.files_of(split, language).items():
            stat = path.stat()
            found.append([name, stat.length, stat.mtime])
        return found

    def clear(self) -> None:
        """Removes all notes: the store is complete."""
        with contextlib.suppress(OSError):  # another process removes them, too
            if (self._store / RECORDS).exists():
                (self._store / RECORDS).rmtree()

    def _path(self, split: str, language: str) -> epath.Path:
        return self._store / RECORDS / split / f"{language}.json"


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _is_made(store: epath.Path, planned: Manifest, overwrite: bool) -> bool:
    """Whether `store`, which has a manifest, already holds what is planned, whole.

    Raises:
      InputError: it holds a store made otherwise, and may not be overwritten.
    """
    try:
        existing = TokenStore(store)
        found = existing.manifest
        same = ((found.sequence_length, found.tokenizer_sha256, found.provenance)
                == (planned.sequence_length, planned.tokenizer_sha256, planned.provenance))
        if same:
            for split in found.splits:
                for language in existing.parts(split):
                    existing.array(split, language)
            return True
        cause = "made from other documents or with other settings"
    except InputError as error:
        cause = f"damaged ({error})"
    if overwrite:
        return False
    raise InputError(f"{store}: holds a token store, {cause}; set export_tokens.overwrite=True to replace it")


@gin.configurable
def export_tokens(
    corpus: Corpus = gin.REQUIRED,
    tokenizer: epath.PathLike = gin.REQUIRED,
    store: epath.PathLike = gin.REQUIRED,
    sequence_length: int = gin.REQUIRED,
    num_threads: int = 2,
    overwrite: bool = False,
) -> None:
    """Exports all splits and languages of a corpus to a token store, or this process's share of them.

    A whole store made before from the same files and settings is kept; an export that was interrupted goes on with the
    parts that are not whole.

    Args:
      corpus: the documents.
      tokenizer: SentencePiece model file; a copy goes into the store.
      store: folder of the store, local or gs://.
      sequence_length: tokens per row.
      num_threads: threads that tokenise.
      overwrite: replaces a store that was made otherwise, or is damaged.

    Raises:
      InputError: documents or tokenizer cannot be read, or another store is in the way.
    """
    if not isinstance(sequence_length, int) or sequence_length < 1:
        raise InputError(f"export_tokens.sequence_length: {sequence_length!r} is no positive number of tokens")
    store, model = epath.Path(store), Tokenizer(tokenizer)
    parts = [(split, language) for split in corpus.all_splits for language in corpus.languages_of(split)]
    number, count = cluster.shard()
    bytes_of = {part: sum(path.stat().length for path in corpus.files_of(*part).values()) for part in parts}
    # The largest first, dealt out in turn.
    mine = sorted(parts, key=lambda part: (-bytes_of[part], part))[number::count]
    start = time.perf_counter()
    made_by = {"program": "data_mixtures.export", "version": __version__, **corpus.settings}
    # All documents are read where a store is in the way, this process's part of them otherwise.
    exists = (store / token_store.MANIFEST).exists()
    hashes = {part: corpus.hashes(*part) for part in (parts if exists else mine)}
    planned = Manifest(sequence_length, model.vocab_size, model.sha256, {}, {})
    records = Records(store, corpus, {**made_by, "sequence_length": sequence_length, "tokenizer": model.sha256})
    if exists:
        if _is_made(store, _with_inputs(planned, made_by, hashes), overwrite):
            records.clear()
            print(f"{store}: made before from the same documents and settings, kept", file=sys.stderr)
            return
        (store / token_store.MANIFEST).unlink(missing_ok=True)
    for part in mine:
        if records.find(*part, hashes[part]):
            continue
        records.remove(*part)
        files = records.fingerprint(*part)
        made = export_part(corpus.documents(*part), model, store / part[0] / part[1], sequence_length, planned.dtype,
                           num_threads, "/".join(part))
        records.add(*part, hashes[part], files, made)
    found = {part: records.find(*part, hashes.get(part) if part in mine else None) for part in parts}
    if missing := [part for part in parts if not found[part]]:
        if (store / token_store.MANIFEST).exists():
            print(f"{store}: completed by another process", file=sys.stderr)
            return
        print(f"{store}: {len(parts) - len(missing)} of {len(parts)} parts are there; the process with the last one "
              "completes the store", file=sys.stderr)
        return
    _complete(store, model, _with_inputs(planned, made_by, {part: record["hashes"] for part, record in found.items()}),
              {part: record["part"] for part, record in found.items()})
    records.clear()
    _report(f"{store}:", sum(record["part"].documents for record in found.values()),
            sum(record["part"].tokens for record in found.values()), time.perf_counter() - start)


def _with_inputs(planned: Manifest, made_by: Mapping[str, Any], hashes: Mapping[tuple[str, str], Any]) -> Manifest:
    """`planned` with its provenance: the documents' `hashes` by (split, language)."""
    inputs: dict[str, dict[str, Any]] = {}
    for (split, language), of_part in hashes.items():
        inputs.setdefault(split, {})[language] = of_part
    return dataclasses.replace(planned, provenance={**made_by, "inputs": inputs})


def _complete(store: epath.Path, model: Tokenizer, planned: Manifest, parts: Mapping[tuple[str, str], Part]) -> None:
    """Makes a store of parts that are all there; several processes may do so at once, and write the same."""
    splits: dict[str, dict[str, Part]] = {}
    for (split, language), part in parts.items():
        splits.setdefault(split, {})[language] = part
    for split, languages in splits.items():
        for folder in _children(store / split):
            if folder.name not in languages:  # of an earlier store
                with contextlib.suppress(OSError):
                    folder.rmtree()
    write_atomic(store / token_store.TOKENIZER, model.model)
    token_store.write_manifest(store, dataclasses.replace(planned, splits=splits))


if __name__ == "__main__":
    run(export_tokens, "data_mixtures.export", shards=True)
