"""Reads frames of video files at given times, or spread evenly over the length; memory does not grow with the length.

PyAV (FFmpeg's libraries) decodes. Every time gets the frame that is on screen then, the same one that decoding the
whole file gives; frames are turned by the file's display matrix.

    candidates = read_frames("clip.mp4", 224, count=128)
    candidates.frames    # uint8 [128, 224, 224, 3]
    candidates.times     # seconds
"""

from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.decoder import FrameDecoder, OutOfOrderError, decode_key_frame
from video.frames.track import Track, open_video, scan_track

RESIZE_MODES = ("stretch", "crop")
# Frames are taken to begin this many seconds before their times, so that rounding does not move them behind a time.
_ROUNDING = 1e-6


class Candidates(NamedTuple):
    """Frames of a video.

    Attributes:
      frames: uint8 `[frames, size, size, 3]`, red, green, blue.
      times: float64 `[frames]`, when each frame is on screen, seconds from the video track's first frame: the time that
        was wanted, or the one at which a key frame appears that was taken for it.
      duration: length of the video track, seconds.
      numbers: int64 `[frames]`, each frame's number in the video, counted from 0 in the order of presentation. A number
        occurs more than once where a video has fewer frames than requested.
      damage: a sentence on what the decoder could not read; "" where it read everything.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float
    numbers: np.ndarray
    damage: str = ""


def even_timestamps(duration: float, count: int) -> np.ndarray:
    """Returns the middles of `count` equal parts of the duration: float64 `[count]`, seconds."""
    return (np.arange(count) + 0.5) * duration / count


def read_frames(
    path: epath.PathLike, size: int, *, count: int | None = None, times: Sequence[float] | None = None,
    resize_mode: str = "stretch", key_frames: bool = False,
) -> Candidates:
    """Decodes the frames of a video that are on screen at some times, or key frames near them.

    With `key_frames`, each wanted time gets the nearest key frame, which is decoded alone: in a long video that is many
    times as fast, since the frame on screen needs all frames from the key frame before it on. No key frame is taken
    twice: of several times with the same nearest one, the closest gets it, and the others get the frames on screen. So
    where key frames are sparse, the candidates are still spread evenly.

    Args:
      path: local file; any container and codec that FFmpeg supports: mp4, webm, avi, mkv, ...
      size: pixels of a side of the square frames; bicubic.
      count: number of frames, in the middles of equal parts of the duration; or
      times: seconds from the first frame, ascending.
      resize_mode: "stretch" squeezes the whole frame (SigLIP), "crop" scales its shorter side and keeps the middle
        (CLIP).
      key_frames: takes key frames.

    Raises:
      InputError: the file is missing, is no video, has no moving pictures, cannot be decoded, or ends early.
    """
    if resize_mode not in RESIZE_MODES:
        raise InputError(f"resize_mode = {resize_mode!r}: not one of {', '.join(RESIZE_MODES)}")
    if (count is None) == (times is None):
        raise InputError(f"{path}: give either count or times")
    track = scan_track(path)
    times = even_timestamps(track.duration, count) if times is None else np.asarray(times, np.float64)
    if len(times) and (np.diff(times) < 0).any() | (times[0] < 0) | (times[-1] > track.duration + _ROUNDING):
        raise InputError(f"{path}: times must ascend from 0 to the duration, {track.duration:.3f} s")
    keys = nearest_key_frames(times, track.times[track.keys[:, 0]]) if key_frames else np.full(len(times), -1)
    try:
        return _read(path, track, times, keys, size, resize_mode)
    except OutOfOrderError:
        return _read(path, track._replace(ordered=False), times, np.full(len(times), -1), size, resize_mode)


def try_read_frames(path: str, *, size: int, count: int, resize_mode: str, key_frames: bool) -> Candidates | str:
    """Calls `read_frames`; returns the error's message where it fails."""
    try:
        return read_frames(path, size, count=count, resize_mode=resize_mode, key_frames=key_frames)
    except InputError as error:
        return str(error)


def reading_notes(video: str, candidates: Candidates, needed: int) -> list[str]:
    """Returns sentences for the user: damage, and fewer different frames than the `needed` number."""
    different = len(np.unique(candidates.numbers))
    few = [f"{video}: {different} different frames, fewer than the {needed} requested"] if different < needed else []
    return [candidates.damage, *few] if candidates.damage else few


def nearest_key_frames(times: np.ndarray, key_times: np.ndarray) -> np.ndarray:
    """Gives each time the key frame nearest to it, and each key frame to the nearest of its times alone.

    Args:
      times: wanted times `[times]`, seconds, ascending.
      key_times: when the key frames appear `[keys]`, seconds, ascending.

    Returns:
      int64 `[times]`, indices of key frames; -1 for a time whose nearest key frame has gone to another.
    """
    times, inverse = np.unique(times, return_inverse=True)
    taken = np.full(len(times), -1)
    if len(key_times):
        nearest = np.searchsorted((key_times[1:] + key_times[:-1]) / 2, times)
        order = np.lexsort((np.abs(times - key_times[nearest]), nearest))
        _, first = np.unique(nearest[order], return_index=True)
        taken[order[first]] = nearest[order[first]]
    return taken[inverse]


def _read(
    path: epath.PathLike, track: Track, times: np.ndarray, keys: np.ndarray, size: int, resize_mode: str
) -> Candidates:
    """Decodes the key frames where `keys` `[times]` names them, else the frames on screen at the times."""
    wanted = np.maximum(np.searchsorted(track.times, times + _ROUNDING, side="right") - 1, 0)
    frames = np.zeros((len(times), size, size, 3), np.uint8)
    numbers = np.zeros(len(times), np.int64)
    if (keys >= 0).any():
        with open_video(path) as container:
            for place in np.flatnonzero(keys >= 0):
                frame = decode_key_frame(container, track, int(keys[place]))
                if frame is None:
                    keys[place] = -1
                else:
                    frames[place] = _picture(frame, size, resize_mode, track.pixel_aspect)
    by_key = keys >= 0
    numbers[by_key] = track.keys[keys[by_key], 0]
    with FrameDecoder(path, track) as decoder:
        for number in np.unique(wanted[~by_key]):
            same = (wanted == number) & ~by_key
            numbers[same], frame = decoder.frame(int(number))
            frames[same] = _picture(frame, size, resize_mode, track.pixel_aspect)
    times = np.where(by_key, track.times[numbers], times)
    damage = [*track.damage, *decoder.damage]
    more = f", and {len(damage) - 1} times more" if len(damage) > 1 else ""
    return Candidates(frames, times, track.duration, numbers, f"{path}: damaged {damage[0]}{more}" if damage else "")


def _picture(frame: av.VideoFrame, size: int, resize_mode: str, pixel_aspect: float) -> np.ndarray:
    """Resizes and turns a frame: uint8 `[size, size, 3]`."""
    turns = round(frame.rotation / 90) % 4
    width = frame.width * pixel_aspect
    if resize_mode == "stretch":
        scaled_size = size, size
    else:
        scale = size / min(width, frame.height)
        scaled_size = max(round(width * scale), size), max(round(frame.height * scale), size)
    scaled = frame.reformat(*scaled_size, format="rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return np.rot90(scaled[top : top + size, left : left + size], turns)
