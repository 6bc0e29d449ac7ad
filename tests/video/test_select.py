"""Frames chosen for questions: no frame twice, and a contact sheet for each question."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey
from video.decode import DecodeConfig
from video.decode import main as decode
from video.frame_choice.rules import RULES
from video.frame_choice.scores import Scores
from video.frame_choice.selector import Selector
from video.frames.frame_store import FrameStore
from video.select import SelectFramesConfig, main, sheet_name


class Level:
    """Scores frames by their brightness."""

    size, resize_mode, settings = 16, "stretch", "level"

    def __call__(self, video, frames, times, question):
        values = frames[:, 8, 8, 0].astype(np.float32)
        alike = -np.abs(values[:, None] - values) / 255
        return Scores(values, cosines=alike)

    def score_some(self, video, frames, question, indices):
        return self(video, frames, None, question).values[indices]


@pytest.mark.parametrize("scorer", [None, Level()])
@pytest.mark.parametrize("choice", sorted(RULES))
def test_every_frame_is_chosen_once(tmp_path, scorer, choice):
    path = write_grey(tmp_path / "q.mp4", "libx264", np.arange(5) / 5, 5, 5)
    with pytest.warns(UserWarning, match=r"q\.mp4: 5 different frames, fewer than the 8 requested"):
        assert Selector(scorer, choice, candidates=16, num_frames=8).select(path, "Which?") == [0, 1, 2, 3, 4]
    assert len(set(Selector(scorer, choice, candidates=16, num_frames=3).select(path, "Which?"))) == 3
    if scorer and choice == "top":
        assert Selector(scorer, choice, candidates=16, num_frames=3).select(path, "Which?") == [2, 3, 4]


@given(st.lists(st.text(min_size=1), min_size=2, max_size=9, unique=True))
def test_sheets_have_names_of_their_own(ids):
    names = [sheet_name(id) for id in ids]
    assert len(set(names)) == len(ids)
    assert all("/" not in name and "\0" not in name and len(f"{name}.png".encode()) < 200 for name in names)


def test_names_of_sheets():
    assert [sheet_name(id) for id in ("q/1", "q_1", "q%2F1", "v1.2-x")] == ["q%2F1", "q_1", "q%252F1", "v1.2-x"]
    long = [sheet_name("x" * 300 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 180


def test_a_selection_with_sheets_is_kept_or_replaced_when_told(tmp_path, capsys):
    write_grey(tmp_path / "q.mp4", "libx264", np.arange(5) / 5, 5, 5)
    lines = [{"id": id, "video": "q.mp4", "question": "Which?", "options": ["A. red", "B. green"], "answer": "A"}
             for id in ("q/1", "q_1")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SelectFramesConfig(
        questions=tmp_path / "q.jsonl", output=tmp_path / "out",
        selector=Selector(None, candidates=16, num_frames=8), sheets=2, processes=1, compilation_cache=None)
    main(config)
    assert capsys.readouterr().err.count("note: q.mp4: 5 different frames, fewer than the 8 requested\n") == 1
    assert json.loads((tmp_path / "out/selected_frames.json").read_text()) == [[0, 1, 2, 3, 4]] * 2
    assert sorted(sheet.name for sheet in (tmp_path / "out/sheets").glob("*.png")) == ["q%2F1.png", "q_1.png"]
    main(dataclasses.replace(config, processes=2))
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("out: made before from the same inputs and settings, kept\n")
    with pytest.raises(InputError, match=r"out: exists, made with settings sheets = 2 \(now 0\); set overwrite=True"):
        main(dataclasses.replace(config, sheets=0))
    main(dataclasses.replace(config, sheets=0, overwrite=True))
    assert not (tmp_path / "out/sheets").exists()


class Listener(Level):
    """Keeps all that a scorer is given besides the frames."""

    def __init__(self):
        self.heard = []

    def __call__(self, video, frames, times, question):
        self.heard.append((video, question))
        return super().__call__(video, frames, times, question)


def test_videos_elsewhere_and_answers_that_no_scorer_sees(tmp_path):
    """Video-MME's and MLVU's forms, with and without answers; the videos lie in another folder than the questions."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "questions").mkdir()
    write_grey(tmp_path / "videos/v.mp4", "libx264", np.arange(5) / 5, 5, 5)
    records = [
        {"question_id": "1", "videoID": "v", "question": "Which?", "options": ["A. left", "B. right"], "answer": "B"},
        {"question_id": "2", "video_name": "v", "question": "Why?\n(A) left\n(B) right", "task_type": "ego",
         "candidates": ["left", "right"], "answer": "A"},
        {"question_id": "3", "video": "v.mp4", "question": "How?", "candidates": ["left", "right"]},
    ]
    (tmp_path / "questions/q.json").write_text(json.dumps(records))
    listener = Listener()
    config = SelectFramesConfig(
        questions=tmp_path / "questions/q.json", videos=tmp_path / "videos", output=tmp_path / "out",
        selector=Selector(listener, candidates=4, num_frames=2), sheets=3, processes=1, compilation_cache=None)
    main(config)
    assert listener.heard == [("v.mp4", "Which?"), ("v.mp4", "Why?"), ("v.mp4", "How?")]
    selected = json.loads((tmp_path / "out/selected.json").read_text())
    assert [(entry["question_id"], entry["question"], entry["numbers"]) for entry in selected["v.mp4"]] == [
        ("1", "Which?", [3, 4]), ("2", "Why?", [3, 4]), ("3", "How?", [3, 4])]
    with pytest.raises(InputError, match=r"q\.json: no video can be decoded; .*questions/v\.mp4: no such file"):
        main(dataclasses.replace(config, videos=None, output=tmp_path / "other"))


def test_decode_takes_videos_from_another_folder(tmp_path):
    write_grey(tmp_path / "v.mp4", "libx264", np.arange(5) / 5, 5, 5)
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "q.jsonl")
        files[-1].write_text(json.dumps({"video": "v.mp4", "question": "Which?"}) + "\n")
    settings = {"questions": files, "output": tmp_path / "store", "size": 16, "candidates": 4, "processes": 1}
    with pytest.raises(InputError, match=r"files in one folder are needed, not in 2; or set decode\.videos"):
        decode(DecodeConfig(**settings))
    decode(DecodeConfig(**settings, videos=tmp_path))
    assert FrameStore(tmp_path / "store").videos == ["v.mp4"]


def test_a_limit_draws_questions_from_the_whole_file(tmp_path):
    for name in ("a", "b"):
        write_grey(tmp_path / f"{name}.mp4", "libx264", np.arange(5) / 5, 5, 5)
    lines = [{"id": f"q{n}", "video": "ab"[n // 20] + ".mp4", "question": "Which?", "answer": "red"} for n in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(SelectFramesConfig(
        questions=tmp_path / "q.jsonl", output=tmp_path / "out", limit=8, sheets=1, processes=1, compilation_cache=None,
        selector=Selector(None, candidates=4, num_frames=2)))
    numbers = json.loads((tmp_path / "out/selected_frames.json").read_text())
    drawn = [f"q{n}" for n, own in enumerate(numbers) if own]
    selected = json.loads((tmp_path / "out/selected.json").read_text())
    assert len(numbers) == 40 and len(drawn) == 8
    assert drawn == [entry["question_id"] for entries in selected.values() for entry in entries]
    assert list(selected) == ["a.mp4", "b.mp4"] and min(map(len, selected.values())) > 1
    assert len(list((tmp_path / "out/sheets").glob("*.png"))) == 1
