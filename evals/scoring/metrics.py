"""Accuracy metrics: rules that read a model's answer to an item from the measurements of its options.

METRICS lists them; item tables, results, comparison and report take all entries from there. To add one:

    METRICS["acc_words"] = Metric(lambda options: options.log_likelihood / options.words)

and, where it needs a new measurement (`words`), the field in `Options` and its column in `item_tables`. A figure over
items or languages that is no accuracy (as `consistency.Consistency`) is a field of `results.TaskResults`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

EXACT_MATCH = "exact_match"  # the metric of generated answers
_PUNCTUATION = " .,;:!?\"'()[]。、，！？"


class Options(NamedTuple):
    """Measurements of all options of one item; float64 `[options]` each.

    Attributes:
      log_likelihood: log-likelihood of the option after the prompt, nats.
      tokens: tokens of the option.
      characters: characters of the option's text, without the delimiter.
      n_bytes: bytes of that text in UTF-8.
      unconditional: log-likelihood of the option without the prompt; nan where it was not measured.
    """

    log_likelihood: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    n_bytes: np.ndarray
    unconditional: np.ndarray


class Metric(NamedTuple):
    """A rule that chooses one of an item's options.

    Attributes:
      scores: function of an item's `Options` to float64 `[options]`; the option with the largest is chosen.
      needs: fields of `Options` that `scores` reads and that not every evaluation measures.
    """

    scores: Callable[[Options], np.ndarray]
    needs: tuple[str, ...] = ()


# Names as in lm-evaluation-harness: log-likelihood in all, per character, byte and token, and less the log-likelihood
# without the prompt (pointwise mutual information, arXiv 2104.08315).
METRICS: dict[str, Metric] = {
    "acc": Metric(lambda options: options.log_likelihood),
    "acc_norm": Metric(lambda options: options.log_likelihood / options.characters),
    "acc_bytes": Metric(lambda options: options.log_likelihood / options.n_bytes),
    "acc_tokens": Metric(lambda options: options.log_likelihood / options.tokens),
    "acc_mutual_info": Metric(lambda options: options.log_likelihood - options.unconditional, ("unconditional",)),
}


def choose_option(options: Options, metric: str) -> int:
    """Returns the index of the option that a metric chooses, the first among equals; -1 where a score is nan."""
    scores = METRICS[metric].scores(options)
    return -1 if np.isnan(scores).any() else int(np.argmax(scores))


def choose_options(items: Sequence[Options]) -> dict[str, np.ndarray]:
    """Returns the options chosen by each metric with measurements: metric -> int `[items]`, -1 for none."""
    measured = [name for name, metric in METRICS.items()
                if all(any(not np.isnan(getattr(item, field)).all() for item in items) for field in metric.needs)]
    return {name: np.array([choose_option(item, name) for item in items]) for name in measured}


def match_answer(answer: str, choices: Sequence[str]) -> int:
    """Returns the index of the first choice that equals a generated answer; -1 where none does.

    Case, white space, and punctuation at the ends do not count (our rule).
    """
    normalise = lambda text: " ".join(text.casefold().split()).strip(_PUNCTUATION)  # noqa: E731
    return next((number for number, choice in enumerate(choices) if normalise(choice) == normalise(answer)), -1)
