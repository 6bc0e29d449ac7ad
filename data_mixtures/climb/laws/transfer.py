"""Families of transfer between languages: the contribution of a mixture's other languages to one language's ratio.

Each family is a form of `sum_{j != i} T_ij(r_i, r_j, D)`, the transferred ratio; all are our own. It is exactly 0 where
every r_j is 0, and may be negative (interference). Its strengths are `T_ij = strength_i (1 + deviation_ij)`, with
deviations drawn to 0: the fewer the runs, the more the languages share one strength. With `fades`, the transferred
ratio is multiplied by `(D / D0)^-delta_i / (1 + r_i / rho_i)`: transfer is strongest for scarce languages.

To add a family, write its class and add a line to `TRANSFER_FAMILIES`.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# `PowerTransfer` takes ratios well below this for zero.
_EPSILON = 0.01


@dataclasses.dataclass(frozen=True)
class Transfer(abc.ABC):
    """A family of transfer, of one target.

    Attributes:
      d_varies: True: D varies in the table, and delta is fitted.
      fades: see the module.
    """

    d_varies: bool
    fades: bool = True

    def sizes(self, languages: int) -> dict[str, int]:
        """Returns names and lengths of the parameters."""
        fading = {"log_rho": 1} | ({"delta": 1} if self.d_varies else {})
        return {"log_strength": 1, "deviation": languages} | self.shape_sizes | (fading if self.fades else {})

    def prior(self) -> dict[str, tuple[float, float]]:
        """Returns mean and standard deviation of each parameter's prior."""
        # Over the few doublings of D that proxies see, delta and the isolated law's exponent are hard to separate.
        fading = {"log_rho": (0.0, 1.0)} | ({"delta": (0.0, 0.1)} if self.d_varies else {})
        return {"log_strength": (np.log(0.1), 2.0), "deviation": (0.0, 1.0)} | self.shape_prior | fading

    def transferred(self, p, own, others, scale):
        """Returns the transferred ratio `[...]`.

        Args:
          p: parameters by name.
          own: the language's own ratios `[...]`.
          others: ratios of all languages `[..., languages]`, 0 in the column of its own.
          scale: `log D/D0` `[...]`.
        """
        total = self.unfaded(p, jnp.exp(p["log_strength"]) * (1 + p["deviation"]), others)
        if self.fades:
            total = total / (1 + own / jnp.exp(p["log_rho"]))
            if self.d_varies:
                total = total * jnp.exp(-p["delta"] * scale)
        return self.added(p, own, total)

    def added(self, p, own, total):
        """Returns what the sum of transfer `total` adds to the own ratio; by default the sum itself."""
        return total

    @property
    def shape_sizes(self) -> dict[str, int]:
        """Length of each parameter of the family's shape."""
        return dict.fromkeys(self.shape_prior, 1)

    shape_prior = {}  # noqa: RUF012

    @abc.abstractmethod
    def unfaded(self, p, strengths, others):
        """Returns the sum before it fades, for strengths `[languages]`."""


@dataclasses.dataclass(frozen=True)
class LinearTransfer(Transfer):
    """`sum_j T_ij r_j`."""

    def unfaded(self, p, strengths, others):
        return others @ strengths


@dataclasses.dataclass(frozen=True)
class SaturatingTransfer(Transfer):
    """`sum_j T_ij r_j / (1 + r_j / kappa_i)`."""

    shape_prior = {"log_kappa": (np.log(0.5), 1.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        return (others / (1 + others / jnp.exp(p["log_kappa"]))) @ strengths


@dataclasses.dataclass(frozen=True)
class PowerTransfer(Transfer):
    """`sum_j T_ij ((r_j + e)^q_i - e^q_i) / ((1 + e)^q_i - e^q_i)`, e = 0.01."""

    shape_prior = {"log_q": (np.log(0.6), 0.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        q = jnp.exp(p["log_q"])
        zero = _EPSILON**q
        return (((others + _EPSILON) ** q - zero) / ((1 + _EPSILON) ** q - zero)) @ strengths


@dataclasses.dataclass(frozen=True)
class AggregateTransfer(Transfer):
    """`x / sqrt(1 + (x / s_i)^2)`, `x = sum_j T_ij r_j`: the sum over all other languages saturates."""

    shape_prior = {"log_s": (np.log(0.3), 1.5)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        total = others @ strengths
        return total / jnp.sqrt(1 + (total / jnp.exp(p["log_s"])) ** 2)


@dataclasses.dataclass(frozen=True)
class SubstitutionTransfer(Transfer):
    """`rt_i = ((r_i + e)^q_i + (x + e)^q_i - e^q_i)^(1 / q_i) - e`, `x = sum_j T_ij r_j`, 0 < q < 1, e = 0.001.

    Constant elasticity of substitution: own and others' text add up at q = 1, and the smaller q is, the more each is
    worth beside some of the other. Beside others' text, a token of its own may so be worth more than one, as we saw for
    small proxies, whose general skills all languages train. Interference, a negative x, is added as it is.
    """

    shape_prior = {"logit_q": (0.0, 1.0)}  # noqa: RUF012

    def unfaded(self, p, strengths, others):
        return others @ strengths

    def added(self, p, own, total):
        q, e = jax.nn.sigmoid(p["logit_q"]), 0.001
        positive = jnp.maximum(total, 0)
        gain = (1 + ((positive + e) ** q - e**q) / (own + e) ** q) ** (1 / q) - 1  # in this form 0 is exactly 0
        return (own + e) * gain + (total - positive)


# Add your family here: its name, as `Climb.family` has it, and a function of `d_varies` that makes it.
TRANSFER_FAMILIES = {
    "linear": functools.partial(LinearTransfer, fades=False),
    "saturating": functools.partial(SaturatingTransfer, fades=False),
    "saturating_fading": SaturatingTransfer,
    "power_fading": PowerTransfer,
    "aggregate_fading": AggregateTransfer,
    "substitution_fading": SubstitutionTransfer,
}
