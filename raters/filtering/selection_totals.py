"""Totals of the scores of all files, put together from those of each file."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from raters.filtering.score_table import ScoreTable


def describe_file(scores: ScoreTable) -> dict[str, Any]:
    """Returns the totals of one file's scores as JSON, for `join_files`."""
    groups = []
    for language, source in sorted(set(zip(scores.language.tolist(), scores.source.tolist()))):
        own = (scores.language == language) & (scores.source == source)
        rated = own & scores.rated
        groups.append([language, source, int(rated.sum()), int(scores.tokens[rated].sum()), int((own & ~rated).sum())])
    moments = []
    for language in range(len(scores.languages)):
        values = scores.score[(scores.language == language) & scores.rated]
        mean = float(values.mean()) if len(values) else 0.0
        moments.append([len(values), mean, float(((values - mean) ** 2).sum())])
    undetermined = np.flatnonzero(scores.rated & np.isin(
        scores.language, [i for i, name in enumerate(scores.languages) if name == UNDETERMINED]))
    return {"rater": scores.rater, "languages": scores.languages, "sources": scores.sources, "rows": len(scores),
            "groups": groups, "moments": moments,
            "undetermined": [len(undetermined), int(scores.number[undetermined[0]]) if len(undetermined) else None]}


@dataclasses.dataclass(frozen=True)
class Totals:
    """Totals of the scores of all files.

    Attributes:
      raters: the rater that decides, and the others.
      languages, sources: their names, sorted.
      rows: number of documents.
      documents, tokens: of those with a score, `[languages][sources]`.
      without_score: documents without one, `[languages]`.
      moments: mean and standard deviation of each language's scores.
      undetermined: number of rated documents without a language; file and number of the first.
    """

    raters: list[str]
    languages: list[str]
    sources: list[str]
    rows: int
    documents: list[list[int]]
    tokens: list[list[int]]
    without_score: list[int]
    moments: list[tuple[float, float]]
    undetermined: tuple[int, str]

    def empty_table(self, name: str) -> ScoreTable:
        """Returns a table without rows of a file."""
        return ScoreTable(self.raters[0], (name,), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint64),
                          tuple(self.languages), np.zeros(0, np.int32), tuple(self.sources), np.zeros(0, np.int32),
                          np.zeros(0), np.zeros(0, np.int64))

    def sample(self, scores: ScoreTable, size: int) -> np.ndarray:
        """Returns the mask `[rows]` of a file's part of a sample of about `size` documents, or of all if fewer."""
        if self.rows <= size:
            return np.ones(len(scores), bool)
        return scores.key < np.uint64(int(size / self.rows * 2**64))


def join_files(folder: epath.PathLike, files: Iterable[tuple[str, Mapping[str, Any]]]) -> Totals:
    """Puts together (name, {"raters", **`describe_file`}) of all files.

    Args:
      folder: the scores, for messages.
      files: the files.

    Raises:
      InputError: the files were scored by different raters.
    """
    raters: list[set[str]] = []
    groups: dict[tuple[str, str], np.ndarray] = collections.defaultdict(lambda: np.zeros(3, np.int64))
    moments: dict[str, tuple[int, float, float]] = {}
    sources: set[str] = set()
    rows = undetermined = 0
    first = ""
    for name, one in files:
        raters = [names | {rater} - {""} for names, rater in zip(raters or [set()] * len(one["raters"]), one["raters"])]
        rows += one["rows"]
        sources |= set(one["sources"])
        for language, source, *counts in one["groups"]:
            groups[one["languages"][language], one["sources"][source]] += counts
        for language, (n, mean, squares) in zip(one["languages"], one["moments"]):
            m, before, rest = moments.get(language, (0, 0.0, 0.0))
            # Chan, Golub and LeVeque (1979): means and sums of squares of parts.
            moments[language] = (m + n, before + (mean - before) * n / max(m + n, 1),
                                 rest + squares + (mean - before) ** 2 * m * n / max(m + n, 1))
        count, number = one["undetermined"]
        first = f"{name}:{number}" if count and not undetermined else first
        undetermined += count
    for names in raters:
        if len(names) > 1:
            raise InputError(f"{folder}: scores of several raters: {', '.join(sorted(names))}")
    all_languages, all_sources = sorted(moments), sorted(sources)
    counts = np.array([[groups[language, source] for source in all_sources] for language in all_languages],
                      np.int64).reshape(len(all_languages), len(all_sources), 3)
    return Totals([next(iter(names), "") for names in raters], all_languages, all_sources, rows,
                  counts[:, :, 0].tolist(), counts[:, :, 1].tolist(), counts[:, :, 2].sum(axis=1).tolist(),
                  [(mean, math.sqrt(squares / max(n, 1))) for n, mean, squares in map(moments.get, all_languages)],
                  (undetermined, first))
