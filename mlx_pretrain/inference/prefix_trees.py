"""Sequences that begin alike as trees, and the trees as rows of a batch: every shared token is there once.

Sorted, sequences that begin alike stand side by side. A range of them is one tree; a tree that is too large for a row
is cut where its branches part, and when much precedes that place, it becomes a prefix of its own, whose keys and
values are computed once for all the rows behind it.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# A shared beginning of so many tokens is worth a prefix of its own.
MIN_PREFIX = 32


class Row(NamedTuple):
    """Trees side by side, their tokens depth first.

    Attributes:
      tokens, positions, ends: int32 `[tokens]`; see `models.tree_attention.TreeMask` for `ends`.
      nodes: int32 `[nodes]`, the tokens from which others are predicted.
      places: int32 `[pairs]`, of each pair of a node and a token to score, the node's place in `nodes`.
      targets: int32 `[pairs]`, the token to score.
      members: (number of the sequence, its pairs in order) of each sequence in the row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    nodes: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    members: list[tuple[int, np.ndarray]]


class Group(NamedTuple):
    """Rows behind one prefix.

    Attributes:
      prefix: int32 `[tokens]`, may be empty.
      rows: (length the row is to be filled up to, row) each.
    """

    prefix: np.ndarray
    rows: list[tuple[int, Row]]


class _Unit(NamedTuple):
    """A tree: sorted sequences first, ..., last - 1 without their first `base` tokens."""

    first: int
    last: int
    base: int
    size: int


def row_lengths(shortest: int, longest: int) -> list[int]:
    """Lengths of rows, each a half or a third longer than the one before: 256, 384, 512, 768, 1024, ..."""
    lengths = [shortest]
    while lengths[-1] < longest:
        step = lengths[-1] // 2 if len(lengths) % 2 else lengths[-1] // 3
        lengths.append(lengths[-1] + max(step, 1))
    return lengths


def pack_prefix_trees(
    sequences: Sequence[np.ndarray], first_targets: Sequence[int], lengths: Sequence[int]
) -> list[Group]:
    """Puts sequences into rows.

    A sequence's tokens from its first target on are scored; its last one is never fed.

    Args:
      sequences: int32 `[length]` each.
      first_targets: where the scored part of each begins, at least 1.
      lengths: that rows may have, ascending; the longest holds any sequence.

    Returns:
      Groups of rows. A row has at most its length of tokens and of nodes, and twice as many pairs.
    """
    return list(_Planting(sequences, first_targets, lengths).groups())


class _Planting:
    """One call of `pack_prefix_trees`, on its sequences in sorted order."""

    def __init__(self, sequences, first_targets, lengths):
        # Big-endian, bytes compare as token ids do.
        keys = [np.asarray(sequence, ">u4").tobytes() for sequence in sequences]
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        self._sequences = [np.asarray(sequences[i], np.int32) for i in self._order]
        self._starts = np.array([first_targets[i] for i in self._order], np.int64)
        self._lengths = list(lengths)
        fed = np.array([len(sequence) - 1 for sequence in self._sequences], np.int64)
        # Tokens that a sequence has in common with the one before it.
        self._common = np.zeros(len(fed) + 1, np.int64)
        for i in range(1, len(fed)):
            self._common[i] = _common_length(self._sequences[i - 1], self._sequences[i])
        common, self._fed = self._common[1:-1], fed
        new_tokens = np.maximum(fed[1:] - np.minimum(common, fed[:-1]), 0)
        known = np.maximum(common - np.maximum(self._starts[1:], self._starts[:-1]), 0)
        new_pairs = fed[1:] + 1 - self._starts[1:] - known
        # Sums up to a sequence, of what it adds to its predecessor.
        self._token_sum, self._pair_sum = (np.concatenate([[0, 0], np.cumsum(x)]) for x in (new_tokens, new_pairs))

    def _size(self, first: int, last: int, base: int) -> int:
        """Tokens of a tree, or half of its pairs where those are more."""
        tokens = self._tokens(first, last, base)
        pairs = self._fed[first] + 1 - self._starts[first] + self._pair_sum[last] - self._pair_sum[first + 1]
        return int(max(tokens, -(-pairs // 2)))

    def groups(self) -> Iterator[Group]:
        """Every sequence in a row of a group."""
        waiting = [(0, len(self._sequences), 0)] if self._sequences else []
        plain: list[_Unit] = []
        while waiting:
            first, last, base = waiting.pop()
            units, inner = self._cut(first, last, base)
            waiting += inner
            if base:
                yield Group(self._sequences[first][:base], self._fill(units))
            else:
                plain += units
        if plain:
            yield Group(np.zeros(0, np.int32), self._fill(plain))

    def _cut(self, first: int, last: int, base: int) -> tuple[list[_Unit], list[tuple[int, int, int]]]:
        """Cuts a range into trees that fit into rows, and ranges that get a prefix of their own."""
        units, prefixed, waiting = [], [], [(first, last)]
        row, longest = self._lengths[0], self._lengths[-1]
        while waiting:
            first, last = waiting.pop()
            size = self._size(first, last, base)
            if last - first == 1:
                units.append(_Unit(first, last, base, size))
                continue
            common = self._common[first + 1 : last]
            depth = int(common.min())
            parts = [first, *(first + 1 + np.flatnonzero(common == depth)).tolist(), last]
            again = (len(parts) - 2) * max(depth - base, 0)  # tokens computed again if it is cut here
            if 16 * again > size:
                # A prefix has batches of its own, so enough has to follow it to fill them.
                small = size <= row or (size <= longest and size - (depth - base) < 4 * row)
                prefix = int(min(depth, self._starts[first:last].min() - 1))
                if not small and not base and prefix >= MIN_PREFIX:
                    prefixed.append((first, last, prefix))
                    continue
                if small or (size <= longest and depth - base >= MIN_PREFIX):
                    units.append(_Unit(first, last, base, size))
                    continue
            waiting += itertools.pairwise(parts)
        return units, prefixed

    def _fill(self, units: list[_Unit]) -> list[tuple[int, Row]]:
        """Best fit, largest first: a tree goes to the fullest row that has room."""
        rows: list[list[_Unit]] = []
        lengths: list[int] = []
        room: list[tuple[int, int]] = []  # (free tokens, row), ascending
        for unit in sorted(units, key=lambda unit: (-unit.size, unit.first)):
            place = bisect.bisect_left(room, (unit.size, -1))
            if place < len(room):
                free, row = room.pop(place)
            else:
                row = len(rows)
                rows.append([])
                lengths.append(self._lengths[bisect.bisect_left(self._lengths, unit.size)])
                free = lengths[row]
            rows[row].append(unit)
            bisect.insort(room, (free - unit.size, row))
        return [(length, self._row(row)) for length, row in zip(lengths, rows)]

    def _row(self, units: list[_Unit]) -> Row:
        tokens, positions, ends, keys, members = [], [], [], [], []
        at = 0
        for unit in units:
            path = np.zeros(int(self._fed[unit.first : unit.last].max()), np.int64)
            start, closed = at, np.zeros(self._tokens(unit.first, unit.last, unit.base), np.int32)
            depth = unit.base
            for i in range(unit.first, unit.last):
                sequence, fed = self._sequences[i], int(self._fed[i])
                shared = depth if i == unit.first else max(unit.base, min(depth, int(self._common[i])))
                closed[path[shared:depth] - start] = at
                path[shared:fed] = np.arange(at, at + fed - shared)
                tokens.append(sequence[shared:fed])
                positions.append(np.arange(shared, fed))
                at += max(fed - shared, 0)
                depth = max(fed, shared)
                scored = int(self._starts[i])
                keys.append(path[scored - 1 : fed] << 32 | sequence[scored:])
                members.append(self._order[i])
            closed[path[unit.base : depth] - start] = at
            ends.append(closed)
        unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        nodes, places = np.unique(unique >> 32, return_inverse=True)
        parts = np.split(inverse, np.cumsum([len(key) for key in keys])[:-1])
        return Row(*(np.concatenate(x).astype(np.int32) for x in (tokens, positions, ends)), nodes.astype(np.int32),
                   places.astype(np.int32), (unique & 0xFFFFFFFF).astype(np.int32), list(zip(members, parts)))

    def _tokens(self, first: int, last: int, base: int) -> int:
        """Of a tree."""
        return int(self._fed[first] - base + self._token_sum[last] - self._token_sum[first + 1])


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
