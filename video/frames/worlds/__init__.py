"""Worlds: what happens in synthetic videos, and what is asked about it.

    base.py       the interface, and what worlds share
    moments.py    16 s, events of about a second; every question names the shape it is about
    stories.py    64 s, events of 1 to 6 s, distractors; most questions do not name the frames that matter

To add a world, write its file and add a line to `WORLDS`.
"""

import os

import numpy as np
from etils import epath

from video.frames.rendering import render, write_video
from video.frames.worlds import moments, stories
from video.frames.worlds.base import World, make_captions
from video.questions import Question

# Name in `synthetic.world` -> world. Add yours here.
WORLDS: dict[str, World] = {"moments": moments.WORLD, "stories": stories.WORLD}


def make_video(
    number: int, *, folder: str, world: str, seed: int, seconds: float, fps: int, size: int, shown: float
) -> list[Question]:
    """Renders video `number` unless its file exists, and returns its questions, captions among them."""
    rng = np.random.default_rng([seed, number])
    events, name = WORLDS[world].draw_events(rng, seconds, shown), f"v{number:05d}"
    path = epath.Path(folder) / "videos" / f"{name}.mp4"
    video = f"videos/{name}.mp4"
    questions = WORLDS[world].make_questions(events, video, name, rng) + make_captions(events, video, name, seconds)
    if not path.exists():
        shapes = [*events, *WORLDS[world].draw_distractors(events, rng, seconds, shown)]
        scratch = path.parent / f".{name}.{os.getpid()}.mp4"
        write_video(scratch, render(shapes, rng, seconds, fps, size), fps)
        scratch.replace(path)
    return questions
