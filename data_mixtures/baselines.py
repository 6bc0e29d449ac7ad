"""Baseline mixtures: natural, temperature-scaled, uniform and UniMax rates from the token counts of a store.

Writes a rates file that the SeqIO mixture and the token loader both read.
"""

import math
import sys
from collections.abc import Mapping

import gin
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import MANIFEST, read_manifest
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256


def temperature_rates(counts: Mapping[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Rates proportional to count^(1 / temperature): 1 is the natural mixture, infinity the uniform one.

    Raises:
      InputError: the temperature is not positive, or a count is not.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    if empty := sorted(language for language, count in counts.items() if count <= 0):
        raise InputError(f"no text in {', '.join(empty)}")
    # Through logarithms: count^(1 / temperature) overflows for small temperatures.
    logs = {language: math.log(count) / temperature for language, count in counts.items()}
    top = max(logs.values())
    weights = {language: math.exp(log - top) for language, log in logs.items()}
    total = math.fsum(weights.values())
    return {language: weight / total for language, weight in weights.items()}


def capped_budgets(rates: Mapping[str, float], budget: float, caps: Mapping[str, float]) -> dict[str, float]:
    """Shares `budget` out by `rates`, no language above its cap; what a capped one leaves goes to the others by rate.

    With uniform rates and caps of `max_epochs` times the text, this is UniMax (https://arxiv.org/abs/2304.09151,
    algorithm 1). When the caps sum to less than the budget, every language gets its cap.
    """
    # By how soon they are full; the first that is not full ends the list of capped languages.
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
    """Temperature rates (UniMax: uniform) under which no language is seen more than `max_epochs` times.

    Args:
      counts: language -> tokens of text.
      total_tokens: tokens the run will train on.
      max_epochs: how often a language's text may be repeated.
      temperature: of the rates before the cap.

    Raises:
      InputError: all the text repeated `max_epochs` times is less than `total_tokens`.
    """
    if not total_tokens > 0 or not max_epochs > 0:
        raise InputError(f"total_tokens and max_epochs must be positive, got {total_tokens} and {max_epochs}")
    if (most := max_epochs * sum(counts.values())) < total_tokens:
        raise InputError(f"{total_tokens:,} tokens cannot be had: {max_epochs} epochs of all text are {most:,}")
    caps = {language: max_epochs * count for language, count in counts.items()}
    budgets = capped_budgets(temperature_rates(counts, temperature), total_tokens, caps)
    return {language: budget / total_tokens for language, budget in budgets.items()}


@gin.configurable
def write_baseline(
    store: epath.PathLike = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    temperature: float | str = 1.0,
    max_epochs: float | None = None,
    total_tokens: int | None = None,
    split: str = "train",
) -> None:
    """Writes a baseline's rates file from a token store.

    Args:
      store: the token store; its manifest has the token counts.
      output: the rates file.
      temperature: 1 natural, "inf" uniform; in between, rates are proportional to tokens^(1/temperature).
      max_epochs: with it no language is repeated more often in `total_tokens` (with temperature "inf": UniMax).
      total_tokens: planned length of the run in tokens; also gives the epochs in the rates file.
      split: the split whose tokens count.
    """
    manifest = read_manifest(store)
    if split not in manifest.splits:
        raise InputError(f"{store}: no split {split!r}; there is {', '.join(sorted(manifest.splits))}")
    counts = {language: part.tokens for language, part in manifest.splits[split].items()}
    try:
        temperature = float(temperature)
    except ValueError:
        raise InputError(f"write_baseline.temperature: {temperature!r} is no number") from None
    if max_epochs is None:
        rates = temperature_rates(counts, temperature)
    elif total_tokens is None:
        raise InputError("write_baseline.max_epochs needs write_baseline.total_tokens")
    else:
        rates = unimax_rates(counts, total_tokens, max_epochs, temperature)
    more = {}
    if total_tokens is not None:
        more["epochs"] = {language: rate * total_tokens / counts[language] for language, rate in rates.items()}
    config = {"temperature": str(temperature), "max_epochs": max_epochs, "total_tokens": total_tokens, "split": split}
    save_rates(output, rates, {"program": "data_mixtures.baselines", "version": __version__, "config": config,
                               "manifest_sha256": sha256(epath.Path(store) / MANIFEST)}, **more)
    for language, rate in sorted(rates.items(), key=lambda item: -item[1]):
        epochs = f"  {more['epochs'][language]:8.3f} epochs" if more else ""
        print(f"{language:<8} {rate:8.4%}  of {counts[language]:>12,} tokens{epochs}", file=sys.stderr)


if __name__ == "__main__":
    run(write_baseline, "data_mixtures.baselines")
