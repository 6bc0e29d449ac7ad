"""The rates file: mixture weights, the share of the training tokens that each language gets.

One JSON file serves the SeqIO mixture and the token loader:

    {"format": "mlx-rates", "version": 1, "rates": {"en": 0.4, "fi": 0.1, ...}, "provenance": {...}}

The file may have further keys (intervals, expected losses, epochs), which inform people and are not read here.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_json

FORMAT = "mlx-rates"
VERSION = 1


def normalise_rates(rates: Mapping[str, float], where: str, known: Collection[str] | None = None) -> dict[str, float]:
    """Checks mixture weights and scales them to sum to 1; leaves out languages of weight 0.

    Args:
      rates: language -> weight, any non-negative number.
      where: origin of the weights, named in errors.
      known: languages that have text; None skips that check.

    Raises:
      InputError: a weight is not a finite number >= 0, the sum is not positive, or a language is unknown.
    """
    for language, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate):
            raise InputError(f"{where}: the rate of {language!r} is {rate!r}, not a finite number")
        if rate < 0:
            raise InputError(f"{where}: the rate of {language!r} is negative ({rate})")
        if known is not None and rate > 0 and language not in known:
            raise InputError(f"{where}: unknown language {language!r}; there is text for {', '.join(sorted(known))}")
    total = math.fsum(rates.values())
    if not total > 0:
        raise InputError(f"{where}: the rates sum to {total}, not to something positive")
    return {language: rate / total for language, rate in rates.items() if rate > 0}


def load_rates(path: epath.PathLike, known: Collection[str] | None = None) -> dict[str, float]:
    """Reads a rates file and returns normalised weights, sorted by language.

    Args:
      path: file.
      known: languages that have text; None skips that check.

    Raises:
      InputError: the file cannot be read, or as `normalise_rates`.
    """
    content = read_json(path, "rates file")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("rates"), dict):
        raise InputError(f'{path}: not a rates file; it needs "format": "{FORMAT}" and a "rates" object')
    if content.get("version") != VERSION:
        raise InputError(f"{path}: rates file of version {content.get('version')!r}; this program reads {VERSION}")
    return dict(sorted(normalise_rates(content["rates"], str(path), known).items()))


def save_rates(path: epath.PathLike, rates: Mapping[str, float], provenance: Mapping[str, Any], **more: Any) -> None:
    """Writes normalised weights as a rates file, atomically, with `more` as further top-level keys."""
    content = {"format": FORMAT, "version": VERSION, "rates": normalise_rates(rates, str(path))}
    write_json(path, {**content, "provenance": dict(provenance), **more})
