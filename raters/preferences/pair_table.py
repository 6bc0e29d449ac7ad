"""A file of pairs with its documents as tokens, in memory."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError
from raters.preferences.pair_file import PAIR_TYPES, PARALLEL, read_lines

_TOKENIZER_BATCH = 256  # texts


@dataclasses.dataclass(frozen=True)
class PairTable:
    """The pairs of a file (`pair_file`) and their tokenized documents.

    Attributes:
      path: path of the file.
      tokens: int32, the documents' tokens one after the other, cut to the encoder's length.
      starts: int64 `[documents + 1]`, index of each document's first token.
      documents: int64 `[pairs, 2]`, A and B.
      preference: float32 `[pairs]`, P(B>A).
      pair_type: int8 `[pairs]`, index into `PAIR_TYPES`.
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
    pair_type: np.ndarray
    language: np.ndarray
    languages: list[str]
    raters: list[str]
    votes: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def rows(self, documents: np.ndarray, length: int, pad_id: int) -> np.ndarray:
        """Returns the tokens of documents `[...]`, padded: int32 `[..., length]`."""
        rows = np.full((documents.size, length), pad_id, np.int32)
        for row, document in zip(rows, documents.ravel()):
            start, stop = self.starts[document], self.starts[document + 1]
            row[: stop - start] = self.tokens[start:stop]
        return rows.reshape(*documents.shape, length)

    def win_rates(self) -> np.ndarray:
        """Returns each document's mean P(it beats the other) over its pairs that are not parallel: `[documents]`.

        A pointwise rater learns these. Documents that are only in parallel pairs have 1/2.
        """
        single = self.pair_type != PARALLEL
        won, played = np.zeros(len(self.language)), np.zeros(len(self.language))
        for side, share in ((0, 1 - self.preference), (1, self.preference)):
            np.add.at(won, self.documents[single, side], share[single])
            np.add.at(played, self.documents[single, side], 1)
        return np.where(played > 0, won / np.maximum(played, 1), 0.5).astype(np.float32)


def read_pairs(path: epath.PathLike, tokenizer: Any, length: int) -> PairTable:
    """Reads and tokenizes a file of pairs, each document once.

    Args:
      path: file of `raters.pairs`.
      tokenizer: object with `encode_batch` and `wrap`.
      length: greatest number of tokens of a document, special ones included; the rest is cut.

    Raises:
      InputError: the file is missing, malformed (with the line) or holds no pair.
    """
    path = epath.Path(path)
    numbers: dict[tuple[str, str, str], int] = {}
    names, pending, tokens = [], [], []
    documents, preference, pair_types, votes = [], [], [], []
    special = len(tokenizer.wrap([]))

    def tokenize() -> None:
        for ids in tokenizer.encode_batch(pending, 1):
            tokens.append(tokenizer.wrap(ids[: length - special]))
        pending.clear()

    def number_of(document: dict[str, str]) -> int:
        key = document["source"], document["id"], document["lang"]
        if key not in numbers:
            numbers[key] = len(numbers)
            names.append(document["lang"])
            pending.append(document["text"])
            if len(pending) == _TOKENIZER_BATCH:
                tokenize()
        return numbers[key]

    for number, pair in read_lines(path):
        try:
            documents.append((number_of(pair["a"]), number_of(pair["b"])))
            preference.append(float(pair["p_b"]))
            pair_types.append(PAIR_TYPES.index(pair["kind"]))
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
        pair_type=np.array(pair_types, np.int8),
        language=language.astype(np.int16),
        languages=languages.tolist(),
        raters=raters,
        votes=np.array([[vote.get(name, np.nan) for name in raters] for vote in votes], np.float32),
    )
