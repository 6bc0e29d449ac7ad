"""BOLT, AKS and MDP3 against what their published code chooses.

The values below were printed by `inverse_transform_sampling(scores, T, 3.0)` of select_frames.py in
github.com/sming256/BOLT, and by frame_select.py of github.com/ncTimTang/AKS with its own settings (t1 = 0.8, t2 = -100,
depth 5), on the sequences of `sequence`; frames that were chosen twice are listed once. Those of MDP3 are what
`_select_frames_fast` of its class `MDP3` chose (segments of 32, lambda 0.2, conditioned on one frame) from `vectors`.
"""

import numpy as np
import pytest

from video.frame_choice.rules import RULES
from video.frame_choice.scores import Scores


def sequence(name) -> np.ndarray:
    """Returns 128 scores: `rough` ones that fill 0 to 1, or small ones with eight `spikes`."""
    i = np.arange(128)
    rough = (i * i * 7919 + 104729 * i) % 1009 / 1009
    if name == "rough":
        return rough
    spikes = rough / 10
    spikes[40:44] += 0.9
    spikes[[70, 71, 100, 120]] += 0.85
    return spikes


BOLT = {
    ("rough", 2): [66],
    ("rough", 4): [31, 54, 73, 94],
    ("rough", 8): [15, 30, 45, 56, 69, 85, 96, 111],
    ("rough", 16): [9, 14, 21, 31, 41, 46, 54, 60, 68, 73, 84, 87, 94, 107, 111, 114],
    ("rough", 64): [2, 4, 9, 10, 12, 15, 16, 17, 21, 24, 27, 29, 31, 34, 37, 41, 42, 43, 44, 46, 48, 49, 50, 54, 56,
        60, 64, 66, 68, 69, 70, 73, 76, 82, 84, 85, 86, 88, 89, 92, 94, 96, 98, 102, 105, 107, 111, 112, 113, 114, 116,
        120, 123],
    ("spikes", 2): [43],
    ("spikes", 4): [41, 43, 70, 71],
    ("spikes", 8): [41, 42, 43, 70, 71, 120],
    ("spikes", 16): [40, 41, 42, 43, 70, 71, 100, 120],
    ("spikes", 64): [40, 41, 42, 43, 70, 71, 100, 120],
}
AKS = {
    ("rough", 2): [],
    ("rough", 4): [],
    ("rough", 8): [],
    ("rough", 16): [],
    ("rough", 64): [1, 2, 4, 6, 9, 10, 13, 15, 16, 17, 20, 21, 24, 27, 29, 31, 32, 34, 37, 39, 42, 43, 45, 46, 48, 49,
        52, 54, 56, 57, 60, 62, 64, 66, 68, 69, 73, 75, 76, 78, 81, 82, 85, 86, 88, 91, 92, 94, 96, 98, 101, 102, 105,
        107, 110, 111, 112, 114, 116, 118, 120, 123, 126, 127],
    ("spikes", 2): [42, 43],
    ("spikes", 4): [41, 42, 43, 120],
    ("spikes", 8): [40, 41, 42, 43, 70, 71, 100, 120],
    ("spikes", 16): [],
    ("spikes", 64): [1, 2, 4, 6, 9, 10, 13, 15, 16, 17, 20, 21, 24, 27, 29, 31, 32, 34, 37, 39, 42, 43, 45, 46, 48,
        49, 52, 54, 56, 57, 60, 62, 64, 66, 70, 71, 73, 75, 76, 78, 81, 82, 85, 86, 88, 91, 92, 94, 96, 98, 100, 102,
        105, 107, 110, 111, 112, 114, 116, 118, 120, 123, 126, 127],
}


@pytest.mark.parametrize("name, num_frames", BOLT)
def test_bolt_chooses_what_its_code_does_and_fills_up_with_neighbours(name, num_frames):
    published, ours = BOLT[name, num_frames], RULES["bolt"](Scores(sequence(name)), num_frames).tolist()
    assert len(ours) == num_frames
    if num_frames == 2:  # the code reads the median twice; ours the quarters, on both sides of it
        assert len(published) == 1 and ours[0] <= published[0] <= ours[1]
    elif len(published) == num_frames:
        assert ours == published
    else:
        assert set(published) < set(ours)
        assert max(min(abs(frame - own) for own in published) for frame in ours) <= num_frames // 2


def test_bolt_reads_the_quarters_for_two_frames():
    density = (sequence("rough") - sequence("rough").min()) ** 3
    for frame, share in zip(RULES["bolt"](Scores(sequence("rough")), 2), (0.25, 0.75)):
        assert density[:frame].sum() < share * density.sum() <= density[: frame + 1].sum()


@pytest.mark.parametrize("name, num_frames", AKS)
def test_aks_chooses_what_its_code_does_and_more_where_that_gives_too_few(name, num_frames):
    published, ours = AKS[name, num_frames], RULES["aks"](Scores(sequence(name)), num_frames).tolist()
    assert len(ours) == num_frames and set(published) <= set(ours)
    assert len(published) in (0, num_frames)  # in these sequences


def test_the_values_cover_both_sides():
    """Some of the published choices are complete, others lack frames; also below T = 32."""
    for table in (BOLT, AKS):
        complete = {len(frames) == num_frames for (_, num_frames), frames in table.items() if num_frames < 32}
        assert complete == {True, False}


# (candidates, T): frames; the question is the last of the vectors.
MDP3 = {
    (32, 1): [27],
    (32, 2): [3, 27],
    (32, 4): [3, 8, 23, 27],
    (32, 8): [3, 6, 8, 10, 18, 19, 23, 27],
    (32, 16): [2, 3, 4, 5, 6, 7, 8, 10, 14, 18, 19, 20, 23, 27, 29, 30],
    (96, 1): [27],
    (96, 2): [27, 37],
    (96, 4): [3, 27, 37, 92],
    (96, 8): [3, 27, 37, 72, 73, 89, 92, 94],
    (96, 16): [3, 8, 18, 19, 23, 27, 33, 37, 42, 48, 55, 59, 72, 89, 92, 94],
}


def vectors() -> np.ndarray:
    """Returns 97 unit vectors float64 `[97, 8]`."""
    i, j = np.meshgrid(np.arange(97), np.arange(8), indexing="ij")
    drawn = (i * i * (7919 + 104729 * j) + 31 * i * j + 17 * j) % 1009 / 1009 - 0.3
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize("candidates, num_frames", MDP3)
def test_mdp3_chooses_what_its_code_does(candidates, num_frames):
    frames, question = vectors()[:candidates], vectors()[-1]
    scores = Scores(frames @ question, cosines=frames @ frames.T)
    assert RULES["mdp3"](scores, num_frames).tolist() == MDP3[candidates, num_frames]
