"""Batches of pairs for the trainer, in the order of a training stream."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlx_pretrain.data.loader import Batch, Mixture, MixtureSource
from mlx_pretrain.files import sha256
from raters.preferences.pair_file import PAIR_TYPES, PARALLEL
from raters.preferences.pair_table import PairTable


@dataclasses.dataclass(frozen=True)
class PairProvenance:
    """The origin of one row of a batch.

    Attributes:
      kind: type of the pair, one of PAIR_TYPES; the name is the key in non_finite_step_*.json.
      pair: number of the pair in the file, from 0.
      epoch: number of earlier passes over the pairs of this type.
    """

    kind: str
    pair: int
    epoch: int


def pair_mixture(table: PairTable, pair_types: Sequence[int], batch_size: int, seed: int) -> Mixture:
    """Returns the mixture of pairs of some types, in the shares of the file, from the beginning.

    Args:
      table: the pairs.
      pair_types: types to use, indices into `PAIR_TYPES`; each must occur.
      batch_size: pairs in the global batch.
      seed: seed of the order.
    """
    rows = {PAIR_TYPES[pair_type]: int((table.pair_type == pair_type).sum()) for pair_type in pair_types}
    return Mixture(rows, rows, dict.fromkeys(rows, sha256(table.path)), seed, batch_size)


class PairSource(MixtureSource):
    """Batches of pairs, with exact shares of the pair types."""

    def __init__(
        self,
        table: PairTable,
        mixture: Mixture,
        *,
        length: int,
        pad_id: int,
        rows: np.ndarray | None = None,
    ):
        """Lays out the stream.

        Args:
          table: the pairs.
          mixture: mixture of the types to use, see `pair_mixture`; batch 0 is its next one.
          length: tokens of a row.
          pad_id: id behind shorter documents.
          rows: rows of the global batch that this host reads; None: all.
        """
        super().__init__(mixture, rows)
        self._table, self._length, self._pad_id = table, length, pad_id
        self._pair_types = list(mixture.rates)
        self._members = [np.flatnonzero(table.pair_type == PAIR_TYPES.index(name)) for name in self._pair_types]
        self._win_rates = table.win_rates()

    def _pairs(self, batch: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns pair, type (index into the mixture) and epoch of each row."""
        source, row, epoch = self.sampler.locate(batch, rows)
        return np.array([self._members[s][r] for s, r in zip(source, row)]), source, epoch

    def __getitem__(self, batch: int) -> Batch:
        """Returns this host's rows of a batch.

        Returns:
          tokens: int32 `[rows, 2, length]`, A and B.
          preference: float32 `[rows]`, P(B>A).
          win_rate: float32 `[rows, 2]`, see `PairTable.win_rates`.
          parallel: int32 `[rows]`, 1 for one document in two languages.
          language: int32 `[rows, 2]`, index into the table's languages.
        """
        pairs, _, _ = self._pairs(batch, self.rows)
        return pair_batch(self._table, pairs, self._length, self._pad_id, self._win_rates)

    def provenance(self, batch: int) -> list[PairProvenance]:
        """Returns the origin of every row of the global batch, for error reports."""
        pairs, source, epoch = self._pairs(batch)
        return [PairProvenance(self._pair_types[s], int(p), int(e)) for p, s, e in zip(pairs, source, epoch)]


def pair_batch(table: PairTable, pairs: np.ndarray, length: int, pad_id: int, win_rates: np.ndarray) -> Batch:
    """Returns the arrays of `PairSource.__getitem__` for some pairs of the table."""
    documents = table.documents[pairs]
    return {
        "tokens": table.rows(documents, length, pad_id),
        "preference": table.preference[pairs],
        "win_rate": win_rates[documents],
        "parallel": (table.pair_type[pairs] == PARALLEL).astype(np.int32),
        "language": table.language[documents].astype(np.int32),
    }
