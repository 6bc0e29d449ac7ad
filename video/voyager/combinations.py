"""Combinations of T frames out of M candidates: all of them, or a seeded sample."""

import hashlib
import itertools
import math

import numpy as np

from mlx_pretrain.errors import InputError


def combinations(candidates: int, chosen: int, most: int | None = None, seed: int = 0, name: str = "") -> np.ndarray:
    """Distinct combinations, in lexicographic order.

    Args:
      candidates: M.
      chosen: T.
      most: if there are more, so many are drawn, each as likely as any other; None: all.
      seed: of the draw.
      name: of what they are for; every name has a draw of its own.

    Returns:
      int32 `[combinations, chosen]`, each ascending.

    Raises:
      InputError: T is not between 1 and M, or there are too many to list.
    """
    if not 1 <= chosen <= candidates:
        raise InputError(f"combinations of {chosen} out of {candidates} frames: there are none")
    total = math.comb(candidates, chosen)
    if most is None and total > 10_000_000:
        raise InputError(f"{total:,} combinations of {chosen} out of {candidates} frames: draw a sample")
    if most is None or total <= most:
        return np.array(list(itertools.combinations(range(candidates), chosen)), np.int32)
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    found = np.zeros((0, chosen), np.int32)
    while len(found) < most:
        # The first T of a random order of the candidates; those that are there already are drawn again.
        drawn = rng.random((2 * (most - len(found)) + 16, candidates)).argpartition(chosen - 1, axis=1)[:, :chosen]
        found = np.concatenate([found, np.sort(drawn, axis=1).astype(np.int32)])
        _, first = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(first)][:most]
    return found[np.lexsort(found.T[::-1])]
