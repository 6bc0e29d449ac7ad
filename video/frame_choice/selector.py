"""Chooses T of M candidate frames of a video for a question, by a scorer and a rule."""

import dataclasses
import warnings
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frame_choice.rules import ASKING, RULES, even
from video.frame_choice.scorers import Scorer
from video.frame_choice.scores import AskedScores, Scores
from video.frames.reading import Candidates, read_frames, reading_notes


@dataclasses.dataclass(frozen=True)
class Selection:
    """The frames chosen for a question.

    Attributes:
      indices: int64 `[chosen]`, the chosen candidates, ascending; fewer than T where the video has fewer frames.
      numbers: int64 `[chosen]`, their numbers in the video, each one once.
      seconds: float64 `[chosen]`, their times.
      scores: those of all candidates, NaN where a rule did not ask; None without a scorer.
      frames_encoded: number of candidates that the scorer had to encode for this question, as if it were the first on
        the video.
      candidates: the frames that were chosen from.
    """

    indices: np.ndarray
    numbers: np.ndarray
    seconds: np.ndarray
    scores: Scores | None
    frames_encoded: int
    candidates: Candidates


@gin.configurable
class Selector:
    """Chooses frames.

        selector = Selector(Voyager("runs/video/voyager", "runs/video/llm"), candidates=128, num_frames=8)
        selector.select("clip.mp4", "What colour was the star?")   # numbers of 8 frames, e.g. [3, 17, ...]

        candidates = read_frames("clip.mp4", selector.size, count=128)   # decoded once for several questions
        selector.choose("clip.mp4", candidates, "Which came first?").seconds
    """

    def __init__(
        self, scorer: Scorer | None = None, choice: str = "greedy", candidates: int = 128, num_frames: int = 8
    ):
        """Checks the settings.

        Args:
          scorer: scores the candidates; None: frames are spread evenly. The rules of `rules.ASKING` need an
            `AskableScorer`.
          choice: rule that chooses by the scores, a name in `rules.RULES`.
          candidates: M, frames of a video that are scored.
          num_frames: T, frames that are chosen.

        Raises:
          InputError: a setting is wrong.
        """
        if choice not in RULES or not 1 <= num_frames <= candidates:
            raise InputError(f"Selector: choice must be one of {', '.join(RULES)}; num_frames, from 1 to candidates")
        if choice in ASKING and scorer is not None and not hasattr(scorer, "score_some"):
            raise InputError(f"Selector: choice = '{choice}' asks for the scores of some candidates, and "
                             f"{type(scorer).__name__} scores all of them together")
        self.scorer, self.choice, self.candidates, self.num_frames = scorer, choice, candidates, num_frames

    @property
    def size(self) -> int:
        """Pixels of a side of the frames that are scored."""
        return self.scorer.size if self.scorer else 64

    @property
    def resize_mode(self) -> str:
        """The scorer's mode, see `read_frames`."""
        return self.scorer.resize_mode if self.scorer else "stretch"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings on which the choice depends, apart from video and question, as JSON."""
        scorer = self.scorer and self.scorer.settings
        return {"scorer": scorer, "choice": self.choice, "candidates": self.candidates, "num_frames": self.num_frames}

    def choose(self, video: str, candidates: Candidates, question: str) -> Selection:
        """Chooses from frames that were decoded before."""
        scorer, frames = self.scorer, candidates.frames
        _, distinct, place = np.unique(candidates.numbers, return_index=True, return_inverse=True)
        if scorer is None:
            scores, encoded, chosen = None, 0, even(len(distinct), self.num_frames)
        elif self.choice in ASKING:
            asked = AskedScores(lambda some: scorer.score_some(video, frames, question, distinct[some]), len(distinct))
            chosen = RULES[self.choice](asked, self.num_frames)
            scores, encoded = Scores(asked.values[place]), asked.count
        else:
            scores, encoded = scorer(video, frames, candidates.times, question), len(frames)
            chosen = RULES[self.choice](scores.subset(distinct), self.num_frames)
        indices = distinct[chosen]
        return Selection(indices, candidates.numbers[indices], candidates.times[indices], scores, encoded, candidates)

    def select(self, video: epath.PathLike, question: str) -> list[int]:
        """Returns the numbers of the frames of a video file to show for a question; warns of damage or too few frames.

        Raises:
          InputError: see `read_frames`.
        """
        candidates = read_frames(video, self.size, count=self.candidates, resize_mode=self.resize_mode)
        for note in reading_notes(str(video), candidates, self.num_frames):
            warnings.warn(note, stacklevel=2)
        return self.choose(str(video), candidates, question).numbers.tolist()
