"""What a scorer says about the candidates of a question: a value for each, and for two of them together."""

import dataclasses
from collections.abc import Callable

import numpy as np

from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of the candidates of a question.

    Attributes:
      values: float32 `[candidates]`, by frame: similarity of frame and question, or a reward.
      pairs: float32 `[candidates, candidates]`, symmetric, what two frames are worth together besides their values; the
        diagonal is not read. None: nothing.
      cosines: float32 `[candidates, candidates]`, how much two frames are alike; None: the scorer does not say.
    """

    values: np.ndarray
    pairs: np.ndarray | None = None
    cosines: np.ndarray | None = None

    def __post_init__(self):
        for name in ("pairs", "cosines"):
            matrix = getattr(self, name)
            if self.values.ndim != 1 or (matrix is not None and matrix.shape != 2 * self.values.shape):
                raise ValueError(f"Scores: values has shape {list(self.values.shape)}, {name} "
                                 f"{None if matrix is None else list(matrix.shape)}")

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, indices: np.ndarray) -> "Scores":
        """Returns the scores of some candidates, int `[chosen]`."""
        return Scores(self.values[indices], *(None if matrix is None else matrix[np.ix_(indices, indices)]
                                              for matrix in (self.pairs, self.cosines)))

    def ask(self, indices: np.ndarray) -> np.ndarray:
        """Returns the values of some candidates, float32 `[asked]`; see `AskedScores`."""
        return self.values[indices]

    def required_cosines(self, rule: str) -> np.ndarray:
        """Returns `cosines` for a rule of this name; raises InputError where there are none."""
        if self.cosines is None:
            raise InputError(f"Selector.choice = '{rule}': compares frames with each other, and the scorer does not "
                             "say how much two frames are alike")
        return self.cosines


class AskedScores:
    """Scores that are computed for the candidates that a rule asks about.

        asked = AskedScores(lambda indices: similarity.score_some("clip.mp4", frames, "What colour?", indices), 128)
        asked.ask(np.array([3, 64]))   # float32 [2]; a candidate is scored once, however often it is asked about
        asked.count                    # 2

    Attributes:
      values: float32 `[candidates]`, NaN where nobody asked.
    """

    def __init__(self, score: Callable[[np.ndarray], np.ndarray], candidates: int):
        """Keeps the function from indices int `[asked]` to values float32 `[asked]`."""
        self._score, self.values = score, np.full(candidates, np.nan, np.float32)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def count(self) -> int:
        """Number of candidates that were scored."""
        return int((~np.isnan(self.values)).sum())

    def ask(self, indices: np.ndarray) -> np.ndarray:
        """Returns the values of some candidates, float32 `[asked]`."""
        new = np.unique(indices[np.isnan(self.values[indices])])
        if len(new):
            self.values[new] = self._score(new)
        return self.values[indices]
