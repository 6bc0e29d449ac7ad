"""Frames out of video files: so many moments, evenly spread over the time, resized; memory does not grow with length.

PyAV decodes (FFmpeg's libraries). Every moment gets the frame that is on screen then, so variable frame rates need no
care; frames are turned as the file's display matrix says.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError

FITS = ("stretch", "crop")
# A moment may be so much later than the last frame ends, in parts of the last moment: headers are not exact.
_MISSING = 0.05
# Where moments are farther apart, seconds, the decoder jumps to the key frame before the next one.
_JUMP = 2.0


class Candidates(NamedTuple):
    """Frames of a video.

    Attributes:
      frames: uint8 `[frames, size, size, 3]`, red, green, blue.
      times: float64 `[frames]`, seconds from the beginning.
      duration: of the video, seconds.
      rate: frames per second of the video, on average.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float
    rate: float

    @property
    def numbers(self) -> np.ndarray:
        """Number of each frame in the video, as far as its rate is constant: int64 `[frames]`."""
        return np.floor(self.times * self.rate + 1e-6).astype(np.int64)


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
      times: these moments, seconds, ascending.
      fit: "stretch" the whole frame (SigLIP), or scale its shorter side and "crop" the middle (CLIP).

    Raises:
      InputError: there is no such file, it is no video, has no pictures, cannot be decoded, or ends early.
    """
    if fit not in FITS:
        raise InputError(f"fit = {fit!r}: not one of {', '.join(FITS)}")
    if (count is None) == (times is None):
        raise InputError(f"{path}: give either count or times")
    with _opened(path) as container:
        if not container.streams.video:
            raise InputError(f"{path}: no pictures in it ({', '.join(s.type for s in container.streams) or 'empty'})")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        duration = _duration(container, stream)
        if not duration:
            raise InputError(f"{path}: no frames in it")
        wanted = moments(duration, count) if times is None else np.asarray(times, np.float64)
        if len(wanted) and (np.diff(wanted) < 0).any() | (wanted[0] < 0) | (wanted[-1] > duration):
            raise InputError(f"{path}: times must ascend from 0 to the duration, {duration:.3f} s")
        found = np.zeros((len(wanted), size, size, 3), np.uint8)
        done, reached = 0, 0.0
        for frame, shown, end in _shown(container, stream, wanted):
            if shown.stop > shown.start:
                found[shown] = _picture(frame, size, fit, stream.sample_aspect_ratio)
                done = shown.stop
            reached = end
        if done < len(wanted):
            raise InputError(f"{path}: ends after {reached:.2f} of {duration:.2f} s; truncated?")
        return Candidates(found, wanted, duration, float(stream.average_rate or 0))


def try_frames(path: str, *, size: int, count: int, fit: str) -> Candidates | str:
    """`read_frames`, or why it failed."""
    try:
        return read_frames(path, size, count=count, fit=fit)
    except InputError as error:
        return str(error)


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[av.container.InputContainer]:
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be decoded as a video ({error.strerror})") from None


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds that the header promises; of streams that promise nothing, the end of the last packet."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base
    ends = [float((packet.pts + (packet.duration or 0)) * stream.time_base)
            for packet in container.demux(stream) if packet.pts is not None]
    container.seek(0)
    return max(ends, default=0.0) - _start(stream)


def _start(stream: av.VideoStream) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _shown(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: np.ndarray
) -> Iterator[tuple[av.VideoFrame, slice, float]]:
    """Decoded frames: (frame, which of the moments it is on screen at, end of the last frame so far)."""
    start, place, last, end = _start(stream), 0, None, 0.0
    jump = len(wanted) > 1 and np.diff(wanted).max() > _JUMP
    keys = _key_times(stream, start) if jump else np.zeros(0)
    frames = iter(container.decode(stream))
    now = 0.0
    while place < len(wanted):
        key = keys[np.searchsorted(keys, wanted[place], side="right") - 1] if len(keys) else 0.0
        if key > now:
            container.seek(round((key + start) / stream.time_base), stream=stream)
            frames = iter(container.decode(stream))
            last = None
        for frame in frames:
            if frame.pts is None:
                continue
            now = float(frame.pts * stream.time_base) - start
            end = max(end, now + float((frame.duration or 0) * stream.time_base))
            if last is not None and now > wanted[place]:
                stop = int(np.searchsorted(wanted, now, side="left"))
                yield last, slice(place, stop), end
                place, last = stop, frame
                break
            last = frame
        else:
            if last is not None and wanted[-1] <= max(end, now) * (1 + _MISSING):
                yield last, slice(place, len(wanted)), end
            elif last is not None:
                yield last, slice(place, place), end
            return


def _key_times(stream: av.VideoStream, start: float) -> np.ndarray:
    """Times of the key frames as far as the container has an index, seconds, ascending."""
    times = [float(entry.timestamp * stream.time_base) - start for entry in stream.index_entries if entry.is_keyframe]
    return np.unique(np.maximum(times, 0.0)) if times else np.zeros(0)


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
