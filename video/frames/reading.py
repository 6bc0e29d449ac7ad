"""Frames of video files at given times, or spread evenly over the length; memory does not grow with the length.

PyAV decodes (FFmpeg's libraries). First the packets are read without decoding them: they tell when each frame appears,
so variable frame rates and first time stamps other than 0 need no further care. Every time then gets the frame that is
on screen, the same one that decoding the whole file gives; frames are turned as the file's display matrix says.
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

FITS = ("stretch", "crop")
# The part of the promised duration that may be missing at the end: headers are not exact.
_MISSING = 0.05
# Fewer frames than these are decoded rather than jumped over: a jump empties the decoder's threads.
_JUMP = 24
# Frames begin this much earlier than their times say, seconds, so that rounding does not move them behind a time.
_ROUNDING = 1e-6
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails


class Candidates(NamedTuple):
    """Frames of a video.

    Attributes:
      frames: uint8 `[frames, size, size, 3]`, red, green, blue.
      times: float64 `[frames]`, seconds from the video track's first frame.
      duration: of the video track, seconds.
      numbers: int64 `[frames]`, which of the video's frames each one is, counted from 0 in the order in which they are
        shown. A number stands there more than once where a video has fewer frames than were asked for.
      damage: what the decoder could not read, in a sentence; "" where there was nothing.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float
    numbers: np.ndarray
    damage: str = ""


def moments(duration: float, count: int) -> np.ndarray:
    """The middles of `count` equal parts of the duration: float64 `[count]`, seconds."""
    return (np.arange(count) + 0.5) * duration / count


def read_frames(
    path: epath.PathLike, size: int, *, count: int | None = None, times: Sequence[float] | None = None,
    fit: str = "stretch",
) -> Candidates:
    """Decodes a video's frames at some moments.

    Args:
      path: local; any container and codec that FFmpeg knows: mp4, webm, avi, mkv, ...
      size: pixels of a side of the square frames; bicubic.
      count: so many, in the middles of equal parts of the duration; or
      times: these moments, seconds from the first frame, ascending.
      fit: "stretch" the whole frame (SigLIP), or scale its shorter side and "crop" the middle (CLIP).

    Raises:
      InputError: there is no such file, it is no video, has no moving pictures, cannot be decoded, or ends early.
    """
    if fit not in FITS:
        raise InputError(f"fit = {fit!r}: not one of {', '.join(FITS)}")
    if (count is None) == (times is None):
        raise InputError(f"{path}: give either count or times")
    track = _scan(path)
    wanted = moments(track.duration, count) if times is None else np.asarray(times, np.float64)
    if len(wanted) and (np.diff(wanted) < 0).any() | (wanted[0] < 0) | (wanted[-1] > track.duration + _ROUNDING):
        raise InputError(f"{path}: times must ascend from 0 to the duration, {track.duration:.3f} s")
    try:
        return _read(path, track, wanted, size, fit)
    except _OutOfOrderError:
        return _read(path, track._replace(ordered=False), wanted, size, fit)


def try_frames(path: str, *, size: int, count: int, fit: str) -> Candidates | str:
    """`read_frames`, or why it failed."""
    try:
        return read_frames(path, size, count=count, fit=fit)
    except InputError as error:
        return str(error)


def notes(video: str, found: Candidates, count: int) -> list[str]:
    """What is to be said of a video of which `count` different frames are needed, a sentence each."""
    different = len(np.unique(found.numbers))
    few = [f"{video}: {different} different frames, fewer than the {count} asked for"] if different < count else []
    return [found.damage, *few] if found.damage else few


class _OutOfOrderError(Exception):
    """The time stamps of decoded frames do not ascend."""


class _Track(NamedTuple):
    """What the packets of a video track tell, without decoding.

    Attributes:
      index: of the stream.
      stamps: int64 `[frames]`, presentation time stamps as in the file, ascending; of no use unless `ordered`.
      times: float64 `[frames]`, when each frame appears, seconds from the first one.
      duration: from the first frame to the end of the last, seconds.
      keys: int64 `[keys, 2]`: number of a key frame, and the time stamp to seek for it.
      ordered: decoded frames are known by their time stamps; otherwise they have to be counted from the beginning.
      damage: where the file cannot be read.
    """

    index: int
    stamps: np.ndarray
    times: np.ndarray
    duration: float
    keys: np.ndarray
    ordered: bool
    damage: tuple[str, ...]


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    key: bool


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[av.container.InputContainer]:
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be decoded as a video (FFmpeg says: {error.strerror})") from None


def _video_stream(path: epath.PathLike, container: av.container.InputContainer) -> av.VideoStream:
    """The default one of the streams with moving pictures, or the first: covers and thumbnails are none."""
    moving = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not moving:
        types = ["cover picture" if stream.type == "video" else stream.type for stream in container.streams]
        raise InputError(f"{path}: no moving pictures in it ({', '.join(types) or 'empty'})")
    stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
    if stream.codec_context is None:
        raise InputError(f"{path}: FFmpeg has no decoder for the codec of its pictures")
    return stream


def _packets(
    container: av.container.InputContainer, damage: list[str], stream: av.VideoStream | None = None
) -> Iterator[av.Packet]:
    """Packets of one stream or of all, and the empty ones that flush decoders; goes on behind damage."""
    progress, place = True, "the beginning"
    while progress:
        progress = False
        try:
            for packet in container.demux(stream) if stream else container.demux():
                if packet.size:
                    progress, place = True, _place(packet)
                yield packet
            return
        except av.FFmpegError as error:
            damage.append(f"behind {place} (FFmpeg says: {error.strerror})")


def _place(packet: av.Packet) -> str:
    """Where a packet is, for messages."""
    stamp = packet.pts if packet.dts is None else packet.dts
    return f"byte {packet.pos}" if stamp is None else f"time stamp {float(stamp * packet.time_base):.2f} s"


def _scan(path: epath.PathLike) -> _Track:
    """Reads all packets of a file; raises InputError as `read_frames`."""
    damage: list[str] = []
    packets: list[_Packet] = []
    last = 0.0
    with _opened(path) as container:
        stream = _video_stream(path, container)
        index = stream.index
        # A track without a length of its own may be shorter than others, so all count.
        for packet in _packets(container, damage, stream if stream.duration else None):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                last = max(last, (stamp + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream_index == index and packet.size and not packet.is_discard:
                if packet.is_corrupt:
                    damage.append(f"at {_place(packet)} (FFmpeg says: corrupt packet)")
                packets.append(_Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
        if not packets:
            raise InputError(f"{path}: no frames in it")
        if container.format.name == "avi" and stream.frames > len(packets):  # its time stamps count frames
            damage.append(f"({stream.frames - len(packets)} of {stream.frames} frames are missing)")
        unit, rate = stream.time_base, float(stream.guessed_rate or stream.average_rate or 25)
        stamps, ordered = _stamps(packets, 1 / unit, stream.codec_context.has_b_frames)
        if stamps is None:  # frames of one length
            times = np.arange(len(packets)) / rate
            return _Track(index, times, times, len(packets) / rate, np.zeros((0, 2), int), False, tuple(damage))
        promised = float(stream.duration * unit) if stream.duration else (container.duration or 0) / av.time_base
        final = max(packets, key=lambda packet: packet.pts) if ordered else packets[-1]
        end = stamps[-1] + (final.duration or (round(np.median(np.diff(stamps))) if len(stamps) > 1 else
                                               round(1 / (rate * unit))))
        reached = float(max(end, end - stamps[0]) * unit)
        if not stream.duration:
            reached = max(reached, last, last - float(stamps[0] * unit))
        if reached < promised * (1 - _MISSING):
            raise InputError(f"{path}: ends after {reached:.2f} of {promised:.2f} s; truncated?")
    keys = [(packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts))
            for packet in packets if packet.key and ordered]
    if ordered and not (packets[0].key and packets[0].pts == stamps[0]):
        first = _first_stamp(path, index)
        stamps = stamps if first is None else stamps[np.searchsorted(stamps, first) :]
    keys = np.array(sorted(key for key in keys if key[0] >= stamps[0]), np.int64).reshape(-1, 2)
    keys[:, 0] = np.searchsorted(stamps, keys[:, 0])
    # One division, so that 4,400 thousandths are 4.4.
    times = (stamps - stamps[0]) * unit.numerator / unit.denominator
    return _Track(index, stamps, times, float((end - stamps[0]) * unit), keys, ordered, tuple(damage))


def _stamps(packets: Sequence[_Packet], second: float, delayed: bool) -> tuple[np.ndarray | None, bool]:
    """Time stamps int64 `[frames]` of frames as they are shown, or None; whether decoded frames can be known by them.

    Args:
      packets: in the order of the file.
      second: of the time stamps.
      delayed: the decoder may give frames in another order.
    """
    pts, dts = [packet.pts for packet in packets], [packet.dts for packet in packets]
    known = [stamp for stamp in dts if stamp is not None]
    if any(later < earlier - second for earlier, later in itertools.pairwise(known)):  # recordings that were joined
        return None, False
    if None not in pts and len(set(pts)) == len(pts):
        stamps = np.sort(np.array(pts, np.int64))
        # AVI has decoding times alone; as presentation times these are the right values, but of other frames.
        return stamps, not delayed or stamps.tolist() != pts
    if None not in dts and len(set(dts)) == len(dts):
        return np.array(dts, np.int64), False
    return None, False


def _first_stamp(path: epath.PathLike, index: int) -> int | None:
    """Time stamp of the first frame that can be decoded, where a recording begins between key frames; None: damage."""
    said: list[str] = []
    with _opened(path) as container:
        for packet in _packets(container, said, container.streams[index]):
            try:
                for frame in packet.decode():
                    if frame.pts is not None:
                        return None if said else frame.pts
            except av.FFmpegError as error:
                said.append(_failure(packet, error))
    raise InputError(f"{path}: no frame in it can be decoded{_because(said)}")


def _failure(packet: av.Packet, error: av.FFmpegError) -> str:
    return f"at {_place(packet)} (the decoder says: {error.strerror})"


def _because(damage: Sequence[str]) -> str:
    return f": damaged {damage[0]}" if damage else ""


def _read(path: epath.PathLike, track: _Track, wanted: np.ndarray, size: int, fit: str) -> Candidates:
    """Decodes the frames on screen at the times `wanted`."""
    asked = np.maximum(np.searchsorted(track.times, wanted + _ROUNDING, side="right") - 1, 0)
    frames = np.zeros((len(wanted), size, size, 3), np.uint8)
    numbers = np.zeros(len(wanted), np.int64)
    with _Decoder(path, track) as decoder:
        for number in np.unique(asked):
            same = asked == number
            numbers[same], frame = decoder.frame(int(number))
            frames[same] = _picture(frame, size, fit, decoder.pixel_aspect)
    damage = [*track.damage, *decoder.damage]
    more = f", and {len(damage) - 1} times more" if len(damage) > 1 else ""
    return Candidates(frames, wanted, track.duration, numbers, f"{path}: damaged {damage[0]}{more}" if damage else "")


class _Decoder:
    """Decodes chosen frames of a track, in ascending order. A context manager.

    Attributes:
      damage: where the decoder failed, and what it said.
      pixel_aspect: width of a pixel in heights, or None; known with the first frame.
    """

    def __init__(self, path: epath.PathLike, track: _Track):
        self.damage: list[str] = []
        self._path, self._track = path, track
        self._keys = track.keys if track.ordered else track.keys[:0]
        self._stack = contextlib.ExitStack()
        self._container: av.container.InputContainer | None = None

    def __enter__(self) -> "_Decoder":
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def _open(self) -> None:
        """Begins with the first frame."""
        self._stack.close()
        self.damage = []
        self._container = self._stack.enter_context(_opened(self._path))
        self._stream = self._container.streams[self._track.index]
        self._stream.thread_type = "AUTO"
        self.pixel_aspect = self._stream.sample_aspect_ratio
        self._begin(None)

    def _begin(self, key: int | None) -> None:
        self._frames = self._decoded(key)
        self._now: tuple[int, av.VideoFrame] | None = None
        self._next = next(self._frames, None)

    def frame(self, number: int) -> tuple[int, av.VideoFrame]:
        """The frame on screen when frame `number` should appear, and its own number.

        This is the one before (at the beginning, the next), and noted as damage, where the decoder does not give the
        frame that should appear.

        Raises:
          InputError: nothing can be decoded, or nothing from long before the frame on.
        """
        if self._container is None:
            self._open()
        before = int(np.searchsorted(self._keys[:, 0], number, side="right")) - 1
        reached = self._now[0] if self._now else 0
        if before > 0 and self._keys[before, 0] - reached > _JUMP:
            if self._jump(before, number):
                return self._now
            # The whole file is decoded from here on, so that this costs no more than that.
            self._keys = self._keys[:0]
            self._open()
        self._advance(number)
        track, where = self._track, f"{self._track.times[number]:.2f} s"
        self._now = self._now or self._next
        if self._now is None:
            raise InputError(f"{self._path}: no frame in it can be decoded{_because(self.damage)}")
        if self._next is None and track.times[number] - track.times[self._now[0]] > _MISSING * track.duration:
            raise InputError(f"{self._path}: nothing can be decoded behind {track.times[self._now[0]]:.2f} of "
                             f"{track.duration:.2f} s{_because(self.damage)}")
        if self._now[0] != number:
            self.damage.append(f"at {where}: no frame of its own, a neighbour is taken")
        elif self._now[1].is_corrupt:
            self.damage.append(f"at {where}: the decoder calls this frame corrupt")
        return self._now

    def _advance(self, number: int) -> None:
        """Decodes up to the frame behind `number`."""
        while self._next is not None and self._next[0] <= number:
            self._now, self._next = self._next, next(self._frames, None)

    def _jump(self, before: int, number: int) -> bool:
        """Decodes frame `number` from a key frame on: the one just before, or ever earlier ones."""
        back = 1
        while before > 0:
            key, offset = self._keys[before].tolist()
            try:
                self._container.seek(offset, stream=self._stream)
                self._begin(key)
            except av.FFmpegError:
                return False
            # Files with a gradual refresh call frames key frames behind which some are still incomplete.
            if self._next is not None and self._next[0] == key and self._next[1].key_frame:
                self._advance(number)
                if self._now[0] == number and not self._now[1].is_corrupt:
                    return True
            before, back = before - back, 2 * back
        return False

    def _decoded(self, key: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Numbers and frames from key frame number `key` on; None: all. Nothing where a seek went behind the key."""
        track, reached = self._track, -1
        first = None if key is None else int(track.stamps[key])
        waiting = first is not None
        for packet in _packets(self._container, self.damage, self._stream):
            if waiting:
                if packet.is_keyframe and packet.pts is not None and packet.pts > first:
                    return
                waiting = packet.pts != first
                if waiting:
                    continue
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.damage.append(_failure(packet, error))
                continue
            for frame in frames:
                if not track.ordered:
                    reached += 1
                    if self.damage:
                        raise InputError(f"{self._path}: damaged {self.damage[0]}; without presentation times it "
                                         "cannot be read")
                    yield min(reached, len(track.times) - 1), frame
                    continue
                number = -1 if frame.pts is None else int(np.searchsorted(track.stamps, frame.pts, side="right")) - 1
                if number < (key or 0):  # before the key frame, shown earlier though decoded later
                    continue
                if number <= reached:
                    if self.damage:  # it is of no use then
                        continue
                    raise _OutOfOrderError
                reached = number
                yield number, frame


def _picture(frame: av.VideoFrame, size: int, fit: str, pixel_aspect) -> np.ndarray:
    """uint8 `[size, size, 3]`."""
    turns = round(frame.rotation / 90) % 4
    width = frame.width * float(pixel_aspect or 1)
    if fit == "stretch":
        to = size, size
    else:
        scale = size / min(width, frame.height)
        to = max(round(width * scale), size), max(round(frame.height * scale), size)
    scaled = frame.reformat(*to, format="rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return np.rot90(scaled[top : top + size, left : left + size], turns)
