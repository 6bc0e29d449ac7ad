"""Small rated corpora, as `raters.score` leaves them."""

import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet


def write_documents(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A .jsonl or .jsonl.gz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    content = text.encode(errors="backslashreplace")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_scores(
    folder: pathlib.Path, name: str, records: Sequence[Mapping[str, Any]], scores: Sequence[float],
    tokens: Sequence[int] | None = None, rater: str | Sequence[str] = "tested@1", **columns: Any,
) -> None:
    """The score file of an input file; `columns` replaces columns."""
    tokens = [len(record["text"]) for record in records] if tokens is None else tokens
    table = {
        "number": pa.array(range(1, len(records) + 1), pa.int64()),
        "id": pa.array([record["id"] for record in records], pa.string()),
        "language": pa.array([record["lang"] for record in records], pa.string()),
        "source": pa.array([record.get("source", "") for record in records], pa.string()),
        "quality_score": pa.array(scores, pa.float32()),
        "n_tokens": pa.array(tokens, pa.int32()),
        "rater": pa.array([rater] * len(records) if isinstance(rater, str) else rater, pa.string()),
    } | columns
    path = folder / f"{name}.scores.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({key: value for key, value in table.items() if value is not None}), path)
