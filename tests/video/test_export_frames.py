"""Chosen frames as short videos: which frames, their size and their turn."""

import dataclasses
import json

import av
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey, write_video
from video.export_frames import ExportFramesConfig, main
from video.frames.reading import read_frames
from video.frames.writing import write_frames


def decoded(path):
    """Returns all frames of a file, upright: uint8 `[frames, height, width, 3]`."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_shows(path, source, numbers):
    """Compares a short video with frames of `write_grey`, whose levels are 4 apart."""
    own = decoded(source)[numbers]
    assert np.abs(decoded(path).astype(int) - own)[:, 10:-10, 10:-10].max() <= 1


@pytest.mark.parametrize("times, options", [
    (np.arange(40) / 5, {"b_frames": 2}),
    (np.cumsum(np.tile([0.04, 0.3], 20)), {"key_frames": 30}),  # variable rate
])
def test_the_numbered_frames_are_written(tmp_path, times, options):
    source = write_grey(tmp_path / "source.mp4", "libx264", times, 5, 1000, **options)
    numbers = [0, 3, 4, 29, 38]
    write_frames(source, numbers, tmp_path / "short.mp4")
    assert_shows(tmp_path / "short.mp4", source, numbers)
    again = read_frames(tmp_path / "short.mp4", 16, count=5)
    np.testing.assert_array_equal(again.numbers, np.arange(5))
    assert again.duration == 5.0
    with av.open(str(tmp_path / "short.mp4")) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize("rotation, shape", [(0, (64, 96)), (90, (96, 64))])
def test_frames_keep_their_size_and_stand_upright(tmp_path, rotation, shape):
    source = write_video(tmp_path / "source.mp4", "libx264", np.arange(6) / 5, rotation=rotation)
    write_frames(source, [1, 5], tmp_path / "short.mp4")
    frames, own = decoded(tmp_path / "short.mp4").astype(int), read_frames(source, 32, times=[0.2, 1.0]).frames
    assert frames.shape == (2, *shape, 3)
    rows, columns = (np.arange(32) * side // 32 for side in shape)
    difference = np.abs(frames[:, rows][:, :, columns] - own)
    assert np.median(difference) < 4 and difference[:, 4:12, 4:12].max() < 12 and difference[:, 20:28, 20:28].max() < 12


def chosen(folder, numbers):
    (folder / "selected").mkdir(exist_ok=True)
    entries = [{"question_id": f"q/{n}", "question": f"Which {n}?", "frames": [], "numbers": own}
               for n, own in enumerate(numbers)]
    (folder / "selected/selected.json").write_text(json.dumps({"v.mp4": entries}))


def test_every_question_gets_a_short_video(tmp_path, capsys):
    write_grey(tmp_path / "v.mp4", "libx264", np.arange(20) / 5, 5, 5)
    chosen(tmp_path, [[1, 7], [0, 19]])
    config = ExportFramesConfig(selected=tmp_path / "selected", videos=tmp_path, output=tmp_path / "out", processes=1)
    main(config)
    entries = json.loads((tmp_path / "out/index.json").read_text())["videos"]["v.mp4"]
    assert [entry["question_id"] for entry in entries] == ["q/0", "q/1"]
    assert [entry["question"] for entry in entries] == ["Which 0?", "Which 1?"]
    for entry, numbers in zip(entries, [[1, 7], [0, 19]]):
        assert_shows(tmp_path / "out" / entry["file"], tmp_path / "v.mp4", numbers)
    main(config)
    assert capsys.readouterr().err.endswith("out: made before from the same inputs and settings, kept\n")
    chosen(tmp_path, [[2, 3]])
    with pytest.raises(InputError, match="out: exists, made with other inputs selected"):
        main(config)
    main(dataclasses.replace(config, overwrite=True))
    assert [path.name for path in (tmp_path / "out/videos").iterdir()] == ["q%2F0.mp4"]


def test_choices_that_cannot_be_exported(tmp_path):
    chosen(tmp_path, [[0]])
    config = ExportFramesConfig(selected=tmp_path / "selected", videos=tmp_path, output=tmp_path / "out", processes=1)
    with pytest.raises(InputError, match=r"v\.mp4: no such file"):
        main(config)
    assert not (tmp_path / "out").exists()
    old = {"v.mp4": [{"question_id": "1", "question": "Which?", "frames": [0.5]}]}
    (tmp_path / "selected/selected.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match=r"selected\.json: has no numbers of frames; choose them again"):
        main(config)
