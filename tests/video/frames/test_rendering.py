"""Synthetic videos show their events, and files of questions are read as they were written."""

import dataclasses

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from video.frames.rendering import COLOURS, Event, render, write_video
from video.frames.worlds.base import make_captions
from video.frames.worlds.moments import draw_events, make_questions
from video.questions import Question, read_questions, write_questions


def drawn(number):
    rng = np.random.default_rng([7, number])
    return draw_events(rng, 16.0, 1.0), rng


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


def test_distractors_are_grey_small_or_all_over():
    rng = np.random.default_rng(2)
    shapes = [Event("star", "grey", 0.0, 1.0, 0.3, 0.5), Event("disc", "red", 1.0, 2.0, 0.3, 0.5),
              Event("flash", "red", 2.0, 3.0, 0.3, 0.5), Event("star", "red", 3.0, 4.0, 0.3, 0.5)]
    grey, disc, flash, star = render(shapes, rng, 4.0, 1, 64).astype(int)
    assert np.ptp(grey, axis=-1).max() < 120
    reds = [(np.abs(frame - COLOURS["red"]).max(axis=-1) < 25).mean() for frame in (disc, flash, star)]
    assert 0.02 < reds[0] < 0.04 and reds[1] == 1 and 0.02 < reds[2] < 0.08
    assert np.abs(grey[32, 19] - 140).max() < 25


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
