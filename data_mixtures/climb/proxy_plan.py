"""Plans of proxy runs: mixtures at the corners, which identify transfer, and mixtures around the natural one."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.baselines import temperature_rates
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig

Mixtures = dict[str, dict[str, float]]  # name -> language -> ratio

_NO_EFFECT = ("attention", "max_length", "remat", "unroll")  # fields of a model that leave the result the same


@dataclasses.dataclass(frozen=True)
class ProxyRun:
    """One proxy run.

    Attributes:
      mixture: name of its mixture.
      model: its shape.
      rates: its mixture, language -> ratio.
      seed: seed of its parameters and data order.
      steps: steps after which it is evaluated, ascending; the last ends it.
      epochs_per_token: increase, with each training token, of the epochs of the language that is repeated most.
    """

    mixture: str
    model: DecoderConfig
    rates: Mapping[str, float]
    seed: int
    steps: tuple[int, ...]
    epochs_per_token: float

    @property
    def name(self) -> str:
        """Name of its rows and its file, e.g. "only-de-0.276M-seed0"."""
        return f"{self.mixture}-{self.size}-seed{self.seed}"

    @property
    def size(self) -> str:
        """Parameters of the model as a word, e.g. "0.276M"."""
        return f"{self.model.parameters() / 1e6:.3g}M"

    @property
    def model_settings(self) -> dict[str, Any]:
        """Fields of the model that change the result, as JSON."""
        fields = dataclasses.asdict(self.model)
        return json.loads(json.dumps({name: value for name, value in fields.items() if name not in _NO_EFFECT}))


@gin.configurable(denylist=["counts"])
def planned_mixtures(
    counts: Mapping[str, int],
    mixtures: int = 32,
    monolingual: bool = True,
    leave_one_out: bool = True,
    pairs: int | None = None,
    pair_shares: Sequence[float] = (0.5,),
    temperature: float = 3.0,
    concentration: tuple[float, float] = (0.5, 5.0),
    seed: int = 0,
) -> Mixtures:
    """Returns the mixtures of a plan of proxy runs: name -> language -> ratio.

    Monolingual runs fix the isolated laws; pairs and leave-one-out runs identify the transfer from one language to
    another; the drawn mixtures are near the expected optimum. Names and draws do not depend on their number, so a
    finished plan can be extended.

    Args:
      counts: language -> tokens of text.
      mixtures: mixtures drawn from Dirichlet distributions around the natural ratios (as RegMix, arXiv 2407.01492).
      monolingual: adds one monolingual run per language.
      leave_one_out: adds one run per language without it, in which the others keep their natural proportions.
      pairs: highest number of runs of two languages, drawn from all pairs; None: all pairs.
      pair_shares: ratios of the first language of a pair; .5 serves both directions.
      temperature: temperature of the centre of the Dirichlet distributions (1 natural, larger is flatter).
      concentration: lowest and highest sum of a Dirichlet's parameters per language, drawn log-uniformly per mixture;
        small ones reach the edges of the simplex.
      seed: seed of the draws.

    Raises:
      InputError: a language without text, fewer than two languages, or an empty plan.
    """
    languages = sorted(counts)
    if len(languages) < 2:
        raise InputError(f"planned_mixtures: one language ({', '.join(languages)}) cannot be mixed")
    natural = temperature_rates(counts)
    centre = np.array([temperature_rates(counts, temperature)[language] for language in languages])
    low, high = concentration
    if not 0 < low <= high:
        raise InputError(f"planned_mixtures.concentration = {concentration!r}: needs 0 < lowest <= highest")
    if bad := [share for share in pair_shares if not 0 < share < 1]:
        raise InputError(f"planned_mixtures.pair_shares: {bad[0]!r} is not between 0 and 1")
    plan: Mixtures = {}
    if monolingual:
        plan |= {f"only-{language}": {language: 1.0} for language in languages}
    if leave_one_out and len(languages) > 2:
        for language in languages:
            rest = {other: natural[other] / (1 - natural[language]) for other in languages if other != language}
            plan[f"without-{language}"] = rest
    combinations = list(itertools.combinations(languages, 2))
    order = np.random.default_rng([seed, 1]).permutation(len(combinations))
    for number in sorted(order[:pairs]):
        first, second = combinations[number]
        for share in pair_shares:
            plan[f"pair-{first}-{second}-{share:g}"] = {first: share, second: 1 - share}
    for number in range(mixtures):
        rng = np.random.default_rng([seed, 2, number])
        strength = np.exp(rng.uniform(np.log(low), np.log(high))) * len(languages)
        ratios = rng.dirichlet(strength * centre)
        plan[f"mix-{number:03d}"] = {l: float(r) for l, r in zip(languages, ratios) if r > 0}
    if not plan:
        raise InputError("planned_mixtures: the plan is empty")
    return plan


@gin.configurable(denylist=["counts"])
def given_mixtures(counts: Mapping[str, int], paths: Sequence[epath.PathLike] = gin.REQUIRED) -> Mixtures:
    """Returns the mixtures of rates files, each named like its file (without .json).

    Args:
      counts: language -> tokens of text.
      paths: the rates files.

    Raises:
      InputError: a file is no rates file, names a language without text, or two have one name.
    """
    plan: Mixtures = {}
    for path in paths:
        name = epath.Path(path).stem
        if name in plan:
            raise InputError(f"{path}: a second rates file named {name!r}; run names would clash")
        plan[name] = load_rates(path, known=counts)
    return plan
