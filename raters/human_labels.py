"""Reads documents that people rated for quality, from files in the layouts of published data sets.

    layout, told by its fields          ratings of a document
    FineWeb-C                           educational_value_labels, a list with each person's label, from "None" (0) to
                                        "Excellent" (4); annotator_ids; language_code ("dan_Latn"); text, id
    JQL, as released                    score, 0 to 5: the majority of three people's ratings, or the mean of those
                                        tied; language, or metadata with a language; text, id
    JQL, the pipeline's annotations     scores, a list with each person's rating, -Infinity for a missing one;
                                        document_id

FineWeb-C is huggingface.co/datasets/data-is-better-together/fineweb-c, JQL (Ali et al. 2025, arXiv 2505.22232)
huggingface.co/datasets/JQL-AI/JQL-Human-Edu-Annotations, its pipeline github.com/Modalities/ml_filter. Files are
.jsonl, .parquet, or .csv with a header (JQL as released). Nothing is fetched: the user has the files.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.data.documents import match_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.languages import UNDETERMINED, is_language

FINEWEB_C, PROBLEMATIC = ("None", "Minimal", "Basic", "Good", "Excellent"), "❗ Problematic Content ❗"
_PARQUET_BATCH = 256


@dataclasses.dataclass(frozen=True)
class LabelledDocument:
    """A document that people rated.

    Attributes:
      id: the record's id, else "<file>:<line or row>".
      language: code of its language as the file has it: the record's, else a known code in the file's path, else "und".
      text: its text; "" where the file has none.
      ratings: one of each person, or one that stands for several; higher is better.
      people: who gave them, as far as the file tells.
      problematic: number of people who called it problematic in place of a rating (FineWeb-C).
    """

    id: str
    language: str
    text: str
    ratings: tuple[float, ...]
    people: tuple[str, ...] = ()
    problematic: int = 0


def read_labels(patterns: str | Sequence[str]) -> tuple[list[LabelledDocument], dict[str, epath.Path]]:
    """Reads the documents of all files that match.

    Several records of a document, by its id and language, are ratings of several people, and become one.

    Args:
      patterns: path or glob, or a list of them.

    Returns:
      The documents, and path -> path of the files.

    Raises:
      InputError: no file matches, or a record is in none of the layouts above.
    """
    files = {str(path): path for pattern in ([patterns] if isinstance(patterns, str) else patterns)
             for path in match_files(pattern)}
    documents: dict[tuple[str, str], LabelledDocument] = {}
    for path in files.values():
        for document in _read_file(path):
            key = document.id, document.language
            if (known := documents.get(key)) is not None:
                document = dataclasses.replace(
                    known, ratings=known.ratings + document.ratings, people=known.people + document.people,
                    problematic=known.problematic + document.problematic)
            documents[key] = document
    return list(documents.values()), files


def _read_file(path: epath.Path) -> Iterator[LabelledDocument]:
    of_path = next(filter(is_language, (path.name.split(".")[0], *reversed(path.parent.parts))), UNDETERMINED)
    for number, record in _records(path):
        place = f"{path}:{number}"
        metadata = record.get("metadata")
        language = record.get("language_code") or record.get("language") or record.get("lang") or (
            metadata.get("language") if isinstance(metadata, Mapping) else None) or of_path
        name = next((record[key] for key in ("id", "document_id") if record.get(key) is not None),
                    f"{path.name}:{number}")
        text = record.get("text") or ""
        if not isinstance(language, str) or not isinstance(text, str):
            raise InputError(f"{place}: language and text must be strings")
        ratings, people, problematic = _ratings(record, place)
        yield LabelledDocument(str(name), language, text, ratings, people, problematic)


def _records(path: epath.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (line or row from 1, record)."""
    if path.suffix == ".parquet":
        try:
            with path.open("rb") as file:
                batches = pa.parquet.ParquetFile(file).iter_batches(_PARQUET_BATCH)
                yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None
    elif path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".csv":
        csv.field_size_limit(1 << 30)  # a text is a field
        try:
            yield from enumerate(csv.DictReader(io.StringIO(path.read_text(), newline="")), 1)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from None
    else:
        raise InputError(f"{path}: unknown type of label file; known are .jsonl, .parquet and .csv")


def _ratings(record: Mapping[str, Any], place: str) -> tuple[tuple[float, ...], tuple[str, ...], int]:
    """Returns (ratings, people who gave them, number who called the document problematic)."""
    if "educational_value_labels" in record:
        labels, people = record["educational_value_labels"], record.get("annotator_ids")
        people = [""] * len(labels) if isinstance(labels, list) and not people else people
        if not isinstance(labels, list) or not isinstance(people, list) or len(people) != len(labels):
            raise InputError(f"{place}: educational_value_labels must be a list, with as many annotator_ids")
        if unknown := sorted(set(map(str, labels)) - {*FINEWEB_C, PROBLEMATIC, "None"}):
            raise InputError(f"{place}: unknown label {unknown[0]!r}; known are {', '.join((*FINEWEB_C, PROBLEMATIC))}")
        given = [(float(FINEWEB_C.index(str(label))), str(person)) for label, person in zip(labels, people)
                 if label != PROBLEMATIC]
        return (tuple(rating for rating, _ in given), tuple(person for _, person in given if person),
                len(labels) - len(given))
    if "scores" in record or "score" in record:
        scores = record["scores"] if "scores" in record else [record["score"]]
        if not isinstance(scores, list):
            raise InputError(f"{place}: scores must be a list")
        try:
            numbers = [math.nan if score in (None, "") else float(score) for score in scores]
        except (TypeError, ValueError):
            raise InputError(f"{place}: a score is no number: {scores!r}") from None
        return tuple(number for number in numbers if math.isfinite(number)), (), 0
    raise InputError(f"{place}: no ratings; a record has educational_value_labels (FineWeb-C), score or scores (JQL), "
                     f"this one {', '.join(map(str, record)) or 'nothing'}")
