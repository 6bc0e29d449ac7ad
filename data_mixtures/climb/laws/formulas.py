"""The formulas: losses as functions of the parameters of one target, and the priors of those parameters.

Each is a frozen dataclass, hashed by value, so that it can be a static argument of compiled programs.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from data_mixtures.climb.laws.interactions import Interaction, floored

Prior = dict[str, tuple[np.ndarray | float, float]]


@dataclasses.dataclass(frozen=True)
class Chinchilla:
    """`L(N, d) = E + A / N^alpha + B / (d + d0)^beta`, d the language's own tokens `rt D` (2203.15556's form).

    E and A / N^alpha are one constant where N does not vary. `shift`: d0 is fitted, else 0; it is ours, for proxies so
    small that the power law has not begun.
    """

    n_varies: bool
    d_varies: bool
    shift: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        names = ("log_e", "log_b", "log_beta") + ("log_a", "log_alpha") * self.n_varies
        return dict.fromkeys(names + ("log_shift",) * self.shift, 1)

    def prior(self, losses: np.ndarray) -> Prior:
        """Of losses `[rows]`: wide, and only there so that what the data leave open stays finite."""
        rest = max(np.median(losses) - 0.7 * losses.min(), 0.1)
        size = {"log_a": (np.log(0.2 * losses.min()), 1.0), "log_alpha": (np.log(0.3), 0.7)} if self.n_varies else {}
        shift = {"log_shift": (np.log(0.02), 1.5)} if self.shift else {}
        return {
            "log_e": (np.log(0.7 * losses.min()), 0.7),
            "log_b": (np.log(rest) + 0.3 * np.log(0.1), 1.0),
            "log_beta": (np.log(0.3), 0.7),
            **size,
            **shift,
        }

    def log_loss(self, p, effective, size, scale):
        end = p["log_e"]
        if self.n_varies:
            end = jnp.logaddexp(end, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        tokens = effective * jnp.exp(scale) + (jnp.exp(p["log_shift"]) if self.shift else 0)
        return jnp.logaddexp(end, p["log_b"] - jnp.exp(p["log_beta"]) * jnp.log(tokens))


@dataclasses.dataclass(frozen=True)
class Separable:
    """`L(N, D, p) = (E + A / N^alpha + B / D^beta) p^-gamma` (2410.12883); terms that do not vary are one constant."""

    n_varies: bool
    d_varies: bool

    @property
    def sizes(self) -> dict[str, int]:
        terms = ("log_a", "log_alpha") * self.n_varies + ("log_b", "log_beta") * self.d_varies
        return dict.fromkeys(("log_e", "log_gamma", *terms), 1)

    def prior(self, losses: np.ndarray) -> Prior:
        term = np.log(0.2 * losses.min())
        size = {"log_a": (term, 1.0), "log_alpha": (np.log(0.3), 0.7)} if self.n_varies else {}
        scale = {"log_b": (term, 1.0), "log_beta": (np.log(0.3), 0.7)} if self.d_varies else {}
        return {"log_e": (np.log(0.7 * losses.min()), 0.7), "log_gamma": (np.log(0.1), 1.0), **size, **scale}

    def log_loss(self, p, effective, size, scale):
        log_loss = p["log_e"]
        if self.n_varies:
            log_loss = jnp.logaddexp(log_loss, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        if self.d_varies:
            log_loss = jnp.logaddexp(log_loss, p["log_b"] - jnp.exp(p["log_beta"]) * scale)
        return log_loss - jnp.exp(p["log_gamma"]) * jnp.log(effective)


@dataclasses.dataclass(frozen=True)
class Shared:
    """`L(N, D, rt) = (E + A / N^alpha) rt^-gamma + B rt^-kappa / (D + d0)^beta`, with constants for what does not vary.

    Ours. Languages share the model, so the loss that a language ends at without limit of text rises as its part falls,
    and share its early training, which depends on the steps made more than on the language's own tokens. With gamma =
    kappa and d0 = 0 it is `Separable`, with gamma = 0, kappa = beta and d0 = 0 `Chinchilla`.
    """

    n_varies: bool
    d_varies: bool
    shift: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        names = ("log_e", "log_gamma", "log_b", "log_kappa") + ("log_a", "log_alpha") * self.n_varies
        scale = ("log_beta",) + ("log_shift",) * self.shift
        return dict.fromkeys(names + scale * self.d_varies, 1)

    def prior(self, losses: np.ndarray) -> Prior:
        alone = Chinchilla(self.n_varies, self.d_varies, self.shift).prior(losses)
        exponents = {"log_gamma": (np.log(0.05), 1.0), "log_kappa": (np.log(0.1), 1.0)}
        return {name: value for name, value in (alone | exponents).items() if name in self.sizes}

    def log_loss(self, p, effective, size, scale):
        part = jnp.log(effective)
        end, rest = p["log_e"], p["log_b"] - jnp.exp(p["log_kappa"]) * part
        if self.n_varies:
            end = jnp.logaddexp(end, p["log_a"] - jnp.exp(p["log_alpha"]) * size)
        if self.d_varies:
            tokens = jnp.exp(scale) + (jnp.exp(p["log_shift"]) if self.shift else 0)
            rest -= jnp.exp(p["log_beta"]) * jnp.log(tokens)
        return jnp.logaddexp(end - jnp.exp(p["log_gamma"]) * part, rest)


@dataclasses.dataclass(frozen=True)
class EffectiveModel:
    """A law of the form `isolated(rt)` with the parameters of one target in one vector (`fitting.Model`)."""

    languages: int
    isolated: Chinchilla | Separable | Shared
    interaction: Interaction | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each parameter, in the order of the vector."""
        return self.isolated.sizes | (self.interaction.sizes(self.languages) if self.interaction else {})

    def prior(self, losses: np.ndarray) -> Prior:
        return self.isolated.prior(losses) | (self.interaction.prior() if self.interaction else {})

    def effective(self, p, rows, target):
        own = rows["ratios"] @ target["own"]
        if self.interaction is not None:
            own = own + self.interaction.given(p, own, rows["ratios"] * (1 - target["own"]), rows["scale"])
        return floored(own, target["floor"])

    def isolated_log_loss(self, p, effective, rows):
        return self.isolated.log_loss(p, effective, rows["size"], rows["scale"])

    def log_loss(self, parameters, rows, target):
        p = unpack(self.sizes, parameters)
        return self.isolated_log_loss(p, self.effective(p, rows, target), rows)


@dataclasses.dataclass(frozen=True)
class MixingModel:
    """`c + exp(k + t . r)`: see `MixingLaw`."""

    languages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"log_c": 1, "k": 1, "t": self.languages}

    def prior(self, losses: np.ndarray) -> Prior:
        rest = max(np.median(losses) - 0.7 * losses.min(), 0.1)
        return {"log_c": (np.log(0.7 * losses.min()), 0.7), "k": (np.log(rest), 2.0), "t": (0.0, 3.0)}

    def log_loss(self, parameters, rows, target):
        p = unpack(self.sizes, parameters)
        return jnp.logaddexp(p["log_c"], p["k"] + rows["ratios"] @ p["t"])


def unpack(sizes: dict[str, int], vector) -> dict:
    """A vector `[parameters]` as a dictionary of scalars and, where the size is not 1, vectors."""
    ends = np.cumsum(list(sizes.values()))
    part = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends)}
    return {name: vector[part[name].start] if size == 1 else vector[part[name]] for name, size in sizes.items()}
