"""Stories: longer videos whose questions do not name the frames that matter.

Six to ten coloured shapes, the events, appear for one to six times `shown` seconds each: one shape three times, one or
two shapes twice, the others once. Exactly one repeated shape has the same colour when it appears first and last.

Between events there are distractors: grey shapes of the same outlines, coloured discs, and flashes of the whole frame.
Questions are about coloured shapes alone.

No two events have the same shape, colour and side, so frames tell which event they show, however many of them show one
and the same. One frame of each span of a question's evidence, in order of time, is enough to answer it, and frames of
other events beside them, wherever they lie, do not make this answer wrong:

    after       "What came right after the red star?" -> a shape. The star's frame, and the next event's: no event lies
                between them, so of the events that are shown behind the star this is always the first.
    before      "What came right before the cross?" -> a shape. Likewise, backwards.
    first       "Which coloured shape came first?" One frame of the first event, which precedes all others.
    last        "Which coloured shape came last?" One frame of the last event.
    appearance  "What colour was the ring the first time?", "the second time?", "the last time?" The first, the first
                two, or the last appearance: others that are shown lie behind the first two, or before the last.
    same        "Did the first and the last heart have the same colour?" Both of them; one between them is neither the
                first nor the last that is shown.
    again       "Which shape came again in the same colour?" Both appearances. They differ in their side from one
                another, and no other two events agree in shape and colour.
    order       "Which came first, the ring or the blue heart?" Both, each named so that no other event is meant.
    count       "How many times was there a coloured ring?" All appearances, which differ in colour or side.

"Which shape came twice in a row?" is not asked: where the event between two rings is not shown, they look like it.

Answers are balanced: shapes and colours are exchangeable, as are beginning and end, so with the question alone all
options are equally likely; the numbers of "count" and yes and no of "same" are drawn before their shapes.
"""

import collections
import itertools

import numpy as np

from video.frames.rendering import COLOURS, SHAPES, Event
from video.frames.worlds.base import World, place_in_time, spans
from video.questions import Question

NUMBERS = ("one", "two", "three")
ORDINALS = ("first", "second", "last")
TYPES = ("after", "before", "first", "last", "appearance", "same", "again", "order", "count")

# Numbers of appearances of the shapes of a video.
_APPEARANCES = ((3, 2, 1), (3, 2, 1, 1), (3, 2, 1, 1, 1), (3, 2, 2, 1), (3, 2, 1, 1, 1, 1), (3, 2, 2, 1, 1),
                (3, 2, 2, 1, 1, 1))  # fmt: skip
_LONGEST = 6  # times `shown`
_MAX_SHARE = 0.75  # of the video in which there is an event
_TRIES = 24  # to find a free time for a distractor


def draw_events(rng: np.random.Generator, seconds: float, shown: float) -> list[Event]:
    """Draws the events of a video, in order.

    Args:
      rng: source of all choices.
      seconds: length of the video, at least 48 times `shown`.
      shown: shortest time that a shape is on screen, seconds; the longest is six times as long.
    """
    appearances = _APPEARANCES[rng.integers(len(_APPEARANCES))]
    shapes = rng.permutation(SHAPES)[: len(appearances)].tolist()
    in_order = rng.permutation(np.repeat(shapes, appearances)).tolist()
    lengths = np.full(len(in_order), np.inf)
    while lengths.sum() > _MAX_SHARE * seconds:
        lengths = rng.uniform(shown, _LONGEST * shown, len(in_order))
    starts = place_in_time(rng, lengths, seconds, shown / 2)
    colours = {shape: rng.permutation(list(COLOURS))[:times].tolist() for shape, times in zip(shapes, appearances)}
    on_right = {shape: rng.integers(0, 2, times).tolist() for shape, times in zip(shapes, appearances)}
    alike = rng.choice([shape for shape, times in zip(shapes, appearances) if times > 1])
    colours[alike][-1], on_right[alike][-1] = colours[alike][0], 1 - on_right[alike][0]
    events = []
    for shape, start, length in zip(in_order, starts, lengths):
        x = rng.uniform(0.2, 0.38) + 0.42 * on_right[shape].pop(0)
        events.append(Event(shape, colours[shape].pop(0), float(start), float(start + length), float(x),
                            float(rng.uniform(0.25, 0.75))))
    return events


def draw_distractors(events: list[Event], rng: np.random.Generator, seconds: float, shown: float) -> list[Event]:
    """Draws what distracts from the events, at times when nothing else is there.

    Grey shapes and coloured discs stay for one to two times `shown` seconds, flashes of the whole frame for a quarter
    to half of it.
    """
    distractors: list[Event] = []
    for _ in range(_TRIES):
        shape = str(rng.choice([*rng.choice(SHAPES, 1), "disc", "flash"]))
        colour = "grey" if shape in SHAPES else str(rng.choice(list(COLOURS)))
        length = shown * (rng.uniform(0.25, 0.5) if shape == "flash" else rng.uniform(1, 2))
        start = rng.uniform(0, seconds - length)
        x = rng.uniform(0.2, 0.38) + 0.42 * rng.integers(0, 2)
        y = rng.uniform(0.25, 0.75)
        if all(start + length <= other.start or start >= other.end for other in (*events, *distractors)):
            distractors.append(Event(shape, colour, float(start), float(start + length), float(x), float(y)))
    return distractors


def make_questions(events: list[Event], video: str, name: str, rng: np.random.Generator) -> list[Question]:
    """Makes the questions on a video, one of each type."""
    by_shape: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        by_shape[event.shape].append(event)
    looks = collections.Counter((event.shape, event.colour) for event in events)
    named = {event: event.shape if len(by_shape[event.shape]) == 1 else f"{event.colour} {event.shape}"
             for event in events if looks[event.shape, event.colour] == 1}
    repeated = [shape for shape in by_shape if len(by_shape[shape]) > 1]
    (alike,) = (shape for shape in repeated if by_shape[shape][0].colour == by_shape[shape][-1].colour)
    pairs = list(itertools.pairwise(events))
    questions = []

    def choose(values):
        return values[rng.integers(len(values))]

    def add(question_type: str, question: str, answer: str, options, evidence: list[Event]) -> None:
        questions.append(Question(f"{name}-{question_type}", video, question, answer, question_type, tuple(options),
                                  spans(sorted(evidence, key=lambda event: event.start))))

    for question_type, neighbours in (("after", pairs), ("before", [(later, earlier) for earlier, later in pairs])):
        anchor, neighbour = choose([(anchor, neighbour) for anchor, neighbour in neighbours
                                    if anchor in named and anchor.shape != neighbour.shape])
        add(question_type, f"What came right {question_type} the {named[anchor]}?", neighbour.shape,
            [shape for shape in SHAPES if shape != anchor.shape], [anchor, neighbour])
    add("first", "Which coloured shape came first?", events[0].shape, SHAPES, events[:1])
    add("last", "Which coloured shape came last?", events[-1].shape, SHAPES, events[-1:])
    appearances = choose([by_shape[shape] for shape in repeated
                          if len({event.colour for event in by_shape[shape]}) > 1])
    ordinal = choose(ORDINALS)
    evidence = {"first": appearances[:1], "second": appearances[:2], "last": appearances[-1:]}[ordinal]
    add("appearance", f"What colour was the {appearances[0].shape} the {ordinal} time?", evidence[-1].colour, COLOURS,
        evidence)
    answer = choose(("yes", "no"))
    shape = alike if answer == "yes" else choose([shape for shape in repeated if shape != alike])
    add("same", f"Did the first and the last {shape} have the same colour?", answer, ("yes", "no"),
        [by_shape[shape][0], by_shape[shape][-1]])
    add("again", "Which shape came again in the same colour?", alike, SHAPES,
        [by_shape[alike][0], by_shape[alike][-1]])
    both = [list(named)[i] for i in rng.permutation(len(named))[:2]]
    first = min(both, key=lambda event: event.start)
    options = [named[event] for event in both]
    add("order", f"Which came first, the {options[0]} or the {options[1]}?", named[first], options, both)
    times = int(rng.integers(1, 4))
    shape = choose([shape for shape in by_shape if len(by_shape[shape]) == times])
    add("count", f"How many times was there a coloured {shape}?", NUMBERS[times - 1], NUMBERS, by_shape[shape])
    return questions


WORLD = World(seconds=64.0, fps=4, shortest=48.0, types=TYPES, draw_events=draw_events, make_questions=make_questions,
              draw_distractors=draw_distractors)
