"""Metrics choose options, and generated answers match them."""

import numpy as np
import pytest

from evals.scoring import metrics
from evals.scoring.metrics import Options


def options(likelihood, tokens=None, characters=None, n_bytes=None, unconditional=None) -> Options:
    n = len(likelihood)
    return Options(*(np.array(x, np.float64) for x in (
        likelihood, tokens or [1] * n, characters or [1] * n, n_bytes or [1] * n, unconditional or [np.nan] * n)))


def test_every_metric_can_choose():
    measured = options([-4.0, -6.0, -7.0, -9.0, -20.0], [1, 1, 4, 9, 10], [2, 8, 7, 5, 9], [2, 8, 20, 6, 9],
                       [-1.0, -5.0, -6.0, -8.0, -30.0])
    chosen = {name: metrics.choose_option(measured, name) for name in metrics.METRICS}
    assert chosen == {"acc": 0, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 3, "acc_mutual_info": 4}
    assert metrics.choose_option(options([-1.0, -2.0]), "acc_mutual_info") == -1
    assert metrics.choose_option(options([-1.0, -1.0]), "acc") == 0


@pytest.mark.parametrize("answer, place", [
    (" The  Cat.", 1), ("猫。", 2), ("cats", -1), ("STRASSE", 0), ("the cat sat", -1), ("", -1)])
def test_answers_match_apart_from_case_space_and_punctuation(answer, place):
    assert metrics.match_answer(answer, ("straße", "the cat", "猫", "The cat!")) == place
