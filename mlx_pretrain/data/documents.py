"""Streaming readers of documents.

A document is `{id, lang, text, source}`, of which only `text` is required. Files, by their extension:

    .jsonl     one JSON object per line, blank lines allowed
    .txt       plain text; one file is one document, or every non-blank line is (`Corpus.text_unit`)
    .parquet   one row per document, row groups streamed

.jsonl and .txt may be compressed: .xz, .gz, .zst. Paths may be local or gs://. Memory stays at one document (one row
group for parquet).
"""

import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.errors import InputError

TEXT_UNITS = ("file", "line")

_DECOMPRESS = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    # Not the zstandard package: it ends a truncated stream in silence.
    ".zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd")),
}
_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 256  # rows decoded at a time
_COLUMNS = ("id", "lang", "text", "source")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
      id: the record's id, else "<file name>:<line or row, from 1>" (or the file name alone for a whole file).
      text: the text as it is in the file.
      language: the record's `lang`, else "".
      source: the record's `source`, else "".
    """

    id: str
    text: str
    language: str
    source: str


def match_files(pattern: epath.PathLike) -> list[epath.Path]:
    """Files matching a path or glob, sorted.

    Raises:
      InputError: nothing matches.
    """
    # A glob is anchored at the longest folder that holds no wildcard.
    parts = epath.Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if fixed is None:
        found = [epath.Path(pattern)] if epath.Path(pattern).exists() else []
    else:
        root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
        found = sorted(root.glob("/".join(parts[fixed:]))) if root.exists() else []
    if not found:
        raise InputError(f"{pattern}: no such file" if fixed is None else f"{pattern}: no file matches")
    return found


def read_documents(path: epath.PathLike, text_unit: str = "file") -> Iterator[Document]:
    """Streams the documents of one file.

    Args:
      path: a .jsonl, .txt (either may end in .xz, .gz or .zst too) or .parquet file.
      text_unit: what a document is in a .txt file, the "file" or each non-blank "line".

    Raises:
      InputError: the file is missing, of unknown type, empty, truncated or not UTF-8; a record is not a JSON object or
        has no text. The message names the file, and the line or row.
    """
    path = epath.Path(path)
    suffixes = path.suffixes
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _DECOMPRESS else path.suffix
    if kind == ".parquet" and path.suffix == ".parquet":
        documents = _read_parquet(path)
    elif kind == ".jsonl":
        documents = _read_jsonl(path)
    elif kind == ".txt":
        documents = _read_text_lines(path) if text_unit == "line" else _read_text(path)
    else:
        raise InputError(f"{path}: unknown type of document file; known are .jsonl and .txt "
                         f"(also with {', '.join(_DECOMPRESS)}) and .parquet")
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise InputError(f"{path}: empty, there is no document in it")


@contextlib.contextmanager
def _open_bytes(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed by its extension; damage becomes an InputError."""
    try:
        with path.open("rb") as raw, _DECOMPRESS.get(path.suffix, contextlib.nullcontext)(raw) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {error}") from None


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers from 1, without the line end."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, _decode(line, f"{path}:{number}")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None


def _read_jsonl(path: epath.Path) -> Iterator[Document]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: malformed JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: a {type(record).__name__} where a JSON object is expected")
        yield _document(record, path, number, escapes="\\u" in line)


def _document(record: dict[str, object], path: epath.Path, number: int, escapes: bool) -> Document:
    text = record.get("text")
    if not isinstance(text, str):
        raise InputError(f'{path}:{number}: no "text" string in this record')
    if escapes:  # JSON can spell half a surrogate pair, which no encoding of Unicode can hold
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}:{number}: the text is not valid Unicode: {error}") from None
    name = record.get("id")
    return Document(f"{path.name}:{number}" if name is None else str(name), text,
                    str(record.get("lang") or ""), str(record.get("source") or ""))


def _read_text(path: epath.Path) -> Iterator[Document]:
    with _open_bytes(path) as file:
        content = file.read().removeprefix(_BOM)
    if content.strip():
        yield Document(path.name, _decode(content, str(path)), "", "")


def _read_text_lines(path: epath.Path) -> Iterator[Document]:
    for number, line in _lines(path):
        yield Document(f"{path.name}:{number}", line, "", "")


def _read_parquet(path: epath.Path) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            table = pa.parquet.ParquetFile(file)
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(_PARQUET_BATCH, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, path, number, escapes=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None
