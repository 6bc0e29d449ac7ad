"""What the other languages of a mixture give one language: families of `sum_{j != i} T_ij(r_i, r_j, D)`, all our own.

Each is exactly 0 where every r_j is 0, may be negative (interference), and has the strengths
`T_ij = strength_i (1 + deviation_ij)`, the deviations drawn to 0: the fewer the runs, the more languages share one.
With `fades`, what comes in is times `(D / D0)^-delta_i / (1 + r_i / rho_i)`: transfer is strongest for scarce
languages.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Below it a ratio is as good as zero to `Power`.
_EPSILON = 0.01


def floored(ratio, floor):
    """`(x + sqrt(x^2 + 4 f^2)) / 2`: positive and smooth; x itself far above f, `f^2 / |x|` far below zero."""
    size = (jnp.abs(ratio) + jnp.sqrt(ratio**2 + 4 * floor**2)) / 2
    return jnp.where(ratio >= 0, size, floor**2 / size)


@dataclasses.dataclass(frozen=True)
class Interaction(abc.ABC):
    """A family of T, of one target.

    Attributes:
      d_varies: whether delta is fitted.
      fades: see the module.
    """

    d_varies: bool
    fades: bool = True

    def sizes(self, languages: int) -> dict[str, int]:
        """Names and lengths of the parameters."""
        fading = {"log_rho": 1} | ({"delta": 1} if self.d_varies else {})
        return {"log_strength": 1, "deviation": languages} | self.shape_sizes | (fading if self.fades else {})

    def prior(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each parameter's prior."""
        # Over the few doublings of D that proxies see, delta is hard to tell from the isolated law's own exponent.
        fading = {"log_rho": (0.0, 1.0)} | ({"delta": (0.0, 0.1)} if self.d_varies else {})
        return {"log_strength": (np.log(0.1), 2.0), "deviation": (0.0, 1.0)} | self.shape_prior | fading

    def given(self, p, own, others, scale):
        """The sum `[...]` for own ratios `[...]`, others `[..., languages]` (own column 0), `scale = log D/D0`."""
        given = self.unfaded(p, jnp.exp(p["log_strength"]) * (1 + p["deviation"]), others)
        if self.fades:
            given = given / (1 + own / jnp.exp(p["log_rho"]))
            if self.d_varies:
                given = given * jnp.exp(-p["delta"] * scale)
        return self.combined(p, own, given)

    def combined(self, p, own, given):
        """What is added to the own ratio when `given` comes in."""
        return given

    @property
    def shape_sizes(self) -> dict[str, int]:
        return dict.fromkeys(self.shape_prior, 1)

    shape_prior = {}  # noqa: RUF012

    @abc.abstractmethod
    def unfaded(self, p, strengths, others):
        """The sum before it fades."""


@dataclasses.dataclass(frozen=True)
class Linear(Interaction):
    """`sum_j T_ij r_j`."""

    def unfaded(self, p, strengths, others):
        return others @ strengths


@dataclasses.dataclass(frozen=True)
class Saturating(Interaction):
    """`sum_j T_ij r_j / (1 + r_j / kappa_i)`."""

    shape_prior = {"log_kappa": (np.log(0.5), 1.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        return (others / (1 + others / jnp.exp(p["log_kappa"]))) @ strengths


@dataclasses.dataclass(frozen=True)
class Power(Interaction):
    """`sum_j T_ij ((r_j + e)^q_i - e^q_i) / ((1 + e)^q_i - e^q_i)`, e = 0.01."""

    shape_prior = {"log_q": (np.log(0.6), 0.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        q = jnp.exp(p["log_q"])
        zero = _EPSILON**q
        return (((others + _EPSILON) ** q - zero) / ((1 + _EPSILON) ** q - zero)) @ strengths


@dataclasses.dataclass(frozen=True)
class Aggregate(Interaction):
    """`x / sqrt(1 + (x / s_i)^2)`, `x = sum_j T_ij r_j`: what all the others give together saturates."""

    shape_prior = {"log_s": (np.log(0.3), 1.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        total = others @ strengths
        return total / jnp.sqrt(1 + (total / jnp.exp(p["log_s"])) ** 2)


@dataclasses.dataclass(frozen=True)
class Substitution(Interaction):
    """`rt_i = ((r_i + e)^q_i + (x + e)^q_i - e^q_i)^(1 / q_i) - e`, `x = sum_j T_ij r_j`, 0 < q < 1, e = 0.001.

    Constant elasticity of substitution: own and others' text add up at q = 1, and the smaller q is, the more each is
    worth beside some of the other. So a token of one's own may be worth more than a token in company, as we saw for
    small proxies, whose general skills all languages train. Interference, a negative x, is added as it is.
    """

    shape_prior = {"logit_q": (0.0, 1.0)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        return others @ strengths

    def combined(self, p, own, given):
        q, e = jax.nn.sigmoid(p["logit_q"]), 0.001
        positive = jnp.maximum(given, 0)
        gain = (1 + ((positive + e) ** q - e**q) / (own + e) ** q) ** (1 / q) - 1  # in this form 0 is exactly 0
        return (own + e) * gain + (given - positive)


INTERACTIONS = {
    "linear": functools.partial(Linear, fades=False),
    "saturating": functools.partial(Saturating, fades=False),
    "saturating_fading": Saturating,
    "power_fading": Power,
    "aggregate_fading": Aggregate,
    "substitution_fading": Substitution,
}
