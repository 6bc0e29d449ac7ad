"""Decodes the videos of questions into a store of frames: `python -m video.decode --gin_file=gin/video/decode.gin`.

Training reads frames thousands of times, so they are decoded once: M candidates of every video, resized, in worker
processes. Videos that cannot be decoded go to rejects with the reason; of a video with fewer frames some stand more
than once, and it is said. The store is a `video.frames.row_store` of kind "frames"
with an array "frames" uint8 `[videos, candidates, size, size, 3]`; the id of a row is the video's path.
"""

import functools
import hashlib
import json
from collections.abc import Iterable

import gin
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from video.frames.reading import FITS, notes, try_frames
from video.frames.row_store import VERSION, RowStore, RowWriter
from video.questions import read_questions

KIND = "frames"


@gin.configurable
def decode(
    questions: epath.PathLike | list = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    size: int = gin.REQUIRED,
    candidates: int = 16,
    fit: str = "stretch",
    processes: int = 2,
) -> None:
    """Decodes every video that a question is on; started again it goes on.

    Args:
      questions: file of `video.questions`, or several in one folder.
      output: folder of the store.
      size: pixels of a side.
      candidates: frames of each video.
      fit: see `read_frames`.
      processes: that decode.

    Raises:
      InputError: questions or settings are wrong, the folder holds other frames, or no video can be decoded.
    """
    if min(size, candidates, processes) < 1 or fit not in FITS:
        raise InputError(f"decode: size, candidates and processes must be positive, fit one of {', '.join(FITS)}")
    files = [questions] if isinstance(questions, (str, epath.Path)) else list(questions)
    folders = {epath.Path(file).parent for file in files}
    if len(folders) != 1:
        raise InputError(f"decode.questions: files in one folder are needed, not in {len(folders)}")
    (folder,) = folders
    videos = list(dict.fromkeys(question.video for file in files for question in read_questions(file)))
    writer = RowWriter(output, KIND, {"size": size, "candidates": candidates, "fit": fit}, len(videos), {
        "frames": ((candidates, size, size, 3), np.dtype(np.uint8)), "times": ((candidates,), np.dtype(np.float64))})
    todo = [video for video in videos if video not in writer.done]
    if len(todo) < len(videos):
        print(f"{len(videos) - len(todo):,} of {len(videos):,} videos were done before")
    with Workers(functools.partial(try_frames, size=size, count=candidates, fit=fit), processes) as workers:
        items = ((video, str(folder / video)) for video in todo)
        for video, found in tqdm(workers.map(items), "videos", len(todo), disable=None):
            if isinstance(found, str):
                writer.reject(video, found)
                print(f"rejected: {found}")
            else:
                for note in notes(video, found, candidates):
                    print(f"note: {note}")
                writer.add(video, {"frames": found.frames, "times": found.times}, duration=found.duration)
    if len(writer.done) == writer.rejected:
        raise InputError(f"{folder}: none of {len(videos):,} videos can be decoded")
    writer.complete(folder=str(folder))
    print(f"{output}: {candidates} frames of {size} x {size} of {len(videos) - writer.rejected:,} videos, "
          f"{writer.rejected:,} rejected")


class FrameStore:
    """A complete store of frames.

    Attributes:
      size, candidates, fit: of every video.
      videos: their paths, by row.
      durations: in seconds, by row.
      times: float64 `[videos, candidates]`, seconds.
      rejected: path -> why it could not be decoded.
    """

    def __init__(self, path: epath.PathLike):
        """Raises InputError when there is none."""
        self._rows = RowStore(path, KIND)
        self.size, self.candidates = self._rows.settings["size"], self._rows.settings["candidates"]
        self.fit = self._rows.settings["fit"]
        self.videos = [line["id"] for line in self._rows.rows]
        self.rejected = self._rows.rejected
        self._row = {video: row for row, video in enumerate(self.videos)}
        self.times = self._rows.read("times")
        self.durations = [line["duration"] for line in self._rows.rows]

    def __contains__(self, video: str) -> bool:
        return video in self._row

    def row(self, video: str) -> int:
        """Number of a video's row; raises InputError where it has none."""
        if video not in self._row:
            why = self.rejected.get(video, "not in the questions it was decoded for")
            raise InputError(f"{self._rows.path}: no frames of {video} ({why})")
        return self._row[video]

    def check_size(self, size: int) -> None:
        """Raises InputError where a vision tower takes frames of another size, in pixels."""
        if size != self.size:
            raise InputError(f"{self._rows.path}: frames of {self.size} pixels, the vision tower takes {size}")

    def fingerprint(self) -> str:
        """Of how the frames were made and of which videos, not of their pixels."""
        content = [VERSION, self.size, self.candidates, self.fit, self.videos, self.durations]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def frames(self, rows: Iterable[int] | None = None) -> np.ndarray:
        """uint8 `[rows, candidates, size, size, 3]`; None: all."""
        return self._rows.read("frames", rows)


def main() -> None:
    """Decodes videos into a store of frames. Parameters: decode.* (see video/decode.py)."""
    decode()


if __name__ == "__main__":
    command_line.run(main, "video.decode")
