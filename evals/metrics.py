"""Accuracy and Multilingual Consistency (MuBench, arXiv 2506.19468), with bootstrap intervals over items."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

# Name -> what an option's log-likelihood is divided by; see `option_scores`.
NORMALISATIONS = ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mutual_info")
EXACT_MATCH = "exact_match"  # of generated answers
_PUNCTUATION = " .,;:!?\"'()[]。、，！？"
RESAMPLES = 1000
LEVEL = 0.95


class Options(NamedTuple):
    """What was measured of every option of one item; float64 `[options]` each.

    Attributes:
      log_likelihood: of the option after the prompt, nats.
      tokens: scored.
      characters, n_bytes: of the option's text, without what joins it to the prompt; bytes of UTF-8.
      unconditional: log-likelihood without the prompt; nan where it was not asked for.
    """

    log_likelihood: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    n_bytes: np.ndarray
    unconditional: np.ndarray


def option_scores(options: Options, normalisation: str) -> np.ndarray:
    """What the options are chosen by, float64 `[options]`, the largest wins.

    "acc": log-likelihood; "acc_norm", "acc_bytes", "acc_tokens": per character, byte and token; "acc_mutual_info":
    less the log-likelihood without the prompt (arXiv 2104.08315, PMI). Names are lm-evaluation-harness's.

    Raises:
      ValueError: another name.
    """
    likelihood = options.log_likelihood
    match normalisation:
        case "acc":
            return likelihood
        case "acc_norm":
            return likelihood / options.characters
        case "acc_bytes":
            return likelihood / options.n_bytes
        case "acc_tokens":
            return likelihood / options.tokens
        case "acc_mutual_info":
            return likelihood - options.unconditional
    raise ValueError(f"normalisation {normalisation!r}: not one of {', '.join(NORMALISATIONS)}")


def choose(options: Options, normalisation: str) -> int:
    """The option that wins, the first among equals; -1 where there is no score."""
    scores = option_scores(options, normalisation)
    return -1 if np.isnan(scores).any() else int(np.argmax(scores))


class Consistency(NamedTuple):
    """How far languages agree; `[languages, languages]`, symmetric.

    Attributes:
      mlc: share of items with the same choice, right or wrong: MLC(l, l') = (1/N) sum_i 1[c_i = c'_i].
      rel_mlc: MLC over the mean of both accuracies; nan where both are 0.
      chance: sum_c P_l(c) P_l'(c), what independent choices with the same preferences would agree on (ours).
    """

    mlc: np.ndarray
    rel_mlc: np.ndarray
    chance: np.ndarray


def consistency(choices: np.ndarray, labels: np.ndarray) -> Consistency:
    """Consistency of choices int `[languages, items]`, -1 for none, which agrees with nothing; labels int `[items]`."""
    n_languages, n_items = choices.shape
    mlc, chance = np.zeros((2, n_languages, n_languages))
    for option in np.unique(choices[choices >= 0]):
        chosen = (choices == option).astype(np.float64)
        mlc += chosen @ chosen.T / n_items
        share = chosen.mean(axis=1)
        chance += np.outer(share, share)
    accuracy = (choices == labels).mean(axis=1)
    return Consistency(mlc, _relative(mlc, accuracy), chance)


def _relative(mlc: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    mean = (accuracy[..., :, None] + accuracy[..., None, :]) / 2
    return np.divide(mlc, mean, out=np.full(mlc.shape, np.nan), where=mean > 0)


def over_pairs(matrix: np.ndarray) -> float:
    """Mean over pairs of unlike languages; nan for one language."""
    values = matrix[np.triu_indices(len(matrix), 1)]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def against(matrix: np.ndarray, reference: int) -> float:
    """Mean over the other languages' agreement with one; nan for one language."""
    values = np.delete(matrix[reference], reference)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


class Interval(NamedTuple):
    """A figure with its bootstrap percentile interval."""

    value: float
    low: float
    high: float


def _interval(value: float, resampled: np.ndarray, level: float) -> Interval:
    if not np.isfinite(resampled).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _weights(n_items: int, resamples: int, seed: int) -> np.ndarray:
    """How often each item is drawn, over the number of items: float64 `[resamples, items]`."""
    return np.random.default_rng(seed).multinomial(n_items, np.full(n_items, 1 / n_items), size=resamples) / n_items


def intervals(
    choices: np.ndarray,
    labels: np.ndarray,
    reference: int | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, list[Interval] | Interval]:
    """Accuracy of every language and consistency over all, items resampled, the same ones in all languages.

    Args:
      choices: int `[languages, items]`; -1: none.
      labels: int `[items]`.
      reference: place of English among the languages, if there.
      resamples, level, seed: of the bootstrap.

    Returns:
      "accuracy": one per language; "mean_accuracy"; and with several languages "mlc", "rel_mlc", "chance" over all
      pairs, and with a reference "mlc_vs_reference", "rel_mlc_vs_reference".
    """
    n_languages, n_items = choices.shape
    weights = _weights(n_items, resamples, seed)
    correct = (choices == labels).astype(np.float64)
    accuracy = weights @ correct.T
    found: dict[str, list[Interval] | Interval] = {
        "accuracy": [_interval(float(c.mean()), a, level) for c, a in zip(correct, accuracy.T)],
        "mean_accuracy": _interval(float(correct.mean()), accuracy.mean(axis=1), level),
    }
    if n_languages < 2:
        return found
    exact = consistency(choices, labels)
    left, right = np.triu_indices(n_languages, 1)
    same = (choices[left] == choices[right]) & (choices[left] >= 0)
    agreement = weights @ same.T.astype(np.float64)  # [resamples, pairs]
    mean = (accuracy[:, left] + accuracy[:, right]) / 2
    relative = np.divide(agreement, mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    chance = np.zeros(agreement.shape)
    for option in np.unique(choices[choices >= 0]):
        share = weights @ (choices == option).T.astype(np.float64)
        chance += share[:, left] * share[:, right]
    for name, matrix, values in (("mlc", exact.mlc, agreement), ("rel_mlc", exact.rel_mlc, relative),
                                 ("chance", exact.chance, chance)):
        found[name] = _interval(over_pairs(matrix), _row_means(values), level)
        if reference is not None and name != "chance":
            with_reference = (left == reference) | (right == reference)
            found[f"{name}_vs_reference"] = _interval(
                against(matrix, reference), _row_means(values[:, with_reference]), level)
    return found


def _row_means(values: np.ndarray) -> np.ndarray:
    """Means of the numbers in each row; nan where there are none."""
    numbers = np.isfinite(values)
    sums = np.where(numbers, values, 0).sum(axis=1)
    return np.divide(sums, numbers.sum(axis=1), out=np.full(len(values), np.nan), where=numbers.any(axis=1))


class Paired(NamedTuple):
    """Two models on the same items.

    Attributes:
      difference: accuracy of the second less that of the first.
      p_value: exact, that both are right equally often: of all ways to swap the models, item by item, the share with a
        difference at least as large. For one language that is McNemar's test.
    """

    difference: Interval
    p_value: float


def paired(
    first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Paired:
    """Compares which items were right.

    Args:
      first, second: bool `[items]`, or `[languages, items]`: then an item is drawn in all languages together.
      resamples, level, seed: of the bootstrap.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    difference = (second.astype(np.float64) - first).mean(axis=0)
    resampled = _weights(len(difference), resamples, seed) @ difference
    gains = second.sum(axis=0) - first.sum(axis=0)
    return Paired(_interval(float(difference.mean()), resampled, level), _sign_flip_p_value(gains))


def _sign_flip_p_value(gains: np.ndarray) -> float:
    """Two-sided p-value of a sum of integers whose signs are as likely to be the other way round, each by itself."""
    sizes = np.abs(gains)
    total, observed = int(sizes.sum()), abs(int(gains.sum()))
    # Swapping the items of a set T makes the sum total - 2 sum(T); this is the distribution of sum(T).
    chance = np.ones(1)
    for size, count in zip(*np.unique(sizes[sizes > 0], return_counts=True)):
        known, chance = chance, np.zeros(len(chance) + size * count)
        for swapped, probability in enumerate(scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)):
            chance[size * swapped : size * swapped + len(known)] += probability * known
    return min(1.0, 2 * float(chance[: (total - observed) // 2 + 1].sum()))


def matching(answer: str, choices: Sequence[str]) -> int:
    """The first of the choices that a generated answer is, apart from case, white space, and punctuation at its ends;
    -1: none (exact match, as far as our own rule of what is the same)."""
    plain = lambda text: " ".join(text.casefold().split()).strip(_PUNCTUATION)  # noqa: E731
    return next((place for place, choice in enumerate(choices) if plain(choice) == plain(answer)), -1)


def summarise(intervals_: Mapping[str, Sequence[Interval] | Interval]) -> dict[str, object]:
    """The same as plain numbers, for JSON."""
    plain = lambda interval: {"value": interval.value, "low": interval.low, "high": interval.high}  # noqa: E731
    return {name: plain(found) if isinstance(found, Interval) else [plain(x) for x in found]
            for name, found in intervals_.items()}
