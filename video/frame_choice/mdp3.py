"""MDP3: chooses a list of frames by a determinant of their kernel, with the question, segment by segment."""

import numpy as np

from video.frame_choice.scores import Scores

_SEGMENT = 32  # candidates; 128 where more frames than these are chosen: the published setting
_BANDWIDTHS = 2.0 ** np.arange(-3, 2)
_LEAST_VARIANCE = 1e-10  # of a frame whose likes are all chosen, where rounding may leave zero or less


def mdp3(scores: Scores, num_frames: int, relevance_weight: float = 5.0, recount: bool = True) -> np.ndarray:
    """MDP3 (arXiv 2501.02885): a determinantal point process with the question, and a dynamic program over segments.

    For unit vectors a and b the kernel is the mean of exp(-|a - b|^2 / 2 alpha) over alpha = 1/8, 1/4, 1/2, 1, 2, which
    is a function of their cosine. A set of frames has the log-likelihood sum of 2 w log k(frame, question) + log det of
    the frames' kernel matrix (equation 9, w = 1 / lambda = 5). In each segment frames are added greedily, conditioned
    on the last frame chosen before the segment; a dynamic program over the segments finds how many each one gets. The
    published code adds that last frame's own terms again in every segment that gets frames, with a kernel that is a sum
    and no mean, so that it spreads frames over segments: this is `recount`.

    Args:
      scores: cosines of frames and question, cosines of pairs of frames. Other values take part by exp(-(1 - value) /
        alpha) all the same; cosines are cut to -1 to 1.
      num_frames: T.
      relevance_weight: w.
      recount: chooses what the published code does; False counts each frame once (ours).

    Raises:
      InputError: the scorer gives no cosines.
    """
    kernel = _kernel(np.clip(scores.required_cosines("mdp3"), -1, 1).astype(np.float64))
    candidates = len(scores)
    if num_frames >= candidates:
        return np.arange(candidates)
    log_relevance = 2 * relevance_weight * _log_kernel(scores.values.astype(np.float64))
    # For each number of frames chosen so far: the best list's log-likelihood and its frames.
    likelihoods = np.full(num_frames + 1, -np.inf)
    likelihoods[0] = 0.0
    lists: list[list[int]] = [[] for _ in likelihoods]
    size = _SEGMENT if num_frames <= _SEGMENT else 4 * _SEGMENT
    for start in range(0, candidates, size):
        segment = np.arange(start, min(start + size, candidates))
        most = min(num_frames, len(segment))
        reached = np.flatnonzero(likelihoods > -np.inf)
        # The kernel of each list's last frame and the segment's; zeros where no frame was chosen.
        last = np.array([kernel[lists[count][-1], segment] if lists[count] else np.zeros(len(segment))
                         for count in reached])
        gains, added = _greedy(kernel[np.ix_(segment, segment)], log_relevance[segment], last, most)
        # What each list's last frame adds again; the sum of the kernels is that many times their mean.
        again = [log_relevance[lists[count][-1]] + (2 * relevance_weight + 1) * np.log(len(_BANDWIDTHS))
                 if recount and lists[count] else 0.0 for count in reached]
        totals = np.full((num_frames + 1, most + 1), -np.inf)  # [chosen in the end, of these in the segment]
        for row, count in enumerate(reached):
            steps = np.arange(min(most, num_frames - count) + 1)
            totals[count + steps, steps] = likelihoods[count] + gains[row, steps] + again[row] * (steps > 0)
        steps = totals.argmax(axis=1)
        likelihoods = totals.max(axis=1)
        rows = {count: row for row, count in enumerate(reached.tolist())}
        lists = [
            [] if likelihoods[count] == -np.inf
            else lists[count - step] + sorted(segment[added[rows[count - step], :step]].tolist())
            for count, step in enumerate(steps.tolist())]
    return np.array(lists[num_frames])


def _greedy(
    kernel: np.ndarray, log_relevance: np.ndarray, last: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Adds frames of a segment one by one by the highest gain in log-likelihood, from several beginnings at once.

    The gain of a frame is its log relevance plus the log of its variance given the frames before it, which a Cholesky
    factor of their kernel keeps up to date (Chen et al. 2018, arXiv 1709.05135, algorithm 1).

    Args:
      kernel: float64 `[segment, segment]`, ones on the diagonal.
      log_relevance: float64 `[segment]`.
      last: float64 `[beginnings, segment]`, kernel of the frame that each beginning is conditioned on; zeros: none.
      most: number of frames to add.

    Returns:
      Total gains after 0, 1, ... frames, float64 `[beginnings, most + 1]`, and the frames in order, int `[beginnings,
      most]`.
    """
    everyone, size = np.arange(len(last)), len(kernel)
    factor = np.zeros((most + 1, len(last), size))
    factor[0] = last
    variances = np.maximum(1 - last**2, _LEAST_VARIANCE)
    gains, added = np.zeros((len(last), most + 1)), np.zeros((len(last), most), np.int64)
    free = np.zeros((len(last), size))  # -inf for chosen frames
    for step in range(most):
        candidates = log_relevance + np.log(variances) + free
        frame = candidates.argmax(axis=1)
        gains[:, step + 1] = gains[:, step] + candidates[everyone, frame]
        added[:, step] = frame
        free[everyone, frame] = -np.inf
        known = np.einsum("sbn,sb->bn", factor[: step + 1], factor[: step + 1, everyone, frame])
        # No covariance exceeds the deviations; where they are no cosines of vectors, it is cut to that.
        deviations = np.sqrt(variances)
        row = (kernel[frame] - known) / deviations[everyone, frame][:, None]
        factor[step + 1] = np.clip(row, -deviations, deviations)
        variances = np.maximum(variances - factor[step + 1] ** 2, _LEAST_VARIANCE)
    return gains, added


def _kernel(cosines: np.ndarray) -> np.ndarray:
    """Returns the kernel of pairs `[frames, frames]` from their cosines; ones on the diagonal."""
    narrow = np.exp((cosines - 1) / _BANDWIDTHS[-1])  # the others are its powers 2, 4, 8, 16
    kernel = narrow.copy()
    for _ in _BANDWIDTHS[1:]:
        narrow *= narrow
        kernel += narrow
    kernel /= len(_BANDWIDTHS)
    np.fill_diagonal(kernel, 1)
    return kernel


def _log_kernel(cosines: np.ndarray) -> np.ndarray:
    """Returns the log of the kernel of frames and question `[frames]`, whatever the size of the values."""
    exponents = (cosines[:, None] - 1) / _BANDWIDTHS
    highest = exponents.max(axis=1)
    return highest + np.log(np.exp(exponents - highest[:, None]).mean(axis=1))
