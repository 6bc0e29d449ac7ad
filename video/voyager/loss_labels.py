"""Reads the labels that Frame-Voyager learns from.

A label is the loss of the frozen Video-LLM on the right answer, given one combination of frames; `video.label`
computes and stores them.
"""

import dataclasses

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.row_store import RowStore
from video.questions import Question, read_questions
from video.voyager.frame_features import FEATURES, FeatureStore

LOSSES = "losses"


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of the questions that can teach something.

        labels = read_labels("runs/video/labels", "runs/video/labels.jsonl")
        features = labels.features.features_of(labels.video[:32])      # float32 [32, M, tokens, embed]
        times = labels.features.times[labels.video[:32]]               # float64 [32, M], seconds

    Attributes:
      path: folder they were read from.
      settings: settings that the losses depend on: `model`, `frames`, `candidates`, ...
      questions: the kept questions.
      features: features of the candidates, their times and the videos' durations; read when they are needed.
      video: int64 `[questions]`, row of the question's video in `features`.
      losses: float32 `[questions, K]`, mean over the right answer's tokens, nats.
      combinations: uint16 `[questions, K, T]`, the candidates that each loss was computed with, ascending. Unused
        places hold M: with several T, those at the end of the smaller combinations.
      dropped: filter -> number of questions it left out; a question counts for the first such filter.
    """

    path: epath.Path
    settings: dict
    questions: list[Question]
    features: FeatureStore
    video: np.ndarray
    losses: np.ndarray
    combinations: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.questions)


def combination_sizes(combinations: np.ndarray, candidates: int) -> np.ndarray:
    """Returns the number of frames of each combination: int64 `[...]` of `[..., T]`, whose unused places hold M."""
    return (combinations < candidates).sum(axis=-1)


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
        with combinations of several sizes the largest deviation within a size counts; None: no limit.

    Raises:
      InputError: the losses are missing, incomplete or those of other questions, or no question is left.
    """
    path = epath.Path(path)
    losses, features = RowStore(path / LOSSES, LOSSES), FeatureStore(path / FEATURES)
    by_id = {question.id: question for question in read_questions(questions)}
    if missing := [line["id"] for line in losses.rows if line["id"] not in by_id]:
        raise InputError(f"{questions}: no question {missing[0]}, but {path} has losses of it ({len(missing)} such)")
    values, combinations = losses.read("losses"), losses.read("combinations")
    finite = np.isfinite(values).all(axis=1)
    hard = finite & (values.mean(axis=1) > (np.inf if max_mean_loss is None else max_mean_loss))
    # All questions have the same sizes at the same places.
    sizes = combination_sizes(combinations[:1], features.shape[0]).ravel()
    deviations = np.max([values[:, sizes == size].std(axis=1) for size in np.unique(sizes)], axis=0, initial=0.0)
    flat = finite & ~hard & (deviations < (0.0 if min_deviation is None else min_deviation))
    kept = np.flatnonzero(finite & ~hard & ~flat)
    dropped = {"rejected": len(losses.rejected), "not finite": int((~finite).sum()),
               "mean loss too high": int(hard.sum()), "losses too even": int(flat.sum())}
    if not len(kept):
        raise InputError(f"{path}: no question is left ({', '.join(f'{name}: {n}' for name, n in dropped.items())})")
    return Labels(path, losses.settings, [by_id[losses.rows[row]["id"]] for row in kept], features,
                  np.array([features.row[losses.rows[row]["video"]] for row in kept]), values[kept],
                  combinations[kept], dropped)
