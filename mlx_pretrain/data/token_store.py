"""The token store: fixed-length token sequences per split and language, as TensorStore (zarr3) arrays.

    STORE/manifest.json            content and provenance; written last, so that its presence means "complete"
    STORE/tokenizer.model          SentencePiece model that made the tokens
    STORE/<split>/<language>/      zarr3 array [sequences, length], uint16 or uint32; of a language that was exported in
                                   groups of files there are arrays 0/, 1/, ... in the folder

A training sequence is a slice of the language's documents, each ended by EOS, joined and cut to `length`; the last
row of an array is padded with 0. Rows are read by random access, on local disks and gs://.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, kvstore, read_json, sha256, write_json

FORMAT = "mlx-token-store"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
PAD_ID, EOS_ID, UNK_ID, BOS_ID = 0, 1, 2, 3

# A shard is one file, in which rows are stored uncompressed one by one, so that a random row costs one ranged read.
ROWS_PER_SHARD = 8192


@dataclasses.dataclass(frozen=True)
class Part:
    """Counts of one language of one split.

    Attributes:
      sequences: rows in the array.
      tokens: tokens that are not padding, one EOS per document included.
      bytes: UTF-8 bytes of the text.
      documents: number of documents.
      files: data file (relative to the language's folder) -> size in bytes, by which truncation is noticed.
      groups: rows of each array of a language with several, which are read as one; empty for a single array.
    """

    sequences: int
    tokens: int
    bytes: int
    documents: int
    files: Mapping[str, int]
    groups: Sequence[int] = ()

    @property
    def arrays(self) -> dict[str, int]:
        """Folder of each array, relative to the language's -> its rows."""
        return {str(i): rows for i, rows in enumerate(self.groups)} or {"": self.sequences}


def join_parts(parts: Sequence[Part]) -> Part:
    """Returns the part of a language of which each of `parts` has written an array, into the folders 0/, 1/, ..."""
    sequences, tokens, n_bytes, documents = (sum(getattr(part, name) for part in parts)
                                             for name in ("sequences", "tokens", "bytes", "documents"))
    files = {f"{i}/{name}": size for i, part in enumerate(parts) for name, size in part.files.items()}
    return Part(sequences, tokens, n_bytes, documents, files, [part.sequences for part in parts])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of a token store.

    Attributes:
      sequence_length: tokens per row.
      vocab_size: bound of the token ids.
      tokenizer_sha256: fingerprint of tokenizer.model.
      splits: split -> language -> Part.
      provenance: hashes of the documents, settings and version of the program that made the store.
    """

    sequence_length: int
    vocab_size: int
    tokenizer_sha256: str
    splits: Mapping[str, Mapping[str, Part]]
    provenance: Mapping[str, Any]

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds all token ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of manifest.json."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        for part in (part for parts in content["splits"].values() for part in parts.values() if not part["groups"]):
            del part["groups"]
        return content


def write_manifest(store: epath.PathLike, manifest: Manifest) -> None:
    """Writes the manifest, which completes a store; all arrays and the tokenizer must be in place."""
    write_json(epath.Path(store) / MANIFEST, manifest.as_json())


def read_manifest(store: epath.PathLike) -> Manifest:
    """Reads and checks a store's manifest.

    Raises:
      InputError: the manifest is missing (no store, or an interrupted export) or of another format, a language has no
        text, or the tokenizer is not the one that made the tokens.
    """
    path = epath.Path(store) / MANIFEST
    with gcs.named_errors(path):
        complete = path.exists()
    if not complete:
        gcs.check_bucket(path)
        raise InputError(f"{store}: no token store here (no {MANIFEST}; was its export interrupted? run it again)")
    content = read_json(path, "token store manifest")
    header = (content.pop("format", None), content.pop("version", None)) if isinstance(content, dict) else None
    if header != (FORMAT, VERSION):
        raise InputError(f"{path}: not the manifest of a token store of version {VERSION}")
    try:
        splits = {s: {l: Part(**part) for l, part in parts.items()} for s, parts in content.pop("splits").items()}
        manifest = Manifest(splits=splits, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: malformed manifest: {error}") from None
    for split, parts in splits.items():
        for language, part in parts.items():
            if not part.bytes:  # its bits per byte would be infinite, its share of a mixture wasted
                raise InputError(f"{path}: the {split} text in {language!r} is empty ({part.documents} documents, "
                                 "0 bytes); export the store again without it")
    tokenizer = epath.Path(store) / TOKENIZER
    if not tokenizer.exists() or sha256(tokenizer) != manifest.tokenizer_sha256:
        raise InputError(f"{tokenizer}: not the tokenizer these tokens were made with (missing or changed)")
    return manifest


def zarr3_spec(path: epath.PathLike) -> dict[str, Any]:
    """Returns TensorStore's description of a zarr3 array in a folder, local or gs://."""
    return {"driver": "zarr3", "kvstore": kvstore(path)}


class PartWriter:
    """Writes one language of one split from blocks of rows; holds at most one shard of rows in memory.

        writer = PartWriter("tokens/train/en", 256, np.uint16)
        writer.append(rows)        # uint16 [n, 256]
        part = writer.close(tokens=..., n_bytes=..., documents=...)        # Part, for the manifest
    """

    def __init__(self, path: epath.PathLike, sequence_length: int, dtype: np.dtype):
        """Creates the array at `path`, in place of a former one."""
        self._path = epath.Path(path)
        if self._path.exists():
            self._path.rmtree()
        self._rows: list[np.ndarray] = []
        self._pending = self._written = 0
        codecs = [{"name": "sharding_indexed", "configuration": {
            "chunk_shape": [1, sequence_length],
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }}]
        metadata = {
            "shape": [0, sequence_length],
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_PER_SHARD, sequence_length]}},
            "codecs": codecs,
        }
        self._array = ts.open({**zarr3_spec(path), "metadata": metadata}, create=True).result()

    def append(self, rows: np.ndarray) -> None:
        """Appends rows, unsigned integers `[n, sequence_length]`."""
        self._rows.append(rows)
        self._pending += len(rows)
        if self._pending >= ROWS_PER_SHARD:
            rows = np.concatenate(self._rows)
            whole = len(rows) // ROWS_PER_SHARD * ROWS_PER_SHARD
            self._flush(rows[:whole])
            self._rows, self._pending = [rows[whole:]], len(rows) - whole

    def _flush(self, rows: np.ndarray) -> None:
        """Writes rows. Raises OSError where the disk is full, say."""
        stop = self._written + len(rows)
        try:
            self._array = self._array.resize(exclusive_max=[stop, None]).result()
            for start in range(self._written, stop, ROWS_PER_SHARD):
                block = rows[start - self._written :][:ROWS_PER_SHARD]
                self._array[start : start + len(block)].write(block).result()
        except ValueError as error:
            if not (code := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(self._path)) from None
        self._written = stop

    def close(self, tokens: int, n_bytes: int, documents: int) -> Part:
        """Writes the last rows and returns the Part with these counts."""
        if self._pending:
            self._flush(np.concatenate(self._rows))
            self._rows, self._pending = [], 0
        return Part(self._written, tokens, n_bytes, documents, _data_files(self._path))


def _data_files(path: epath.Path) -> dict[str, int]:
    """Returns data file of an array, relative to its folder -> size in bytes."""
    return {name: size for name, size in sorted(file_sizes(path).items()) if name != "zarr.json"}


class TokenStore:
    """A complete token store, opened for reading.

        store = TokenStore("runs/sample/tokens")
        store.parts("train")["en"].tokens        # tokens of English training text
        store.array("train", "en")[:4].read().result()        # its first rows, uint16 [4, sequence_length]
        Tokenizer(store.path / TOKENIZER).decode(store.read("heldout", "en")[0])

    Attributes:
      path: folder of the store.
      manifest: content of the store.
    """

    def __init__(self, path: epath.PathLike):
        """Reads the manifest. Raises InputError when there is no complete, readable store at `path`."""
        self.path = epath.Path(path)
        self.manifest = read_manifest(path)
        self._sizes: dict[str, Mapping[str, int]] = {}  # split -> file, relative to the split's folder -> bytes
        self._arrays: dict[tuple[str, str], ts.TensorStore] = {}
        self._fingerprints: dict[tuple[str, str], str] = {}

    def part(self, split: str, language: str) -> Part:
        """Returns the counts of a language. Raises InputError when the store lacks the split or the language."""
        parts = self.parts(split)
        if language not in parts:
            raise InputError(f"{self.path}: no {split} text in {language!r}; available: {', '.join(sorted(parts))}")
        return parts[language]

    def parts(self, split: str) -> Mapping[str, Part]:
        """Returns language -> Part of a split, languages without a whole sequence included.

        Raises:
          InputError: the store has no such split.
        """
        if split not in self.manifest.splits:
            raise InputError(f"{self.path}: no split {split!r}; available: {', '.join(sorted(self.manifest.splits))}")
        return self.manifest.splits[split]

    def check_fits(self, vocab_size: int, max_length: int) -> None:
        """Raises InputError when the store has larger token ids or longer sequences than a model takes."""
        ids, length = self.manifest.vocab_size, self.manifest.sequence_length
        if vocab_size < ids:
            raise InputError(f"{self.path}: {ids} token ids, the model has vocab_size={vocab_size}")
        if max_length < length:
            raise InputError(f"{self.path}: sequences of {length} tokens, the model has max_length={max_length}")

    def arrays(self, split: str, languages: Iterable[str]) -> list[ts.TensorStore]:
        """Returns the rows of languages, `[sequences, sequence_length]` each; opens all at once, and each only once.

        Raises:
          InputError: a data file is missing or truncated, or an array is not what the manifest says.
        """
        languages = list(languages)
        opening = {}
        for language in languages:
            if (split, language) not in self._arrays:
                self._check_files(split, language)
                folder = self.path / split / language
                opening[language] = [(folder / name, rows, ts.open(zarr3_spec(folder / name), read=True, open=True))
                                     for name, rows in self.part(split, language).arrays.items()]
        for language, parts in opening.items():
            opened = [self._checked(*part) for part in parts]
            self._arrays[split, language] = ts.concat(opened, axis=0) if len(opened) > 1 else opened[0]
        return [self._arrays[split, language] for language in languages]

    def _check_files(self, split: str, language: str) -> None:
        part, folder = self.part(split, language), self.path / split / language
        if split not in self._sizes:  # one listing of files serves all languages
            self._sizes[split] = file_sizes(self.path / split)
        for name, size in part.files.items():
            actual_size = self._sizes[split].get(f"{language}/{name}")
            if actual_size is None:
                raise InputError(f"{folder / name}: missing from the token store; export it again")
            if actual_size != size:
                raise InputError(f"{folder / name}: {actual_size} bytes where the manifest says {size}; export the "
                                 "token store again")

    def _checked(self, folder: epath.Path, rows: int, opening: ts.Future) -> ts.TensorStore:
        try:
            array = opening.result()
        except ValueError as error:
            raise InputError(f"{folder}: cannot be opened as zarr3: {str(error).splitlines()[0]}") from None
        if array.shape != (rows, self.manifest.sequence_length):
            raise InputError(f"{folder}: shape {array.shape} where the manifest says "
                             f"{(rows, self.manifest.sequence_length)}; export the token store again")
        return array

    def array(self, split: str, language: str) -> ts.TensorStore:
        """Returns the rows of one language; see `arrays`."""
        return self.arrays(split, [language])[0]

    def fingerprints(self, split: str, languages: Collection[str]) -> dict[str, str]:
        """Returns language -> digest of its counts and of 8 evenly spread rows, computed once.

        Raises:
          InputError: as `arrays`, or a row cannot be read.
        """
        fresh = [language for language in languages if (split, language) not in self._fingerprints]
        reads = [array[np.linspace(0, max(array.shape[0] - 1, 0), min(array.shape[0], 8)).astype(int)].read()
                 for array in self.arrays(split, fresh)]
        for language, read in zip(fresh, reads):
            part = self.part(split, language)
            counts = [self.manifest.tokenizer_sha256, part.sequences, part.tokens, part.bytes, part.documents]
            try:
                rows = read.result()
            except ValueError as error:
                folder = self.path / split / language
                raise InputError(f"{folder}: cannot be read: {str(error).splitlines()[0]}") from None
            digest = hashlib.sha256(repr(counts).encode() + rows.tobytes())
            self._fingerprints[split, language] = digest.hexdigest()
        return {language: self._fingerprints[split, language] for language in languages}

    def read(self, split: str, language: str) -> np.ndarray:
        """Reads all rows of one language into memory, `[sequences, sequence_length]`."""
        return self.array(split, language).read().result()


def used_languages(store: TokenStore, split: str, rates: Iterable[str]) -> list[str]:
    """Returns the languages of `rates`. Raises InputError when one of them has no sequence in the store."""
    languages = list(rates)
    for language in languages:
        if store.part(split, language).sequences == 0:
            raise InputError(f"{store.path}: {language!r} has no {split} sequence, but a positive rate")
    return languages
