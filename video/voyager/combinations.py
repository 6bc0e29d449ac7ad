"""Combinations of T frames out of M candidates: all of them, or a seeded sample."""

import hashlib
import itertools
import math

import numpy as np

from mlx_pretrain.errors import InputError


def combinations(
    candidates: int, num_frames: int, max_combinations: int | None = None, seed: int = 0, name: str = ""
) -> np.ndarray:
    """Lists or draws distinct combinations, in lexicographic order.

    Args:
      candidates: M.
      num_frames: T.
      max_combinations: size of the sample if there are more, each combination equally likely; None: no limit.
      seed: seed of the sample.
      name: name of the sample, e.g. a question's id; each name has a different sample.

    Returns:
      int32 `[combinations, num_frames]`, each ascending.

    Raises:
      InputError: T is not between 1 and M, or there are too many to list.
    """
    if not 1 <= num_frames <= candidates:
        raise InputError(f"combinations of {num_frames} out of {candidates} frames do not exist")
    total = math.comb(candidates, num_frames)
    if max_combinations is None and total > 10_000_000:
        raise InputError(f"{total:,} combinations of {num_frames} out of {candidates} frames: draw a sample")
    if max_combinations is None or total <= max_combinations:
        return np.array(list(itertools.combinations(range(candidates), num_frames)), np.int32)
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    sample = np.zeros((0, num_frames), np.int32)
    while len(sample) < max_combinations:
        # The first T of a random order of the candidates; repeated combinations are dropped and others drawn.
        order = rng.random((2 * (max_combinations - len(sample)) + 16, candidates)).argpartition(num_frames - 1, axis=1)
        sample = np.concatenate([sample, np.sort(order[:, :num_frames], axis=1).astype(np.int32)])
        _, first = np.unique(sample, axis=0, return_index=True)
        sample = sample[np.sort(first)][:max_combinations]
    return sample[np.lexsort(sample.T[::-1])]
