"""A linear classifier of hashed word n-grams, as the fastText filter of DCLM (arXiv 2406.11794):

    python -m raters.ngrams --gin.train_ngrams.good=GOOD.jsonl --gin.train_ngrams.bad=BAD.jsonl \
        --gin.train_ngrams.output=ngrams.npz

The features are scikit-learn's HashingVectorizer (MurmurHash3, signed, rows of unit length), the classifier its
logistic regression. The file holds the weights and a JSON description, nothing that can be executed.
"""

import io
import itertools
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence

import gin
import numpy as np
from etils import epath
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document, match_files, read_documents
from mlx_pretrain.data.word_boundaries import words
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_atomic
from raters.preferences.corruption import CORRUPTIONS, corrupt_share

FORMAT = "mlx-ngram-classifier"
VERSION = 1


@gin.configurable
class NgramClassifier:
    """Log-odds that a document is one of the good ones.

    Attributes:
      name: of the rater.
      description: how the classifier was made.
    """

    def __init__(self, path: epath.PathLike = gin.REQUIRED, name: str = "ngrams"):
        """Loads what `train_ngrams` wrote.

        Raises:
          InputError: the file is missing, damaged, or no classifier of this program.
        """
        self.name = name
        try:
            with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
                weights, bias = file["weights"], file["bias"]
                self.description = json.loads(file["description"].tobytes())
            if (self.description["format"], self.description["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{self.description['format']} of version {self.description['version']}")
            if weights.shape != (self.description["features"],) or bias.shape != () or weights.dtype != np.float32:
                raise ValueError(f"weights of shape {weights.shape} and type {weights.dtype}")
            if not (np.isfinite(weights).all() and np.isfinite(bias)):
                raise ValueError("weights that are not finite")
            self._vectorizer = _vectorizer(self.description["ngrams"], self.description["features"])
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{path}: no such n-gram classifier") from None
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not an n-gram classifier of version {VERSION}: {error}") from None
        self._weights, self._bias = weights.astype(np.float64), float(bias)

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Log-odds, natural: float64 `[documents]`; nan for a document without words."""
        if not documents:
            return np.zeros(0)
        features = self._vectorizer.transform(document.text for document in documents)
        known = np.diff(features.indptr) > 0
        return np.where(known, features @ self._weights + self._bias, np.nan)


def _vectorizer(ngrams: Sequence[int], features: int) -> HashingVectorizer:
    return HashingVectorizer(tokenizer=words, token_pattern=None, ngram_range=tuple(ngrams), n_features=features)


@gin.configurable
def train_ngrams(
    good: str = gin.REQUIRED,
    output: str = gin.REQUIRED,
    bad: str | None = None,
    ngrams: tuple[int, int] = (1, 2),
    features: int = 2**18,
    regularization: float = 1e-4,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = 0,
) -> None:
    """Trains the classifier and writes it.

    Args:
      good: path or glob of documents worth having.
      output: file to write (.npz).
      bad: path or glob of documents not worth having; None: corrupted copies of the good ones
      (`raters.preferences.corruption`).
      ngrams: shortest and longest n-gram, in words (units of scripts without spaces).
      features: hash buckets.
      regularization: L2 penalty on the weights, beside the mean loss of a document.
      kinds: of corruption, where `bad` is None.
      seed: of the corruption.

    Raises:
      InputError: no documents, or a parameter out of range.
    """
    if not (1 <= ngrams[0] <= ngrams[1] and 1 <= features <= 2**30 and regularization > 0):
        raise InputError(f"train_ngrams: ngrams={tuple(ngrams)} must be (shortest, longest), features={features} "
                         f"positive and regularization={regularization} above 0")
    counts = {}

    def texts(kind: str) -> Iterator[str]:
        pattern = bad if kind == "bad" and bad is not None else good
        documents = itertools.chain.from_iterable(map(read_documents, match_files(pattern)))
        if kind == "bad" and bad is None:
            documents = (document for document, _ in corrupt_share(documents, 1.0, kinds, seed=seed))
        counts[kind] = 0
        for document in documents:
            counts[kind] += 1
            yield document.text

    vectorizer = _vectorizer(ngrams, features)
    x = vectorizer.transform(itertools.chain(texts("good"), texts("bad")))
    y = np.repeat([1, 0], [counts["good"], counts["bad"]])
    # Few and large steps: on this many weights lbfgs spends its time in threads of BLAS.
    model = LogisticRegression(C=1 / (regularization * len(y)), class_weight="balanced", solver="newton-cg").fit(x, y)
    files = {str(path): sha256(path) for pattern in (good, bad) if pattern for path in match_files(pattern)}
    description = {
        "format": FORMAT, "version": VERSION, "ngrams": list(ngrams), "features": features, "documents": counts,
        "provenance": {"program": "raters.ngrams", "version": __version__, "sha256": files, "seed": seed,
                       "regularization": regularization, "bad": bad or {"corrupted": list(kinds)}},
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, weights=model.coef_[0].astype(np.float32), bias=np.float64(model.intercept_[0]),
                        description=np.frombuffer(json.dumps(description).encode(), np.uint8))
    write_atomic(output, buffer.getvalue())
    right = float(((x @ model.coef_[0] + model.intercept_[0] > 0) == y).mean())
    print(f"{output}: {counts['good']} good and {counts['bad']} bad documents, {right:.1%} of them told apart",
          file=sys.stderr)


if __name__ == "__main__":
    run(train_ngrams, "raters.ngrams")
