"""How well rewards order combinations by the Video-LLM's loss."""

import numpy as np
import scipy.stats

from video.voyager.loss_labels import Labels


def ranking(of_frames: np.ndarray, labels: Labels) -> dict[str, float]:
    """Means over questions whose losses are not all equal.

    Args:
      of_frames: rewards `[questions, candidates]`.
      labels: losses of combinations of these candidates.

    Returns:
      loss: reward-ranking loss over all pairs, see `voyager.ranking_loss`.
      ranking_accuracy: share of the pairs in the right order.
      kendall, spearman: rank correlations of reward and negative loss.
      regret: loss of the combination with the highest reward less the lowest loss, nats per token.
      random_regret: the same of a combination at random.
      regret/<type>: by type of question.
    """
    found: dict[str, list[float]] = {name: [] for name in (
        "loss", "ranking_accuracy", "kendall", "spearman", "regret", "random_regret")}
    for rewards, losses, combinations, question in zip(
            of_frames, labels.losses, labels.combinations, labels.questions):
        if losses.min() == losses.max():
            continue
        predicted = rewards[combinations].mean(axis=1)
        loss, accuracy = _pairs(predicted, losses)
        found["loss"].append(loss)
        found["ranking_accuracy"].append(accuracy)
        # All rewards are equal before training: no correlation.
        flat = predicted.min() == predicted.max()
        found["kendall"].append(0.0 if flat else scipy.stats.kendalltau(predicted, -losses).statistic)
        found["spearman"].append(0.0 if flat else scipy.stats.spearmanr(predicted, -losses).statistic)
        regret = losses[predicted.argmax()] - losses.min()
        found["regret"].append(regret)
        found["random_regret"].append(losses.mean() - losses.min())
        if question.type:
            found.setdefault(f"regret/{question.type}", []).append(regret)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def _pairs(predicted: np.ndarray, losses: np.ndarray, rows: int = 256) -> tuple[float, float]:
    """Mean ranking loss and share in the right order over all pairs of unequal loss."""
    total = right = pairs = 0.0
    for start in range(0, len(losses), rows):
        part = slice(start, start + rows)
        better = losses[part, None] < losses[None]
        margin = (predicted[part, None] - predicted[None])[better].astype(np.float64)
        total += np.logaddexp(0, -margin).sum()
        right += (margin > 0).sum() + 0.5 * (margin == 0).sum()
        pairs += len(margin)
    return total / pairs, right / pairs
