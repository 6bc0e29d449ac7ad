"""Files of multiple-choice questions as other collections write them."""

import dataclasses
import json

import pytest

from mlx_pretrain.errors import InputError
from video.questions import Question, read_questions


def read(tmp_path, **fields):
    line = {"id": "a", "video": "v.mp4", "question": "Which colour?", **fields}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    (question,) = read_questions(tmp_path / "q.jsonl")
    return question.options, question.answer


@pytest.mark.parametrize("options, answer", [
    (["A. red", "B. green", "C. U.S. blue"], "B"),  # Video-MME
    (["A. red", "B. green", "C. U.S. blue"], "B."),
    (["A. red", "B. green", "C. U.S. blue"], "green"),
    (["(A) red", "(B) green", "(C) U.S. blue"], "(B)"),  # MVBench
    (["A) red", "B) green", "C) U.S. blue"], "b"),
    (["A: red", "B: green", "C: U.S. blue"], "B"),
    (["A.red", "B.green", "C.U.S. blue"], "B"),
    (["red", "green", "U.S. blue"], "B"),
    (["red", "green", "U.S. blue"], "green"),
])
def test_letters_of_multiple_choice(tmp_path, options, answer):
    assert read(tmp_path, options=options, answer=answer) == (("red", "green", "U.S. blue"), "green")


def test_letters_that_are_the_options_themselves(tmp_path):
    assert read(tmp_path, options=["B", "A"], answer="A") == (("B", "A"), "A")
    assert read(tmp_path, options=["A. Smith", "B. Jones"], answer="B. Jones") == (("A. Smith", "B. Jones"), "B. Jones")
    assert read(tmp_path, options=["U.S.A.", "France"], answer="B") == (("U.S.A.", "France"), "France")


@pytest.mark.parametrize("options, answer, message", [
    (["A. red", "B. green"], "C", "the answer 'C' is not among the options"),
    (["A. red", "B. green"], "blue", "the answer 'blue' is not among the options"),
    (["B. red", "A. green"], "A", "letters are not A, B, C"),
    (["A. red", "B. red"], "B", "an option appears twice"),
    ("AB", "A", "options must be a list"),
])
def test_wrong_options_are_named(tmp_path, options, answer, message):
    with pytest.raises(InputError, match=rf"q\.jsonl:1: .*{message}"):
        read(tmp_path, options=options, answer=answer)


# A row of lmms-lab/Video-MME as it is published; the question's words are others.
VIDEO_MME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "How many are red?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
}


def question(tmp_path, record):
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    (only,) = read_questions(tmp_path / "q.jsonl")
    return only


def test_video_mme_is_read_as_it_is_published(tmp_path):
    expected = Question("001-1", "fFjv93ACGo8.mp4", "How many are red?", "Three.", "Counting Problem",
                        ("One.", "Two.", "Three.", "Four."))
    assert question(tmp_path, VIDEO_MME) == expected
    assert question(tmp_path, {**VIDEO_MME, "videoID": "fFjv93ACGo8.mkv"}).video == "fFjv93ACGo8.mkv"
    assert question(tmp_path, {**VIDEO_MME, "videoID": None}).video == "001.mp4"
    # Our own fields beside theirs, where they agree; the path gives the folder.
    ours = {"id": "001-1", "video": "data/fFjv93ACGo8.mp4", "type": "Counting Problem"}
    assert question(tmp_path, {**VIDEO_MME, **ours}) == dataclasses.replace(expected, video="data/fFjv93ACGo8.mp4")


@pytest.mark.parametrize("fields, message", [
    ({"id": "7"}, "id = '7' and question_id = '001-1' name different ids; leave one"),
    ({"video": "v.mp4"}, "video = 'v.mp4' and videoID = 'fFjv93ACGo8.mp4' name different videos"),
    ({"type": "order"}, "type = 'order' and task_type = 'Counting Problem' name different types"),
    ({"question_id": 11}, "question_id is 11, not a text"),
    ({"question_id": ""}, "no id or question_id in this record"),
    ({"videoID": None, "video_id": None}, "no video or videoID or video_id in this record"),
    ({"videoID": "../x"}, "video '../x.mp4' is not a path inside"),
])
def test_fields_that_contradict_or_are_missing_are_named(tmp_path, fields, message):
    with pytest.raises(InputError, match=rf"q\.jsonl:1: {message}"):
        question(tmp_path, {**VIDEO_MME, **fields})
