"""Reads the labels that Frame-Voyager learns from.

A label is the loss of the frozen Video-LLM on a question's right answer, given one combination of frames; `video.label`
computes and stores them.
"""

import dataclasses

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.row_store import RowStore
from video.questions import Question, read_questions

LOSSES, FEATURES = "losses", "features"


class FeatureStore:
    """Stored embeddings of frames, as a Video-LLM's decoder reads them.

    Attributes:
      settings: settings that the features depend on.
      row: path of a video -> number of its row.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the store; raises InputError when it is missing or incomplete."""
        self._rows = RowStore(path, FEATURES)
        self.settings = self._rows.settings
        self.row = {line["id"]: line["row"] for line in self._rows.rows}

    def features(self, video: str) -> np.ndarray:
        """Reads the features of a video: float32 `[M, frame_tokens, embed]`."""
        return self._rows.read("features", [self.row[video]])[0]

    def read(self) -> np.ndarray:
        """Reads the features of all videos: float32 `[videos, M, frame_tokens, embed]`."""
        return self._rows.read("features")

    def times(self) -> np.ndarray:
        """Reads the times of the frames of all videos: float64 `[videos, M]`, seconds."""
        return self._rows.read("times")


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of the questions that can teach something.

    Attributes:
      path: folder they were read from.
      settings: settings that the losses depend on: `model`, `frames`, `candidates`, ...
      questions: the kept questions.
      features: float32 `[videos, M, frame_tokens, embed]`.
      video: int64 `[questions]`, row of `features`.
      losses: float32 `[questions, K]`, mean over the right answer's tokens, nats.
      combinations: uint16 `[questions, K, T]`, the candidates that each loss was computed with; a place that holds M is
        empty.
      times: float64 `[videos, M]`, seconds.
      dropped: filter -> number of questions it left out; a question counts for the first such filter.
    """

    path: epath.Path
    settings: dict
    questions: list[Question]
    features: np.ndarray
    video: np.ndarray
    losses: np.ndarray
    combinations: np.ndarray
    times: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def sizes(self) -> np.ndarray:
        """Number of frames of each combination, int64 `[questions, K]`."""
        return (self.combinations < self.times.shape[1]).sum(axis=2)


def read_labels(
    path: epath.PathLike, questions: epath.PathLike, max_mean_loss: float | None = None,
    min_deviation: float | None = None,
) -> Labels:
    """Reads the labels in a folder that `video.label` wrote.

    Args:
      path: the folder.
      questions: the file that was labelled.
      max_mean_loss: questions with a higher mean loss are left out, as the Video-LLM cannot answer them whatever it
        sees; None: no limit.
      min_deviation: questions whose losses have a lower standard deviation are left out, as the frames do not matter;
        None: no limit.

    Raises:
      InputError: the losses are missing, incomplete or those of other questions, or no question is left.
    """
    path = epath.Path(path)
    losses, features = RowStore(path / LOSSES, LOSSES), FeatureStore(path / FEATURES)
    by_id = {question.id: question for question in read_questions(questions)}
    if missing := [line["id"] for line in losses.rows if line["id"] not in by_id]:
        raise InputError(f"{questions}: no question {missing[0]}, but {path} has losses of it ({len(missing)} such)")
    values = losses.read("losses")
    finite = np.isfinite(values).all(axis=1)
    hard = finite & (values.mean(axis=1) > (np.inf if max_mean_loss is None else max_mean_loss))
    flat = finite & ~hard & (values.std(axis=1) < (0.0 if min_deviation is None else min_deviation))
    kept = np.flatnonzero(finite & ~hard & ~flat)
    dropped = {"rejected": len(losses.rejected), "not finite": int((~finite).sum()),
               "mean loss too high": int(hard.sum()), "losses too even": int(flat.sum())}
    if not len(kept):
        raise InputError(f"{path}: no question is left ({', '.join(f'{name}: {n}' for name, n in dropped.items())})")
    return Labels(path, losses.settings, [by_id[losses.rows[row]["id"]] for row in kept], features.read(),
                  np.array([features.row[losses.rows[row]["video"]] for row in kept]), values[kept],
                  losses.read("combinations", kept), features.times(), dropped)
