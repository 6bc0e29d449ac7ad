"""Rules that choose T of M candidate frames without training: evenly, or by what a scorer says about the frames.

Every rule returns T distinct indices of candidates in ascending order; all M where there are no more than T. To add a
rule, write a function (scores, num_frames) -> indices and enter it in `RULES`: gin files choose among its names
(`Selector.choice = 'bolt'`). A rule that needs few scores reads them by `scores.ask(indices)` alone and is named in
`ASKING` too: the scorer then encodes those frames only.
"""

from collections.abc import Callable

import numpy as np

from video.frame_choice.mdp3 import mdp3
from video.frame_choice.scores import AskedScores, Scores


def even(candidates: int, num_frames: int) -> np.ndarray:
    """Takes the middles of equal parts of the candidates: int64 `[num_frames]`."""
    num_frames = min(num_frames, candidates)
    return (np.arange(num_frames) * 2 + 1) * candidates // (2 * num_frames)


def top(scores: Scores, num_frames: int) -> np.ndarray:
    """Takes the candidates with the highest values; among equal values the earlier ones."""
    return np.sort(_best(scores.values, num_frames))


def bolt(scores: Scores, num_frames: int, power: float = 3.0) -> np.ndarray:
    """BOLT (arXiv 2503.21483): inverse transform sampling of the density ((s - min) / (max - min))^power.

    The distribution is read at linspace(1/T, 1 - 1/T, T). At T = 2 the published code so reads the median twice, and at
    T = 1 the very end: ours reads the middles of T equal parts there (1/4 and 3/4; 1/2). Where several readings fall on
    one candidate, ours takes the nearest free one instead, so that T frames result. Equal values: evenly.
    """
    candidates, num_frames = len(scores), min(num_frames, len(scores))
    density = _scaled(scores.values) ** power
    if not density.sum() > 0:
        return even(candidates, num_frames)
    first = 1 / num_frames if num_frames > 2 else 1 / (2 * num_frames)
    cumulative = np.cumsum(density) / density.sum()
    readings = np.searchsorted(cumulative, np.linspace(first, 1 - first, num_frames))
    free = np.ones(candidates, bool)
    for reading in np.minimum(readings, candidates - 1):
        free_indices = np.flatnonzero(free)
        free[free_indices[np.argmin(np.abs(free_indices - reading))]] = False
    return np.flatnonzero(~free)


def aks(scores: Scores, num_frames: int, threshold: float = 0.8, depth: int = 5) -> np.ndarray:
    """Adaptive Keyframe Sampling (arXiv 2502.21271): halves segments until their best frames stand out.

    A segment is kept when the mean of its T highest values, scaled to 0 to 1 over the video, exceeds its mean by the
    threshold; after d halvings it gives its T / 2^d best frames. Ours stops halving at one frame for each segment,
    where the published code would give none, and fills up with the best remaining frames.
    """
    num_frames = min(num_frames, len(scores))
    scaled, kept = _scaled(scores.values), []
    depth = min(depth, int(np.log2(num_frames)))
    segments = [(np.arange(len(scores)), 0)]
    while segments:
        segment, halvings = segments.pop()
        values = scaled[segment]
        stands_out = np.sort(values)[-num_frames:].mean() - values.mean() > threshold
        if stands_out or halvings == depth or len(segment) < 2:
            kept += segment[_best(values, num_frames >> halvings)].tolist()
        else:
            middle = len(segment) // 2
            segments += [(segment[:middle], halvings + 1), (segment[middle:], halvings + 1)]
    return _fill_up(kept, scaled, num_frames)


def mmr(scores: Scores, num_frames: int, relevance: float = 0.5) -> np.ndarray:
    """Maximal marginal relevance (Carbonell and Goldstein 1998), one frame after another.

    The next frame has the highest relevance * value - (1 - relevance) * its highest cosine with a chosen frame. Values
    are scaled to 0 to 1 over the video (ours), as cosines of frames and text spread far less than those of frames.

    Raises:
      InputError: the scorer gives no cosines.
    """
    cosines = scores.required_cosines("mmr")
    gains = relevance * _scaled(scores.values)
    chosen = [int(np.argmax(gains))]
    closest = cosines[chosen[0]].astype(np.float64)
    while len(chosen) < min(num_frames, len(scores)):
        marginal = gains - (1 - relevance) * closest
        marginal[chosen] = -np.inf
        chosen.append(int(np.argmax(marginal)))
        closest = np.maximum(closest, cosines[chosen[-1]])
    return np.sort(chosen)


def greedy(scores: Scores, num_frames: int) -> np.ndarray:
    """Maximises a reward of sets, the sum of the values plus the sum of the pairs i < j (our own, see `voyager`).

    Frames are added by the highest gain; then the swap of a chosen frame for another that gains most is made until none
    gains. As the swaps begin also from the frames of `top` and the better end is taken, no set is worse than theirs.
    Without pairs: `top`.
    """
    start = top(scores, num_frames)
    if scores.pairs is None or len(start) in (1, len(scores)):
        return start
    values = scores.values.astype(np.float64)
    pairs = scores.pairs.astype(np.float64)
    pairs = (pairs + pairs.T) / 2
    np.fill_diagonal(pairs, 0)
    added, marginal = [], values.copy()
    for _ in start:
        added.append(int(np.argmax(marginal)))
        marginal += pairs[added[-1]]
        marginal[added] = -np.inf
    ends = [_swapped(values, pairs, np.array(begin)) for begin in (added, start)]
    return np.sort(max(ends, key=lambda chosen: set_reward(scores, chosen)))


def set_reward(scores: Scores, chosen: np.ndarray) -> float:
    """Returns the sum of the values of a set, int `[chosen]`, plus the sum of its pairs i < j."""
    rows, columns = np.triu_indices(len(chosen), 1)
    reward = float(scores.values[chosen].sum(dtype=np.float64))
    if scores.pairs is None:
        return reward
    pairs = scores.pairs[np.ix_(chosen, chosen)].astype(np.float64)
    return reward + float((pairs + pairs.T)[rows, columns].sum()) / 2


def focus(
    scores: Scores | AskedScores, num_frames: int, clip: int = 8, coarse: int = 2, promoted: float = 0.25,
    best: float = 0.2,
) -> np.ndarray:
    """FOCUS (arXiv 2510.27280): a bandit over clips that scores some of the frames only.

    Every clip is scored at a few frames; the clips with the highest optimistic means (the empirical Bernstein bound,
    mean + sqrt(2 ln N var / n) + 3 ln N / n times the span of the scores) are scored completely. A share of the T
    frames are the best of all scored ones, the others the best of the promoted clips, the same number from each. Ours
    works on the M candidates, not on seconds; the frames of a clip that are scored first are evenly spread, not drawn,
    so that a question always gets the same frames; and the best of a clip are taken, not drawn.

    Args:
      scores: read by `ask` alone.
      num_frames: T.
      clip: candidates of a clip; fewer where that gives less than 8 clips.
      coarse: frames of a clip that are scored first.
      promoted: share of the clips that are scored completely; more where they hold fewer than T frames.
      best: share of the T frames that may come from any clip.
    """
    candidates = len(scores)
    if num_frames >= candidates:
        return np.arange(candidates)
    clips = np.array_split(np.arange(candidates), max(candidates // clip, min(8, candidates)))
    asked = [frames[even(len(frames), coarse)] for frames in clips]
    scores.ask(np.concatenate(asked))
    order = np.argsort(-_optimistic_means(scores, asked), kind="stable")
    enough = np.searchsorted(np.cumsum([len(clips[number]) for number in order]), num_frames) + 1
    zoomed = [clips[number] for number in order[: max(int(np.ceil(promoted * len(clips))), enough)]]
    scores.ask(np.concatenate(zoomed))
    zoomed = [zoomed[number] for number in np.argsort(-_optimistic_means(scores, zoomed), kind="stable")]

    seen = np.unique(np.concatenate([*asked, *zoomed]))
    values = np.full(candidates, -np.inf)
    values[seen] = scores.ask(seen)
    chosen = _best(values, round(best * num_frames)).tolist()
    remaining = num_frames - len(chosen)
    for rank, frames in enumerate(zoomed):
        frames = np.setdiff1d(frames, chosen)
        chosen += frames[_best(values[frames], (remaining + len(zoomed) - 1 - rank) // len(zoomed))].tolist()
    return _fill_up(chosen, values, num_frames)


def _optimistic_means(scores: Scores | AskedScores, clips: list[np.ndarray]) -> np.ndarray:
    """Returns upper confidence bounds on the mean score of each clip, `[clips]`, from the frames listed for it."""
    values = [scores.ask(frames).astype(np.float64) for frames in clips]
    counts = np.array([len(v) for v in values])
    span, total = np.ptp(np.concatenate(values)), np.log(counts.sum())
    variances = np.array([v.var() for v in values])
    return np.array([v.mean() for v in values]) + np.sqrt(2 * total * variances / counts) + 3 * span * total / counts


def _swapped(gains: np.ndarray, pairs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Swaps chosen frames for others, the best swap first, until none raises the sum of gains and pairs i < j.

    Args:
      gains: float64 `[candidates]`.
      pairs: float64 `[candidates, candidates]`, symmetric, zero on the diagonal.
      chosen: int `[chosen]`.
    """
    chosen = chosen.copy()
    marginal = gains + pairs[chosen].sum(axis=0)
    tolerance = 1e-12 * (1 + np.abs(gains).max() + np.abs(pairs).max())  # rounding alone shall not swap forever
    while True:
        change = marginal - marginal[chosen, None] - pairs[chosen]  # [chosen, candidates]
        change[:, chosen] = -np.inf
        removed, added = np.unravel_index(np.argmax(change), change.shape)
        if not change[removed, added] > tolerance:
            return chosen
        marginal += pairs[added] - pairs[chosen[removed]]
        chosen[removed] = added


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the highest values, highest first, among equals the earlier: int64 `[count]`."""
    return np.argsort(-np.asarray(values, np.float64), kind="stable")[:count]


def _fill_up(chosen: list[int], values: np.ndarray, num_frames: int) -> np.ndarray:
    """Adds the best remaining frames up to T; ascending."""
    rest = np.setdiff1d(np.arange(len(values)), chosen)
    return np.sort(np.concatenate([chosen, rest[_best(values[rest], num_frames - len(chosen))]]).astype(np.int64))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scales values to 0 to 1; zeros where all are equal."""
    values = np.asarray(values, np.float64)
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros(len(values))


# Name in `Selector.choice` -> function of the scores and T. Add your rule here.
RULES: dict[str, Callable[[Scores, int], np.ndarray]] = {
    "top": top, "bolt": bolt, "aks": aks, "mmr": mmr, "mdp3": mdp3, "greedy": greedy, "focus": focus}
# Rules that read scores by `ask` alone, of some candidates.
ASKING = frozenset({"focus"})
