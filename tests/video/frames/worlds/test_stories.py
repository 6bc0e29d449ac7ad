"""The world of stories: a frame of each span of evidence is enough, others do no harm, and nothing is given away.

Questions are answered here by a reader of their text, who knows only which shapes are seen, in order of time.
"""

import collections
import re

import numpy as np
import pytest

from tests.video.conftest import question_only_accuracy
from video.frames.rendering import COLOURS, SHAPES, Event
from video.frames.worlds.stories import TYPES, draw_distractors, draw_events, make_questions

SECONDS = 64.0
TIMES = np.arange(64) + 0.5


def drawn(number, seed=3):
    """Returns the events of a video, its questions, and the generator of what comes next."""
    rng = np.random.default_rng([seed, number])
    events = draw_events(rng, SECONDS, 1.0)
    return events, make_questions(events, "v.mp4", f"v{number}", rng), rng


def seen_at(events, times):
    """Returns what a viewer of the frames at these times sees of events, in order: (shape, colour, side), each once."""
    seen = [(event.shape, event.colour, event.side) for time in sorted(times) for event in events
            if event.start <= time < event.end]
    return list(dict.fromkeys(seen))


def read(question: str, seen: list[tuple[str, str, str]]) -> str:
    """Answers a question from what is seen; "" where that is too little."""

    def places(name):
        *colour, shape = name.split()
        return [n for n, event in enumerate(seen) if event[0] == shape and [*colour, event[1]][0] == event[1]]

    def asked(pattern):
        match = re.fullmatch(pattern, question)
        return match and match.groups()

    if found := asked(r"What came right (after|before) the (.+)\?"):
        neighbours = [place + {"after": 1, "before": -1}[found[0]] for place in places(found[1])]
        return "".join(seen[place][0] for place in neighbours if 0 <= place < len(seen))
    if found := asked(r"Which coloured shape came (first|last)\?"):
        return seen[{"first": 0, "last": -1}[found[0]]][0] if seen else ""
    if found := asked(r"What colour was the (\w+) the (first|second|last) time\?"):
        place = {"first": 0, "second": 1, "last": -1}[found[1]]
        colours = [seen[n][1] for n in places(found[0])]
        return colours[place] if len(colours) > max(place, 0) else ""
    if found := asked(r"Did the first and the last (\w+) have the same colour\?"):
        colours = [seen[n][1] for n in places(found[0])]
        return ("yes" if colours[0] == colours[-1] else "no") if len(colours) > 1 else ""
    if question == "Which shape came again in the same colour?":
        counts = collections.Counter(event[:2] for event in seen)
        return "".join(shape for (shape, _), count in counts.items() if count > 1)
    if found := asked(r"Which came first, the (.+) or the (.+)\?"):
        order = sorted((place, name) for name in found for place in places(name))
        return order[0][1] if len(order) == 2 else ""
    (shape,) = asked(r"How many times was there a coloured (\w+)\?")
    return ["", "one", "two", "three"][len(places(shape))]


def moment(span, rng):
    """Returns a time of a span, whose ends are rounded to milliseconds."""
    return rng.uniform(span[0] + 0.001, span[1] - 0.001)


def test_events_lie_in_the_video_and_no_two_look_the_same():
    lengths, counts = [], collections.Counter()
    for number in range(200):
        events, _, _ = drawn(number)
        counts[len(events)] += 1
        spans = np.array([(event.start, event.end) for event in events])
        lengths += np.diff(spans, axis=1).ravel().tolist()
        assert (np.diff(spans.ravel()) > 0.49).all() and spans[0, 0] > 0.49 and spans[-1, 1] < SECONDS - 0.49
        assert len({(event.shape, event.colour, event.side) for event in events}) == len(events)
        assert seen_at(events, TIMES) == [(event.shape, event.colour, event.side) for event in events]
    assert set(counts) == {6, 7, 8, 9, 10} and 1 <= min(lengths) < 1.1 and 5.9 < max(lengths) <= 6


@pytest.mark.parametrize("others", [0, 1, 4, 20, 64])
def test_a_frame_of_every_span_answers_and_others_do_no_harm(others):
    types = collections.Counter()
    for number in range(100):
        events, questions, rng = drawn(number)
        for question in questions:
            times = [moment(span, rng) for span in question.evidence] + rng.permutation(TIMES)[:others].tolist()
            assert read(question.question, seen_at(events, times)) == question.answer, (question, events)
            assert question.answer in question.options
            types[question.type] += 1
    assert types == dict.fromkeys(TYPES, 100)


def test_without_one_span_of_the_evidence_all_other_frames_mislead():
    right = collections.defaultdict(list)
    for number in range(300):
        events, questions, rng = drawn(number)
        for question in questions:
            span = question.evidence[rng.integers(len(question.evidence))]
            times = [time for time in TIMES if not span[0] <= time < span[1]]
            right[question.type].append(read(question.question, seen_at(events, times)) == question.answer)
    assert all(np.mean(right[name]) < 0.4 for name in TYPES), {name: np.mean(right[name]) for name in TYPES}


def test_questions_alone_do_not_give_answers_away():
    questions = [question for number in range(1200) for question in drawn(number, seed=5)[1]]
    for name, (chance, best, error) in question_only_accuracy(questions).items():
        assert best < chance + 0.03 + 2 * error, name


def test_distractors_are_beside_the_events():
    kinds = collections.Counter()
    for number in range(100):
        events, _, rng = drawn(number)
        distractors = draw_distractors(events, rng, SECONDS, 1.0)
        spans = np.array(sorted((shape.start, shape.end) for shape in [*events, *distractors])).ravel()
        assert (np.diff(spans) >= 0).all() and spans[0] >= 0 and spans[-1] <= SECONDS
        for shape in distractors:
            assert shape.colour in COLOURS if shape.shape in ("disc", "flash") else shape.colour == "grey"
            kinds[shape.shape if shape.shape not in SHAPES else "grey"] += 1
            if shape.shape == "flash":
                assert shape.end - shape.start <= 0.5
    assert set(kinds) == {"grey", "disc", "flash"} and min(kinds.values()) > 100


def test_the_reader_above_reads_as_a_person_would():
    star, ring, blue = ("star", "red", "left"), ("ring", "green", "left"), ("star", "blue", "right")
    assert read("What came right after the red star?", [star, ring, blue]) == "ring"
    assert read("What came right before the blue star?", [star, ring, blue]) == "ring"
    assert read("What colour was the star the second time?", [star, ring, blue]) == "blue"
    assert read("What colour was the star the second time?", [star, ring]) == ""
    assert read("Which came first, the ring or the blue star?", [star, ring, blue]) == "ring"
    assert read("How many times was there a coloured star?", [star, ring, blue]) == "two"
    assert seen_at([Event("star", "red", 1.0, 3.0, 0.3, 0.5)], [1.5, 2.5]) == [star]
