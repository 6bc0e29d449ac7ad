"""Embeddings of documents on disk: a parquet file beside the scores of each input file, rows in the same order.

    number      line or row of the input
    embedding   the bytes of its numbers, little-endian, of the type and width in the file's metadata; not a list, which
                takes several times as long to read

    table = pq.read_table(path)
    dtype = ml_dtypes.bfloat16 or np.float16 or np.float32         # table.schema.metadata[b"dtype"]
    vectors = np.stack([np.frombuffer(value, dtype) for value in table["embedding"].to_pylist()])

Every page has a checksum (CRC-32), which reading verifies.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.errors import InputError

FORMAT, VERSION = "mlx-rater-embeddings", 1
# Stored type -> its NumPy type. Rounding changes a number by at most its 2**-8th part in bfloat16, its 2**-11th in
# float16 (from 6e-5 to 65,504) and its 2**-24th in float32.
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
COLUMN = "embedding"
# The numbers' bytes are near to noise: a dictionary or zstd would cost time and spare little.
WRITE_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": False,
                 "write_page_checksum": True}


def embedding_schema(dtype: str, width: int, settings: Mapping[str, Any]) -> pa.Schema:
    """Returns the schema of a file.

    Args:
      dtype: key of `DTYPES`.
      width: numbers of an embedding.
      settings: what the embeddings depend on, for the metadata.
    """
    return pa.schema([("number", pa.int64()), (COLUMN, pa.binary(width * DTYPES[dtype].itemsize))]).with_metadata({
        "format": FORMAT, "version": str(VERSION), "dtype": dtype, "width": str(width),
        "settings": json.dumps(settings)})


def as_column(embeddings: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Returns embeddings `[documents, width]` as a column of their bytes."""
    rows = np.ascontiguousarray(embeddings)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows.reshape(-1).view(np.uint8))])


def as_embeddings(column: pa.FixedSizeBinaryArray, dtype: str) -> np.ndarray:
    """Returns the embeddings in a column of their bytes, `[documents, width]`, without a copy."""
    size = column.type.byte_width
    rows = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return rows.view(DTYPES[dtype]).reshape(len(column), -1)


def read_embeddings(scores: epath.Path, embeddings: epath.Path) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Reads the scores and the embeddings of one input file's documents, some thousand at a time.

    Args:
      scores, embeddings: the two files.

    Yields:
      rows of the scores, and their embeddings in the stored type `[rows, width]`; nan for a document without a token.

    Raises:
      InputError: a file is missing, damaged or of another format, or the two are of different documents.
    """
    path = embeddings
    try:
        with scores.open("rb") as rated, embeddings.open("rb") as embedded:
            vectors = pa.parquet.ParquetFile(embedded, page_checksum_verification=True)
            metadata = vectors.schema_arrow.metadata or {}
            if (metadata.get(b"format"), metadata.get(b"version")) != (FORMAT.encode(), str(VERSION).encode()):
                raise InputError(f"{embeddings}: no file of embeddings of version {VERSION}")
            path = scores
            rows = pa.parquet.ParquetFile(rated)
            if rows.num_row_groups != vectors.num_row_groups:
                raise InputError(f"{embeddings}: has other rows than {scores}; run raters.score again")
            for group in range(rows.num_row_groups):
                path = scores
                table = rows.read_row_group(group)
                path = embeddings
                part = vectors.read_row_group(group).combine_chunks()
                if not part["number"].equals(table["number"]):
                    raise InputError(f"{embeddings}: has other rows than {scores}; run raters.score again")
                if len(part):
                    yield table, as_embeddings(part[COLUMN].chunk(0), metadata[b"dtype"].decode())
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: no such file; run raters.score again") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None
