"""The interface of worlds, and what they share: places in time, and captions.

A world says what happens in a video and what is asked about it; `video.frames.rendering` draws it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from video.frames.rendering import Event
from video.questions import Question


def _no_distractors(events: Sequence[Event], rng: np.random.Generator, seconds: float, shown: float) -> list[Event]:
    return []


class World(NamedTuple):
    """A kind of synthetic videos with questions on them.

    Attributes:
      seconds, fps: length and frames per second of its videos, unless `synthetic` sets others.
      shortest: least length of a video, in multiples of the shortest time that a shape is on screen.
      types: types of its questions.
      draw_events: (rng, seconds, shown) -> the events of a video, in order; they do not overlap.
      make_questions: (events, video, name, rng) -> questions on a video, whose ids begin with `name`.
      draw_distractors: (events, rng, seconds, shown) -> things that are on screen beside the events.
    """

    seconds: float
    fps: int
    shortest: float
    types: tuple[str, ...]
    draw_events: Callable[[np.random.Generator, float, float], list[Event]]
    make_questions: Callable[[list[Event], str, str, np.random.Generator], list[Question]]
    draw_distractors: Callable[[list[Event], np.random.Generator, float, float], list[Event]] = _no_distractors


def place_in_time(rng: np.random.Generator, lengths: np.ndarray, seconds: float, gap: float) -> np.ndarray:
    """Draws when events of these lengths begin, in order: float64 `[events]`, seconds.

    All times between them, before the first and behind the last are at least `gap` seconds.
    """
    # The rest of the video is drawn for the gaps.
    gaps = rng.dirichlet(np.ones(len(lengths) + 1)) * (seconds - lengths.sum() - gap * (len(lengths) + 1))
    return np.cumsum(gaps + gap)[:-1] + np.concatenate([[0], np.cumsum(lengths)[:-1]])


def spans(events: Sequence[Event]) -> tuple[tuple[float, float], ...]:
    """Returns when events are on screen, as `Question.evidence` has it."""
    return tuple((round(event.start, 3), round(event.end, 3)) for event in events)


def make_captions(events: Sequence[Event], video: str, name: str, seconds: float) -> list[Question]:
    """Makes captions of parts of a video: one for every event, one for the longest time without any."""
    ends = [0.0, *(event.end for event in events)]
    starts = [*(event.start for event in events), seconds]
    quiet = max(zip(ends, starts), key=lambda span: span[1] - span[0])
    captions = [(f"{event.colour} {event.shape} {event.side}", (event.start, event.end)) for event in events]
    return [Question(f"{name}-caption{n}", video, "What is there?", answer, "caption",
                     clip=(round(start, 3), round(end, 3)))
            for n, (answer, (start, end)) in enumerate([*captions, ("nothing", quiet)])]
