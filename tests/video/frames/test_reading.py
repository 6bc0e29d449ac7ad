"""Frames of real files: containers, variable rates, rotation, damaged files and files that are no videos."""

import fractions

import av
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey, write_video
from video.frames import decoder
from video.frames.reading import even_timestamps, read_frames

EVEN = np.arange(80) / 10


def numbers(frames):
    """Reads the frames' numbers off the red of their lower halves."""
    return frames[:, -6, frames.shape[2] // 2, 0].astype(int) / 3


def write_sound(path):
    """Writes a second of silence without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"),
                                         ("a.avi", "mpeg4")])
def test_the_frame_on_screen_at_each_time(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec, EVEN)
    read = read_frames(path, 32, count=16)
    assert read.frames.shape == (16, 32, 32, 3) and read.frames.dtype == np.uint8
    np.testing.assert_allclose(read.times, even_timestamps(read.duration, 16))
    shown = np.searchsorted(EVEN, read.times + 1e-9, side="right") - 1
    assert np.abs(numbers(read.frames) - shown).max() < 4.5  # colours of video are rough
    assert read.frames[3, 4, 4, 1] > 150 > 50 > read.frames[3, -4, 4, 1]
    assert read.duration == pytest.approx(8.0, abs=0.15)


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(20, 300, 80)) / 1000
    times -= times[0]
    path = write_video(tmp_path / "a.mp4", "libx264", times)
    read = read_frames(path, 32, count=40)
    shown = np.searchsorted(times, read.times, side="right") - 1
    assert np.abs(numbers(read.frames) - shown).max() < 2


def test_jumps_to_key_frames_find_the_same(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", np.arange(600) / 5, key_frames=25)
    few = read_frames(path, 32, count=12)  # ten seconds apart: it jumps
    many = read_frames(path, 32, count=600)
    indices = np.searchsorted(many.times, few.times - 0.1)
    near = [many.frames[max(index - 1, 0) : index + 2] for index in indices]
    assert all((frame == options).all(axis=(1, 2, 3)).any() for frame, options in zip(few.frames, near))


def test_frames_at_given_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", EVEN)
    read = read_frames(path, 16, times=[0.0, 0.05, 4.45, 4.45, 7.92])
    assert np.abs(numbers(read.frames) - [0, 0, 44, 44, 79])[:, None].max() < 2
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
    stretched, cropped = (read_frames(path, 32, count=2, resize_mode=mode).frames for mode in ("stretch", "crop"))
    assert stretched.shape == cropped.shape == (2, 32, 32, 3)
    with pytest.raises(InputError, match="resize_mode = 'pad'"):
        read_frames(path, 32, count=2, resize_mode="pad")


def test_incomplete_videos_and_other_files_are_named(tmp_path):
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
    with pytest.raises(InputError, match=r"sound\.mp4: no moving pictures in it \(audio\)"):
        read_frames(write_sound(tmp_path / "sound.mp4"), 16, count=4)


def test_sound_does_not_disturb(tmp_path):
    plain = read_frames(write_video(tmp_path / "a.mp4", "libx264", EVEN), 16, count=5)
    both = read_frames(write_video(tmp_path / "b.mp4", "libx264", EVEN, audio=True), 16, count=5)
    assert np.abs(plain.frames.astype(int) - both.frames).max() < 12  # x264's threads do not always agree


FIFTHS = np.arange(50) / 5


def grey(frames):
    """Reads the frames' numbers off their grey, see `write_grey`; conversions to YUV and back take up to two levels."""
    return np.round((frames[:, 8, 8].mean(axis=-1) - 19) / 4).astype(int)


def decoded_whole(path):
    """Decodes all frames of an undamaged file, resized as by `read_frames`: uint8 `[frames, 16, 16, 3]`."""
    with av.open(str(path)) as container:
        return np.array([frame.reformat(16, 16, format="rgb24", interpolation="BICUBIC").to_ndarray()
                         for frame in container.decode(video=0)])


@pytest.fixture
def jumps(monkeypatch):
    """Makes every key frame worth a jump; lists for each jump whether it reached its frame."""
    made, jump = [], decoder.FrameDecoder._jump
    monkeypatch.setattr(decoder, "_JUMP", 2)
    monkeypatch.setattr(decoder.FrameDecoder, "_jump", lambda *args: made.append(jump(*args)) or made[-1])
    return made


@pytest.mark.parametrize("name, codec, settings, jumped", [
    ("a.mp4", "libx264", {}, True),
    ("a.mp4", "libx264", {"b_frames": 3, "key_frames": 4}, True),  # decoding times are behind the next key frame
    ("fragments.mp4", "libx264", {"b_frames": 2, "key_frames": 7,
                                  "container": {"movflags": "frag_keyframe+empty_moov"}}, True),
    ("b.mkv", "libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1:b-pyramid=normal"}}, True),
    ("refresh.mkv", "libx264", {"options": {"intra-refresh": "1"}}, False),
    ("hevc.mp4", "libx265", {"b_frames": 3, "options": {"x265-params": "open-gop=1:log-level=none:pools=none"}}, True),
    ("vp9.webm", "libvpx-vp9", {"options": {"lag-in-frames": "10", "cpu-used": "8"}}, True),
    ("vp8.webm", "libvpx", {"options": {"lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8"}}, True),
    ("a.ts", "libx264", {"b_frames": 2}, True),
    ("a.flv", "libx264", {"b_frames": 2}, True),
    ("a.mpg", "mpeg2video", {"b_frames": 2}, False),  # some time stamps appear twice
    ("mpeg4.avi", "mpeg4", {"b_frames": 2}, True),
    ("h264.avi", "libx264", {"b_frames": 2}, False),  # no presentation times: it has to be decoded whole
    ("a.h264", "libx264", {"b_frames": 2}, False),  # no times at all
])
def test_the_same_frames_as_by_decoding_everything(tmp_path, jumps, name, codec, settings, jumped):
    rate = 25 if codec == "mpeg2video" else 5
    path = write_grey(tmp_path / name, codec, np.arange(57) / rate, rate, rate,
                      **{"key_frames": 10, **settings})
    whole = decoded_whole(path)
    assert len(whole) == 57
    for count in (8, 11, 57, 80):
        chosen = read_frames(path, 16, count=count)
        expected = np.floor(chosen.times * rate + 1e-6)
        assert chosen.duration == pytest.approx(57 / rate) and not chosen.damage
        np.testing.assert_array_equal(chosen.numbers, expected)
        np.testing.assert_array_equal(chosen.frames, whole[chosen.numbers])
    assert any(jumps) == jumped


@pytest.mark.parametrize("cut", [3000, 9000, 15000])
def test_a_recording_that_begins_between_key_frames(tmp_path, cut):
    whole = write_grey(tmp_path / "a.ts", "libx264", FIFTHS, 5, 5, b_frames=2, key_frames=10).read_bytes()
    (tmp_path / "b.ts").write_bytes(whole[cut // 188 * 188 :])
    expected, chosen = decoded_whole(tmp_path / "b.ts"), read_frames(tmp_path / "b.ts", 16, count=20)
    assert chosen.duration == pytest.approx(len(expected) / 5)
    np.testing.assert_array_equal(chosen.numbers, np.floor(chosen.times * 5 + 1e-6))
    np.testing.assert_array_equal(chosen.frames, expected[chosen.numbers])


def test_lengths_are_those_of_the_video_track(tmp_path):
    for name, settings in {"audio.mkv": {"audio": 14}, "audio.mp4": {"audio": 14}, "short.mkv": {"audio": 3},
                           "late.mkv": {"offset": 5, "container": {"avoid_negative_ts": "disabled"}},
                           "late.mp4": {"offset": 5, "container": {"avoid_negative_ts": "disabled"}},
                           "late.ts": {"offset": 5, "audio": 2}}.items():
        chosen = read_frames(write_grey(tmp_path / name, "libx264", FIFTHS, 5, 1000, **settings), 16, count=10)
        assert chosen.duration == pytest.approx(10, abs=0.01), name
        assert grey(chosen.frames).tolist() == chosen.numbers.tolist() == list(range(2, 50, 5)), name


def test_truncated_files_with_other_tracks_are_named(tmp_path):
    for name, container in {"a.mkv": {}, "a.mp4": {"movflags": "faststart"}}.items():
        path = write_grey(tmp_path / name, "libx264", FIFTHS, 5, 1000, audio=14, container=container)
        whole = path.read_bytes()
        start = max(whole.find(b"mdat"), 0)
        path.write_bytes(whole[: (start + len(whole)) // 2])
        with pytest.raises(InputError, match=rf"{name}: ends after .* truncated\?"):
            read_frames(path, 16, count=4)


def test_numbers_are_those_of_decoded_frames(tmp_path):
    times = np.array([0, 7, 19, 20, 41, 70])
    path = write_grey(tmp_path / "a.mp4", "libx264", times, 1, 1000)
    assert read_frames(path, 16, times=times + 0.0).numbers.tolist() == [0, 1, 2, 3, 4, 5]
    chosen = read_frames(path, 16, times=[6.9, 7.0, 19.5, 30.0, 69.0])
    assert chosen.numbers.tolist() == grey(chosen.frames).tolist() == [0, 1, 2, 3, 4]


def with_cover(source, path):
    """Copies an MP4 file, with a JPEG as the cover that iTunes writes."""
    cover = av.CodecContext.create("mjpeg", "w")
    cover.width = cover.height = 32
    cover.pix_fmt, cover.time_base = "yuvj420p", fractions.Fraction(1, 1)
    (jpeg,) = cover.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
                           .reformat(format="yuvj420p"))
    box = lambda name, content: (len(content) + 8).to_bytes(4, "big") + name + content  # noqa: E731
    data = box(b"data", (13).to_bytes(4, "big") + bytes(4) + bytes(jpeg))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    extra = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", box(b"covr", data))))
    whole = source.read_bytes()
    start = whole.index(b"moov") - 4
    end = start + int.from_bytes(whole[start : start + 4], "big")
    assert end == len(whole)  # offsets of samples do not change
    # In front of the tracks, so that the cover becomes stream 0.
    movie = whole[start + 8 : end]
    first = int.from_bytes(movie[:4], "big")
    path.write_bytes(whole[:start] + box(b"moov", movie[:first] + extra + movie[first:]))
    return path


def test_covers_are_no_video(tmp_path):
    film = with_cover(write_grey(tmp_path / "a.mp4", "libx264", FIFTHS, 5, 1000), tmp_path / "film.mp4")
    with av.open(str(film)) as container:
        assert container.streams[0].disposition.name == "attached_pic"
    assert grey(read_frames(film, 16, count=10).frames).tolist() == list(range(2, 50, 5))
    with pytest.raises(InputError, match=r"song\.mp4: no moving pictures in it \(cover picture, audio\)"):
        read_frames(with_cover(write_sound(tmp_path / "b.mp4"), tmp_path / "song.mp4"), 16, count=4)


def damage_packet(path, number):
    """Overwrites a packet but for its first bytes, in place."""
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][number]
    whole = bytearray(path.read_bytes())
    start = whole.index(packet)
    whole[start + 4 : start + len(packet)] = b"\xff" * (len(packet) - 4)
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_goes_on_behind_damage_and_says_where(tmp_path, name):
    path = write_grey(tmp_path / name, "libx264", FIFTHS, 5, 1000, b_frames=2, key_frames=10)
    damage_packet(path, 20)
    chosen = read_frames(path, 16, count=10)
    right = [0, 1, 2, 3, 6, 7, 8, 9]
    assert grey(chosen.frames)[right].tolist() == chosen.numbers[right].tolist() == [2, 7, 12, 17, 32, 37, 42, 47]
    assert f"{name}: damaged at" in chosen.damage and " 4." in chosen.damage
    damage_packet(path, 0)
    chosen = read_frames(path, 16, count=10)
    assert grey(chosen.frames)[[0, 2, 3]].tolist() == chosen.numbers[[0, 2, 3]].tolist() and chosen.damage
    assert chosen.numbers[2:4].tolist() == [12, 17] and chosen.numbers[6:].tolist() == [32, 37, 42, 47]
    for number in (10, 30, 40):
        damage_packet(path, number)
    with pytest.raises(InputError, match=f"{name}: no frame .* can be decoded: damaged at .*decoder says"):
        read_frames(path, 16, count=10)


def test_counted_frames_of_a_damaged_file_are_refused(tmp_path):
    path = write_grey(tmp_path / "a.avi", "libx264", FIFTHS, 5, 5, b_frames=2, key_frames=10)
    damage_packet(path, 20)
    with pytest.raises(InputError, match=r"a\.avi: damaged .*without presentation times it cannot be read"):
        read_frames(path, 16, count=10)


def test_unknown_codecs_and_lost_packets_are_named(tmp_path):
    whole = write_grey(tmp_path / "a.mkv", "libx264", FIFTHS, 5, 1000).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    with pytest.raises(InputError, match=r"b\.mkv: FFmpeg has no decoder"):
        read_frames(tmp_path / "b.mkv", 16, count=4)
    path = write_grey(tmp_path / "a.ts", "libx264", FIFTHS, 5, 5, b_frames=2, key_frames=10)
    packets = bytearray(path.read_bytes())
    packets[25000:26000] = b"\xff" * 1000
    path.write_bytes(packets)
    assert "a.ts: damaged at time stamp" in read_frames(path, 16, count=4).damage


def test_the_default_one_of_several_tracks(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        streams = [output.add_stream("libx264", rate=5) for _ in range(2)]
        streams[0].disposition, streams[1].disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for level, stream in zip((20, 200), streams):
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, fractions.Fraction(1, 5)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode())
    assert read_frames(tmp_path / "a.mkv", 16, count=4).frames.min() > 190
