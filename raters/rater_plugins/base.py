"""What a rater is: anything that maps documents to scores, or judges pairs of them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_pretrain.data.documents import Document


class Rater(Protocol):
    """Rates documents one by one.

    Only the order of the scores counts when raters are put together (`raters.preferences.aggregate`), so their scale
    is free. A
    rater that reads further fields of the records names them in an attribute `fields`.

    Attributes:
      name: names the rater in files and reports.
    """

    name: str

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Float64 `[documents]`, higher is better, nan where it has no score.

        A document's score must not depend, rounding apart, on the others it is scored with.
        """
        ...


class PairRater(Protocol):
    """Judges pairs of documents and knows nothing of single ones.

    Attributes:
      name: names the rater in files and reports.
      pairs: ids (a, b) of the pairs it can judge, each once, in either order.
    """

    name: str
    pairs: Sequence[tuple[str, str]]

    def prefers(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """P(B>A) for pairs of ids (a, b): float64 `[pairs]` in [0, 1], nan where it has no judgement."""
        ...


def record_fields(raters: Sequence[Rater | PairRater]) -> tuple[str, ...]:
    """Fields of the records, besides those of every document, that these raters read."""
    return tuple(dict.fromkeys(field for rater in raters for field in getattr(rater, "fields", ())))
