"""The scores of all documents as columns, without their texts, read from the files of `raters.score`."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from raters.scoring.shards import SCHEMA, SCORES, absolute_root, scored_root


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """One rater's scores of all documents, row by row.

    Attributes:
      rater: name and version.
      files: paths of the input files relative to the corpus's root; `file` int32 `[rows]` is the index in them.
      number: line or row in the file, int64 `[rows]`, ascending within a file.
      key: hash of seed, language, source and id, uint64 `[rows]`: breaks ties and seeds the sampling, so that neither
        depends on the order of files or rows.
      languages, sources: names, "und" for an unknown language; `language` and `source` int32 `[rows]` are indices.
      score: float64 `[rows]`, nan where the rater has none.
      tokens: int64 `[rows]`.
    """

    rater: str
    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray
    key: np.ndarray
    languages: tuple[str, ...]
    language: np.ndarray
    sources: tuple[str, ...]
    source: np.ndarray
    score: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    @property
    def rated(self) -> np.ndarray:
        """Mask `[rows]` of the documents that have a score."""
        return np.isfinite(self.score)

    def rows(self, keep: np.ndarray) -> "ScoreTable":
        """Returns the table of some rows; `keep` is a mask or indices."""
        columns = ("file", "number", "key", "language", "source", "score", "tokens")
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in columns})


def document_key(seed: int, language: str, source: str, document_id: str) -> int:
    """Returns a 64-bit hash that identifies a document, whichever file holds it."""
    digest = hashlib.blake2b("\0".join((str(seed), language, source, document_id)).encode(errors="surrogatepass"),
                             digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def score_path(folder: epath.PathLike, name: str, root: epath.PathLike | None = None) -> epath.Path:
    """Returns the path of a rater's scores of the input file `name`.

    Args:
      folder: the rater's scores.
      name: path of the input file relative to the corpus's root.
      root: root of the corpus, for the message.

    Raises:
      InputError: there is no such file.
    """
    path = epath.Path(folder) / (name + SCORES)
    if not path.exists():
        scored = scored_root(folder)
        other_root = root is not None and scored not in (None, absolute_root(root))
        raise InputError(f"{path}: no such score file; the documents were not rated by this rater"
                         + (f", or not under this Corpus.root: the scores are of {scored}" if other_root else ""))
    return path


def read_scores(
    folder: epath.PathLike, files: Sequence[str], seed: int = 0, root: epath.PathLike | None = None
) -> ScoreTable:
    """Reads a rater's score files of the input `files`: 40 bytes of memory a document, while reading twice that.

    Args:
      folder, root: see `score_path`.
      files: paths of the input files relative to the corpus's root.
      seed: seed of the documents' keys.

    Raises:
      InputError: a file is missing, damaged, lacks a column or token counts, is not in the order of the input, or is of
        another rater.
    """
    raters: set[str] = set()
    names: dict[str, dict[str, int]] = {"language": {}, "source": {}}
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in (
        ("file", np.int32), ("number", np.int64), ("key", np.uint64), ("language", np.int32), ("source", np.int32),
        ("score", np.float64), ("tokens", np.int64))}
    for index, name in enumerate(files):
        path = score_path(folder, name, root)
        last = 0
        for rows in _batches(path):
            if rows["number"].null_count:
                raise InputError(f"{path}: rows without a number; is this a file of raters.score?")
            number = rows["number"].to_numpy()
            if len(number) and (number[0] <= last or (np.diff(number) <= 0).any()):
                raise InputError(f"{path}: numbers are not ascending, as those of the input's lines are")
            last = number[-1] if len(number) else last
            texts = {field: rows[field].fill_null("").to_pylist() for field in ("id", "language", "source")}
            texts["language"] = [language or UNDETERMINED for language in texts["language"]]
            raters.update(rows["rater"].unique().to_pylist())
            columns["file"].append(np.full(len(number), index, np.int32))
            columns["number"].append(number)
            columns["key"].append(np.array([document_key(seed, *values) for values in zip(
                texts["language"], texts["source"], texts["id"])], np.uint64))
            for field, indices in names.items():
                columns[field].append(np.array([indices.setdefault(v, len(indices)) for v in texts[field]], np.int32))
            columns["score"].append(rows["quality_score"].cast(pa.float64()).to_numpy(zero_copy_only=False))
            if rows["n_tokens"].null_count:
                raise InputError(f"{path}: no token counts, which quotas need; rate with a tokenizer")
            columns["tokens"].append(rows["n_tokens"].to_numpy().astype(np.int64))
    if len(raters) > 1:
        raise InputError(f"{folder}: scores of several raters: {', '.join(sorted(map(str, raters)))}")
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    for field, indices in names.items():  # numbered by name, so that nothing depends on the order of files
        ranks = np.argsort(np.argsort(np.array(list(indices), object))).astype(np.int32)
        joined[field] = ranks[joined[field]] if len(indices) else joined[field]
    return ScoreTable(next(iter(raters), ""), tuple(files), languages=tuple(sorted(names["language"])),
                      sources=tuple(sorted(names["source"])), **joined)


def _batches(path: epath.Path) -> Iterator[dict[str, pa.Array]]:
    """Yields the columns of a score file, some rows at a time."""
    try:
        with path.open("rb") as raw:
            table = pa.parquet.ParquetFile(raw)
            for column in SCHEMA:
                if column.name not in table.schema_arrow.names or (
                        table.schema_arrow.field(column.name).type != column.type):
                    raise InputError(f"{path}: no column {column.name!r} of type {column.type}; is this a file of "
                                     "raters.score?")
            for batch in table.iter_batches(columns=SCHEMA.names):
                yield {name: batch.column(name) for name in SCHEMA.names}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None


def aligned(scores: ScoreTable, other: ScoreTable) -> np.ndarray:
    """Returns `other`'s scores of the documents of `scores`, float64 `[rows]`; nan where it has none."""
    values = np.full(len(scores), np.nan)
    for index, name in enumerate(scores.files):
        mine, theirs = scores.file == index, other.file == other.files.index(name)
        numbers = other.number[theirs]
        at = np.searchsorted(numbers, scores.number[mine])
        same = np.append(numbers, -1)[at] == scores.number[mine]
        values[mine] = np.where(same, np.append(other.score[theirs], np.nan)[at], np.nan)
    return values
