"""Wrong files among the videos of questions: one line each in video.decode and video.select; key frames in a store."""

import json
import re
import struct

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey
from tests.video.frames.test_reading import write_sound
from video import decode, select
from video.frame_choice.selector import Selector
from video.frames.frame_store import FrameStore
from video.frames.reading import read_frames

FIFTHS = np.arange(50) / 5


def promise_two_hours(path):
    """Changes the length that the headers of a file state to two hours; of a fragmented MP4, or a Matroska file."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".mkv":
        start = content.index(b"\x44\x89\x88") + 3
        content[start : start + 8] = struct.pack(">d", 7_200_000)
    for box in (b"mvhd", b"mdhd") if path.suffix == ".mp4" else ():
        start = content.index(box) + 16
        unit = int.from_bytes(content[start : start + 4], "big")
        content[start + 4 : start + 8] = (7200 * unit).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos, one of them good, and a question on each."""
    folder = tmp_path_factory.mktemp("videos")
    whole = write_grey(folder / "good.mp4", "libx264", FIFTHS, 5, 5, key_frames=10).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    index = whole.index(b"moov")
    (folder / "cut.mp4").write_bytes(whole[: index // 2])
    (folder / "cut_index.mp4").write_bytes(whole[: (index + len(whole)) // 2])
    write_grey(folder / "cut.mkv", "libx264", FIFTHS, 5, 1000)
    content = (folder / "cut.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    write_sound(folder / "sound.mp4")
    for name in ("promise.mp4", "promise.mkv"):
        write_grey(folder / name, "libx264", FIFTHS, 5, 1000, container={"movflags": "frag_keyframe+empty_moov"}
                   if name == "promise.mp4" else {})
        promise_two_hours(folder / name)
    (folder / "q.jsonl").write_text("".join(
        json.dumps({"id": name, "video": name, "question": "Which?", "answer": "this"}) + "\n" for name in [
            "good.mp4", *REASONS]))
    return folder


REASONS = {
    "empty.mp4": r"empty\.mp4: cannot be decoded as a video \(FFmpeg says: Invalid data .*\)",
    "cut.mp4": r"cut\.mp4: cannot be decoded as a video \(FFmpeg says: Invalid data .*\)",
    # Depends on the byte.
    "cut_index.mp4": r"cut_index\.mp4: (no moving .*\(no tracks at all; truncated\?\)|cannot be decoded as a video .*)",
    "cut.mkv": r"cut\.mkv: ends after \d\.\d+ of 10\.00 s; truncated\?",
    "sound.mp4": r"sound\.mp4: no moving pictures in it \(audio\)",
    "promise.mp4": r"promise\.mp4: ends after 10\.00 of 7200\.00 s; truncated\?",
    "promise.mkv": r"promise\.mkv: ends after 10\.00 of 7200\.00 s; truncated\?",
    "none.mp4": r"none\.mp4: no such file",
}


@pytest.mark.parametrize("key_frames", [False, True])
def test_wrong_files_are_named_and_the_others_decoded(folder, tmp_path, capsys, key_frames):
    config = decode.DecodeConfig(questions=str(folder / "q.jsonl"), output=str(tmp_path / "frames"), size=16,
                                 candidates=4, processes=1, key_frames=key_frames)
    decode.main(config)
    said = capsys.readouterr().err
    store = FrameStore(tmp_path / "frames")
    assert store.videos == ["good.mp4"] and set(store.rejected) == set(REASONS)
    for name, reason in REASONS.items():
        assert re.fullmatch(rf"{re.escape(str(folder))}/{reason}", store.rejected[name])
        assert said.count(f"rejected: {store.rejected[name]}\n") == 1
    read = read_frames(folder / "good.mp4", 16, count=4, key_frames=key_frames)
    np.testing.assert_array_equal(store.frames()[0], read.frames)
    np.testing.assert_array_equal(store.times[0], read.times)
    assert store.times[0].tolist() == ([2, 4, 6, 8] if key_frames else [1.25, 3.75, 6.25, 8.75])
    with pytest.raises(InputError, match=r"made with key_frames = "):
        decode.main(decode.dataclasses.replace(config, key_frames=not key_frames))


@pytest.mark.parametrize("settings", [{}, {"key_frames": True}])
def test_wrong_files_are_rejected_by_a_selection(folder, tmp_path, settings):
    select.main(select.SelectFramesConfig(
        questions=str(folder / "q.jsonl"), output=str(tmp_path / "out"), processes=1, compilation_cache=None,
        selector=Selector(None, candidates=4, num_frames=2, **settings)))
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == list(REASONS)
    for reject in rejects:
        assert re.fullmatch(rf"{re.escape(str(folder))}/{REASONS[reject['id']]}", reject["reason"])
    chosen = json.loads((tmp_path / "out/selected_frames.json").read_text())
    assert chosen == [[20, 40] if settings else [18, 43]] + [[]] * len(REASONS)


def test_nothing_is_written_where_every_file_is_wrong(folder, tmp_path):
    (folder / "wrong.jsonl").write_text(json.dumps(
        {"id": "a", "video": "promise.mp4", "question": "Which?", "answer": "this"}) + "\n")
    with pytest.raises(InputError, match=r"none of 1 videos can be decoded") as error:
        decode.main(decode.DecodeConfig(questions=str(folder / "wrong.jsonl"), output=str(tmp_path / "frames"), size=16,
                                        candidates=4, processes=1))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"no video can be decoded; the first: .*promise\.mp4: ends after") as error:
        select.main(select.SelectFramesConfig(
            questions=str(folder / "wrong.jsonl"), output=str(tmp_path / "out"), processes=1, compilation_cache=None,
            selector=Selector(None, candidates=4, num_frames=2)))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
