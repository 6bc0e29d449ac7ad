"""Reads the packets of a video file, without decoding them, to learn when each frame is on screen.

Packets carry the time stamps and the key-frame flags of the frames, so variable frame rates and first time stamps other
than 0 need no further care, and `video.frames.decoder` knows where it may begin to decode.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from etils import epath

from mlx_pretrain.errors import InputError

# The part of the promised duration that may be missing at the end: headers are not exact.
MISSING = 0.05
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails


class Track(NamedTuple):
    """A file's video track as its packets describe it.

    Attributes:
      index: the stream's number in the file.
      stamps: int64 `[frames]`, presentation time stamps as in the file, ascending; meaningless unless `ordered`.
      times: float64 `[frames]`, when each frame appears, seconds from the first one.
      duration: seconds from the first frame to the end of the last.
      keys: int64 `[keys, 2]`, the number of each key frame and the time stamp to seek for it.
      ordered: True where a decoded frame's time stamp gives its number; else frames are counted from the beginning.
      pixel_aspect: a pixel's width divided by its height.
      damage: places that cannot be read.
    """

    index: int
    stamps: np.ndarray
    times: np.ndarray
    duration: float
    keys: np.ndarray
    ordered: bool
    pixel_aspect: float
    damage: tuple[str, ...]


class _Packet(NamedTuple):
    """The fields of a packet that outlive its container; times in units of the stream's time base."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool


@contextlib.contextmanager
def open_video(path: epath.PathLike) -> Iterator[av.container.InputContainer]:
    """Opens a file; inside the block, FFmpeg's errors become an InputError that names it."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be decoded as a video (FFmpeg says: {error.strerror})") from None


def read_packets(
    container: av.container.InputContainer, damage: list[str], stream: av.VideoStream | None = None
) -> Iterator[av.Packet]:
    """Yields the packets of one stream or of all, and the empty ones that flush decoders.

    Continues behind damage, whose place is added to the list `damage`.
    """
    progress, position = True, "the beginning"
    while progress:
        progress = False
        try:
            for packet in container.demux(stream) if stream else container.demux():
                if packet.size:
                    progress, position = True, packet_position(packet)
                yield packet
            return
        except av.FFmpegError as error:
            damage.append(f"behind {position} (FFmpeg says: {error.strerror})")


def packet_position(packet: av.Packet) -> str:
    """A packet's time stamp or, without one, its byte, for messages."""
    stamp = packet.pts if packet.dts is None else packet.dts
    return f"byte {packet.pos}" if stamp is None else f"time stamp {float(stamp * packet.time_base):.2f} s"


def decoding_failure(packet: av.Packet, error: av.FFmpegError) -> str:
    """Names the packet that cannot be decoded and the decoder's reason, for messages."""
    return f"at {packet_position(packet)} (the decoder says: {error.strerror})"


def first_damage(damage: Sequence[str]) -> str:
    """The end of a message: the first damage, if any."""
    return f": damaged {damage[0]}" if damage else ""


def scan_track(path: epath.PathLike) -> Track:
    """Reads all packets of a file.

    Raises:
      InputError: the file is missing, is no video, has no moving pictures or no decoder for them, or ends early.
    """
    damage: list[str] = []
    packets: list[_Packet] = []
    last = 0.0
    with open_video(path) as container:
        stream = _video_stream(path, container)
        index = stream.index
        # Without a length in the track, another track may be longer, so all are read.
        for packet in read_packets(container, damage, stream if stream.duration else None):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                last = max(last, (stamp + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream_index == index and packet.size and not packet.is_discard:
                if packet.is_corrupt:
                    damage.append(f"at {packet_position(packet)} (FFmpeg says: corrupt packet)")
                packets.append(_Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
        if not packets:
            raise InputError(f"{path}: no frames in it")
        if container.format.name == "avi" and stream.frames > len(packets):  # AVI's time stamps count frames
            damage.append(f"({stream.frames - len(packets)} of {stream.frames} frames are missing)")
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        unit, rate = stream.time_base, float(stream.guessed_rate or stream.average_rate or 25)
        stamps, ordered = _time_stamps(packets, 1 / unit, stream.codec_context.has_b_frames)
        if stamps is None:  # without time stamps, all frames last equally long
            times = np.arange(len(packets)) / rate
            return Track(index, times, times, len(packets) / rate, np.zeros((0, 2), int), False, pixel_aspect,
                         tuple(damage))
        promised = float(stream.duration * unit) if stream.duration else (container.duration or 0) / av.time_base
        final = max(packets, key=lambda packet: packet.pts) if ordered else packets[-1]
        end = stamps[-1] + (final.duration or (round(np.median(np.diff(stamps))) if len(stamps) > 1 else
                                               round(1 / (rate * unit))))
        reached = float(max(end, end - stamps[0]) * unit)
        if not stream.duration:
            reached = max(reached, last, last - float(stamps[0] * unit))
        if reached < promised * (1 - MISSING):
            raise InputError(f"{path}: ends after {reached:.2f} of {promised:.2f} s; truncated?")
    keys = [(packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts))
            for packet in packets if packet.is_key and ordered]
    if ordered and not (packets[0].is_key and packets[0].pts == stamps[0]):
        first = _first_stamp(path, index)
        stamps = stamps if first is None else stamps[np.searchsorted(stamps, first) :]
    keys = np.array(sorted(key for key in keys if key[0] >= stamps[0]), np.int64).reshape(-1, 2)
    keys[:, 0] = np.searchsorted(stamps, keys[:, 0])
    # One division, so that 4,400 thousandths are 4.4.
    times = (stamps - stamps[0]) * unit.numerator / unit.denominator
    return Track(index, stamps, times, float((end - stamps[0]) * unit), keys, ordered, pixel_aspect, tuple(damage))


def _video_stream(path: epath.PathLike, container: av.container.InputContainer) -> av.VideoStream:
    """Returns the default stream with moving pictures, or the first; covers and thumbnails don't count."""
    moving = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not moving:
        types = ["cover picture" if stream.type == "video" else stream.type for stream in container.streams]
        raise InputError(f"{path}: no moving pictures in it ({', '.join(types) or 'no tracks at all; truncated?'})")
    stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
    if stream.codec_context is None:
        raise InputError(f"{path}: FFmpeg has no decoder for the codec of its pictures")
    return stream


def _time_stamps(packets: Sequence[_Packet], second: float, delayed: bool) -> tuple[np.ndarray | None, bool]:
    """Sorts the packets' time stamps into the order of presentation.

    Args:
      packets: the track's packets in the order of the file.
      second: units of the time stamps in a second.
      delayed: True where the decoder may give frames in another order.

    Returns:
      int64 `[frames]`, ascending, or None where the packets have no usable ones; and `Track.ordered`.
    """
    pts, dts = [packet.pts for packet in packets], [packet.dts for packet in packets]
    known = [stamp for stamp in dts if stamp is not None]
    # Several recordings were joined: time runs backwards by more than a second.
    if any(later < earlier - second for earlier, later in itertools.pairwise(known)):
        return None, False
    if None not in pts and len(set(pts)) == len(pts):
        stamps = np.sort(np.array(pts, np.int64))
        # AVI has decoding times alone; as presentation times these are the right values, but of other frames.
        return stamps, not delayed or stamps.tolist() != pts
    if None not in dts and len(set(dts)) == len(dts):
        return np.array(dts, np.int64), False
    return None, False


def _first_stamp(path: epath.PathLike, index: int) -> int | None:
    """Returns the time stamp of the first decodable frame of a recording that begins between key frames.

    None where something before it is damaged: the packets' own stamps are kept then.
    """
    damage: list[str] = []
    with open_video(path) as container:
        for packet in read_packets(container, damage, container.streams[index]):
            try:
                for frame in packet.decode():
                    if frame.pts is not None:
                        return None if damage else frame.pts
            except av.FFmpegError as error:
                damage.append(decoding_failure(packet, error))
    raise InputError(f"{path}: no frame in it can be decoded{first_damage(damage)}")
