"""Chooses T of M candidate frames of a video for a question, by a scorer and a rule."""

import dataclasses
import warnings
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frame_choice.coarse_to_fine import times_within
from video.frame_choice.rules import RULES, even
from video.frame_choice.scorers import Embeddings, Scorer
from video.frames.reading import Candidates, read_frames, reading_notes


@dataclasses.dataclass(frozen=True)
class Selection:
    """The frames chosen for a question.

    Attributes:
      indices: int64 `[chosen]`, the chosen candidates, ascending; fewer than T where the video has fewer frames.
      numbers: int64 `[chosen]`, their numbers in the video, each one once.
      seconds: float64 `[chosen]`, their times.
      scores: float32 `[candidates]`, or None without a scorer.
      candidates: the frames that were chosen from.
    """

    indices: np.ndarray
    numbers: np.ndarray
    seconds: np.ndarray
    scores: np.ndarray | None
    candidates: Candidates


@gin.configurable
class Selector:
    """Chooses frames.

        selector = Selector(Voyager("runs/video/voyager", "runs/video/llm"), candidates=128, num_frames=8)
        selector.select("clip.mp4", "What colour was the star?")   # numbers of 8 frames, e.g. [3, 17, ...]

        candidates = read_frames("clip.mp4", selector.size, count=128)   # decoded once for several questions
        selector.choose("clip.mp4", candidates, "Which came first?").seconds
    """

    def __init__(self, scorer: Scorer | None = None, choice: str = "top", candidates: int = 128, num_frames: int = 8,
                 key_frames: bool = False, stretches: int | None = None):
        """Checks the settings.

        Args:
          scorer: scores the candidates; None: frames are spread evenly.
          choice: rule that chooses by the scores, a name in `rules.RULES`: "top", "bolt" or "aks".
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
        scores = None if self.scorer is None else self.scorer(video, candidates.frames, question)
        _, distinct = np.unique(candidates.numbers, return_index=True)
        indices = distinct[even(len(distinct), self.num_frames) if scores is None
                           else RULES[self.choice](scores[distinct], self.num_frames)]
        return Selection(indices, candidates.numbers[indices], candidates.times[indices], scores, candidates)

    def choose_closely(self, path: epath.PathLike, first: Selection, question: str) -> Selection:
        """Chooses again, inside the stretches of a video file that scored best in a first choice.

        Raises:
          InputError: see `read_frames`.
        """
        times = times_within(first.candidates.times, first.candidates.duration, first.scores, self.stretches)
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
