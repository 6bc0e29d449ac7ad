"""Measures of the agreement between rewards of combinations and the Video-LLM's losses on them."""

from collections.abc import Iterator

import numpy as np
import scipy.stats

from video.questions import Question
from video.voyager.loss_labels import Labels, combination_sizes


def ranking_metrics(predicted: np.ndarray, labels: Labels) -> dict[str, float]:
    """Returns means over groups, which are a question's combinations of one size whose losses are not all equal.

    Args:
      predicted: rewards of the labelled combinations, `[questions, combinations]`.
      labels: the Video-LLM's losses on them.

    Returns:
      loss: reward-ranking loss over all pairs, see `frame_voyager.ranking_loss`.
      ranking_accuracy: share of the pairs in the right order.
      kendall, spearman: rank correlations of reward and negative loss.
      regret: loss of the combination with the highest reward minus the lowest loss, nats per token.
      random_regret: expected regret of a combination drawn at random.
      regret/<type>: regret on the questions of a type.
    """
    values: dict[str, list[float]] = {name: [] for name in (
        "loss", "ranking_accuracy", "kendall", "spearman", "regret", "random_regret")}
    for question, rewards, losses in _by_size(predicted, labels):
        if losses.min() == losses.max():
            continue
        loss, accuracy = _pairs(rewards, losses)
        values["loss"].append(loss)
        values["ranking_accuracy"].append(accuracy)
        # Before training all rewards are equal, and correlations are undefined: they count as 0.
        flat = rewards.min() == rewards.max()
        values["kendall"].append(0.0 if flat else scipy.stats.kendalltau(rewards, -losses).statistic)
        values["spearman"].append(0.0 if flat else scipy.stats.spearmanr(rewards, -losses).statistic)
        regret = losses[rewards.argmax()] - losses.min()
        values["regret"].append(regret)
        values["random_regret"].append(losses.mean() - losses.min())
        if question.type:
            values.setdefault(f"regret/{question.type}", []).append(regret)
    return {name: float(np.mean(x)) if x else float("nan") for name, x in values.items()}


def _by_size(predicted: np.ndarray, labels: Labels) -> Iterator[tuple[Question, np.ndarray, np.ndarray]]:
    """Yields (question, rewards, losses) of the combinations of each size."""
    for question, rewards, losses, combinations in zip(
            labels.questions, predicted, labels.losses, labels.combinations):
        sizes = combination_sizes(combinations, labels.features.shape[0])
        for size in np.unique(sizes):
            yield question, rewards[sizes == size], losses[sizes == size]


def _pairs(predicted: np.ndarray, losses: np.ndarray, rows: int = 256) -> tuple[float, float]:
    """Returns the mean ranking loss, and the share in the right order, of all pairs of unequal loss."""
    total = right = pairs = 0.0
    for start in range(0, len(losses), rows):
        part = slice(start, start + rows)
        better = losses[part, None] < losses[None]
        margin = (predicted[part, None] - predicted[None])[better].astype(np.float64)
        total += np.logaddexp(0, -margin).sum()
        right += (margin > 0).sum() + 0.5 * (margin == 0).sum()
        pairs += len(margin)
    return total / pairs, right / pairs
