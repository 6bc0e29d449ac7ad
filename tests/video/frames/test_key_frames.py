"""Key frames as candidates: the same pictures, numbers and times as by decoding everything, in every container."""

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.conftest import write_grey
from video.frames import reading
from video.frames.reading import nearest_key_frames, read_frames

FRAMES = 57


def decoded_whole(path):
    """Decodes all frames, resized as by `read_frames`: uint8 `[frames, 16, 16, 3]`, and which are key frames."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return (np.array([frame.reformat(16, 16, format="rgb24", interpolation="BICUBIC").to_ndarray()
                      for frame in frames]), np.array([frame.key_frame for frame in frames]))


def nearest(keys, count):
    """Returns the key frame nearest to each of `count` even times."""
    return [min(keys, key=lambda key: abs(key - time)) for time in (np.arange(count) + 0.5) * FRAMES / count]


@pytest.fixture
def exactly(monkeypatch):
    """Lists the numbers of frames that are decoded from the key frame before them."""
    numbers, frame = [], reading.FrameDecoder.frame
    monkeypatch.setattr(reading.FrameDecoder, "frame",
                        lambda decoder, number: numbers.append(number) or frame(decoder, number))
    return numbers


@pytest.mark.parametrize("name, codec, settings", [
    ("a.mp4", "libx264", {}),
    ("a.mp4", "libx264", {"b_frames": 3}),
    ("fragments.mp4", "libx264", {"b_frames": 2, "container": {"movflags": "frag_keyframe+empty_moov"}}),
    ("late.mp4", "libx264", {"offset": 5, "container": {"avoid_negative_ts": "disabled"}}),
    ("open.mkv", "libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1:b-pyramid=normal"}}),
    ("hevc.mp4", "libx265", {"b_frames": 3, "options": {"x265-params": "open-gop=1:log-level=none:pools=none"}}),
    ("vp9.webm", "libvpx-vp9", {"options": {"lag-in-frames": "10", "cpu-used": "8"}}),
    ("vp8.webm", "libvpx", {"options": {"lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8"}}),
    ("a.ts", "libx264", {"b_frames": 2}),
    ("a.flv", "libx264", {"b_frames": 2}),
    ("mpeg4.avi", "mpeg4", {"b_frames": 2}),
])
def test_key_frames_alone_are_those_of_decoding_everything(tmp_path, exactly, name, codec, settings):
    path = write_grey(tmp_path / name, codec, np.arange(FRAMES) / 5, 5, 5, **{"key_frames": 6, **settings})
    whole, is_key = decoded_whole(path)
    keys = np.flatnonzero(is_key)
    assert len(whole) == FRAMES and len(keys) > 5
    chosen = read_frames(path, 16, count=4, key_frames=True)
    assert not exactly and not chosen.damage
    np.testing.assert_array_equal(chosen.numbers, nearest(keys, 4))
    np.testing.assert_allclose(chosen.times, chosen.numbers / 5)
    np.testing.assert_array_equal(chosen.frames, whole[chosen.numbers])
    # More candidates than key frames: each key frame once, and between them the frames on screen.
    chosen = read_frames(path, 16, count=20, key_frames=True)
    assert (np.diff(chosen.numbers) > 0).all() and set(nearest(keys, 20)) <= set(chosen.numbers)
    np.testing.assert_array_equal(chosen.numbers, np.floor(chosen.times * 5 + 1e-6))
    np.testing.assert_array_equal(chosen.frames, whole[chosen.numbers])
    assert len(exactly) == 20 - len(set(nearest(keys, 20)))


@pytest.mark.parametrize("name, settings", [
    ("h264.avi", {"b_frames": 2}),  # no presentation times
    ("a.h264", {"b_frames": 2}),  # no times at all
    ("refresh.mkv", {"options": {"intra-refresh": "1"}}),  # frames marked as key frames are incomplete
])
def test_exact_frames_where_no_key_frame_can_be_decoded_alone(tmp_path, name, settings):
    path = write_grey(tmp_path / name, "libx264", np.arange(FRAMES) / 5, 5, 5, **{"key_frames": 10, **settings})
    whole, _ = decoded_whole(path)
    chosen = read_frames(path, 16, count=8, key_frames=True)
    np.testing.assert_array_equal(chosen.frames, whole[chosen.numbers])
    exact = read_frames(path, 16, count=8)
    begins = chosen.numbers == 0  # the first frame of a refresh is a whole one
    np.testing.assert_array_equal(chosen.numbers[~begins], exact.numbers[~begins])


def test_a_damaged_key_frame_is_replaced(tmp_path):
    path = write_grey(tmp_path / "a.mp4", "libx264", np.arange(FRAMES) / 5, 5, 1000, key_frames=6)
    with av.open(str(path)) as container:
        keys = {float(packet.pts * packet.time_base): bytes(packet) for packet in container.demux(video=0)
                if packet.size and packet.is_keyframe}
    times = list(keys)[1:4]
    packet = keys[times[1]]
    content = bytearray(path.read_bytes())
    start = content.index(packet)
    content[start + 4 : start + len(packet)] = b"\xff" * (len(packet) - 4)
    path.write_bytes(content)
    chosen = read_frames(path, 16, times=times, key_frames=True)
    assert chosen.times[::2].tolist() == times[::2] and "a.mp4: damaged at time stamp 2." in chosen.damage


SECONDS = st.floats(0, 100, allow_nan=False, width=16)


@given(st.lists(SECONDS, max_size=12).map(sorted), st.lists(SECONDS, max_size=12, unique=True).map(sorted))
def test_each_key_frame_goes_to_the_nearest_of_its_times(times, keys):
    taken = nearest_key_frames(np.array(times), np.array(keys)).tolist()
    closest = [min(range(len(keys)), key=lambda key: abs(keys[key] - time)) if keys else -1 for time in times]
    rivals = {key: [time for time, own in zip(times, closest) if own == key] for key in closest}
    owner = {key: min(rivals[key], key=lambda time: abs(keys[key] - time)) for key in rivals if key >= 0}
    assert taken == [key if owner.get(key) == time else -1 for key, time in zip(closest, times)]
    shown = [time if key < 0 else keys[key] for time, key in zip(times, taken)]
    assert shown == sorted(shown)
