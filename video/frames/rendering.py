"""Draws synthetic videos: grey shapes that drift, coloured shapes that appear for a while."""

import dataclasses
from collections.abc import Callable, Sequence

import av
import numpy as np
from etils import epath

COLOURS = {"red": (228, 38, 44), "green": (44, 190, 62), "blue": (52, 96, 240), "yellow": (245, 216, 40),
           "purple": (168, 60, 214), "orange": (250, 140, 30)}  # fmt: skip
SHAPES = ("star", "cross", "ring", "triangle", "diamond", "heart")
SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Event:
    """A shape that is on screen for a while.

    Attributes:
      shape: one of SHAPES; "disc", a smaller shape, or "flash", which fills the frame, where it is no event but
        distracts from them.
      colour: one of COLOURS; "grey" where it is no event.
      start, end: seconds.
      x, y: middle of the shape, 0 to 1 from the frame's left and upper edge.
    """

    shape: str
    colour: str
    start: float
    end: float
    x: float
    y: float

    @property
    def side(self) -> str:
        """Half of the frame that the shape is in: "left" or "right"."""
        return SIDES[int(self.x > 0.5)]


def render(events: Sequence[Event], rng: np.random.Generator, seconds: float, fps: int, size: int) -> np.ndarray:
    """Draws the frames of a video: uint8 `[frames, size, size, 3]`."""
    n = round(seconds * fps)
    grid = (np.arange(size) + 0.5) / size
    ground = rng.uniform(30, 90, (2, 3))
    angle, turn = rng.uniform(0, 2 * np.pi), rng.uniform(-0.1, 0.1)
    movers = [(rng.uniform(0.1, 0.9, 2), rng.uniform(-0.25, 0.25, 2), rng.uniform(0.06, 0.12), rng.uniform(110, 170),
               rng.random() < 0.5) for _ in range(3)]
    frames = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        time = i / fps
        slope = angle + turn * time
        ramp = 0.5 + 0.5 * ((grid[None] - 0.5) * np.cos(slope) + (grid[:, None] - 0.5) * np.sin(slope))
        picture = ground[0] + ramp[..., None] * (ground[1] - ground[0])
        for middle, speed, radius, grey, is_round in movers:
            moved = 1 - np.abs((middle + speed * time) % 2 - 1)  # bounces off the edges
            x, y = grid[None] - moved[0], grid[:, None] - moved[1]
            distance = np.hypot(x, y) if is_round else np.maximum(np.abs(x), np.abs(y))
            picture = _over(picture, radius - distance, grey, size)
        for event in events:
            if event.start <= time < event.end:
                x, y = (grid[None] - event.x) / 0.17, (grid[:, None] - event.y) / 0.17
                picture = _over(picture, 0.17 * _OUTLINES[event.shape](x, y), _PAINTS[event.colour], size)
        frames[i] = np.clip(picture + rng.normal(0, 4, (size, size, 1)), 0, 255)
    return frames


def _over(picture: np.ndarray, inside: np.ndarray, colour, size: int) -> np.ndarray:
    """Paints a shape with smooth edges; `inside` is the distance to its edge, 1 a frame's side, positive inside."""
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
    return picture + cover * (np.asarray(colour, float) - picture)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    corner = (np.arctan2(x, -y) * 5 / (2 * np.pi)) % 1
    return 0.42 + 0.58 * np.abs(2 * corner - 1) ** 1.3 - np.hypot(x, y)


_PAINTS = COLOURS | {"grey": (140, 140, 140)}

# Shapes in a circle of radius 1 about the middle, y downwards: positive inside, nearly a distance.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "star": _star,
    "cross": lambda x, y: np.maximum(np.minimum(0.28 - np.abs(x), 0.95 - np.abs(y)),
                                     np.minimum(0.95 - np.abs(x), 0.28 - np.abs(y))),
    "ring": lambda x, y: 0.22 - np.abs(np.hypot(x, y) - 0.72),
    "triangle": lambda x, y: np.minimum(0.6 - y, (y + 1.0 - 1.75 * np.abs(x)) / 2),
    "diamond": lambda x, y: (0.95 - np.abs(x) * 1.35 - np.abs(y)) / 1.6,
    "heart": lambda x, y: 0.72 - np.hypot(x, 0.22 - 1.05 * y - 0.85 * np.sqrt(np.abs(x) + 1e-6)),
    "disc": lambda x, y: 0.6 - np.hypot(x, y),
    "flash": lambda x, y: np.ones(np.broadcast_shapes(x.shape, y.shape)),
}  # fmt: skip


def write_video(path: epath.PathLike, frames: np.ndarray, fps: int) -> None:
    """Writes frames uint8 `[frames, height, width, 3]` as an H.264 file; equal frames give equal bytes."""
    # With its lookahead x264 made 14 different files of the same frames in 30 attempts.
    options = {"crf": "23", "preset": "veryfast", "threads": "1",
               "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
