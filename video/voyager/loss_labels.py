"""Stored losses of combinations as what Frame-Voyager learns from."""

import dataclasses

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.row_store import RowStore
from video.questions import Question, read_questions

LOSSES, FEATURES = "losses", "features"


class FeatureStore:
    """What a Video-LLM's decoder reads of frames: an array "features" float32 `[videos, M, frame_tokens, embed]`.

    Attributes:
      settings: what they depend on.
    """

    def __init__(self, path: epath.PathLike):
        """Raises InputError when there is none."""
        self._rows = RowStore(path, FEATURES)
        self.settings = self._rows.settings
        self.row = {line["id"]: line["row"] for line in self._rows.rows}

    def features(self, video: str) -> np.ndarray:
        """float32 `[M, frame_tokens, embed]` of a video."""
        return self._rows.read("features", [self.row[video]])[0]

    def read(self) -> np.ndarray:
        """Those of all videos."""
        return self._rows.read("features")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Losses of questions, those left out that cannot teach anything.

    Attributes:
      path: where they were read from.
      settings: what they depend on: `model`, `frames`, `candidates`, ...
      questions: that were kept.
      features: float32 `[videos, M, frame_tokens, embed]`.
      video: int64 `[questions]`, row of `features`.
      losses: float32 `[questions, K]`.
      combinations: uint16 `[questions, K, T]`.
      dropped: filter -> how many questions it left out; a question counts for the first that does.
    """

    path: epath.Path
    settings: dict
    questions: list[Question]
    features: np.ndarray
    video: np.ndarray
    losses: np.ndarray
    combinations: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.questions)


def read_labels(
    path: epath.PathLike, questions: epath.PathLike, max_mean_loss: float | None = None,
    min_deviation: float | None = None,
) -> Labels:
    """Reads the folder that `video.label` made.

    Args:
      path: the folder.
      questions: the file that was labelled.
      max_mean_loss: questions with a higher mean loss are left out: the Video-LLM cannot answer them whatever it sees.
      min_deviation: so are those whose losses have a lower standard deviation: the frames do not matter.

    Raises:
      InputError: there are no complete losses, they are of other questions, or none is left.
    """
    path = epath.Path(path)
    losses, features = RowStore(path / LOSSES, LOSSES), FeatureStore(path / FEATURES)
    asked = {question.id: question for question in read_questions(questions)}
    if missing := [line["id"] for line in losses.rows if line["id"] not in asked]:
        raise InputError(f"{questions}: {missing[0]} is not there, but {path} has losses of it ({len(missing)} such)")
    values = losses.read("losses")
    finite = np.isfinite(values).all(axis=1)
    hard = finite & (values.mean(axis=1) > (np.inf if max_mean_loss is None else max_mean_loss))
    flat = finite & ~hard & (values.std(axis=1) < (0.0 if min_deviation is None else min_deviation))
    kept = np.flatnonzero(finite & ~hard & ~flat)
    dropped = {"rejected": len(losses.rejected), "not finite": int((~finite).sum()),
               "mean loss too high": int(hard.sum()), "losses too even": int(flat.sum())}
    if not len(kept):
        raise InputError(f"{path}: no question is left ({', '.join(f'{name}: {n}' for name, n in dropped.items())})")
    return Labels(path, losses.settings, [asked[losses.rows[row]["id"]] for row in kept], features.read(),
                  np.array([features.row[losses.rows[row]["video"]] for row in kept]), values[kept],
                  losses.read("combinations", kept), dropped)
