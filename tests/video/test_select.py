"""Frames chosen for questions: no frame twice, and a contact sheet for each question."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey
from video.frame_choice.selector import Selector
from video.select import SelectFramesConfig, main, sheet_name


class Level:
    """Scores frames by their brightness."""

    size, resize_mode, settings = 16, "stretch", "level"

    def __call__(self, video, frames, question):
        return frames[:, 8, 8, 0].astype(np.float32)


@pytest.mark.parametrize("scorer", [None, Level()])
@pytest.mark.parametrize("choice", ["top", "bolt", "aks"])
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
