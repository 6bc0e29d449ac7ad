"""Cuts documents into token chunks and averages the chunks' scores. Runs in worker processes, without JAX.

A document that is too long for the encoder is cut into chunks of full length and a rest; its score is the mean of
their scores, weighted by tokens (as QuRating does, arXiv 2402.09739).
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from raters.rater_plugins.base import Rater

_DETECTED_CHARACTERS = 2000  # more text does not improve identification


class Prepared(NamedTuple):
    """Some documents as worker processes return them.

    Attributes:
      languages: language of each document, `[documents]`.
      n_tokens: int32 `[documents]`, special tokens not counted; None without a tokenizer.
      chunks: int32 `[length]` each, with special tokens, in order of the documents; a document without a token has
        none.
      owners: int32 `[chunks]`, index of each chunk's document.
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
    """Detects languages, counts tokens and cuts documents into chunks: a picklable function of a list of documents.

    Attributes:
      tokenizer: counts tokens, with `encode_batch` and, for chunks, `wrap`; None: tokens are not counted.
      chunk_length: tokens of the longest chunk, with special ones; None: no chunks are made.
      detect: identifies the language of documents of undetermined language.
      rater: plug-in that scores the documents, too.
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
        """Number of tokens added to every chunk."""
        return len(self.tokenizer.wrap(np.empty(0, np.int32)))

    def __call__(self, documents: Sequence[Any]) -> Prepared:
        languages = [document.language for document in documents]
        if self.detect:
            languages = [detect_language(document.text) if document.language == UNDETERMINED else document.language
                         for document in documents]
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
    """Returns the ISO 639-1 code of the likeliest language (langid.py, Lui & Baldwin 2012); "und" without letters."""
    import py3langid  # optional, and slow to load

    sample = text[:_DETECTED_CHARACTERS]
    return py3langid.classify(sample)[0] if any(map(str.isalpha, sample)) else UNDETERMINED


def mean_over_chunks(values: np.ndarray, owners: np.ndarray, weights: np.ndarray, documents: int) -> np.ndarray:
    """Returns the token-weighted means of what the chunks have: scores, or embeddings.

    Args:
      values: float `[chunks, ...]`.
      owners, weights: int `[chunks]`, see `Prepared`; owners ascend.
      documents: number of documents.

    Returns:
      float64 `[documents, ...]`, nan for a document without chunks; for one with a single chunk that chunk's values.
    """
    means = np.full((documents, *values.shape[1:]), np.nan)
    begins = np.flatnonzero(np.diff(owners, prepend=-1))
    weights = weights.astype(np.float64).reshape(-1, *[1] * (values.ndim - 1))
    totals = np.add.reduceat(values.astype(np.float64) * weights, begins, axis=0)
    means[owners[begins]] = totals / np.add.reduceat(weights, begins, axis=0)
    return means
