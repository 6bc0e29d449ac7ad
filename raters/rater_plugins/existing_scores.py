"""Judgements made elsewhere: a column of scores, a file of pairwise verdicts."""

import math
from collections import defaultdict
from collections.abc import Sequence

import gin
import numpy as np
from etils import epath

from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl

_PREFERS_SECOND = {"a": 0.0, "tie": 0.5, "b": 1.0}


@gin.configurable
class GivenScores:
    """Scores that stand in a field of the documents' records."""

    def __init__(self, field: str = gin.REQUIRED, name: str | None = None):
        """`field`: of the records; `name`: of the rater, by default the field's."""
        self.name, self.fields = name or field, (field,)

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Float64 `[documents]`; nan where the field is missing or not a number (text that spells one is none)."""
        return np.array([_number(document.extra.get(self.fields[0])) for document in documents], np.float64)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


@gin.configurable
class PairJudgements:
    """Pairwise verdicts from a JSONL file, e.g. of a large language model or of people.

        {"a": "id 1", "b": "id 2", "winner": "a"}      or "b", or "tie"

    `a` is the document that was shown first. A pair may stand there several times (votes) and in both orders; whoever
    judges favours a place, so the votes of each order are averaged, and then the two orders with equal weight
    (arXiv 2507.01785 asks both ways round; the weighting is ours).

    Attributes:
      name: of the rater.
      pairs: ids of the judged pairs.
      one_order: those of them that were judged in one order only: their preference holds the bias for a place.
      first_place: mean preference for the document shown first over the pairs with both orders; 0.5 is unbiased, nan
        without such pairs.
    """

    def __init__(self, path: epath.PathLike = gin.REQUIRED, name: str = "judgements"):
        """Reads the file.

        Raises:
          InputError: it is missing, empty, or a line is no verdict on two different documents.
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
            raise InputError(f"{path}: empty, there is no judgement in it")
        shown = {pair: sum(found) / len(found) for pair, found in votes.items()}
        self._prefers: dict[tuple[str, str], float] = {}
        self.one_order: list[tuple[str, str]] = []
        places: list[float] = []
        for (a, b), p_b in shown.items():
            if (b, a) in self._prefers:
                continue
            if (b, a) in shown:
                places.append(1 - (p_b + shown[b, a]) / 2)
                p_b = (p_b + 1 - shown[b, a]) / 2
            else:
                self.one_order.append((a, b))
            self._prefers[a, b] = p_b
        self.pairs = list(self._prefers)
        self.first_place = sum(places) / len(places) if places else math.nan

    def prefers(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """P(B>A) for pairs of ids (a, b): float64 `[pairs]`, nan where there is no judgement."""
        return np.array([self._preference(a, b) for a, b in pairs], np.float64)

    def _preference(self, a: str, b: str) -> float:
        if (b, a) in self._prefers:
            return 1 - self._prefers[b, a]
        return self._prefers.get((a, b), math.nan)
