"""Constraints on a mixture: floors, a limit on the repetition of text, fixed ratios."""

import dataclasses
from collections.abc import Mapping, Sequence

import gin
import numpy as np

from mlx_pretrain.errors import InputError

# Sums of ratios this close to 1 count as 1: 61 floors of 1/61 do not sum to 1 in floating point.
_SLACK = 1e-9


def _listed(languages: Sequence[str], values: np.ndarray, selected: np.ndarray) -> str:
    """Returns the selected languages and their values in words, largest first, at most six of them."""
    order = [i for i in np.argsort(-values, kind="stable") if selected[i]]
    more = f" and {len(order) - 6} more" if len(order) > 6 else ""
    return ", ".join(f"{languages[i]} {values[i]:.6g}" for i in order[:6]) + more


def per_language(
    where: str, setting: float | Mapping[str, float], languages: Sequence[str], default: float, highest: float = np.inf
) -> np.ndarray:
    """Returns the values `[languages]` of a setting.

    Args:
      where: name of the setting in errors.
      setting: one number for all languages, or language -> number.
      languages: the languages.
      default: value of a language that the mapping lacks.
      highest: highest value allowed.

    Raises:
      InputError: a language is unknown, or a number is not in [0, highest].
    """
    values = dict(setting) if isinstance(setting, Mapping) else dict.fromkeys(languages, setting)
    if unknown := sorted(set(values) - set(languages)):
        raise InputError(f"{where} names {', '.join(unknown)}; the law has {', '.join(languages)}")
    for language, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value <= highest and np.isfinite(value)):
            limit = f"a number in [0, {highest:g}]" if np.isfinite(highest) else "a finite number, 0 or more"
            raise InputError(f"{where} of {language} is {value!r}, not {limit}")
    return np.array([values.get(language, default) for language in languages], np.float64)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Constraints:
    """Constraints that a mixture must satisfy.

        Constraints(floor=0.01, max_epochs=4, unique_tokens={"de": 2e9, "fi": 1e8}, fixed={"de": 0.3})

    Attributes:
      floor: lowest ratio, of every language or language -> ratio (0 for a language that is not named).
      max_epochs: limit on the epochs over a language's text: `ratio * tokens <= max_epochs * unique_tokens`.
      unique_tokens: language -> tokens of its text, for all languages. A language with 0 gets the ratio 0.
      fixed: language -> ratio that it must have.
    """

    floor: float | Mapping[str, float] = 0.0
    max_epochs: float | None = None
    unique_tokens: Mapping[str, float] | None = None
    fixed: Mapping[str, float] | None = None

    def bounds(self, languages: Sequence[str], tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns lower and upper bounds of the ratios, float64 `[languages]` each; equal where fixed.

        Args:
          languages: languages, in the order of the bounds.
          tokens: planned length D of the run.

        Raises:
          InputError: a language is unknown or has no number of tokens, a number is out of its range, or no mixture
            satisfies the constraints; it names them.
        """
        floors = per_language("constraints: floor", self.floor, languages, 0.0, 1.0)
        fixed = per_language("constraints: fixed ratio", self.fixed or {}, languages, np.nan, 1.0)
        caps, text = np.ones(len(languages)), None
        if self.unique_tokens is not None:
            text = per_language("constraints: unique_tokens", self.unique_tokens, languages, np.nan)
            if np.isnan(text).any():
                missing = [language for language, number in zip(languages, text) if np.isnan(number)]
                raise InputError(f"constraints: unique_tokens has no number for {', '.join(missing)}")
            caps[text == 0] = 0
        if self.max_epochs is not None:
            if text is None:
                raise InputError("constraints: max_epochs needs unique_tokens")
            if not self.max_epochs > 0:
                raise InputError(f"constraints: max_epochs must be positive, got {self.max_epochs}")
            caps = np.minimum(1.0, self.max_epochs * text / tokens)
            demanded = np.fmax(floors, fixed)  # may be just what the text allows, but for rounding
            caps = np.where((caps < demanded) & (caps >= demanded * (1 - _SLACK)), demanded, caps)
        self._check(languages, floors, fixed, caps, text, tokens)
        free = np.isnan(fixed)
        return np.where(free, floors, fixed), np.where(free, caps, fixed)

    def _check(self, languages, floors, fixed, caps, text, tokens) -> None:
        """Raises InputError where the bounds `[languages]` leave no mixture."""
        is_fixed, free = ~np.isnan(fixed), np.isnan(fixed)
        for language, floor, ratio, cap, its_text in zip(
            languages, floors, fixed, caps, np.full(len(caps), np.nan) if text is None else text
        ):
            demand = f"floor {floor:.6g} of {language}" if np.isnan(ratio) else f"fixed ratio {ratio:.6g} of {language}"
            if ratio < floor:
                raise InputError(f"constraints: {demand} is below its floor {floor:.6g}")
            if max(floor, np.nan_to_num(ratio)) <= cap:
                continue
            if its_text == 0:
                raise InputError(f"constraints: {demand}, which has no text (its unique_tokens are 0)")
            raise InputError(
                f"constraints: {demand} is above {cap:.6g}: that is max_epochs {self.max_epochs:g} of its "
                f"{its_text:.6g} unique_tokens, as a share of {tokens:.6g} tokens"
            )
        lowest, highest = np.where(free, floors, fixed).sum(), np.where(free, caps, fixed).sum()
        if highest >= 1 - _SLACK and lowest <= 1 + _SLACK:
            return
        parts = []
        if is_fixed.any():
            parts.append(f"the fixed ratios sum to {fixed[is_fixed].sum():.6g} ({_listed(languages, fixed, is_fixed)})")
        if lowest > 1:
            if (positive := free & (floors > 0)).any():
                listed = _listed(languages, floors, positive)
                parts.append(f"the floors sum to {floors[positive].sum():.6g} ({listed})")
            raise InputError(f"constraints: {' and '.join(parts)}: more than 1")
        if free.any():
            limit = "unique_tokens" if self.max_epochs is None else f"max_epochs {self.max_epochs:g}"
            parts.append(f"what {limit} allows sums to {caps[free].sum():.6g} ({_listed(languages, caps, free)})")
        raise InputError(f"constraints: {' and '.join(parts)}: less than 1 at {tokens:.6g} tokens; train on "
                         "fewer tokens, or allow more epochs")
