"""Two looks at a long video: where the second one looks, and that it finds what the first one passed over."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey
from video.frame_choice.coarse_to_fine import times_within
from video.frame_choice.scorers import Embeddings
from video.frame_choice.scores import Scores
from video.frame_choice.selector import Selector


class Level:
    """Scores frames by their brightness."""

    size, resize_mode, settings = 16, "stretch", "level"

    def __call__(self, video, frames, times, question):
        return Scores(frames[:, 8, 8, 0].astype(np.float32))


@given(st.lists(st.tuples(st.floats(0.5, 9), st.integers(0, 5)), min_size=1, max_size=12), st.integers(1, 14))
def test_times_are_spread_evenly_over_the_best_stretches(gaps_and_scores, stretches):
    gaps, scores = (np.array(values, float) for values in zip(*gaps_and_scores))
    times, duration = np.cumsum(gaps), gaps.sum() + 1
    closer = times_within(times, duration, scores, stretches)
    best = sorted(sorted(range(len(times)), key=lambda place: (-scores[place], place))[:stretches])
    edges = [0, *((times[1:] + times[:-1]) / 2), duration]
    inside = lambda time, place: max(min(time, edges[place + 1]) - edges[place], 0)  # noqa: E731
    total = sum(inside(duration, place) for place in best)
    # The part of the stretches before each time.
    np.testing.assert_allclose([sum(inside(time, place) for place in best) for time in closer],
                               (np.arange(len(times)) + 0.5) * total / len(times))
    assert (np.diff(closer) > 0).all()
    assert all(any(edges[place] <= time <= edges[place + 1] + 1e-9 for place in best) for time in closer)


@pytest.mark.parametrize("key_frames", [False, True])
def test_the_second_look_finds_the_brightest_frame(tmp_path, key_frames):
    levels = 20 + 5 * (40 - np.abs(np.arange(100) - 63)).clip(0)
    path = write_grey(tmp_path / "a.mp4", "libx264", np.arange(100) / 5, 5, 1000, key_frames=10, levels=levels)
    settings = {"candidates": 8, "num_frames": 1, "key_frames": key_frames}
    (far,) = Selector(Level(), **settings).select(path, "Which?")
    (near,) = Selector(Level(), **settings, stretches=1).select(path, "Which?")
    assert abs(far - 63) > 2 and abs(near - 63) <= 1  # candidates 12.5 frames apart, then less than 2


def test_two_looks_need_a_scorer_of_frames(tmp_path):
    safetensors.numpy.save_file({"video:a": np.zeros((4, 2), np.float32)}, tmp_path / "e.safetensors")
    for scorer, stretches in ((None, 2), (Embeddings(tmp_path / "e.safetensors"), 2), (Level(), 0)):
        with pytest.raises(InputError, match="stretches must be positive, and needs a scorer that looks at the frames"):
            Selector(scorer, stretches=stretches)
