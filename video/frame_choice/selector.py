"""Chooses T of M candidate frames of a video for a question, by a scorer and a rule."""

import dataclasses
import warnings
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frame_choice.coarse_to_fine import times_within
from video.frame_choice.rules import ASKING, RULES, even
from video.frame_choice.scorers import Embeddings, Scorer
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
        self, scorer: Scorer | None = None, choice: str = "greedy", candidates: int = 128, num_frames: int = 8,
        key_frames: bool = False, stretches: int | None = None,
    ):
        """Checks the settings.

        Args:
          scorer: scores the candidates; None: frames are spread evenly. The rules of `rules.ASKING` need an
            `AskableScorer`.
          choice: rule that chooses by the scores, a name in `rules.RULES`.
          candidates: M, frames of a video that are scored.
          num_frames: T, frames that are chosen.
          key_frames: takes key frames as candidates, for long videos, see `read_frames`.
          stretches: looks twice: the frames are chosen among M new candidates, exact ones, inside this many stretches
            around the candidates with the best scores, see `coarse_to_fine`; None: looks once.

        Raises:
          InputError: a setting is wrong.
        """
        if choice not in RULES or not 1 <= num_frames <= candidates:
            raise InputError(f"Selector: choice must be one of {', '.join(RULES)}; num_frames, from 1 to candidates")
        if choice in ASKING and scorer is not None and not hasattr(scorer, "score_some"):
            raise InputError(f"Selector: choice = '{choice}' asks for the scores of some candidates, and "
                             f"{type(scorer).__name__} scores all of them together")
        if stretches is not None and (stretches < 1 or scorer is None or isinstance(scorer, Embeddings)):
            raise InputError("Selector: stretches must be positive, and needs a scorer that looks at the frames")
        self.scorer, self.choice, self.candidates, self.num_frames = scorer, choice, candidates, num_frames
        self.key_frames, self.stretches = key_frames, stretches

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
        return {"scorer": scorer, "choice": self.choice, "candidates": self.candidates, "num_frames": self.num_frames,
                "key_frames": self.key_frames, "stretches": self.stretches}

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

    def choose_closely(self, path: epath.PathLike, first: Selection, question: str) -> Selection:
        """Chooses again, inside the stretches of a video file that scored best in a first choice.

        Raises:
          InputError: see `read_frames`.
        """
        times = times_within(first.candidates.times, first.candidates.duration, first.scores.values, self.stretches)
        return self.choose(str(path), read_frames(path, self.size, times=times, resize_mode=self.resize_mode), question)

    def select(self, video: epath.PathLike, question: str) -> list[int]:
        """Returns the numbers of the frames of a video file to show for a question; warns of damage or too few frames.

        Raises:
          InputError: see `read_frames`.
        """
        candidates = read_frames(video, self.size, count=self.candidates, resize_mode=self.resize_mode,
                                 key_frames=self.key_frames)
        for note in reading_notes(str(video), candidates, self.num_frames):
            warnings.warn(note, stacklevel=2)
        selection = self.choose(str(video), candidates, question)
        if self.stretches:
            selection = self.choose_closely(video, selection, question)
        return selection.numbers.tolist()
