"""Pairs of documents as batches for the trainer: tokenized once, in the order of a training stream."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.data.loader import Batch, Mixture, MixtureSampler
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from raters.pairs import FORMAT, KINDS, VERSION

PARALLEL = KINDS.index("parallel")
_TOKENIZED = 256  # texts at a time


@dataclasses.dataclass(frozen=True)
class PairTable:
    """A file of pairs (`raters.pairs`) with its documents as tokens.

    Attributes:
      path: of the file.
      tokens: int32, the documents' tokens one after the other, cut to the encoder's length.
      starts: int64 `[documents + 1]`, where each begins.
      documents: int64 `[pairs, 2]`, A and B.
      preference: float32 `[pairs]`, P(B>A).
      kind: int8 `[pairs]`, index into `raters.pairs.KINDS`.
      language: int16 `[documents]`, index into `languages`.
      languages: sorted names.
      raters: sorted names of the raters behind the preferences.
      votes: float32 `[pairs, raters]`, each rater's own P(B>A), nan where it has none.
    """

    path: epath.Path
    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    preference: np.ndarray
    kind: np.ndarray
    language: np.ndarray
    languages: list[str]
    raters: list[str]
    votes: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def rows(self, documents: np.ndarray, length: int, pad_id: int) -> np.ndarray:
        """Tokens of documents `[...]`, padded: int32 `[..., length]`."""
        found = np.full((documents.size, length), pad_id, np.int32)
        for row, document in zip(found, documents.ravel()):
            start, stop = self.starts[document], self.starts[document + 1]
            row[: stop - start] = self.tokens[start:stop]
        return found.reshape(*documents.shape, length)

    def win_rates(self) -> np.ndarray:
        """P(document beats the one it is paired with), mean over its pairs that are not parallel: `[documents]`.

        What a pointwise rater is trained on. Half where a document is in parallel pairs only.
        """
        pairs = self.kind != PARALLEL
        won, played = np.zeros(len(self.language)), np.zeros(len(self.language))
        for side, share in ((0, 1 - self.preference), (1, self.preference)):
            np.add.at(won, self.documents[pairs, side], share[pairs])
            np.add.at(played, self.documents[pairs, side], 1)
        return np.where(played > 0, won / np.maximum(played, 1), 0.5).astype(np.float32)


def read_pairs(path: epath.PathLike, tokenizer: Any, length: int) -> PairTable:
    """Reads and tokenizes a file of pairs, each document once.

    Args:
      path: file of `raters.pairs`.
      tokenizer: with `encode_batch` and `wrap`.
      length: tokens of a document that are used, special ones included: the first.

    Raises:
      InputError: the file is missing, malformed (with the line) or holds no pair.
    """
    path = epath.Path(path)
    known: dict[tuple[str, str, str], int] = {}
    names, pending, tokens = [], [], []
    documents, preference, kinds, votes = [], [], [], []
    special = len(tokenizer.wrap([]))

    def tokenize() -> None:
        for ids in tokenizer.encode_batch(pending, 1):
            tokens.append(tokenizer.wrap(ids[: length - special]))
        pending.clear()

    def place(document: dict[str, str]) -> int:
        key = document["source"], document["id"], document["lang"]
        if key not in known:
            known[key] = len(known)
            names.append(document["lang"])
            pending.append(document["text"])
            if len(pending) == _TOKENIZED:
                tokenize()
        return known[key]

    for number, pair in _read_lines(path):
        try:
            documents.append((place(pair["a"]), place(pair["b"])))
            preference.append(float(pair["p_b"]))
            kinds.append(KINDS.index(pair["kind"]))
            votes.append({str(name): float(vote) for name, vote in pair["raters"].items()})
            if not 0 <= preference[-1] <= 1:
                raise ValueError(f"p_b is {preference[-1]}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            cause = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}:{number}: not a pair: {cause}") from None
    if not documents:
        raise InputError(f"{path}: no pairs")
    tokenize()
    languages, language = np.unique(names, return_inverse=True)
    raters = sorted({name for vote in votes for name in vote})
    return PairTable(
        path=path,
        tokens=np.concatenate(tokens),
        starts=np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]),
        documents=np.array(documents, np.int64),
        preference=np.array(preference, np.float32),
        kind=np.array(kinds, np.int8),
        language=language.astype(np.int16),
        languages=languages.tolist(),
        raters=raters,
        votes=np.array([[vote.get(name, np.nan) for name in raters] for vote in votes], np.float32),
    )


def _read_lines(path: epath.Path) -> Iterator[tuple[int, Any]]:
    """(line number, object) of all lines but the first, which is checked."""
    try:
        with path.open() as file:
            header = None
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: malformed JSON: {error}") from None
                if header is None:
                    header = value if isinstance(value, dict) else {}
                    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
                        raise InputError(f"{path}: the first line is not that of {FORMAT!r} version {VERSION}")
                    continue
                yield number, value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of pairs") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None


@dataclasses.dataclass(frozen=True)
class PairProvenance:
    """Where one row of a batch comes from: the pair in the order of the file, from 0."""

    kind: str
    pair: int
    epoch: int


def pair_mixture(table: PairTable, kinds: Sequence[int], batch_size: int, seed: int) -> Mixture:
    """Pairs of some kinds, in the shares of the file, from the beginning.

    Args:
      table: the pairs.
      kinds: which to use, indices into `raters.pairs.KINDS`; each must occur.
      batch_size: pairs in the global batch.
      seed: of the order.
    """
    rows = {KINDS[kind]: int((table.kind == kind).sum()) for kind in kinds}
    return Mixture(rows, rows, dict.fromkeys(rows, sha256(table.path)), seed, batch_size)


class PairSource:
    """Batches of pairs, by number: a random-access data source for Grain. Kinds come in exact shares."""

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
          mixture: of the kinds to use, see `pair_mixture`; batch 0 is its next one.
          length: tokens of a row.
          pad_id: behind shorter documents.
          rows: of the global batch that this host reads; None: all.
        """
        self._table, self._mixture, self._length, self._pad_id = table, mixture, length, pad_id
        self._kinds = list(mixture.rates)
        self._members = [np.flatnonzero(table.kind == KINDS.index(kind)) for kind in self._kinds]
        self._stream, self._rows = MixtureSampler(mixture), rows
        self._win_rates = table.win_rates()

    def __len__(self) -> int:
        # Grain wants a length; no run reads this many batches.
        return 1 << 48

    def __repr__(self) -> str:
        return f"PairSource({self._mixture})"

    def _pairs(self, batch: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, row, epoch = self._stream.locate(batch, rows)
        return np.array([self._members[s][r] for s, r in zip(source, row)]), source, epoch

    def __getitem__(self, batch: int) -> Batch:
        """This host's rows of a batch.

        Returns:
          tokens: int32 `[rows, 2, length]`, A and B.
          preference: float32 `[rows]`, P(B>A).
          win_rate: float32 `[rows, 2]`, see `PairTable.win_rates`.
          parallel: int32 `[rows]`, 1 for one document in two languages.
          language: int32 `[rows, 2]`, index into the table's languages.
        """
        pairs, _, _ = self._pairs(batch, self._rows)
        return pair_batch(self._table, pairs, self._length, self._pad_id, self._win_rates)

    def provenance(self, batch: int) -> list[PairProvenance]:
        """Where every row of the global batch comes from, for error reports."""
        pairs, source, epoch = self._pairs(batch)
        return [PairProvenance(self._kinds[s], int(p), int(e)) for p, s, e in zip(pairs, source, epoch)]


def pair_batch(table: PairTable, pairs: np.ndarray, length: int, pad_id: int, win_rates: np.ndarray) -> Batch:
    """The arrays of `PairSource.__getitem__` for these pairs."""
    documents = table.documents[pairs]
    return {
        "tokens": table.rows(documents, length, pad_id),
        "preference": table.preference[pairs],
        "win_rate": win_rates[documents],
        "parallel": (table.kind[pairs] == PARALLEL).astype(np.int32),
        "language": table.language[documents].astype(np.int32),
    }
