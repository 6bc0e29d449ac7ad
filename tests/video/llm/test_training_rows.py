"""Which candidates show a question's evidence, and which frames are shown beside them."""

import numpy as np

from video.llm.training_rows import evidence_frames, with_evidence
from video.questions import Question

TIMES = np.arange(8) + 0.5  # one frame a second


def question(*evidence):
    return Question("a", "clip.mp4", "How many?", "two", evidence=evidence)


def test_spans_have_the_candidates_inside_them_or_the_nearest_one():
    spans = evidence_frames(question((1.0, 4.0), (5.6, 5.9)), TIMES)
    assert [span.tolist() for span in spans] == [[1, 2, 3], [5]]


def test_one_frame_of_each_span_and_others_outside_of_them_first():
    asked, even = question((1.0, 4.0), (6.0, 7.0)), np.array([1, 3, 5, 7])
    assert with_evidence(asked, TIMES, even, 4).tolist() == [2, 5, 6, 7]  # not 1 and 3, of the first span again
    assert with_evidence(asked, TIMES, even, 2).tolist() == [2, 6]
    assert with_evidence(asked, TIMES, even, 5).tolist() == [1, 2, 5, 6, 7]
    assert with_evidence(asked, TIMES, even, 1).tolist() == [2]
    assert with_evidence(question(), TIMES, even, 3).tolist() == [1, 3, 5]
