"""Frames of real files: containers, variable rates, rotation, and what is no whole video."""

import av
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_video
from video.frames import moments, read_frames

EVEN = np.arange(80) / 10


def numbers(frames):
    """Which frame it is, by its red in the lower half."""
    return frames[:, -6, frames.shape[2] // 2, 0].astype(int) / 3


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"),
                                         ("a.avi", "mpeg4")])
def test_the_frame_on_screen_at_each_moment(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec, EVEN)
    found = read_frames(path, 32, count=16)
    assert found.frames.shape == (16, 32, 32, 3) and found.frames.dtype == np.uint8
    np.testing.assert_allclose(found.times, moments(found.duration, 16))
    shown = np.searchsorted(EVEN, found.times + 1e-9, side="right") - 1
    assert np.abs(numbers(found.frames) - shown).max() < 4.5  # colours of video are rough
    assert found.frames[3, 4, 4, 1] > 150 > 50 > found.frames[3, -4, 4, 1]
    assert found.duration == pytest.approx(8.0, abs=0.15)


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(20, 300, 80)) / 1000
    times -= times[0]
    path = write_video(tmp_path / "a.mp4", "libx264", times)
    found = read_frames(path, 32, count=40)
    shown = np.searchsorted(times, found.times, side="right") - 1
    assert np.abs(numbers(found.frames) - shown).max() < 2


def test_jumps_to_key_frames_find_the_same(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", np.arange(600) / 5, key_frames=25)
    few = read_frames(path, 32, count=12)  # ten seconds apart: it jumps
    many = read_frames(path, 32, count=600)
    places = np.searchsorted(many.times, few.times - 0.1)
    near = [many.frames[max(place - 1, 0) : place + 2] for place in places]
    assert all((frame == options).all(axis=(1, 2, 3)).any() for frame, options in zip(few.frames, near))


def test_given_moments(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", EVEN)
    found = read_frames(path, 16, times=[0.0, 0.05, 4.45, 4.45, 7.92])
    assert np.abs(numbers(found.frames) - [0, 0, 44, 44, 79])[:, None].max() < 2
    with pytest.raises(InputError, match="times must ascend"):
        read_frames(path, 16, times=[3.0, 1.0])
    with pytest.raises(InputError, match="times must ascend"):
        read_frames(path, 16, times=[30.0])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_turned_as_the_file_says(tmp_path, rotation):
    upright = read_frames(write_video(tmp_path / "a.mp4", "libx264", EVEN), 32, count=3).frames
    turned = read_frames(write_video(tmp_path / "b.mp4", "libx264", EVEN, rotation=rotation), 32, count=3).frames
    expected = np.rot90(upright, rotation // 90, axes=(1, 2))
    assert np.abs(turned.astype(int) - expected).max() < 12
    # Positive is counter-clockwise, as FFmpeg has it: green, above, comes to the left with 90 degrees.
    sides = {90: (16, 4), 180: (27, 16), 270: (16, 27)}
    assert turned[(1, *sides[rotation], 1)] > 150


def test_crop_keeps_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", EVEN, width=128, height=32)
    stretched, cropped = (read_frames(path, 32, count=2, fit=fit).frames for fit in ("stretch", "crop"))
    assert stretched.shape == cropped.shape == (2, 32, 32, 3)
    with pytest.raises(InputError, match="fit = 'pad'"):
        read_frames(path, 32, count=2, fit="pad")


def test_what_is_no_whole_video(tmp_path):
    whole = write_video(tmp_path / "a.mkv", "libx264", EVEN).read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"half\.mkv: ends after .* of 7\.9. s; truncated"):
        read_frames(tmp_path / "half.mkv", 16, count=4)
    mp4 = write_video(tmp_path / "a.mp4", "libx264", EVEN).read_bytes()
    for name, content in {"half.mp4": mp4[: len(mp4) // 2], "text.mp4": b"no video\n" * 50, "empty.mp4": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be decoded as a video"):
            read_frames(tmp_path / name, 16, count=4)
    with pytest.raises(InputError, match="no such file"):
        read_frames(tmp_path / "none.mp4", 16, count=4)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4: no pictures in it \(audio\)"):
        read_frames(tmp_path / "sound.mp4", 16, count=4)


def test_sound_does_not_disturb(tmp_path):
    plain = read_frames(write_video(tmp_path / "a.mp4", "libx264", EVEN), 16, count=5)
    both = read_frames(write_video(tmp_path / "b.mp4", "libx264", EVEN, audio=True), 16, count=5)
    assert np.abs(plain.frames.astype(int) - both.frames).max() < 12  # x264's threads do not always agree
