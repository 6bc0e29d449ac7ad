"""Trains a linear classifier of hashed word n-grams, as the fastText filter of DCLM (arXiv 2406.11794):

    python -m raters.ngrams --gin.train_ngrams.good='@good/Corpus()' --gin.good/Corpus.files=GOOD.jsonl \
        --gin.train_ngrams.bad='@bad/Corpus()' --gin.bad/Corpus.files=BAD.jsonl --gin.train_ngrams.output=ngrams.npz

The features are scikit-learn's HashingVectorizer (MurmurHash3, signed, rows of unit length), the classifier its
logistic regression. The file holds the weights and a JSON description, no code.
"""

import dataclasses
import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from mlx_pretrain import artifacts
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.word_boundaries import words
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_atomic
from mlx_pretrain.parallel.cluster import log
from raters.preferences.corruption import CORRUPTIONS, corrupt_share
from raters.rater_plugins.base import Rater

FORMAT = "mlx-ngram-classifier"
VERSION = 1


def _read_classifier(path: epath.PathLike) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Returns weights, bias and description of a classifier.

    Raises:
      InputError: the file is missing, damaged, or not a classifier of this program.
    """
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
            weights, bias = file["weights"], file["bias"]
            description = json.loads(file["description"].tobytes())
        if (description["format"], description["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{description['format']} of version {description['version']}")
        if weights.shape != (description["features"],) or bias.shape != () or weights.dtype != np.float32:
            raise ValueError(f"weights of shape {weights.shape} and type {weights.dtype}")
        if not (np.isfinite(weights).all() and np.isfinite(bias)):
            raise ValueError("weights that are not finite")
        _vectorizer(description["ngrams"], description["features"])  # TypeError for malformed values
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such n-gram classifier") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an n-gram classifier of version {VERSION}: {error}") from None
    return weights, float(bias), description


@gin.configurable
class NgramClassifier(Rater):
    """Log-odds that a document is a good one.

    Attributes:
      name: name of the rater.
      description: settings and provenance of the classifier.
    """

    def __init__(self, path: epath.PathLike = gin.REQUIRED, name: str = "ngrams"):
        """Loads the output of this command.

        Raises:
          InputError: the file is missing, damaged, or not a classifier of this program.
        """
        weights, self._bias, self.description = _read_classifier(path)
        self.name, self._weights, self._sha256 = name, weights.astype(np.float64), sha256(path)
        self._vectorizer = _vectorizer(self.description["ngrams"], self.description["features"])

    @property
    def settings(self) -> dict[str, Any]:
        """The file's SHA-256."""
        return {"sha256": self._sha256}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns natural log-odds, float64 `[documents]`; nan for a document without words."""
        if not documents:
            return np.zeros(0)
        features = self._vectorizer.transform(document.text for document in documents)
        known = np.diff(features.indptr) > 0
        return np.where(known, features @ self._weights + self._bias, np.nan)


def _vectorizer(ngrams: Sequence[int], features: int) -> HashingVectorizer:
    return HashingVectorizer(tokenizer=words, token_pattern=None, ngram_range=tuple(ngrams), n_features=features)


@gin.configurable("train_ngrams")
@dataclasses.dataclass(frozen=True)
class NgramsConfig:
    """Settings of the training of a classifier.

    Attributes:
      good: documents worth having.
      output: file to write (.npz).
      bad: documents not worth having; None: corrupted copies of the good ones (`raters.preferences.corruption`).
      ngrams: shortest and longest n-gram, in words (units of scripts without spaces).
      features: number of hash buckets.
      regularization: L2 penalty on the weights, beside the mean loss of a document.
      corruptions: names of the corruptions to draw from, without `bad`.
      seed: seed of the corruption.
      overwrite: replaces a classifier that was made from other inputs or settings.
    """

    good: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    bad: Corpus | None = None
    ngrams: tuple[int, int] = (1, 2)
    features: int = 2**18
    regularization: float = 1e-4
    corruptions: Sequence[str] = tuple(CORRUPTIONS)
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if not (1 <= self.ngrams[0] <= self.ngrams[1] and 1 <= self.features <= 2**30 and self.regularization > 0):
            raise InputError(f"train_ngrams: ngrams={tuple(self.ngrams)} must be (shortest, longest), "
                             f"features={self.features} positive and regularization={self.regularization} above 0")


def _recorded(path: epath.PathLike) -> dict[str, Any] | None:
    """Returns the provenance of a classifier; None without a file, {} for a file that is not a classifier."""
    if not epath.Path(path).exists():
        return None
    try:
        return _read_classifier(path)[2]["provenance"]
    except (InputError, KeyError):
        return {}


def main(config: NgramsConfig) -> None:
    """Trains a classifier of good and bad documents and writes it."""
    corpora = {"good": config.good, "bad": config.bad or config.good}
    made_from = artifacts.provenance("raters.ngrams", config, {
        label: {name: sha256(path) for name, path in corpus.paths().items()} for label, corpus in corpora.items()})
    if artifacts.is_current(config.output, _recorded(config.output), made_from, overwrite=config.overwrite):
        return
    counts = {}

    def texts(label: str) -> Iterator[str]:
        documents = itertools.chain.from_iterable(map(corpora[label].read, corpora[label].paths()))
        if label == "bad" and config.bad is None:
            documents = (document for document, _ in corrupt_share(
                documents, 1.0, config.corruptions, seed=config.seed))
        counts[label] = 0
        for document in documents:
            counts[label] += 1
            yield document.text

    vectorizer = _vectorizer(config.ngrams, config.features)
    x = vectorizer.transform(itertools.chain(texts("good"), texts("bad")))
    y = np.repeat([1, 0], [counts["good"], counts["bad"]])
    # Few and large steps: on this many weights lbfgs spends its time in threads of BLAS.
    model = LogisticRegression(
        C=1 / (config.regularization * len(y)), class_weight="balanced", solver="newton-cg").fit(x, y)
    description = {"format": FORMAT, "version": VERSION, "ngrams": list(config.ngrams), "features": config.features,
                   "documents": counts, "provenance": made_from}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, weights=model.coef_[0].astype(np.float32), bias=np.float64(model.intercept_[0]),
                        description=np.frombuffer(json.dumps(description).encode(), np.uint8))
    write_atomic(config.output, buffer.getvalue())
    right = float(((x @ model.coef_[0] + model.intercept_[0] > 0) == y).mean())
    log(f"{config.output}: {counts['good']} good and {counts['bad']} bad documents, {right:.1%} of them classified "
        "correctly")


if __name__ == "__main__":
    run(main, NgramsConfig, "raters.ngrams")
