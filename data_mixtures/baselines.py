"""Baseline mixtures: natural, temperature-scaled, uniform and UniMax weights from the token counts of a store.

Writes a rates file, which the SeqIO mixture and the token loader both read.
"""

import dataclasses
import math
from collections.abc import Mapping

import gin
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.artifacts import is_current, read_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import MANIFEST, read_manifest
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log


def temperature_rates(counts: Mapping[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Returns mixture weights proportional to count^(1 / temperature): 1 natural, infinity uniform.

    Raises:
      InputError: the temperature is not positive, or a count is not.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    if empty := sorted(language for language, count in counts.items() if count <= 0):
        raise InputError(f"no text in {', '.join(empty)}")
    # In logarithms, as count^(1 / temperature) overflows for small temperatures.
    logs = {language: math.log(count) / temperature for language, count in counts.items()}
    top = max(logs.values())
    weights = {language: math.exp(log - top) for language, log in logs.items()}
    total = math.fsum(weights.values())
    return {language: weight / total for language, weight in weights.items()}


def capped_budgets(rates: Mapping[str, float], budget: float, caps: Mapping[str, float]) -> dict[str, float]:
    """Divides `budget` in proportion to `rates`, no language above its cap; the rest goes to the other languages.

    With uniform rates and caps of `max_epochs` times the text, this is UniMax (https://arxiv.org/abs/2304.09151,
    algorithm 1). When the caps sum to less than the budget, every language gets its cap.
    """
    # Languages in the order in which they reach their caps; the first below its cap ends the capped ones.
    order = sorted((l for l in rates if rates[l] > 0), key=lambda l: caps[l] / rates[l])
    for number, language in enumerate(order):
        free = budget - math.fsum(caps[l] for l in order[:number])
        level = free / math.fsum(rates[l] for l in order[number:])
        if level * rates[language] <= caps[language]:
            return {l: min(caps[l], level * rate) for l, rate in rates.items()}
    return dict(caps)


def unimax_rates(
    counts: Mapping[str, int], total_tokens: float, max_epochs: float, temperature: float = math.inf
) -> dict[str, float]:
    """Returns temperature weights (UniMax: uniform) under which no language is seen more than `max_epochs` times.

    Args:
      counts: language -> tokens of text.
      total_tokens: tokens the run will train on.
      max_epochs: most times that a language's text is seen.
      temperature: temperature of the weights before the cap.

    Raises:
      InputError: all the text repeated `max_epochs` times is less than `total_tokens`.
    """
    if not total_tokens > 0 or not max_epochs > 0:
        raise InputError(f"total_tokens and max_epochs must be positive, got {total_tokens} and {max_epochs}")
    if (available := max_epochs * sum(counts.values())) < total_tokens:
        raise InputError(f"{total_tokens:,} tokens cannot be had: {max_epochs} epochs of all text are {available:,}")
    caps = {language: max_epochs * count for language, count in counts.items()}
    budgets = capped_budgets(temperature_rates(counts, temperature), total_tokens, caps)
    return {language: budget / total_tokens for language, budget in budgets.items()}


@gin.configurable("write_baseline")
@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """Parameters of a baseline.

    Attributes:
      store: token store; its manifest has the token counts.
      output: rates file.
      temperature: 1 natural, "inf" uniform; in between, weights are proportional to tokens^(1/temperature).
      max_epochs: most times that a language's text is repeated in `total_tokens` (with temperature "inf": UniMax);
        None: no limit.
      total_tokens: planned length of the run in tokens; also gives the epochs in the rates file.
      split: split whose tokens count.
      overwrite: replaces a rates file that was made from another store or other settings.
    """

    store: epath.PathLike = gin.REQUIRED
    output: epath.PathLike = gin.REQUIRED
    temperature: float | str = 1.0
    max_epochs: float | None = None
    total_tokens: int | None = None
    split: str = "train"
    overwrite: bool = False

    def __post_init__(self):
        try:
            float(self.temperature)
        except ValueError:
            raise InputError(f"write_baseline.temperature: {self.temperature!r} is no number") from None
        if self.max_epochs is not None and self.total_tokens is None:
            raise InputError("write_baseline.max_epochs needs write_baseline.total_tokens")


def write_baseline(config: BaselineConfig) -> None:
    """Writes a rule-of-thumb mixture, as a rates file, from the token counts of a store.

    Raises:
      InputError: the store cannot be read, the settings ask for what its text does not allow, or a rates file made
        from others is in the way.
    """
    manifest, total_tokens = read_manifest(config.store), config.total_tokens
    if config.split not in manifest.splits:
        raise InputError(f"{config.store}: no split {config.split!r}; available: {', '.join(sorted(manifest.splits))}")
    counts = {language: part.tokens for language, part in manifest.splits[config.split].items()}
    temperature = float(config.temperature)
    made_from = {"program": "data_mixtures.baselines", "version": __version__, "config": {
        "temperature": str(temperature), "max_epochs": config.max_epochs, "total_tokens": total_tokens,
        "split": config.split}, "manifest_sha256": sha256(epath.Path(config.store) / MANIFEST)}
    if is_current(config.output, read_record(config.output, "provenance"), made_from, overwrite=config.overwrite):
        return
    if config.max_epochs is None:
        rates = temperature_rates(counts, temperature)
    else:
        rates = unimax_rates(counts, total_tokens, config.max_epochs, temperature)
    more = {}
    if total_tokens is not None:
        more["epochs"] = {language: rate * total_tokens / counts[language] for language, rate in rates.items()}
    save_rates(config.output, rates, made_from, **more)
    for language, rate in sorted(rates.items(), key=lambda item: -item[1]):
        epochs = f"  {more['epochs'][language]:8.3f} epochs" if more else ""
        log(f"{language:<8} {rate:8.4%}  of {counts[language]:>12,} tokens{epochs}")


if __name__ == "__main__":
    run(write_baseline, BaselineConfig, "data_mixtures.baselines")
