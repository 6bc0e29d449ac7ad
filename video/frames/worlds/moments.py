"""Moments: short videos in which every question names the shape it is about.

Three to five coloured shapes appear for about a second each: two shapes once, one of them one to three times. So a
frame that shows the shape of the question is worth more than others, and for half of the questions one such frame is
worth little without another.
"""

import numpy as np

from video.frames.rendering import COLOURS, SHAPES, SIDES, Event
from video.frames.worlds.base import World, place_in_time, spans
from video.questions import Question

NUMBERS = ("one", "two", "three")
TYPES = ("colour", "side", "order", "count", "same")


def draw_events(rng: np.random.Generator, seconds: float, shown: float) -> list[Event]:
    """Draws the events of a video, in order: two shapes that appear once, one that appears one to three times.

    Args:
      rng: source of all choices.
      seconds: length of the video.
      shown: shortest time that a shape is on screen, seconds; the longest is a third longer.
    """
    once, other, repeated = rng.permutation(SHAPES)[:3].tolist()
    times = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    shapes = rng.permutation([once, other] + [repeated] * times).tolist()
    lengths = rng.uniform(shown, shown * 4 / 3, len(shapes))
    starts = place_in_time(rng, lengths, seconds, shown / 5)
    # Two appearances have the same colour as often as not.
    first, same = rng.choice(list(COLOURS)), rng.random() < 0.5
    events, seen = [], 0
    for shape, start, length in zip(shapes, starts, lengths):
        colour = str(rng.choice(list(COLOURS)))
        if shape == repeated:
            seen += 1
            if seen == 1 or same:
                colour = str(first)
            elif colour == first:
                colour = str(rng.choice([name for name in COLOURS if name != first]))
        x = rng.uniform(0.2, 0.38) + (0.42 if rng.random() < 0.5 else 0.0)
        y = rng.uniform(0.25, 0.75)
        events.append(Event(shape, colour, float(start), float(start + length), float(x), float(y)))
    return events


def make_questions(events: list[Event], video: str, name: str, rng: np.random.Generator) -> list[Question]:
    """Makes the questions on a video, one of each type that it has an answer to."""
    shapes = [event.shape for event in events]
    single = [event for event in events if shapes.count(event.shape) == 1]
    once, other = (single[i] for i in rng.permutation(len(single))[:2])
    (repeated,) = {shape for shape in shapes if shape not in (once.shape, other.shape)}
    appearances = [event for event in events if event.shape == repeated]
    questions = []

    def add(question_type: str, question: str, answer: str, options, evidence: list[Event]) -> None:
        questions.append(Question(f"{name}-{question_type}", video, question, answer, question_type, tuple(options),
                                  spans(evidence)))

    add("colour", f"What colour was the {once.shape}?", once.colour, COLOURS, [once])
    add("side", f"On which side was the {other.shape}?", other.side, SIDES, [other])
    first, second = sorted([once, other], key=lambda event: event.start)
    add("order", f"Which came first, the {once.shape} or the {other.shape}?", first.shape, (once.shape, other.shape),
        [first, second])
    add("count", f"How many times was there a {repeated}?", NUMBERS[len(appearances) - 1], NUMBERS, appearances)
    if len(appearances) == 2:
        same = appearances[0].colour == appearances[1].colour
        add("same", f"Did the {repeated} have the same colour both times?", "yes" if same else "no", ("yes", "no"),
            appearances)
    return questions


WORLD = World(seconds=16.0, fps=8, shortest=12.0, types=TYPES, draw_events=draw_events, make_questions=make_questions)
