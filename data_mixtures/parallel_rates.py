"""Writes mixture weights in which parallel text takes a share of the tokens, equally from both of its languages.

    python -m data_mixtures.parallel_rates --gin_file=gin/runs/parallel_even_2.gin
"""

import dataclasses
from collections.abc import Mapping

import gin
from etils import epath

from mlx_pretrain.artifacts import is_current, provenance, read_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.rates import normalise_rates, save_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log


def with_parallel(rates: Mapping[str, float], languages: tuple[str, str], share: float) -> dict[str, float]:
    """Returns mixture weights in which `share` of all tokens is parallel text.

        with_parallel({"en": 0.9, "zh": 0.1}, ("en", "zh"), 0.08) == {"en": 0.86, "zh": 0.06, "en-zh": 0.08}

    Half of the share is taken from each language, as in MuBench (arXiv 2506.19468, section on parallel corpora). The
    parallel text itself is half in either language, so that the languages keep their shares of the tokens, about.

    Args:
      rates: language -> weight, without parallel text.
      languages: the two languages; joined by "-" they name the parallel text.
      share: share of parallel text in all tokens, 0 for none.

    Raises:
      InputError: a weight is no number, or a language has less than half of `share`.
    """
    rates = normalise_rates(rates, "parallel_rates.rates")
    for language in languages:
        if not 0 <= share / 2 <= rates.get(language, 0):
            raise InputError(f"parallel_rates.share: half of {share} cannot be taken from {language!r}, which has "
                             f"{rates.get(language, 0)} of the tokens")
        rates[language] -= share / 2
    return {language: rate for language, rate in {**rates, "-".join(languages): share}.items() if rate > 0}


@gin.configurable("parallel_rates")
@dataclasses.dataclass(frozen=True)
class ParallelRatesConfig:
    """Parameters of the mixture weights.

    Attributes:
      rates: language -> mixture weight before any text is replaced, e.g. {"en": 0.9, "zh": 0.1}.
      languages: the two languages of the parallel text, e.g. ["en", "zh"].
      share: share of the parallel text in all tokens, 0 for none.
      output: rates file.
      overwrite: replaces a rates file that was made from other settings.
    """

    rates: dict[str, float] = gin.REQUIRED
    languages: tuple[str, str] = gin.REQUIRED
    share: float = gin.REQUIRED
    output: epath.PathLike = gin.REQUIRED
    overwrite: bool = False


def main(config: ParallelRatesConfig) -> None:
    """Writes mixture weights with a share of parallel text.

    Raises:
      InputError: the share cannot be taken from the languages, or another rates file is in the way.
    """
    rates = with_parallel(config.rates, tuple(config.languages), config.share)
    made_from = provenance("data_mixtures.parallel_rates", config, {})
    if is_current(config.output, read_record(config.output, "provenance"), made_from, overwrite=config.overwrite):
        return
    save_rates(config.output, rates, made_from)
    for language, rate in sorted(rates.items(), key=lambda item: -item[1]):
        log(f"{language:<8} {rate:8.4%}")


if __name__ == "__main__":
    run(main, ParallelRatesConfig, "data_mixtures.parallel_rates")
