"""Synthetic videos show what their questions ask for."""

import dataclasses

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from video.frames.rendering import (
    COLOURS,
    SHAPES,
    TYPES,
    draw_events,
    make_captions,
    make_questions,
    render,
    write_video,
)
from video.questions import Question, read_questions, write_questions

SETTINGS = {"seconds": 16.0, "shown": 1.0}


def drawn(number):
    rng = np.random.default_rng([7, number])
    return draw_events(rng, **SETTINGS), rng


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


def test_frames_show_the_event_and_nothing_else_coloured():
    events, rng = drawn(3)
    frames = render(events, rng, 16.0, 8, 64).astype(int)
    for number in range(0, len(frames), 3):
        on_screen = [event for event in events if event.start <= number / 8 < event.end]
        for event in on_screen:
            away = np.abs(frames[number] - COLOURS[event.colour]).max(axis=-1)
            rows, columns = np.nonzero(away < 25)
            assert len(rows) > 20
            assert np.hypot(columns.mean() / 64 - event.x, rows.mean() / 64 - event.y) < 0.08
        if not on_screen:  # the ground is dark, the rest grey
            assert np.ptp(frames[number], axis=-1).max() < 120


def test_captions_name_every_event_and_a_quiet_part():
    events, _ = drawn(5)
    *captions, quiet = make_captions(events, "v.mp4", "v", 16.0)
    assert [caption.answer.split()[1] for caption in captions] == [event.shape for event in events]
    assert quiet.answer == "nothing"
    assert all(quiet.clip[0] >= event.end - 1e-3 or quiet.clip[1] <= event.start + 1e-3 for event in events)


def test_the_same_frames_make_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    frames = render(draw_events(rng, 6.0, 1.0), rng, 6.0, 10, 96)
    for attempt in range(12):
        write_video(tmp_path / f"{attempt}.mp4", frames, 10)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_questions_round_trip(tmp_path):
    events, rng = drawn(1)
    questions = make_questions(events, "a/v.mp4", "v", rng) + make_captions(events, "a/v.mp4", "v", 16.0)
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize("change, message", [
    ({"video": "../v.mp4"}, "not a path inside"),
    ({"video": "/etc/passwd"}, "not a path inside"),
    ({"video": "gs://b/v.mp4"}, "not a path inside"),
    ({"question": ""}, "no question in this record"),
    ({"options": ["no"]}, "'yes' is not among the options"),
    ({"evidence": [[1]]}, "pairs of seconds"),
])
def test_bad_questions_are_named(tmp_path, change, message):
    good = Question("a", "v.mp4", "Is it?", "yes", options=("yes", "no"))
    write_questions(tmp_path / "q.jsonl", [good, good])
    with pytest.raises(InputError, match=r"q\.jsonl:2: id 'a' appears twice"):
        read_questions(tmp_path / "q.jsonl")
    write_questions(tmp_path / "q.jsonl", [dataclasses.replace(good, **change)])
    with pytest.raises(InputError, match=r"q\.jsonl:1: ") as error:
        read_questions(tmp_path / "q.jsonl")
    assert message in str(error.value)
