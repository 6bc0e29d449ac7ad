"""Ways to choose T of M candidate frames that need no training: evenly, or by a score of every frame.

Scores are similarities of frames and question, or rewards. All return T distinct places in ascending order (M, where
there are no more).
"""

import numpy as np


def even(candidates: int, chosen: int) -> np.ndarray:
    """The middles of equal parts of the candidates."""
    chosen = min(chosen, candidates)
    return (np.arange(chosen) * 2 + 1) * candidates // (2 * chosen)


def top(scores: np.ndarray, chosen: int) -> np.ndarray:
    """The candidates with the highest scores `[candidates]`; of equal ones the earlier."""
    return np.sort(np.argsort(-scores, kind="stable")[:chosen])


def bolt(scores: np.ndarray, chosen: int, power: float = 3.0) -> np.ndarray:
    """BOLT (arXiv 2503.21483): inverse transform sampling of the density ((s - min) / max)^power.

    It is read at linspace(1/T, 1 - 1/T, T). Several of these may meet in one candidate; ours then takes the nearest
    free one, so that T frames result.
    """
    candidates, chosen = len(scores), min(chosen, len(scores))
    density = _scaled(scores) ** power
    if chosen < 3 or not density.sum() > 0:  # the reading points need three, a density something that differs
        return even(candidates, chosen) if chosen != 1 else top(scores, 1)
    cumulative = np.cumsum(density) / density.sum()
    wanted = np.searchsorted(cumulative, np.linspace(1 / chosen, 1 - 1 / chosen, chosen))
    free = np.ones(candidates, bool)
    for place in np.minimum(wanted, candidates - 1):
        places = np.flatnonzero(free)
        free[places[np.argmin(np.abs(places - place))]] = False
    return np.flatnonzero(~free)


def aks(scores: np.ndarray, chosen: int, threshold: float = 0.8, depth: int = 5) -> np.ndarray:
    """Adaptive Keyframe Sampling (arXiv 2502.21271): segments are halved until their best frames stand out.

    A segment is kept when the mean of its T highest scores, scaled to 0 to 1 over the video, exceeds its mean by the
    threshold; halved d times it gives its T / 2^d best frames. Ours halves no further than to one frame each, where
    the published code would give none, and fills up with the best that are left.
    """
    chosen = min(chosen, len(scores))
    scaled, found = _scaled(scores), []
    depth = min(depth, int(np.log2(chosen)))
    waiting = [(np.arange(len(scores)), 0)]
    while waiting:
        places, halved = waiting.pop()
        of_segment = scaled[places]
        stands_out = np.sort(of_segment)[-chosen:].mean() - of_segment.mean() > threshold
        if stands_out or halved == depth or len(places) < 2:
            found += places[top(of_segment, chosen >> halved)].tolist()
        else:
            middle = len(places) // 2
            waiting += [(places[:middle], halved + 1), (places[middle:], halved + 1)]
    rest = np.setdiff1d(np.arange(len(scores)), found)
    return np.sort(np.concatenate([found, rest[top(scaled[rest], chosen - len(found))]]).astype(int))


def _scaled(scores: np.ndarray) -> np.ndarray:
    """To 0 to 1; zeros where all are equal."""
    scores = np.asarray(scores, np.float64)
    span = scores.max() - scores.min()
    return (scores - scores.min()) / span if span > 0 else np.zeros(len(scores))
