"""Combinations of T frames out of M candidates: all of them, or a seeded sample whose members begin alike."""

import hashlib
import itertools
import math
from collections.abc import Sequence

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

    Returns:
      int32 `[combinations, largest T]`, each ascending; the places that a smaller combination leaves unused are its
      last, and hold M.

    Raises:
      InputError: a T is not between 1 and M, or there are too many combinations to list.
    """
    sizes = frame_counts(candidates, num_frames)
    totals = {size: math.comb(candidates, size) for size in sizes}
    if max_combinations is None and sum(totals.values()) > 10_000_000:
        raise InputError(f"{sum(totals.values()):,} combinations of {' or '.join(map(str, sizes))} out of {candidates} "
                         "frames: draw a sample")
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    parts, left = {}, max_combinations
    for rest, size in zip(range(len(sizes), 0, -1), sorted(sizes, key=totals.__getitem__)):
        count = totals[size] if left is None else min(totals[size], left // rest)
        left = None if left is None else left - count
        parts[size] = _some(rng, candidates, size, count, nested)
    return np.concatenate([
        np.pad(parts[size], ((0, 0), (0, sizes[-1] - size)), constant_values=candidates) for size in sizes])


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
