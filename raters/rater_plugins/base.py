"""Base classes of raters: plug-ins that map documents to scores, or judge pairs of documents.

A rater of your own, in a module of your own:

    @gin.configurable
    class Longest(Rater):
        name = "longest"

        def score(self, documents):
            return np.array([float(len(document.text)) for document in documents])

A gin file imports the module and names the rater, for pairs or for bulk scoring:

    import my_raters
    pairs.raters = [@Longest(), @Heuristics()]
    score.rater = @Longest()
"""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_pretrain.data.documents import Document


class Rater(abc.ABC):
    """Scores documents one by one.

    Only the order of the scores counts when raters are combined (`raters.preferences.aggregate`), so their scale is
    free.

    Attributes:
      name: name of the rater in files and reports.
      fields: further fields of the records that the rater reads from `Document.extra`.
    """

    name: str
    fields: Sequence[str] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the scores depend on, as JSON; outputs made with other settings are not kept."""
        return {}

    @abc.abstractmethod
    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns the scores, float64 `[documents]`: higher is better, nan without one.

        Apart from rounding, a document's score must not depend on the other documents of the call.
        """


class PairRater(abc.ABC):
    """Judges pairs of documents, not single documents.

    Attributes:
      name: name of the rater in files and reports.
      pairs: ids (a, b) of the pairs it can judge, each once, in either order.
    """

    name: str
    pairs: Sequence[tuple[str, str]]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the judgements depend on, as JSON; outputs made with other settings are not kept."""
        return {}

    @abc.abstractmethod
    def prefers(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Returns P(B>A) for pairs of ids (a, b): float64 `[pairs]` in [0, 1], nan where it has no judgement."""


def record_fields(raters: Sequence[Rater | PairRater]) -> tuple[str, ...]:
    """Returns the further fields of the records that the raters read."""
    return tuple(dict.fromkeys(field for rater in raters for field in getattr(rater, "fields", ())))
