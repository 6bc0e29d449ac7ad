"""Frames of many videos, decoded once by `video.decode`.

The store is a `video.frames.row_store` with an array "frames" uint8 `[videos, candidates, size, size, 3]` and an array
"times" float64 `[videos, candidates]`; the id of a row is the video's path.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.row_store import VERSION, RowStore, RowWriter

FRAMES = "frames"


def open_frame_writer(
    path: epath.PathLike, videos: int, *, size: int, candidates: int, resize_mode: str, key_frames: bool = False
) -> RowWriter:
    """Creates a frame store for at most `videos` videos, or resumes one; arguments as `FrameStore`'s attributes.

    Raises:
      InputError: the folder holds other frames.
    """
    settings = {"size": size, "candidates": candidates, "fit": resize_mode}
    if key_frames:  # named only then, so that older stores can be resumed
        settings["key_frames"] = True
    return RowWriter(path, FRAMES, settings, videos, {
        "frames": ((candidates, size, size, 3), np.dtype(np.uint8)), "times": ((candidates,), np.dtype(np.float64))})


class FrameStore:
    """A complete store of frames.

        store = FrameStore("runs/video/frames")
        if "videos/v00003.mp4" in store:
            frames, times = store.video("videos/v00003.mp4")   # uint8 [candidates, size, size, 3], seconds

    Attributes:
      size: pixels of a side of every frame.
      candidates: number of frames of every video.
      resize_mode, key_frames: see `read_frames`.
      videos: paths of the videos, by row.
      durations: lengths of the videos in seconds, by row.
      times: float64 `[videos, candidates]`, seconds.
      rejected: path -> reason why the video could not be decoded.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the store; raises InputError when it is missing or incomplete."""
        self._rows = RowStore(path, FRAMES)
        self.size, self.candidates = self._rows.settings["size"], self._rows.settings["candidates"]
        self.resize_mode = self._rows.settings["fit"]
        self.key_frames = self._rows.settings.get("key_frames", False)
        self.videos = [line["id"] for line in self._rows.rows]
        self.rejected = self._rows.rejected
        self._row = {video: row for row, video in enumerate(self.videos)}
        self.times = self._rows.read("times")
        self.durations = [line["duration"] for line in self._rows.rows]

    def __contains__(self, video: str) -> bool:
        return video in self._row

    def row(self, video: str) -> int:
        """Returns the number of a video's row; raises InputError where it has none."""
        if video not in self._row:
            reason = self.rejected.get(video, "not in the questions it was decoded for")
            raise InputError(f"{self._rows.path}: no frames of {video} ({reason})")
        return self._row[video]

    def check_size(self, size: int) -> None:
        """Raises InputError where a vision tower takes frames of another size, in pixels."""
        if size != self.size:
            raise InputError(f"{self._rows.path}: frames of {self.size} pixels, the vision tower takes {size}")

    def fingerprint(self) -> str:
        """Digest of the settings, paths and lengths of the videos; their pixels are not read."""
        content = [VERSION, self.size, self.candidates, self.resize_mode, self.videos, self.durations]
        content += ["key_frames"] * self.key_frames
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def frames(self, rows: Iterable[int] | None = None) -> np.ndarray:
        """Reads frames uint8 `[rows, candidates, size, size, 3]`; None: all rows."""
        return self._rows.read("frames", rows)

    def video(self, video: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads a video's frames uint8 `[candidates, size, size, 3]`; returns them with their times `[candidates]`."""
        row = self.row(video)
        return self.frames([row])[0], self.times[row]
