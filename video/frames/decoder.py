"""Decodes single frames of a video file, seeking past frames that are not needed."""

import contextlib
from collections.abc import Iterator

import av
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from video.frames.track import MISSING, Track, decoding_failure, first_damage, open_video, read_packets

# Fewer frames than these are decoded rather than jumped over: a jump empties the decoder's threads.
_JUMP = 24


class OutOfOrderError(Exception):
    """The time stamps of decoded frames do not ascend: frames have to be counted, with `ordered=False`."""


def decode_key_frame(container: av.container.InputContainer, track: Track, key_index: int) -> av.VideoFrame | None:
    """Decodes a key frame, `track.keys[key_index]`, from its own packet alone; None where that gives no whole frame."""
    stream = container.streams[track.index]
    number, offset = track.keys[key_index].tolist()
    stamp = track.stamps[number]
    try:
        container.seek(offset, stream=stream)
        for packet in container.demux(stream):
            if packet.pts == stamp:
                # An empty packet behind it makes the decoder give the frame at once; a seek makes it ready again.
                for frame in [*packet.decode(), *stream.decode(None)]:
                    if frame.pts == stamp and frame.key_frame and not frame.is_corrupt:
                        return frame
            if packet.pts is None or packet.pts == stamp or (packet.is_keyframe and packet.pts > stamp):
                return None
    except av.FFmpegError:
        pass
    return None


class FrameDecoder:
    """Decodes some frames of a track, in ascending order. A context manager.

    Attributes:
      damage: places where the decoder failed, and its reasons.
    """

    def __init__(self, path: epath.PathLike, track: Track):
        self.damage: list[str] = []
        self._path, self._track = path, track
        self._keys = track.keys if track.ordered else track.keys[:0]
        self._stack = contextlib.ExitStack()
        self._container: av.container.InputContainer | None = None

    def __enter__(self) -> "FrameDecoder":
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def _open(self) -> None:
        """Opens the file, again if need be, and begins with its first frame."""
        self._stack.close()
        self.damage = []
        self._container = self._stack.enter_context(open_video(self._path))
        self._stream = self._container.streams[self._track.index]
        self._stream.thread_type = "AUTO"
        self._begin(None)

    def _begin(self, key: int | None) -> None:
        """Begins with key frame number `key`, to which the file was sought; None: with the first frame."""
        self._frames = self._decoded(key)
        self._now: tuple[int, av.VideoFrame] | None = None
        self._next = next(self._frames, None)

    def frame(self, number: int) -> tuple[int, av.VideoFrame]:
        """Returns the frame on screen when frame `number` should appear, and its own number.

        Where the decoder does not give frame `number`, this is the one before it (at the beginning, the next one), and
        is added to `damage`.

        Raises:
          InputError: no frame can be decoded, or none from long before this one on.
        """
        if self._container is None:
            self._open()
        key_index = int(np.searchsorted(self._keys[:, 0], number, side="right")) - 1
        reached = self._now[0] if self._now else 0
        if key_index > 0 and self._keys[key_index, 0] - reached > _JUMP:
            if self._jump(key_index, number):
                return self._now
            # The whole file is decoded from here on, so that this costs no more than that.
            self._keys = self._keys[:0]
            self._open()
        self._advance(number)
        track, time = self._track, f"{self._track.times[number]:.2f} s"
        self._now = self._now or self._next
        if self._now is None:
            raise InputError(f"{self._path}: no frame in it can be decoded{first_damage(self.damage)}")
        if self._next is None and track.times[number] - track.times[self._now[0]] > MISSING * track.duration:
            raise InputError(f"{self._path}: no frame can be decoded behind {track.times[self._now[0]]:.2f} of "
                             f"{track.duration:.2f} s{first_damage(self.damage)}")
        if self._now[0] != number:
            self.damage.append(f"at {time}: no such frame, a neighbour is taken")
        elif self._now[1].is_corrupt:
            self.damage.append(f"at {time}: the decoder calls this frame corrupt")
        return self._now

    def _advance(self, number: int) -> None:
        """Decodes up to the frame behind `number`."""
        while self._next is not None and self._next[0] <= number:
            self._now, self._next = self._next, next(self._frames, None)

    def _jump(self, key_index: int, number: int) -> bool:
        """Decodes frame `number` from a key frame on, first from `key_index`, then from ever earlier ones.

        Returns False where none of them leads to the whole frame.
        """
        back = 1
        while key_index > 0:
            key, offset = self._keys[key_index].tolist()
            try:
                self._container.seek(offset, stream=self._stream)
                self._begin(key)
            except av.FFmpegError:
                return False
            # Files with a gradual refresh mark key frames behind which some frames are still incomplete.
            if self._next is not None and self._next[0] == key and self._next[1].key_frame:
                self._advance(number)
                if self._now[0] == number and not self._now[1].is_corrupt:
                    return True
            key_index, back = key_index - back, 2 * back
        return False

    def _decoded(self, key: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields numbers and frames from key frame number `key` on, or all for None.

        Yields no frame where the seek went behind the key frame.
        """
        track, reached = self._track, -1
        first = None if key is None else int(track.stamps[key])
        waiting = first is not None
        for packet in read_packets(self._container, self.damage, self._stream):
            if waiting:
                if packet.is_keyframe and packet.pts is not None and packet.pts > first:
                    return
                waiting = packet.pts != first
                if waiting:
                    continue
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.damage.append(decoding_failure(packet, error))
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
                    if self.damage:  # behind damage, a repeated stamp does not tell which frame this is
                        continue
                    raise OutOfOrderError
                reached = number
                yield number, frame
