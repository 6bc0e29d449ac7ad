"""Fits linear heads to labels of documents, and measures them on documents held out."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

_NEWTON_STEPS = 50
_LEAST_DOCUMENTS = 10  # of a language, for a figure of its own


def ridge_path(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[tuple[np.ndarray, float]]:
    """Returns (weights, bias) that minimise mean (x w + b - y)**2 + penalty |w|**2, for each penalty.

    Ridge regression (Hoerl and Kennard 1970) in closed form, from one eigendecomposition of the features' covariance.

    Args:
      x: float64 `[documents, features]`.
      y: float64 `[documents]`.
      penalties: positive numbers.
    """
    mean, offset = x.mean(axis=0), y.mean()
    centred = x - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    projected = vectors.T @ (centred.T @ (y - offset) / len(x))
    weights = [vectors @ (projected / (np.maximum(values, 0.0) + penalty)) for penalty in penalties]
    return [(w, float(offset - mean @ w)) for w in weights]


def logistic_path(
    x: np.ndarray, y: np.ndarray, penalties: Sequence[float], intercept: bool
) -> list[tuple[np.ndarray, float]]:
    """Returns (weights, bias) that minimise the mean logistic loss + penalty / 2 |w|**2, for each penalty.

    Newton's method with halved steps where a whole one does not lower the loss; each penalty starts from the solution
    of the next larger one. On differences of two documents' features, without intercept, this is the Bradley-Terry
    model (Bradley and Terry 1952) with a linear score.

    Args:
      x: float64 `[documents, features]`.
      y: float64 `[documents]`, probabilities: labels may be soft.
      penalties: positive numbers.
      intercept: fits the bias; else it is 0.
    """
    if intercept:
        x = np.column_stack([x, np.ones(len(x))])
    w = np.zeros(x.shape[1])
    solutions: dict[float, tuple[np.ndarray, float]] = {}
    for penalty in sorted(penalties, reverse=True):
        scale = np.full(len(w), float(penalty))
        scale[-1] = 1e-10 if intercept else penalty  # nearly free, and the system stays solvable
        w = _newton(x, y, w, scale)
        solutions[penalty] = (w[:-1], float(w[-1])) if intercept else (w, 0.0)
    return [solutions[penalty] for penalty in penalties]


def _newton(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    def objective(w: np.ndarray) -> float:
        z = x @ w
        return float(np.mean(np.logaddexp(0, z) - y * z) + 0.5 * penalties @ w**2)

    best = objective(w)
    for _ in range(_NEWTON_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * (x @ w)))
        gradient = x.T @ (p - y) / len(x) + penalties * w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + np.diag(penalties)
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-12:  # twice the loss that is left to gain
            break
        length = 1.0
        while (now := objective(w - length * step)) > best and length > 1e-6:
            length /= 2
        w, best = w - length * step, now
    return w


def fit_head(
    x: np.ndarray, y: np.ndarray, label_type: str, validation: np.ndarray, penalties: Sequence[float]
) -> tuple[np.ndarray, float, float]:
    """Fits a head; the penalty is the one with the least loss on some of the rows, which are fitted to in the end, too.

    Features are standardised for the fit, so that one penalty is right for all of them.

    Args:
      x: float `[rows, embed]`: embeddings, or for "pairs" those of B less those of A.
      y: float64 `[rows]`: labels, for "pairs" P(B>A).
      label_type: "number" (ridge regression), "binary" (logistic regression) or "pairs" (Bradley-Terry).
      validation: mask `[rows]`.
      penalties: the penalties to choose from.

    Returns:
      kernel float64 `[embed]`, bias, penalty.
    """
    x = x.astype(np.float64)
    centre = np.zeros(x.shape[1]) if label_type == "pairs" else x.mean(axis=0)
    scale = np.sqrt(np.mean((x - centre) ** 2, axis=0))
    scale[scale == 0] = 1.0
    x = (x - centre) / scale

    def path(rows: np.ndarray, penalties: Sequence[float]) -> list[tuple[np.ndarray, float]]:
        if label_type == "number":
            return ridge_path(x[rows], y[rows], penalties)
        return logistic_path(x[rows], y[rows], penalties, label_type == "binary")

    def loss(w: np.ndarray, bias: float) -> float:
        z, target = x[validation] @ w + bias, y[validation]
        return float(np.mean((z - target) ** 2 if label_type == "number" else np.logaddexp(0, z) - target * z))

    losses = [loss(*solution) for solution in path(~validation, penalties)]
    penalty = penalties[int(np.argmin(losses))]
    ((w, bias),) = path(np.ones(len(x), bool), [penalty])
    kernel = w / scale
    return kernel, float(bias - centre @ kernel), float(penalty)


def spearman(score: np.ndarray, label: np.ndarray) -> float:
    """Returns Spearman's rank correlation of two `[n]` arrays, equal values with their mean rank; nan for constants."""
    a, b = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (score, label))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Returns the area under the ROC curve: P(a document with label > 1/2 scores higher than another), ties a half.

    Both `[n]`; nan where all labels are on one side.
    """
    positive = label > 0.5
    n = int(positive.sum())
    if n in (0, len(label)):
        return np.nan
    return float((stats.rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))


def accuracy(margin: np.ndarray, preference: np.ndarray) -> float:
    """Returns the share of decided pairs whose margin score(B) - score(A) agrees with P(B>A), equal scores a half."""
    decided = preference != 0.5
    agrees = np.where(margin == 0, 0.5, np.sign(margin) == np.sign(preference - 0.5))
    return float(agrees[decided].mean()) if decided.any() else np.nan


MEASURES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "number": ("spearman", spearman), "binary": ("auc", auc), "pairs": ("accuracy", accuracy)}


def figures(
    label_type: str, score: np.ndarray, label: np.ndarray, language: np.ndarray, owner: np.ndarray, *,
    resamples: int, confidence: float, seed: int,
) -> dict[str, float | list[float] | dict[str, float] | None]:
    """Measures a head on held-out rows, within each language, because scores order documents within one.

    Args:
      label_type: key of `MEASURES`.
      score, label: float64 `[rows]`.
      language: `[rows]`, names.
      owner: int `[rows]`: rows with one owner are resampled together, as translations of a document are.
      resamples, confidence, seed: of the interval, percentiles over resampled owners.

    Returns:
      The measure's name -> its mean over languages, weighted by rows; "interval"; "languages" -> the measure in each
      with at least 10 rows. None for what cannot be measured.
    """
    name, measure = MEASURES[label_type]
    rows_of = {one: np.flatnonzero(language == one) for one in np.unique(language).tolist()}
    rows_of = {one: rows for one, rows in rows_of.items() if len(rows) >= _LEAST_DOCUMENTS}

    def mean(values: Sequence[float], weights: Sequence[int]) -> float:
        known = np.isfinite(values)
        return float(np.average(np.array(values)[known], weights=np.array(weights)[known])) if known.any() else np.nan

    each = {one: measure(score[rows], label[rows]) for one, rows in rows_of.items()}
    value = mean(list(each.values()), [len(rows) for rows in rows_of.values()])
    rng, (_, owner) = np.random.default_rng(seed), np.unique(owner, return_inverse=True)
    owners = owner.max(initial=-1) + 1
    resampled = []
    for _ in range(resamples if np.isfinite(value) else 0):
        copies = np.bincount(rng.integers(owners, size=owners), minlength=owners)
        drawn = [np.repeat(rows, copies[owner[rows]]) for rows in rows_of.values()]
        drawn = [rows for rows in drawn if len(rows)]
        resampled.append(mean([measure(score[rows], label[rows]) for rows in drawn], [len(rows) for rows in drawn]))
    tail = (1 - confidence) / 2
    known = np.array(resampled)[np.isfinite(resampled)] if resampled else np.zeros(0)
    return {
        name: _rounded(value),
        "interval": [_rounded(bound) for bound in np.quantile(known, (tail, 1 - tail))] if len(known) else None,
        "languages": {one: _rounded(number) for one, number in each.items()},
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
