"""Where to look again in a long video: the stretches whose candidates scored best. Our own formulation.

With 128 candidates of two hours, 56 seconds lie between neighbours, and what a question asks for may be over in one. So
`Selector(key_frames=True, stretches=4)` looks twice: at key frames over the whole length, which are quick to decode,
and then at as many exact frames inside the stretches.
"""

import numpy as np

from video.frame_choice.rules import top
from video.frame_choice.scores import Scores
from video.frames.reading import even_timestamps


def times_within(times: np.ndarray, duration: float, scores: np.ndarray, stretches: int) -> np.ndarray:
    """Spreads times evenly over the stretches around the candidates with the best scores.

    A candidate's stretch is the part of the video that is nearer to it than to any other candidate.

    Args:
      times: when the candidates are on screen `[candidates]`, seconds, ascending.
      duration: length of the video, seconds.
      scores: `[candidates]`.
      stretches: number of stretches.

    Returns:
      float64 `[candidates]`, seconds, ascending.
    """
    edges = np.concatenate([[0.0], (times[1:] + times[:-1]) / 2, [duration]])
    best = top(Scores(scores), stretches)
    ends = np.cumsum(np.diff(edges)[best])  # were the stretches laid end to end
    places = even_timestamps(ends[-1], len(times))
    stretch = np.searchsorted(ends, places, side="right")
    return edges[best][stretch] + places - np.concatenate([[0.0], ends])[stretch]
