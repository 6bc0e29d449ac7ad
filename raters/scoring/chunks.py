"""Documents as token chunks, and back from the chunks' scores to the documents'. Runs in worker processes, without JAX.

A document longer than the encoder takes is cut into chunks of full length and a rest; its score is the mean of their
scores, weighted by tokens (as QuRating does, arXiv 2402.09739).
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_pretrain.errors import InputError
from raters.rater_plugins.base import Rater

_DETECTED_CHARACTERS = 2000  # language identification does not get better with more


class Prepared(NamedTuple):
    """What worker processes make of some documents.

    Attributes:
      languages: of the documents, `[documents]`.
      n_tokens: int32 `[documents]`, special tokens not counted; None without a tokenizer.
      chunks: int32 `[length]` each, special tokens included, the documents' one after the other; a document without
        a token has none.
      owners: int32 `[chunks]`, the document each belongs to.
      weights: int32 `[chunks]`, tokens without the special ones.
      scores: float64 `[documents]` of a rater that runs in the workers; None otherwise.
    """

    languages: list[str]
    n_tokens: np.ndarray | None
    chunks: list[np.ndarray]
    owners: np.ndarray
    weights: np.ndarray
    scores: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Detects languages, counts tokens and cuts documents into chunks; a picklable function of a list of documents.

    Attributes:
      tokenizer: counts tokens, with `encode_batch` and, for chunks, `wrap`; None: tokens are not counted.
      chunk_length: tokens of the longest chunk, special ones included; None: no chunks are made.
      detect: identifies the language of documents without one.
      rater: scores the documents, too.
    """

    tokenizer: Any = None
    chunk_length: int | None = None
    detect: bool = False
    rater: Rater | None = None

    def __post_init__(self):
        if self.detect and importlib.util.find_spec("py3langid") is None:
            raise InputError("detect_language: needs the package py3langid, which is not installed")
        if self.chunk_length is not None and self.chunk_length <= self.special_tokens:
            raise InputError(f"chunk_length = {self.chunk_length}: leaves no room beside the special tokens")

    @property
    def special_tokens(self) -> int:
        """How many are added to every chunk."""
        return len(self.tokenizer.wrap(np.empty(0, np.int32)))

    def __call__(self, documents: Sequence[Any]) -> Prepared:
        languages = [document.language for document in documents]
        if self.detect:
            languages = [language or detect_language(d.text) for language, d in zip(languages, documents)]
        n_tokens, chunks, owners, weights = None, [], [], []
        if self.tokenizer is not None:
            ids = self.tokenizer.encode_batch([document.text for document in documents], 1)
            n_tokens = np.array([len(i) for i in ids], np.int32)
            if self.chunk_length is not None:
                room = self.chunk_length - self.special_tokens
                for owner, document in enumerate(ids):
                    for start in range(0, len(document), room):
                        chunk = document[start : start + room]
                        chunks.append(np.asarray(self.tokenizer.wrap(chunk), np.int32))
                        owners.append(owner)
                        weights.append(len(chunk))
        scores = None if self.rater is None else self.rater.score(documents)
        return Prepared(languages, n_tokens, chunks, np.array(owners, np.int32), np.array(weights, np.int32), scores)


def detect_language(text: str) -> str:
    """ISO 639-1 code of the most likely language (langid.py, Lui & Baldwin 2012); "" for a text without letters."""
    import py3langid  # optional, and slow to load

    sample = text[:_DETECTED_CHARACTERS]
    return py3langid.classify(sample)[0] if any(map(str.isalpha, sample)) else ""


def mean_over_chunks(scores: np.ndarray, owners: np.ndarray, weights: np.ndarray, documents: int) -> np.ndarray:
    """Token-weighted means.

    Args:
      scores: float `[chunks]`.
      owners, weights: int `[chunks]`.
      documents: how many.

    Returns:
      float64 `[documents]`, nan for a document without chunks.
    """
    total = np.bincount(owners, scores.astype(np.float64) * weights, documents)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(owners, weights, documents)
