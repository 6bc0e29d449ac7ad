"""Raters for judgements made elsewhere: a field of scores, scores by id, or a file of pairwise verdicts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl, sha256
from raters.rater_plugins.base import PairRater, Rater
from raters.scoring.values_by_id import ValuesById

_PREFERS_SECOND = {"a": 0.0, "tie": 0.5, "b": 1.0}


@gin.configurable
class ExistingScores(Rater):
    """Scores in a field of the documents' records."""

    def __init__(self, field: str = gin.REQUIRED, name: str | None = None):
        """Args:
          field: field of the records.
          name: name of the rater; None: the field's.
        """
        self.name, self.fields = name or field, (field,)

    @property
    def settings(self) -> dict[str, Any]:
        """The field."""
        return {"field": self.fields[0]}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns float64 `[documents]`; nan where the field is missing or not a number (a numeral in a string)."""
        return np.array([_number(document.extra.get(self.fields[0])) for document in documents], np.float64)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


@gin.configurable
class ScoresById(Rater):
    """Scores in files of their own, joined to the documents by id and, where the files have it, language.

    The files are those that `raters.scoring.values_by_id` describes.
    """

    def __init__(self, files: str | Sequence[str] = gin.REQUIRED, column: str = gin.REQUIRED, name: str | None = None):
        """Reads the scores: 16 bytes of memory for each.

        Args:
          files: .parquet or .jsonl: path or glob, or a list of them.
          column: column of the scores.
          name: name of the rater; None: the column's.

        Raises:
          InputError: no file matches, one cannot be read or has no ids, or none has the column.
        """
        self.name, self._values = name or column, ValuesById(files, [column])

    @property
    def settings(self) -> dict[str, Any]:
        """The column and the files' SHA-256."""
        return {"column": self._values.properties[0],
                "files": {name: sha256(path) for name, path in self._values.files.items()}}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns float64 `[documents]`; nan where no file has the document."""
        rows = self._values.rows([one.id for one in documents], [one.language for one in documents])
        return np.where(rows >= 0, np.append(self._values.values[:, 0], np.nan)[rows], np.nan)


@gin.configurable
class PairJudgements(PairRater):
    """Pairwise verdicts from a JSONL file, e.g. of a large language model or of people.

        {"a": "id 1", "b": "id 2", "winner": "a"}      or "b", or "tie"

    `a` is the document that was shown first. A pair may have several lines (votes) and both orders. Judges have a
    position bias, so the votes of each order are averaged, and then the two orders with equal weight (arXiv 2507.01785
    asks in both orders; the weighting is ours).

    Attributes:
      name: name of the rater.
      pairs: ids of the judged pairs.
      one_order: pairs that were judged in one order only, whose preference holds the position bias.
      first_place: mean preference for the document shown first over the pairs with both orders; 0.5 is unbiased, nan
        without such pairs.
    """

    def __init__(self, path: epath.PathLike = gin.REQUIRED, name: str = "judgements"):
        """Reads the file.

        Raises:
          InputError: it is missing, empty, or a line is not a verdict on two different documents.
        """
        self.name = name
        votes: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number, record in read_jsonl(path):
            pair = (record.get("a"), record.get("b"))
            if not all(isinstance(i, (str, int)) for i in pair) or record.get("winner") not in _PREFERS_SECOND:
                raise InputError(f'{path}:{number}: not {{"a": id, "b": id, "winner": "a" or "b" or "tie"}}')
            first, second = map(str, pair)
            if first == second:
                raise InputError(f"{path}:{number}: {first!r} is compared with itself")
            votes[first, second].append(_PREFERS_SECOND[record["winner"]])
        if not votes:
            raise InputError(f"{path}: no judgement in this file")
        self._sha256 = sha256(path)
        by_order = {pair: sum(values) / len(values) for pair, values in votes.items()}
        self._prefers: dict[tuple[str, str], float] = {}
        self.one_order: list[tuple[str, str]] = []
        first_place: list[float] = []
        for (a, b), p_b in by_order.items():
            if (b, a) in self._prefers:
                continue
            if (b, a) in by_order:
                first_place.append(1 - (p_b + by_order[b, a]) / 2)
                p_b = (p_b + 1 - by_order[b, a]) / 2
            else:
                self.one_order.append((a, b))
            self._prefers[a, b] = p_b
        self.pairs = list(self._prefers)
        self.first_place = sum(first_place) / len(first_place) if first_place else math.nan

    @property
    def settings(self) -> dict[str, Any]:
        """The file's SHA-256."""
        return {"sha256": self._sha256}

    def prefers(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Returns P(B>A) for pairs of ids (a, b): float64 `[pairs]`, nan without a judgement."""
        return np.array([self._preference(a, b) for a, b in pairs], np.float64)

    def _preference(self, a: str, b: str) -> float:
        if (b, a) in self._prefers:
            return 1 - self._prefers[b, a]
        return self._prefers.get((a, b), math.nan)
