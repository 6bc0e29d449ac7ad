"""Decides which documents to keep without all of them in memory: whole cells of documents are kept or not.

A cell holds the documents of a language (and of a source, where sources have quotas) whose preferences agree in sign,
exponent and the first bits of the mantissa: there are 256 between a number and its double. In the order of the
preferences a quota ends in one cell of a language, or in a few with quotas of sources. Only these cells' documents are
looked at one by one; `quotas.choose` then decides on them, and on each other cell as if it was one document. Kept are
the same documents as when it decides on all of them: the other cells are kept as a whole or not at all.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from raters.filtering.score_table import ScoreTable

_SHIFT = 64 - 20
_SIGN = np.uint64(1 << 63)


def bins_of(preference: np.ndarray) -> np.ndarray:
    """Returns the bin of finite preferences, int64 `[n]`; higher preferences have lower bins."""
    bits = (preference + 0.0).view(np.uint64)  # -0.0 and 0.0 are equal
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (~ascending >> np.uint64(_SHIFT)).astype(np.int64)


def lowest_of(bins: np.ndarray) -> np.ndarray:
    """Returns the lowest preference of each bin, float64 `[n]`."""
    ascending = ~((bins.astype(np.uint64) << np.uint64(_SHIFT)) | np.uint64((1 << _SHIFT) - 1))
    return np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending).view(np.float64)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of documents, sorted by language, bin and source.

    Attributes:
      language, bin, source: what the documents of each cell have in common, int64 `[cells]`.
      tokens: tokens of its documents, int64 `[cells]`.
      longest: tokens of its longest document, int64 `[cells]`.
    """

    language: np.ndarray
    bin: np.ndarray
    source: np.ndarray
    tokens: np.ndarray
    longest: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, keep: np.ndarray) -> "Cells":
        """Returns some of the cells; `keep` is a mask or indices."""
        return Cells(*(column[keep] for column in dataclasses.astuple(self)))

    @property
    def ids(self) -> np.ndarray:
        """Names of the cells, uint64 `[cells]`, in the order of language, bin and source."""
        language, bins, source = (column.astype(np.uint64) for column in (self.language, self.bin, self.source))
        return language << np.uint64(48) | bins << np.uint64(28) | source  # up to 65,536 languages, 268 million sources

    def contain(self, others: "Cells") -> np.ndarray:
        """Returns the mask of the `others` that are among these."""
        return np.isin(others.ids, self.ids)


def cells_of(scores: ScoreTable, preference: np.ndarray, by_source: bool) -> Cells:
    """Returns a cell for every document `[rows]`; without `by_source` all sources count as one."""
    source = scores.source.astype(np.int64) if by_source else np.zeros(len(scores), np.int64)
    return Cells(scores.language.astype(np.int64), bins_of(preference), source, scores.tokens, scores.tokens)


def join_cells(parts: Sequence[Cells]) -> Cells:
    """Returns the cells of all parts, sorted, those of one name put together."""
    cells = Cells(*(np.concatenate(columns) for columns in zip(*map(dataclasses.astuple, parts))))
    if not len(cells):
        return cells
    cells = cells.rows(np.argsort(cells.ids))
    starts = np.flatnonzero(np.append(True, np.diff(cells.ids) > 0))
    return dataclasses.replace(cells.rows(starts), tokens=np.add.reduceat(cells.tokens, starts),
                               longest=np.maximum.reduceat(cells.longest, starts))


def undecided(cells: Cells, quotas: Sequence[float], per_source: bool = False,
              caps: Mapping[int, float] | None = None) -> np.ndarray:
    """Returns the mask of the cells whose documents `quotas.choose` may keep in part.

    Args:
      cells: all cells, sorted.
      quotas, per_source, caps: as `quotas.choose`.
    """
    cut = np.zeros(len(cells), bool)
    for language, quota in enumerate(quotas):
        rows = np.flatnonzero(cells.language == language)
        of_language = cells.rows(rows)
        cut[rows] = (_cut_by_source if per_source else _cut_by_language)(of_language, quota, caps or {})
    return cut


def _cut_by_language(cells: Cells, quota: float, caps: Mapping[int, float]) -> np.ndarray:
    cut = np.zeros(len(cells), bool)
    least, most = cells.tokens.copy(), cells.tokens.copy()  # that may count towards the quota
    for source, cap in caps.items():
        own = np.flatnonzero(cells.source == source)
        end = np.cumsum(cells.tokens[own])
        before = end - cells.tokens[own]
        cut[own] = (before < cap * quota) & (end >= cap * quota)
        least[own[end >= cap * quota]] = 0
        most[own[before >= cap * quota]] = 0
    _, index = np.unique(cells.bin, return_inverse=True)
    least, most = (np.bincount(index, tokens).astype(np.int64) for tokens in (least, most))
    return cut | ((np.cumsum(least) - least < quota) & (np.cumsum(most) >= quota))[index]


def _cut_by_source(cells: Cells, quota: float, _: Mapping[int, float]) -> np.ndarray:
    cut = np.zeros(len(cells), bool)
    seen, total = 0, max(cells.tokens.sum(), 1)
    low = high = 0.0  # bounds of the tokens taken of the sources before
    for source in np.unique(cells.source):
        own = np.flatnonzero(cells.source == source)
        end = np.cumsum(cells.tokens[own])
        seen += end[-1]
        share, slack = quota * seen / total, cells.longest[own].max() / 2
        cut[own] = (end - cells.tokens[own] < share - low) & (end >= share - high)
        low, high = (min(bound + end[-1], max(bound, share + way)) for bound, way in ((low, -slack), (high, slack)))
    # A language of which nothing would be taken keeps its best document.
    cut |= (cells.bin == cells.bin.min(initial=-1)) & (low < 1)
    return cut


def reduced_table(cells: Cells, documents: ScoreTable, preference: np.ndarray) -> tuple[ScoreTable, np.ndarray]:
    """Returns (scores, preferences) of single documents, preceded by each of `cells` as if it was one."""
    zeros = np.zeros(len(cells), np.int64)
    columns = {"file": zeros, "number": zeros, "key": zeros, "language": cells.language, "source": cells.source,
               "score": lowest_of(cells.bin), "tokens": cells.tokens}
    joined = {name: np.concatenate([values.astype(getattr(documents, name).dtype), getattr(documents, name)])
              for name, values in columns.items()}
    return dataclasses.replace(documents, **joined), np.concatenate([lowest_of(cells.bin), preference])
