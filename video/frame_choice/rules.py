"""Rules that choose T of M candidate frames without training: evenly, or by a score of every frame.

Scores are similarities of frames and question, or rewards. Every rule returns T distinct indices of candidates in
ascending order; all M where there are no more than T. To add a rule, write a function (scores, num_frames) -> indices
and enter it in `RULES`: gin files choose among its names (`Selector.choice = 'bolt'`).
"""

from collections.abc import Callable

import numpy as np


def even(candidates: int, num_frames: int) -> np.ndarray:
    """Takes the middles of equal parts of the candidates: int64 `[num_frames]`."""
    num_frames = min(num_frames, candidates)
    return (np.arange(num_frames) * 2 + 1) * candidates // (2 * num_frames)


def top(scores: np.ndarray, num_frames: int) -> np.ndarray:
    """Takes the candidates with the highest scores `[candidates]`; among equal scores the earlier ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:num_frames])


def bolt(scores: np.ndarray, num_frames: int, power: float = 3.0) -> np.ndarray:
    """BOLT (arXiv 2503.21483): inverse transform sampling of the density ((s - min) / max)^power.

    The distribution is read at linspace(1/T, 1 - 1/T, T). Where several readings fall on one candidate, ours takes the
    nearest free one instead, so that T frames result.
    """
    candidates, num_frames = len(scores), min(num_frames, len(scores))
    density = _scaled(scores) ** power
    if num_frames < 3 or not density.sum() > 0:  # linspace needs three readings, a density scores that differ
        return even(candidates, num_frames) if num_frames != 1 else top(scores, 1)
    cumulative = np.cumsum(density) / density.sum()
    readings = np.searchsorted(cumulative, np.linspace(1 / num_frames, 1 - 1 / num_frames, num_frames))
    free = np.ones(candidates, bool)
    for reading in np.minimum(readings, candidates - 1):
        free_indices = np.flatnonzero(free)
        free[free_indices[np.argmin(np.abs(free_indices - reading))]] = False
    return np.flatnonzero(~free)


def aks(scores: np.ndarray, num_frames: int, threshold: float = 0.8, depth: int = 5) -> np.ndarray:
    """Adaptive Keyframe Sampling (arXiv 2502.21271): halves segments until their best frames stand out.

    A segment is kept when the mean of its T highest scores, scaled to 0 to 1 over the video, exceeds its mean by the
    threshold; after d halvings it gives its T / 2^d best frames. Ours stops halving at one frame for each segment,
    where the published code would give none, and fills up with the best remaining frames.
    """
    num_frames = min(num_frames, len(scores))
    scaled, kept = _scaled(scores), []
    depth = min(depth, int(np.log2(num_frames)))
    segments = [(np.arange(len(scores)), 0)]
    while segments:
        segment, halvings = segments.pop()
        segment_scores = scaled[segment]
        stands_out = np.sort(segment_scores)[-num_frames:].mean() - segment_scores.mean() > threshold
        if stands_out or halvings == depth or len(segment) < 2:
            kept += segment[top(segment_scores, num_frames >> halvings)].tolist()
        else:
            middle = len(segment) // 2
            segments += [(segment[:middle], halvings + 1), (segment[middle:], halvings + 1)]
    rest = np.setdiff1d(np.arange(len(scores)), kept)
    return np.sort(np.concatenate([kept, rest[top(scaled[rest], num_frames - len(kept))]]).astype(int))


def _scaled(scores: np.ndarray) -> np.ndarray:
    """Scales scores to 0 to 1; zeros where all are equal."""
    scores = np.asarray(scores, np.float64)
    span = scores.max() - scores.min()
    return (scores - scores.min()) / span if span > 0 else np.zeros(len(scores))


# Name in `Selector.choice` -> function of scores `[candidates]` and T. Add your rule here.
RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"top": top, "bolt": bolt, "aks": aks}
