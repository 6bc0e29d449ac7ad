"""Packs sequences that begin alike as trees into the rows of batches, so that shared tokens are computed once.

Sorted sequences with a common beginning are neighbours. A range of them is one tree; a tree that is too large for a row
is cut where its branches part. If they part after many tokens, these become a separate prefix, whose keys and values
are computed once for all the rows behind it. The sequences "abcd", "abce" and "axy", for example, make one tree of the
tokens a b c x: the last token of a sequence is predicted, but never fed to the model.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

# Fewest shared tokens at the beginning that are worth a separate prefix.
MIN_PREFIX = 32


class PackedRow(NamedTuple):
    """Trees side by side in one row, their tokens depth first.

    Attributes:
      tokens, positions: int32 `[tokens]`.
      subtree_ends: int32 `[tokens]`, see `models.tree_attention.TreeMask`.
      nodes: int32 `[nodes]`, indices of the tokens from which others are predicted.
      node_indices: int32 `[pairs]`, for each pair of a node and a token to score: the node's index in `nodes`.
      targets: int32 `[pairs]`, the token to score.
      members: for each sequence in the row its number, and the indices of its pairs, from its first target on.
    """

    tokens: Int32[np.ndarray, " tokens"]
    positions: Int32[np.ndarray, " tokens"]
    subtree_ends: Int32[np.ndarray, " tokens"]
    nodes: Int32[np.ndarray, " nodes"]
    node_indices: Int32[np.ndarray, " pairs"]
    targets: Int32[np.ndarray, " pairs"]
    members: list[tuple[int, Int[np.ndarray, " pairs_of_sequence"]]]


class TreeGroup(NamedTuple):
    """Rows of trees behind one prefix.

    Attributes:
      prefix: int32 `[tokens]`, may be empty.
      rows: (length to fill the row up to, row) of each row.
    """

    prefix: Int32[np.ndarray, " prefix"]
    rows: list[tuple[int, PackedRow]]


class _Tree(NamedTuple):
    """A tree of the sorted sequences first, ..., last - 1 without their first `base` tokens."""

    first: int
    last: int
    base: int
    size: int


def row_lengths(shortest: int, longest: int) -> list[int]:
    """Returns lengths of rows, each a half or a third longer than the last: 256, 384, 512, 768, 1024, ..."""
    lengths = [shortest]
    while lengths[-1] < longest:
        step = lengths[-1] // 2 if len(lengths) % 2 else lengths[-1] // 3
        lengths.append(lengths[-1] + max(step, 1))
    return lengths


def pack_prefix_trees(
    sequences: Sequence[Int[np.ndarray, " _"]], first_targets: Sequence[int], lengths: Sequence[int]
) -> list[TreeGroup]:
    """Packs sequences into rows of prefix trees.

    A sequence's tokens from its first target on are scored; its last token is never fed to the model.

    Args:
      sequences: int32 `[length]` each.
      first_targets: for each sequence the index of the first token to score, at least 1.
      lengths: lengths that rows may have, ascending; the longest holds any sequence.

    Returns:
      Groups of rows. A row has no more tokens and nodes than its length, and at most twice as many pairs.
    """
    return list(_Packer(sequences, first_targets, lengths).groups())


class _Packer:
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
        # Cumulative sums of the tokens and pairs that a sequence adds to its predecessor's.
        self._token_sum, self._pair_sum = (np.concatenate([[0, 0], np.cumsum(x)]) for x in (new_tokens, new_pairs))

    def _size(self, first: int, last: int, base: int) -> int:
        """Returns the row length that a tree needs: its tokens, or half of its pairs if that is more."""
        tokens = self._tokens(first, last, base)
        pairs = self._fed[first] + 1 - self._starts[first] + self._pair_sum[last] - self._pair_sum[first + 1]
        return int(max(tokens, -(-pairs // 2)))

    def groups(self) -> Iterator[TreeGroup]:
        """Yields groups of rows that together hold every sequence once."""
        ranges = [(0, len(self._sequences), 0)] if self._sequences else []
        without_prefix: list[_Tree] = []
        while ranges:
            first, last, base = ranges.pop()
            trees, prefixed = self._cut(first, last, base)
            ranges += prefixed
            if base:
                yield TreeGroup(self._sequences[first][:base], self._fill(trees))
            else:
                without_prefix += trees
        if without_prefix:
            yield TreeGroup(np.zeros(0, np.int32), self._fill(without_prefix))

    def _cut(self, first: int, last: int, base: int) -> tuple[list[_Tree], list[tuple[int, int, int]]]:
        """Cuts a range of sequences into trees that fit into rows, and ranges that get a separate prefix."""
        trees, prefixed, ranges = [], [], [(first, last)]
        row, longest = self._lengths[0], self._lengths[-1]
        while ranges:
            first, last = ranges.pop()
            size = self._size(first, last, base)
            if last - first == 1:
                trees.append(_Tree(first, last, base, size))
                continue
            common = self._common[first + 1 : last]
            depth = int(common.min())
            parts = [first, *(first + 1 + np.flatnonzero(common == depth)).tolist(), last]
            repeated = (len(parts) - 2) * max(depth - base, 0)  # tokens computed again if the tree is cut at `depth`
            if 16 * repeated > size:
                # A prefix has separate batches, so enough sequences must share it to fill them.
                small = size <= row or (size <= longest and size - (depth - base) < 4 * row)
                prefix = int(min(depth, self._starts[first:last].min() - 1))
                if not small and not base and prefix >= MIN_PREFIX:
                    prefixed.append((first, last, prefix))
                    continue
                if small or (size <= longest and depth - base >= MIN_PREFIX):
                    trees.append(_Tree(first, last, base, size))
                    continue
            ranges += itertools.pairwise(parts)
        return trees, prefixed

    def _fill(self, trees: list[_Tree]) -> list[tuple[int, PackedRow]]:
        """Packs trees into rows by best fit, largest first: a tree goes to the fullest row that it fits into."""
        rows: list[list[_Tree]] = []
        lengths: list[int] = []
        room: list[tuple[int, int]] = []  # (free tokens, row), ascending
        for tree in sorted(trees, key=lambda tree: (-tree.size, tree.first)):
            fullest = bisect.bisect_left(room, (tree.size, -1))
            if fullest < len(room):
                free, row = room.pop(fullest)
            else:
                row = len(rows)
                rows.append([])
                lengths.append(self._lengths[bisect.bisect_left(self._lengths, tree.size)])
                free = lengths[row]
            rows[row].append(tree)
            bisect.insort(room, (free - tree.size, row))
        return [(length, self._row(row)) for length, row in zip(lengths, rows)]

    def _row(self, trees: list[_Tree]) -> PackedRow:
        tokens, positions, subtree_ends, pairs, members = [], [], [], [], []
        stop = 0  # of the row's tokens so far
        for tree in trees:
            path = np.zeros(int(self._fed[tree.first : tree.last].max()), np.int64)  # indices of a sequence's tokens
            start, ends = stop, np.zeros(self._tokens(tree.first, tree.last, tree.base), np.int32)
            depth = tree.base
            for i in range(tree.first, tree.last):
                sequence, fed = self._sequences[i], int(self._fed[i])
                shared = depth if i == tree.first else max(tree.base, min(depth, int(self._common[i])))
                ends[path[shared:depth] - start] = stop
                path[shared:fed] = np.arange(stop, stop + fed - shared)
                tokens.append(sequence[shared:fed])
                positions.append(np.arange(shared, fed))
                stop += max(fed - shared, 0)
                depth = max(fed, shared)
                scored = int(self._starts[i])
                pairs.append(path[scored - 1 : fed] << 32 | sequence[scored:])
                members.append(self._order[i])
            ends[path[tree.base : depth] - start] = stop
            subtree_ends.append(ends)
        unique, inverse = np.unique(np.concatenate(pairs), return_inverse=True)
        nodes, node_indices = np.unique(unique >> 32, return_inverse=True)
        pairs_of_members = np.split(inverse, np.cumsum([len(pair) for pair in pairs])[:-1])
        return PackedRow(
            *(np.concatenate(x).astype(np.int32) for x in (tokens, positions, subtree_ends)),
            nodes=nodes.astype(np.int32), node_indices=node_indices.astype(np.int32),
            targets=(unique & 0xFFFFFFFF).astype(np.int32), members=list(zip(members, pairs_of_members)),
        )  # fmt: skip

    def _tokens(self, first: int, last: int, base: int) -> int:
        """Returns the number of a tree's tokens."""
        return int(self._fed[first] - base + self._token_sum[last] - self._token_sum[first + 1])


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
