"""The world of moments: answers follow from the events, and a seed gives the same questions as ever."""

import dataclasses
import hashlib
import json

import numpy as np

from video.frames.rendering import SHAPES
from video.frames.worlds.base import make_captions
from video.frames.worlds.moments import TYPES, draw_events, make_questions


def drawn(number, seed=7):
    rng = np.random.default_rng([seed, number])
    return draw_events(rng, 16.0, 1.0), rng


def test_events_do_not_overlap_and_lie_in_the_video():
    for number in range(200):
        events, _ = drawn(number)
        assert 3 <= len(events) <= 5
        spans = np.array([(event.start, event.end) for event in events]).ravel()
        assert (np.diff(spans) > 0).all() and spans[0] > 0 and spans[-1] < 16
        assert all(1 <= event.end - event.start <= 4 / 3 for event in events)


def test_answers_follow_from_the_events():
    seen = set()
    for number in range(300):
        events, rng = drawn(number)
        for question in make_questions(events, "v.mp4", "v", rng):
            named = [shape for shape in SHAPES if shape in question.question]
            of = {shape: [event for event in events if event.shape == shape] for shape in named}
            first = of[named[0]]
            match question.type:
                case "colour":
                    expected = first[0].colour
                case "side":
                    expected = "left" if first[0].x < 0.5 else "right"
                case "order":
                    expected = named[int(of[named[1]][0].start < first[0].start)]
                case "count":
                    expected = ["one", "two", "three"][len(first) - 1]
                case "same":
                    expected = "yes" if first[0].colour == first[1].colour else "no"
            assert question.answer == expected and question.answer in question.options
            assert list(question.evidence) == sorted(
                (round(event.start, 3), round(event.end, 3)) for event in events if event.shape in named)
            seen.add((question.type, question.answer))
    assert {question_type for question_type, _ in seen} == set(TYPES) and {("same", "yes"), ("same", "no")} <= seen


def test_questions_are_those_of_earlier_versions():
    """Results on videos of a seed stay comparable: the digest was taken before there was a second world."""
    digest = hashlib.sha256()
    for number in range(20):
        events, rng = drawn(number, seed=0)
        name = f"v{number:05d}"
        video = f"videos/{name}.mp4"
        for question in make_questions(events, video, name, rng) + make_captions(events, video, name, 16.0):
            digest.update(json.dumps(dataclasses.asdict(question)).encode())
    assert digest.hexdigest() == "82b45ecf96224a3b04ca971576e5e9182af12483d8cdceab9a8caaef06904a2d"
