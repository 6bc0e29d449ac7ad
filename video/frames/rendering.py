"""Draws synthetic videos with questions on them: grey shapes that drift, coloured shapes that appear for a moment."""

import dataclasses
import os
from collections.abc import Callable

import av
import numpy as np
from etils import epath

from video.questions import Question

COLOURS = {"red": (228, 38, 44), "green": (44, 190, 62), "blue": (52, 96, 240), "yellow": (245, 216, 40),
           "purple": (168, 60, 214), "orange": (250, 140, 30)}  # fmt: skip
SHAPES = ("star", "cross", "ring", "triangle", "diamond", "heart")
SIDES = ("left", "right")
NUMBERS = ("one", "two", "three")
TYPES = ("colour", "side", "order", "count", "same")


@dataclasses.dataclass(frozen=True)
class Event:
    """A coloured shape that is on screen for a moment.

    Attributes:
      shape, colour: one of SHAPES and one of COLOURS.
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


def draw_events(rng: np.random.Generator, seconds: float, shown: float) -> list[Event]:
    """Draws the events of a video, in order: two shapes that appear once, one that appears one to three times.

    Args:
      rng: source of all choices.
      seconds: length of the video.
      shown: shortest time that a shape is on screen, seconds; the longest is a third longer.
    """
    once, other, repeated = rng.permutation(SHAPES)[:3].tolist()
    times = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    shapes = rng.permutation([once, other] + [repeated] * times).tolist()
    lengths = rng.uniform(shown, shown * 4 / 3, len(shapes))
    # The rest of the video is drawn for the gaps between them, each at least shown / 5 long.
    gaps = rng.dirichlet(np.ones(len(shapes) + 1)) * (seconds - lengths.sum() - shown * (len(shapes) + 1) / 5)
    starts = np.cumsum(gaps + shown / 5)[:-1] + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # Two appearances have the same colour as often as not.
    first, same = rng.choice(list(COLOURS)), rng.random() < 0.5
    events, seen = [], 0
    for shape, start, length in zip(shapes, starts, lengths):
        colour = str(rng.choice(list(COLOURS)))
        if shape == repeated:
            seen += 1
            if seen == 1 or same:
                colour = str(first)
            elif colour == first:
                colour = str(rng.choice([name for name in COLOURS if name != first]))
        x = rng.uniform(0.2, 0.38) + (0.42 if rng.random() < 0.5 else 0.0)
        y = rng.uniform(0.25, 0.75)
        events.append(Event(shape, colour, float(start), float(start + length), float(x), float(y)))
    return events


def make_questions(events: list[Event], video: str, name: str, rng: np.random.Generator) -> list[Question]:
    """Makes the questions on a video, one of each type that it has an answer to."""
    shapes = [event.shape for event in events]
    single = [event for event in events if shapes.count(event.shape) == 1]
    once, other = (single[i] for i in rng.permutation(len(single))[:2])
    (repeated,) = {shape for shape in shapes if shape not in (once.shape, other.shape)}
    appearances = [event for event in events if event.shape == repeated]
    questions = []

    def add(question_type: str, question: str, answer: str, options, evidence: list[Event]) -> None:
        questions.append(Question(f"{name}-{question_type}", video, question, answer, question_type, tuple(options),
                                  tuple((round(event.start, 3), round(event.end, 3)) for event in evidence)))

    add("colour", f"What colour was the {once.shape}?", once.colour, COLOURS, [once])
    add("side", f"On which side was the {other.shape}?", other.side, SIDES, [other])
    first, second = sorted([once, other], key=lambda event: event.start)
    add("order", f"Which came first, the {once.shape} or the {other.shape}?", first.shape, (once.shape, other.shape),
        [first, second])
    add("count", f"How many times was there a {repeated}?", NUMBERS[len(appearances) - 1], NUMBERS, appearances)
    if len(appearances) == 2:
        same = appearances[0].colour == appearances[1].colour
        add("same", f"Did the {repeated} have the same colour both times?", "yes" if same else "no", ("yes", "no"),
            appearances)
    return questions


def make_captions(events: list[Event], video: str, name: str, seconds: float) -> list[Question]:
    """Makes captions of parts of a video: one for every event, one for the longest time without any."""
    ends = [0.0, *(event.end for event in events)]
    starts = [*(event.start for event in events), seconds]
    quiet = max(zip(ends, starts), key=lambda span: span[1] - span[0])
    captions = [(f"{event.colour} {event.shape} {event.side}", (event.start, event.end)) for event in events]
    return [Question(f"{name}-caption{n}", video, "What is there?", answer, "caption",
                     clip=(round(start, 3), round(end, 3)))
            for n, (answer, (start, end)) in enumerate([*captions, ("nothing", quiet)])]


def render(events: list[Event], rng: np.random.Generator, seconds: float, fps: int, size: int) -> np.ndarray:
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
                picture = _over(picture, 0.17 * _OUTLINES[event.shape](x, y), COLOURS[event.colour], size)
        frames[i] = np.clip(picture + rng.normal(0, 4, (size, size, 1)), 0, 255)
    return frames


def _over(picture: np.ndarray, inside: np.ndarray, colour, size: int) -> np.ndarray:
    """Paints a shape with smooth edges; `inside` is the distance to its edge, 1 a frame's side, positive inside."""
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
    return picture + cover * (np.asarray(colour, float) - picture)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    corner = (np.arctan2(x, -y) * 5 / (2 * np.pi)) % 1
    return 0.42 + 0.58 * np.abs(2 * corner - 1) ** 1.3 - np.hypot(x, y)


# Shapes in a circle of radius 1 about the middle, y downwards: positive inside, nearly a distance.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "star": _star,
    "cross": lambda x, y: np.maximum(np.minimum(0.28 - np.abs(x), 0.95 - np.abs(y)),
                                     np.minimum(0.95 - np.abs(x), 0.28 - np.abs(y))),
    "ring": lambda x, y: 0.22 - np.abs(np.hypot(x, y) - 0.72),
    "triangle": lambda x, y: np.minimum(0.6 - y, (y + 1.0 - 1.75 * np.abs(x)) / 2),
    "diamond": lambda x, y: (0.95 - np.abs(x) * 1.35 - np.abs(y)) / 1.6,
    "heart": lambda x, y: 0.72 - np.hypot(x, 0.22 - 1.05 * y - 0.85 * np.sqrt(np.abs(x) + 1e-6)),
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


def make_video(
    number: int, *, folder: str, seed: int, seconds: float, fps: int, size: int, shown: float
) -> list[Question]:
    """Renders video `number` unless its file exists, and returns its questions, captions among them."""
    rng = np.random.default_rng([seed, number])
    events, name = draw_events(rng, seconds, shown), f"v{number:05d}"
    path = epath.Path(folder) / "videos" / f"{name}.mp4"
    video = f"videos/{name}.mp4"
    questions = make_questions(events, video, name, rng) + make_captions(events, video, name, seconds)
    if not path.exists():
        scratch = path.parent / f".{name}.{os.getpid()}.mp4"
        write_video(scratch, render(events, rng, seconds, fps, size), fps)
        scratch.replace(path)
    return questions
