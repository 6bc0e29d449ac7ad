"""Files of multiple-choice questions as other collections write them."""

import json

import pytest

from mlx_pretrain.errors import InputError
from video.questions import read_questions


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
    (["A. red", "B. red"], "B", "an option is there twice"),
    ("AB", "A", "options must be a list"),
])
def test_wrong_options_are_named(tmp_path, options, answer, message):
    with pytest.raises(InputError, match=rf"q\.jsonl:1: .*{message}"):
        read(tmp_path, options=options, answer=answer)
