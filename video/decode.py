"""Decodes the videos of questions into a store of frames: `python -m video.decode --gin_file=gin/video/decode.gin`.

Training reads frames thousands of times, so they are decoded once, by worker processes: M candidates of every video,
resized, in a `video.frames.frame_store`. A video that cannot be decoded is recorded with the reason; a video with
fewer than M frames repeats some of them, and is named in the log. A killed run resumes where it stopped.
"""

import dataclasses
import functools
from collections.abc import Sequence

import gin
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log
from video.frames.frame_store import open_frame_writer
from video.frames.reading import RESIZE_MODES, reading_notes, try_read_frames
from video.questions import read_questions


@gin.configurable("decode")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings of `video.decode`.

    Attributes:
      questions: file of `video.questions`, or several; the videos of all questions are decoded.
      videos: folder of the videos; None: that of the questions, which is then the same for all files.
      output: folder of the store.
      size: pixels of a side of the square frames.
      candidates: M, frames of each video, evenly spread.
      resize_mode: "stretch" or "crop", see `read_frames`.
      key_frames: takes the key frames nearest to the even times, for long videos, see `read_frames`.
      processes: number of worker processes.
    """

    questions: str | Sequence[str] = gin.REQUIRED
    videos: str | None = None
    output: str = gin.REQUIRED
    size: int = gin.REQUIRED
    candidates: int = 16
    resize_mode: str = "stretch"
    key_frames: bool = False
    processes: int = 2

    def __post_init__(self):
        """Raises InputError where a setting is wrong."""
        if min(self.size, self.candidates, self.processes) < 1 or self.resize_mode not in RESIZE_MODES:
            raise InputError("decode: size, candidates and processes must be positive, resize_mode one of "
                             f"{', '.join(RESIZE_MODES)}")


def main(config: DecodeConfig) -> None:
    """Decodes every video that a question is about.

    Raises:
      InputError: a file of questions is wrong, the folder holds other frames, or no video can be decoded.
    """
    files = [config.questions] if isinstance(config.questions, str) else list(config.questions)
    folders = {epath.Path(config.videos)} if config.videos else {epath.Path(file).parent for file in files}
    if len(folders) != 1:
        raise InputError(f"decode.questions: files in one folder are needed, not in {len(folders)}; or "
                         "set decode.videos")
    (folder,) = folders
    videos = list(dict.fromkeys(question.video for file in files for question in read_questions(file, answers=False)))
    writer = open_frame_writer(config.output, len(videos), size=config.size, candidates=config.candidates,
                               resize_mode=config.resize_mode, key_frames=config.key_frames)
    remaining = [video for video in videos if video not in writer.done]
    if 0 < len(remaining) < len(videos):
        log(f"{len(videos) - len(remaining):,} of {len(videos):,} videos were done before")
    read = functools.partial(try_read_frames, size=config.size, count=config.candidates,
                             resize_mode=config.resize_mode, key_frames=config.key_frames)
    with Workers(read, config.processes) as workers:
        items = ((video, str(folder / video)) for video in remaining)
        for video, candidates in tqdm(workers.map(items), "videos", len(remaining), disable=None):
            if isinstance(candidates, str):
                writer.reject(video, candidates)
                log(f"rejected: {candidates}")
            else:
                for note in reading_notes(video, candidates, config.candidates):
                    log(f"note: {note}")
                writer.add(video, {"frames": candidates.frames, "times": candidates.times},
                           duration=candidates.duration)
    if len(writer.done) == writer.rejected:
        raise InputError(f"{folder}: none of {len(videos):,} videos can be decoded")
    writer.complete(folder=str(folder))
    log(f"{config.output}: {config.candidates} frames of {config.size} x {config.size} of "
        f"{len(videos) - writer.rejected:,} videos, {writer.rejected:,} rejected")


if __name__ == "__main__":
    command_line.run(main, DecodeConfig, "video.decode")
