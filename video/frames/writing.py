"""Writes some frames of a video as a short video, for programs that take nothing but videos."""

from collections.abc import Iterator, Sequence

import av
import numpy as np
from etils import epath

from video.frames.decoder import FrameDecoder, OutOfOrderError
from video.frames.track import Track, scan_track

# H.264's constant rate factor, at which the loss cannot be seen; 23 is the encoder's own.
_QUALITY = 12


def write_frames(source: epath.PathLike, numbers: Sequence[int], target: epath.PathLike) -> None:
    """Writes frames of a video in their own size, upright, to an MP4 file with a frame a second.

    Every frame is a key frame, so that each can be read by its number.

    Args:
      source: video file.
      numbers: numbers of the frames, ascending, counted as `Candidates.numbers` counts them.
      target: local file, replaced.

    Raises:
      InputError: the source is missing, is no video, or cannot be decoded.
    """
    track = scan_track(source)
    try:
        pictures = list(_pictures(source, track, numbers))
    except OutOfOrderError:
        pictures = list(_pictures(source, track._replace(ordered=False), numbers))
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(_QUALITY), "threads": "1"})
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_item(item: tuple[epath.PathLike, Sequence[int], epath.PathLike]) -> None:
    """Calls `write_frames` with the parts of an item, for `Workers`, whose functions take one argument."""
    write_frames(*item)


def _pictures(source: epath.PathLike, track: Track, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields frames: uint8 `[height, width, 3]`, of the first one's size, which is even, as H.264 needs it."""
    width = height = 0
    with FrameDecoder(source, track) as decoder:
        for number in numbers:
            _, frame = decoder.frame(number)
            if not width:
                width, height = _even(frame.width * track.pixel_aspect), _even(frame.height)
            picture = frame.reformat(width, height, format="rgb24", interpolation="BICUBIC").to_ndarray()
            yield np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))


def _even(size: float) -> int:
    return max(2 * round(size / 2), 2)
