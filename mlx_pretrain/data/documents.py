"""Streaming readers of documents.

A document is `{id, lang, text, source}`, of which only `text` is required; `RecordKeys` names other keys of these
fields. Commands read documents through a `corpus.Corpus`, which also tells their languages. Files, by extension:

    .jsonl, .json    one JSON object per line, blank lines allowed
    .txt             plain text; a file is one document, or every non-blank line is (`Corpus.text_unit`)
    .parquet         one row per document, row groups streamed; text may be in a string or a binary column

.jsonl, .json and .txt may be compressed: .xz, .gz, .zst. Paths may be local or gs://. Memory stays at one document (one
row group for parquet).
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet
import zstandard
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError

TEXT_UNITS = ("file", "line")


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames one after another, with windows of up to 2 GiB, as `zstd --long=31` writes them.

    The readers of the zstandard package end a truncated frame in silence; this one raises EOFError.
    """

    def __init__(self, compressed: BinaryIO):
        self._decompressed, self._rest = self._decompress(compressed), b""

    @staticmethod
    def _decompress(compressed: BinaryIO) -> Iterator[bytes]:
        decompressor, frame = zstandard.ZstdDecompressor(max_window_size=2**31), None
        while piece := compressed.read(256):  # 4 bytes may expand to 128 KiB: at most 8 MiB a piece
            while piece:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(piece)
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame:
            raise EOFError("the last zstd frame has no end")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            if (piece := next(self._decompressed, None)) is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


_DECOMPRESS = {".xz": lzma.open, ".gz": gzip.open, ".zst": lambda raw: io.BufferedReader(_ZstdReader(raw))}
_JSON = (".jsonl", ".json")
_FORMATS = (*_JSON, ".txt", ".parquet")
_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 256  # rows decoded at a time
_STRINGS = (pa.string(), pa.large_string())
_JSON_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value",
               type(None): "null", dict: "an object"}
_COLUMNS = ("id", "lang", "text", "source")


@dataclasses.dataclass(frozen=True)
class RecordKeys:
    """Keys of the fields of records in input files. Commands write records with the default keys.

    Attributes:
      text, id, source: keys of these fields.
      language: key of the language; None: records have none. With the default a record without "lang" may have
        "language".
    """

    text: str = "text"
    id: str = "id"
    language: str | None = "lang"
    source: str = "source"

    @property
    def changed(self) -> dict[str, str | None]:
        """The keys that are not the defaults: what an output records of how its input was read."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default}

    @functools.cached_property
    def languages(self) -> tuple[str, ...]:
        """Keys that may have the language, the one to prefer first."""
        return {None: (), "lang": ("lang", "language")}.get(self.language, (self.language,))

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (self.id, self.text, self.source, *self.languages)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
      id: the record's id, else "<file>:<line or row, from 1>" (or the file alone for a whole file), the file by its
        path below the corpus's folder. So files of one name in two languages are not taken for translations.
      text: the text as it is in the file.
      language: the record's, else the one that the reader was given for the file (`Corpus` takes it from the path).
      source: the record's, else "".
      number: line or row of the file, from 1; not compared.
      extra: further fields of the record, as requested from the reader; absent ones are None.
    """

    id: str
    text: str
    language: str
    source: str
    number: int = dataclasses.field(default=1, compare=False)
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict, hash=False)


def id_hash(document_id: str) -> int:
    """Returns the 64-bit hash of a document's id, which tells documents of one file and number apart."""
    digest = hashlib.blake2b(document_id.encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def glob_files(pattern: epath.PathLike) -> list[epath.Path]:
    """Returns the files matching a path or glob, sorted; an empty list where nothing matches. Folders are no files.

    Raises:
      InputError: the pattern holds **.
    """
    parts = epath.Path(pattern).parts
    if "**" in parts:  # epath supports it on no file system
        raise InputError(f"{pattern}: ** is not supported; name the folders, or use * for each level")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if fixed is not None and gcs.is_gs(pattern):  # one listing, where `is_dir` of every path would be as many requests
        with gcs.named_errors(pattern):
            listed = gcs.filesystem().glob(str(pattern), detail=True)
        return sorted(epath.Path(f"gs://{name}") for name, entry in listed.items() if entry["type"] == "file")
    if fixed is None:
        paths = [epath.Path(pattern)] if epath.Path(pattern).exists() else []
    else:
        root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
        paths = root.glob("/".join(parts[fixed:])) if root.exists() else ()
    return sorted(path for path in paths if not path.is_dir())


def match_files(pattern: epath.PathLike) -> list[epath.Path]:
    """Returns the files matching a path or glob, sorted.

    Raises:
      InputError: nothing matches, or two files are the same but for the extension.
    """
    paths = glob_files(pattern)
    if not paths:
        raise InputError(f"{pattern}: no {'file matches' if re.search(r'[*?[]', str(pattern)) else 'such file'}")
    refuse_twins(paths)
    return paths


def without_extension(name: str) -> str:
    """Returns a path or name of a document file without the extensions of its format and compression."""
    return re.sub(rf"({'|'.join(map(re.escape, _FORMATS))})({'|'.join(map(re.escape, _DECOMPRESS))})?$", "", name)


def refuse_twins(paths: Iterable[epath.PathLike]) -> None:
    """Refuses files that are the same but for the extension: a file beside its compressed copy would be read twice.

    Raises:
      InputError: names the first two such files.
    """
    seen: dict[str, epath.PathLike] = {}
    for path in paths:
        if (other := seen.setdefault(without_extension(str(path)), path)) != path:
            raise InputError(f"{path}: lies beside {epath.Path(other).name}, which has the same name but for the "
                             "extension: the documents would be read twice; move one away, or narrow the pattern")


def read_documents(
    path: epath.PathLike,
    text_unit: str = "file",
    *,
    keys: RecordKeys = RecordKeys(),
    language: str = "",
    name: str | None = None,
    extra: Sequence[str] | None = (),
    rejected: Callable[[int, str], None] | None = None,
) -> Iterator[Document]:
    """Streams the documents of one file.

    Args:
      path: a .jsonl, .json, .txt (each may end in .xz, .gz or .zst too) or .parquet file.
      text_unit: document of a .txt file: the whole "file", or each non-blank "line".
      keys: keys of the fields of records.
      language: language of documents whose record names none.
      name: what the file is called in the ids of documents whose record has none; None: the file's name.
      extra: keys of further fields to keep of each record of a .jsonl or .parquet file; None: all.
      rejected: called with the line or row and the reason for every bad record, which is then skipped; None: the first
        one ends the reading.

    Raises:
      InputError: the file is missing, of unknown type, empty, truncated or damaged as a whole, or is a parquet
        file without the column of the text; or, without `rejected`, a record is not UTF-8, no JSON object, without
        text or with a language that is no string. The message names the file, and the line, row or byte.
    """
    path = epath.Path(path)
    suffixes = path.suffixes
    extension = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _DECOMPRESS else path.suffix
    if path.suffix == ".parquet":
        records, parse = _parquet_rows(path, keys, extra), _document
    elif extension in _JSON:
        records, parse = _lines(path), _json_document
    elif extension == ".txt":
        records, parse = (_lines(path), _line_document) if text_unit == "line" else (_whole(path), _text_document)
    else:
        raise InputError(f"{path}: unknown type of document file; known are {', '.join(_JSON)} and .txt "
                         f"(also with {', '.join(_DECOMPRESS)}) and .parquet")
    empty, place = True, str(path)
    for number, record in records:
        empty = False
        try:
            document = parse(record, f"{place}:{number}", number, name or path.name, language, keys, extra)
        except InputError as error:
            if rejected is None:
                raise
            rejected(number, str(error))
            continue
        yield document
    if empty:
        raise InputError(f"{path}: empty, there is no document in it")


@contextlib.contextmanager
def _open_bytes(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed according to its extension; turns damage into an InputError."""
    try:
        with path.open("rb") as raw:
            try:
                with _DECOMPRESS.get(path.suffix, contextlib.nullcontext)(raw) as file:
                    yield file
            except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, OSError) as error:
                raise InputError(f"{path}: cannot be read near byte {raw.tell()} (truncated or damaged?): "
                                 f"{error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line without its end) of the non-blank lines."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line


def _whole(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    with _open_bytes(path) as file:
        content = file.read().removeprefix(_BOM)
    if content.strip():
        yield 1, content


def _parquet_rows(
    path: epath.Path, keys: RecordKeys, extra: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with path.open("rb") as file:
            table = pa.parquet.ParquetFile(file)
            schema = table.schema_arrow
            if keys.text not in schema.names:
                raise InputError(f'{path}: no column "{keys.text}"; available: {", ".join(schema.names)} '
                                 "(Corpus.text_key names the one with the text)")
            columns = schema.names if extra is None else [
                name for name in dict.fromkeys((*keys.all, *extra)) if name in schema.names]
            number = 0
            for batch in table.iter_batches(_PARQUET_BATCH, columns=columns):
                # As bytes, so that text that is not UTF-8 is the fault of its row.
                batch = pa.RecordBatch.from_arrays(
                    [column.cast(pa.large_binary()) if name in keys.all and column.type in _STRINGS else column
                     for name, column in zip(batch.schema.names, batch.columns)], batch.schema.names)
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None


# Parsers take a record, its place for messages, its number, the name of its file, the language of records that name
# none, the keys, and keys of further fields.


def _text_document(content: bytes, where: str, number: int, name: str, language: str, *_: object) -> Document:
    return Document(name, _decode(content, where.removesuffix(":1")), language, "", number)


def _line_document(line: bytes, where: str, number: int, name: str, language: str, *_: object) -> Document:
    return Document(f"{name}:{number}", _decode(line, where), language, "", number)


def _json_document(
    line: bytes, where: str, number: int, name: str, language: str, keys: RecordKeys, extra: Sequence[str] | None
) -> Document:
    try:
        record = json.loads(_decode(line, where))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: malformed JSON: {error} (each line must be a JSON object)") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: {_JSON_NAMES[type(record)]} where a JSON object is expected")
    document = _document(record, where, number, name, language, keys, extra)
    if b"\\u" in line:  # JSON can spell half a surrogate pair, which no encoding of Unicode can hold
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: the text is not valid Unicode: {error}") from None
    return document


def _document(
    record: dict[str, object], where: str, number: int, name: str, language: str, keys: RecordKeys,
    extra: Sequence[str] | None,
) -> Document:
    for key in keys.all:
        if isinstance(record.get(key), bytes):
            record[key] = _decode(record[key], f'{where}: "{key}"')
    text, document_id, source = record.get(keys.text), record.get(keys.id), record.get(keys.source)
    if not isinstance(text, str):
        others = [field for field, value in record.items() if isinstance(value, str)]
        hint = f"; available: {', '.join(others[:5])} (Corpus.text_key names the one with the text)" if others else ""
        raise InputError(f'{where}: no "{keys.text}" string in this record{hint}')
    language_key, language = next(((key, record[key]) for key in keys.languages
                                   if record.get(key) not in (None, "")), ("", language))
    if not isinstance(language, str):
        json_name = _JSON_NAMES.get(type(language), type(language).__name__)
        raise InputError(f'{where}: "{language_key}" is {json_name} where a string is expected '
                         "(Corpus.language_key names another, or is None)")
    if extra is None:
        read = {*_COLUMNS, keys.id, keys.text, keys.source, language_key}
        extra = [key for key in record if key not in read]
    return Document(f"{name}:{number}" if document_id is None else str(document_id), text, language,
                    str(source or ""), number, {key: record.get(key) for key in extra})
