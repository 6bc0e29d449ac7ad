"""Times the candidates of an hours-long video: exact frames, key frames, and a second look at a few stretches.

    python benchmarks/video_decode.py [--video=FILE] [--seconds=7200] [--candidates=128] [--size=224] [--stretches=4]
        [--rounds=3] [--whole] [--quick]

Without a file it makes one: a minute of clouds that drift and change every six seconds, beside noise for sound, is
encoded as H.264 (640 x 360, 24 frames a second, a key frame every 250 frames and every minute) and AAC, and its packets
are repeated. Every key frame taken is compared with the exact frame at its time. --whole also decodes every frame once.
The last line is JSON: {"seconds": {"scan": [...], "exact": [...], "key_frames": [...], "second_look": [...]},
"processor_seconds": ...}; reading in any way includes the scan of all packets.
"""

import argparse
import fractions
import json
import pathlib
import tempfile
import time

import av
import numpy as np

from video.frame_choice.coarse_to_fine import times_within
from video.frames.reading import read_frames
from video.frames.track import scan_track

_FPS, _WIDTH, _HEIGHT, _SOUND_RATE = 24, 640, 360, 48_000
_MINUTE = 60


def write_minute(path: pathlib.Path) -> None:
    """Encodes a minute of moving pictures with sound."""
    rng = np.random.default_rng(0)
    noise = av.VideoFrame.from_ndarray(rng.integers(0, 256, (72, 128, 3)).astype(np.uint8), format="rgb24")
    clouds = noise.reformat(4 * _WIDTH, 4 * _HEIGHT, format="rgb24", interpolation="BICUBIC").to_ndarray()
    options = {"preset": "veryfast", "crf": "28", "x264-params": "scenecut=0:keyint=250"}
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        sound = output.add_stream("aac", rate=_SOUND_RATE)
        for number in range(_MINUTE * _FPS):
            if number % (6 * _FPS) == 0:
                x, y = rng.integers(0, 2 * _WIDTH), rng.integers(0, 2 * _HEIGHT)
                speed = rng.integers(-3, 4, 2)
            left, upper = np.clip([x, y] + speed * (number % (6 * _FPS)), 0, [3 * _WIDTH, 3 * _HEIGHT])
            picture = np.ascontiguousarray(clouds[upper : upper + _HEIGHT, left : left + _WIDTH])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
        for place in range(0, _MINUTE * _SOUND_RATE, 1024):
            samples = av.AudioFrame.from_ndarray(rng.normal(0, 0.05, (1, 1024)).astype(np.float32), "fltp", "mono")
            samples.rate, samples.pts, samples.time_base = _SOUND_RATE, place, fractions.Fraction(1, _SOUND_RATE)
            output.mux(sound.encode(samples))
        output.mux(sound.encode())


def repeat(minute: pathlib.Path, path: pathlib.Path, minutes: int) -> None:
    """Writes the packets of a file again and again, a minute later each time."""
    with av.open(str(minute)) as source:
        packets = [(packet.stream.index, packet.pts, packet.dts, packet.duration, packet.time_base, packet.is_keyframe,
                    bytes(packet)) for packet in source.demux()
                   # A frame of sound that ends in the next minute would overlap that minute's first one.
                   if packet.size and (packet.stream.type == "video" or (packet.pts >= 0 and
                                       (packet.pts + packet.duration) * packet.time_base <= _MINUTE))]
        packets.sort(key=lambda packet: packet[2] * packet[4])
        with av.open(str(path), "w") as output:
            streams = [output.add_stream_from_template(stream) for stream in source.streams]
            for number in range(minutes):
                for index, pts, dts, duration, unit, is_key, content in packets:
                    packet, later = av.Packet(content), round(number * _MINUTE / unit)
                    packet.pts, packet.dts, packet.duration, packet.time_base = pts + later, dts + later, duration, unit
                    packet.stream, packet.is_keyframe = streams[index], is_key
                    output.mux(packet)


def clocked(function, *args, **settings):
    """Calls a function; returns its result, the seconds and the processor seconds it took."""
    started, used = time.perf_counter(), time.process_time()
    result = function(*args, **settings)
    return result, time.perf_counter() - started, time.process_time() - used


def measure(path: pathlib.Path, candidates: int, size: int, stretches: int) -> dict[str, tuple[float, float]]:
    """Reads the candidates in every way; stops where the key frames are not the exact ones.

    Returns:
      way -> seconds and processor seconds.
    """
    spent = {}

    def clock(name, function, *args, **settings):
        result, *spent[name] = clocked(function, *args, **settings)
        print(f"{name}: {spent[name][0]:.2f} s, {spent[name][1]:.2f} of a processor", flush=True)
        return result

    clock("scan", scan_track, path)
    keys = clock("key_frames", read_frames, path, size, count=candidates, key_frames=True)
    clock("exact", read_frames, path, size, count=candidates)
    scores = np.random.default_rng(0).random(candidates)
    times = times_within(keys.times, keys.duration, scores, stretches)
    clock("second_look", read_frames, path, size, times=times)
    same = read_frames(path, size, times=keys.times)
    assert (same.numbers == keys.numbers).all() and (same.frames == keys.frames).all(), "not the exact frames"
    return spent


def decode_whole(path: pathlib.Path) -> None:
    """Decodes every frame."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for _ in container.decode(video=0):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=pathlib.Path, help="a file of your own")
    parser.add_argument("--seconds", type=float, default=7200, help="length of the file that is made")
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--stretches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="decodes every frame too")
    parser.add_argument("--quick", action="store_true", help="two minutes, eight candidates, one round: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.candidates, arguments.rounds = 120, 8, 1
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.video
        if path is None:
            path = pathlib.Path(folder) / "hours.mp4"
            write_minute(pathlib.Path(folder) / "minute.mp4")
            repeat(pathlib.Path(folder) / "minute.mp4", path, round(arguments.seconds / _MINUTE))
        track = scan_track(path)
        rounds = [measure(path, arguments.candidates, arguments.size, arguments.stretches)
                  for _ in range(arguments.rounds)]
        if arguments.whole:
            rounds[0]["whole"] = clocked(decode_whole, path)[1:]
        wall, processor = ({name: [round(spent[name][place], 2) for spent in rounds if name in spent]
                            for name in rounds[0]} for place in (0, 1))
        print(json.dumps({
            "seconds": wall, "processor_seconds": processor, "duration": round(track.duration, 2),
            "frames": len(track.times), "key_frames": len(track.keys), "candidates": arguments.candidates,
            "size": arguments.size, "megabytes": round(path.stat().st_size / 1e6, 1)}))


if __name__ == "__main__":
    main()
