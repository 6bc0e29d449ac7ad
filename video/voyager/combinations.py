"""Combinations of T frames out of M candidates: all of them, or a seeded sample, a part of it around the best ones."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special

from mlx_pretrain.errors import InputError


def combinations(
    candidates: int,
    num_frames: int | Sequence[int],
    max_combinations: int | None = None,
    seed: int = 0,
    name: str = "",
    nested: bool = False,
    guided: float = 0.0,
) -> np.ndarray:
    """Lists or draws distinct combinations, those of a size in lexicographic order.

    Each combination of a size is equally likely, nested or not, but that repeated ones are replaced: see
    `benchmarks/video_combinations.py` for the deviations.

    Args:
      candidates: M.
      num_frames: T, or several of them, for combinations of several sizes.
      max_combinations: size of the sample if there are more, shared evenly by the sizes; None: no limit.
      seed: seed of the sample.
      name: name of the sample, e.g. a question's id; each name has a different sample.
      nested: True: combinations of a sample share their first frames, so that a Video-LLM reads fewer tokens, see
        `group_sizes`; False: they are drawn one by one.
      guided: share of the sample that is left to `around_the_best`.

    Returns:
      int32 `[combinations, largest T]`, each ascending; the places that a smaller combination leaves unused are its
      last, and hold M.

    Raises:
      InputError: a T is not between 1 and M, or there are too many combinations to list.
    """
    first, _ = sample_sizes(candidates, num_frames, max_combinations, guided)
    rng = _generator(seed, name, 0)
    return _padded([_some(rng, candidates, size, count, nested) for size, count in first.items()], candidates)


def sample_sizes(
    candidates: int, num_frames: int | Sequence[int], max_combinations: int | None = None, guided: float = 0.0
) -> tuple[dict[int, int], dict[int, int]]:
    """Returns how many combinations of each size `combinations` draws, and how many `around_the_best`.

    Raises InputError as `combinations`.
    """
    sizes = frame_counts(candidates, num_frames)
    totals = {size: math.comb(candidates, size) for size in sizes}
    if max_combinations is None and sum(totals.values()) > 10_000_000:
        raise InputError(f"{sum(totals.values()):,} combinations of {' or '.join(map(str, sizes))} out of {candidates} "
                         "frames: draw a sample")
    counts, left = {}, max_combinations
    for rest, size in zip(range(len(sizes), 0, -1), sorted(sizes, key=totals.__getitem__)):
        counts[size] = totals[size] if left is None else min(totals[size], left // rest)
        left = None if left is None else left - counts[size]
    # Where nearly all are labelled anyway, there is nothing to look for.
    around = {size: int(guided * counts[size]) if 2 * counts[size] <= totals[size] else 0 for size in sizes}
    return {size: counts[size] - around[size] for size in sizes}, around


def around_the_best(
    drawn: np.ndarray, losses: np.ndarray, counts: Mapping[int, int], candidates: int, seed: int = 0, name: str = ""
) -> np.ndarray:
    """Draws further combinations of a question, mostly of frames with which its losses were low.

    Of random combinations of few frames, hardly one shows both moments that a question asks about. Our own rule: a
    frame's gain is the mean over the combinations with it of what their losses are below the mean of their size, as if
    there were one more of no gain; T frames are drawn one after the other, each with probability proportional to
    exp(1.5 gain / standard deviation of the gains).

    Args:
      drawn: int `[K, T]`, the question's combinations so far, as `combinations` returns them.
      losses: float `[K]`, the Video-LLM's losses on them.
      counts: size -> number to draw.
      candidates: M.
      seed, name: see `combinations`.

    Returns:
      int32 `[sum of counts, largest T]`, distinct from each other and from `drawn`; smaller sizes first.
    """
    rng = _generator(seed, name, 1)
    shown = (drawn[:, :, None] == np.arange(candidates)).any(axis=1)  # [K, M]
    sizes = shown.sum(axis=1)
    means = {size: losses[sizes == size].mean() for size in np.unique(sizes).tolist()}
    below = np.array([means[size] for size in sizes.tolist()]) - losses
    gains = (below @ shown) / (shown.sum(axis=0) + 1)
    logits = 1.5 * gains / max(gains.std(), 1e-9)
    parts = []
    for size, count in counts.items():
        known = {tuple(row[:size]) for row in drawn[sizes == size].tolist()}
        before, tries = len(known), 0
        new = []
        while len(known) < before + count:
            # The largest T of logits with Gumbel noise are a draw without replacement (Efraimidis and Spirakis 2006).
            # Where too few combinations are likely, the others become so.
            tries += 1
            noise = rng.gumbel(size=candidates) * (1 + tries // (4 * count))
            row = tuple(np.sort(np.argpartition(-(logits + noise), size - 1)[:size]).tolist())
            if row not in known:
                known.add(row)
                new.append(row)
        parts.append(np.array(sorted(new), np.int32).reshape(-1, size))
    return _padded(parts, candidates)


def _generator(seed: int, name: str, which: int) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big"), *([which] if which else [])])


def _padded(parts: Sequence[np.ndarray], candidates: int) -> np.ndarray:
    """Joins combinations of several sizes; unused places hold M."""
    largest = max(part.shape[1] for part in parts)
    return np.concatenate([
        np.pad(part, ((0, 0), (0, largest - part.shape[1])), constant_values=candidates) for part in parts])


def frame_counts(candidates: int, num_frames: int | Sequence[int]) -> list[int]:
    """Returns the sizes T of combinations, ascending; raises InputError unless each is between 1 and M."""
    sizes = sorted({num_frames} if isinstance(num_frames, int) else set(num_frames))
    for size in sizes or [0]:
        if not 1 <= size <= candidates:
            raise InputError(f"combinations of {size} out of {candidates} frames do not exist")
    return sizes


def group_sizes(num_frames: int) -> list[int]:
    """Returns how many combinations of a nested sample share their first 1, 2, ..., T frames.

    Four share the first half, two all but the last quarter. Our own choice: a deeper tree saves the tokens of early
    frames only, of which a question would then see few draws.
    """
    return [4 if 2 * length <= num_frames else 2 if 4 * length <= 3 * num_frames else 1
            for length in range(1, num_frames + 1)]


def _some(rng: np.random.Generator, candidates: int, num_frames: int, count: int, nested: bool) -> np.ndarray:
    """Lists all combinations of one size if `count` is their number, else draws `count` of them."""
    total = math.comb(candidates, num_frames)
    if 2 * count > total:  # few are left out, and those that are not begin alike anyway
        every = np.array(list(itertools.combinations(range(candidates), num_frames)), np.int32)
        return every if count == total else every[np.sort(rng.choice(total, count, replace=False))]
    groups = group_sizes(num_frames) if nested else [1] * num_frames
    sample = np.zeros((0, num_frames), np.int32)
    while len(sample) < count:
        sample = np.concatenate([sample, _draw_tree(rng, candidates, groups, count - len(sample))])
        _, first = np.unique(sample, axis=0, return_index=True)  # repeated ones are dropped and others drawn
        sample = sample[np.sort(first)]
    return sample[np.lexsort(sample.T[::-1])]


def _draw_tree(rng: np.random.Generator, candidates: int, groups: Sequence[int], count: int) -> np.ndarray:
    """Draws the leaves of a random tree of frames, each an equally likely combination.

    A combination is drawn frame by frame in order of time. If r more frames of the candidates behind frame p are to be
    drawn, the next one is later than j with probability C(M - 1 - j, r) / C(M - 1 - p, r). This holds whatever
    combinations share the frames up to p, so each leaf is uniform, though leaves are not independent. Uniform numbers
    are stratified, among the branches of one beginning and among all (Latin hypercube), so that a question's
    combinations cover the candidates more evenly than independent ones.

    Late frames leave few combinations to branches, which would repeat. So a node from whose frame on fewer than four
    combinations a leaf remain is dissolved: its leaves draw this frame and the later ones one by one, among the frames
    from which on so few remain. They stay uniform, as all such nodes of a parent together are one set to draw from.

    Args:
      rng: source of random numbers.
      candidates: M.
      groups: number of leaves that share their first 1, 2, ..., T frames; the last is 1.
      count: number of leaves.

    Returns:
      int32 `[count, T]`.
    """
    rows, leaves, done = np.zeros((1, 0), np.int32), np.array([count]), []
    behind = np.arange(candidates + 1)  # number of candidates behind a frame
    for depth, group in enumerate(groups):
        branches = -(-leaves // group)
        parents = np.repeat(np.arange(len(rows)), branches)
        number = np.arange(len(parents)) - (np.cumsum(branches) - branches)[parents]  # of a branch of its parent
        split, width = branches[parents], len(parents)
        leaves = leaves[parents] * (number + 1) // split - leaves[parents] * number // split
        place = np.empty(width, np.int64)  # the numbers of each parent's branches, in random order
        place[np.lexsort((rng.random(width), parents))] = number
        uniform = (place + (rng.permutation(width) + rng.random(width)) / width) / split
        last = rows[parents, -1] if depth else np.full(width, -1)
        left = len(groups) - depth  # frames to draw, this one included
        with np.errstate(divide="ignore"):
            ways = np.log(scipy.special.comb(behind, left))
            later = np.searchsorted(ways, ways[candidates - 1 - last] + np.log1p(-uniform))
        frames = np.clip(candidates - later, last + 1, candidates - left)
        first_late = candidates - np.searchsorted(scipy.special.comb(behind, left - 1), 4 * leaves)
        dissolved = (leaves > 1) & (frames >= first_late)
        for node in np.flatnonzero(dissolved):
            first = max(first_late[node], last[node] + 1)
            ends = first + _draw_tree(rng, candidates - first, [1] * left, leaves[node])
            done.append(np.column_stack([np.tile(rows[parents[node]], (len(ends), 1)), ends]))
        rows = np.column_stack([rows[parents], frames])[~dissolved]
        leaves = leaves[~dissolved]
    return np.concatenate([rows, *done]).astype(np.int32)
