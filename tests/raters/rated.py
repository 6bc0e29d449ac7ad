"""Small rated corpora, as `raters.score` leaves them."""

import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from raters.filtering.score_table import ScoreTable, document_key


def write_documents(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a .jsonl or .jsonl.gz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    content = text.encode(errors="backslashreplace")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_scores(
    folder: pathlib.Path, name: str, records: Sequence[Mapping[str, Any]], scores: Sequence[float],
    tokens: Sequence[int] | None = None, rater: str | Sequence[str] = "tested@1", **columns: Any,
) -> None:
    """Writes the score file of an input file; `columns` replaces columns."""
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


def make_score_table(score, tokens, language=None, source=None, seed: int = 0) -> ScoreTable:
    """Returns the scores of documents of one file, with codes of languages and sources."""
    n = len(score)
    language = np.zeros(n, np.int32) if language is None else np.asarray(language, np.int32)
    source = np.zeros(n, np.int32) if source is None else np.asarray(source, np.int32)
    key = np.array([document_key(seed, str(l), str(s), str(i)) for i, (l, s) in enumerate(
        zip(language, source))], np.uint64)
    names = lambda codes: tuple(f"n{i}" for i in range(int(codes.max(initial=0)) + 1))  # noqa: E731
    return ScoreTable("tested", ("a",), np.zeros(n, np.int32), np.arange(1, n + 1), key, names(language), language,
                  names(source), source, np.asarray(score, np.float64), np.asarray(tokens, np.int64))


def read_removed(output: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the entries of all removal lists of a command's output, by file."""
    return [json.loads(line) for path in sorted((output / "removed").rglob("*.jsonl"))
            for line in path.read_text().splitlines()]


def write_removed(folder: pathlib.Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """Writes removal lists with these entries; returns the folder, for `exclude`."""
    for name in {entry["file"] for entry in entries}:
        write_documents(folder / f"removed/{name}.jsonl", [entry for entry in entries if entry["file"] == name])
    return str(folder)
