"""A Gaussian process with a law of mixtures for its mean: for tables that vary the ratios alone, or little else.

Our own formulation. Per target i, with y its standardised log-loss, r the ratios and s the logarithms of N and D
(standardised; those that vary in the table):

    y_i(r, s)     = c_i + sum_k a_ik u_k(r) + b_i . s + g_i(x(r), s) + noise
    u_k(r)        = log(eps_k + r_k + t sum_{j != k} T_kj r_j) / 2      effective ratio of language k, shared by all i
    x_j(r)        = log(delta_j + r_j) / 2 + kappa_j r_j               warped ratio, shared by all i
    g_i           ~ GP(0, s_i^2 exp(-sum_j w_ij^2 (x_j - x'_j)^2 / 2)), the sizes being further coordinates of x
    noise sd      = sigma_i (1 + h_i eps_i / (eps_i + r_i))            larger where the target's own ratio vanishes

A target is thus a power law in effective ratios, mainly in its own, plus a smooth remainder. The coefficients c, a and
b are normal and integrated out with g, which leaves one Gaussian process per target. All other parameters have a
log-normal prior, under which a target's own language weighs four times as much as another one. T, eps, delta and kappa
are learnt from all targets together, so tens of runs are enough. They are not set to their likeliest values, as 32 runs
leave too much open: predictions are means over draws from the posterior (Hamiltonian Monte Carlo from the posterior
mode, preconditioned by the curvature there).

In N and D the process is log-linear plus a remainder that fades away from the runs: it interpolates in them.
"""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from data_mixtures.climb.laws.base import FittedLaw, float64
from data_mixtures.climb.proxy_table import ProxyRuns
from mlx_pretrain.errors import InputError

_CONSTANT = 4.0  # prior variance of c
_JITTER = 1e-6
_PADDING = 1e10  # noise variance of padding rows
_ROWS_MULTIPLE = 16
_POINTS = 64  # mixtures predicted at a time
_WAVES = 256  # random Fourier features of a function drawn from the process
_MODE_STEPS = 25
_LEAPS = 16
_PROBES = 8

Prior = dict[str, tuple[np.ndarray, np.ndarray]]


def _prior(own: np.ndarray, n_sizes: int) -> Prior:
    """Returns mean and standard deviation of each parameter's logarithm; `own` is `[targets, languages]`."""
    targets, languages = own.shape
    weight = np.concatenate([np.where(own > 0, -0.5, -2.0), np.full((targets, n_sizes), -1.0)], axis=1)
    normal = lambda mean, sd, *shape: (np.broadcast_to(mean, shape).astype(np.float64), np.full(shape, sd))  # noqa: E731
    return {
        "effective_floor": normal(-6.0, 1.0, languages),  # eps
        "warp_floor": normal(-6.0, 1.0, languages),  # delta
        "warp": normal(0.0, 1.0, languages),  # kappa
        "strength": normal(0.0, 1.0),  # t
        "transfer": normal(-4.0, 1.5, languages, languages),  # T
        "slope": normal(weight, 1.0, *weight.shape),  # prior sd of a and b
        "scale": normal(weight, 1.0, *weight.shape),  # w
        "amplitude": normal(-1.0, 1.0, targets),  # s
        "noise": normal(-3.0, 1.0, targets),  # sigma
        "noise_near_zero": normal(0.0, 1.0, targets),  # h
    }


def _parameters(z, prior: Prior) -> dict[str, jax.Array]:
    """Returns the parameters by name from their standardised values `[parameters]`."""
    values, first = {}, 0
    for name, (mean, sd) in sorted(prior.items()):
        values[name] = jnp.exp(mean + sd * z[first : first + mean.size].reshape(mean.shape))
        first += mean.size
    return values


def _features(p, ratios, sizes):
    """Returns u and x, each followed by the sizes: `[..., languages + sizes]`."""
    transfer = p["strength"] * p["transfer"] * (1 - jnp.eye(ratios.shape[-1]))
    effective = jnp.log(p["effective_floor"] + ratios + ratios @ transfer.T) / 2
    warped = jnp.log(p["warp_floor"] + ratios) / 2 + p["warp"] * ratios
    return jnp.concatenate([effective, sizes], axis=-1), jnp.concatenate([warped, sizes], axis=-1)


def _covariance(p, rows, others):
    """Returns the prior covariance `[targets, rows, others]` of the noise-free losses, from their features."""
    (u, x), (v, y) = rows, others
    slope, scale = p["slope"][:, None], p["scale"][:, None]
    xs, ys = x * scale, y * scale
    squares = jnp.sum(xs**2, -1)[:, :, None] + jnp.sum(ys**2, -1)[:, None] - 2 * xs @ ys.mT
    smooth = p["amplitude"][:, None, None] ** 2 * jnp.exp(-jnp.maximum(squares, 0) / 2)
    return _CONSTANT + (u * slope) @ (v * slope).mT + smooth


def _noise(p, own, ratios):
    """Returns the variance `[targets, rows]` of the noise."""
    has_own = own.sum(axis=1)[:, None]
    floor = own @ p["effective_floor"]
    near = has_own * floor[:, None] / (floor[:, None] + own @ ratios.T + 1 - has_own)
    return (p["noise"][:, None] * (1 + p["noise_near_zero"][:, None] * near)) ** 2 + _JITTER


def _measured(p, data):
    """Returns the covariance `[targets, rows, rows]` of the measured losses."""
    features = _features(p, data["ratios"], data["sizes"])
    noise = _noise(p, data["own"], data["ratios"]) / jnp.maximum(data["counts"], 1)
    noise = jnp.where(data["counts"] > 0, noise, _PADDING)
    return _covariance(p, features, features) + jax.vmap(jnp.diag)(noise)


@jax.jit
def _value_and_grad(z, prior, data):
    """Returns the negative log of the posterior density at z `[parameters]`, up to a constant, and its gradient.

    The covariance K has the gradient (K^-1 - K^-1 y y' K^-1) / 2; JAX's own, through the Cholesky factorisation, took
    over ten times as long.
    """
    covariance, pull_back = jax.vjp(lambda z: _measured(_parameters(z, prior), data), z)
    factor = jnp.linalg.cholesky(covariance)
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1]), factor.shape)
    root = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    inverse = root.mT @ root
    solved = (inverse @ data["y"][..., None])[..., 0]
    value = (solved * data["y"]).sum() / 2 + jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)).sum() + z @ z / 2
    return value, pull_back((inverse - solved[:, :, None] * solved[:, None]) / 2)[0] + z


def _mode(prior: Prior, data) -> np.ndarray:
    """Returns the standardised parameters `[parameters]` after `_MODE_STEPS` steps of L-BFGS from the prior's mean."""
    start = np.zeros(sum(mean.size for mean, _ in prior.values()))
    evaluate = lambda z: jax.device_get(_value_and_grad(z, prior, data))  # noqa: E731
    return optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": _MODE_STEPS}).x


@jax.jit
def _trajectory(z, momentum, slope, step, prior, data):
    """Makes `_LEAPS` leapfrog steps of lengths `[parameters]`; returns the new z, momentum, value and slope."""

    def leap(carry, _):
        z, momentum, _, slope = carry
        z = z + step * (momentum - step / 2 * slope)
        value, new_slope = _value_and_grad(z, prior, data)
        return (z, momentum - step / 2 * (slope + new_slope), value, new_slope), None

    return jax.lax.scan(leap, (z, momentum, jnp.zeros(()), slope), None, length=_LEAPS)[0]


def _draw(mode, prior, data, rng: np.random.Generator, warm_up: int, draws: int) -> tuple[np.ndarray, float]:
    """Returns draws from the posterior `[draws, parameters]`, and the share of proposals that were accepted.

    The mass of the momenta is the diagonal of the Hessian at the mode, by Hutchinson's estimate. The step size is
    adapted during the first `warm_up` iterations; after them every second iteration is kept.
    """
    curvature = np.zeros_like(mode)
    for _ in range(_PROBES):
        probe = rng.choice([-1e-4, 1e-4], len(mode))
        ahead, behind = (jax.device_get(_value_and_grad(mode + sign * probe, prior, data)[1]) for sign in (1, -1))
        curvature += (ahead - behind) / (2 * probe) / _PROBES
    scale, log_step = np.maximum(np.nan_to_num(curvature), 1.0) ** -0.5, np.log(0.15)
    z, (value, slope) = mode, jax.device_get(_value_and_grad(mode, prior, data))
    kept, accepted = [], []
    for number in range(warm_up + 2 * draws):
        momentum = rng.normal(size=len(mode))
        step = np.exp(log_step) * rng.uniform(0.7, 1.3) * scale
        new_z, new_momentum, *new_value_and_slope = jax.device_get(
            _trajectory(z, momentum, slope, step, prior, data))
        gain = value - new_value_and_slope[0] + (momentum @ momentum - new_momentum @ new_momentum) / 2
        probability = np.exp(min(gain, 0.0)) if np.isfinite(gain) else 0.0
        if rng.uniform() < probability:
            z, (value, slope) = new_z, new_value_and_slope
        if number < warm_up:
            log_step += 0.4 * (probability - 0.75)
        else:
            accepted.append(probability)
            if (number - warm_up) % 2:
                kept.append(z)
    return np.stack(kept), float(np.mean(accepted))


@jax.jit
def _conditioned(draws, prior, data):
    """Returns, for each draw, what prediction needs: parameters, features of the rows, and K^-1 y `[targets, rows]`."""

    def condition(z):
        p = _parameters(z, prior)
        factor = jnp.linalg.cholesky(_measured(p, data))
        solved = jax.scipy.linalg.cho_solve((factor, True), data["y"][..., None])[..., 0]
        return p, _features(p, data["ratios"], data["sizes"]), solved

    return jax.lax.map(condition, draws)


def _means(p, features, solved, ratios, sizes):
    """Returns the mean standardised log-losses `[targets]` of one mixture under one draw."""
    (u, x), (v, y) = _features(p, ratios, sizes), features
    smooth = p["amplitude"] ** 2 * jnp.exp(-((x - y) ** 2) @ (p["scale"] ** 2).T / 2)
    covariance = _CONSTANT + (u * v) @ (p["slope"] ** 2).T + smooth
    return jnp.sum(covariance * solved.T, axis=0)


def _wave(waves, features):
    """Returns the values `[..., targets]` of a function drawn from the prior, at features `[..., columns]`."""
    u, x = features
    angles = jnp.einsum("...f,twf->...tw", x, waves["frequency"]) + waves["phase"]
    return waves["constant"] + u @ waves["slope"].T + jnp.sum(waves["height"] * jnp.cos(angles), axis=-1)


@jax.jit
def _corrections(draws, features, data, waves, noise):
    """Returns `[draws, targets, rows]`, like `FittedStructuredGP.solved`: it turns prior into posterior functions.

    `noise` is standard normal, `[draws, targets, rows]`.
    """

    def correct(sample):
        p, features, waves, noise = sample
        deviation = jnp.sqrt(_noise(p, data["own"], data["ratios"]) / jnp.maximum(data["counts"], 1))
        errors = data["y"] - _wave(waves, features).T - deviation * noise
        factor = jnp.linalg.cholesky(_measured(p, data))
        return jax.scipy.linalg.cho_solve((factor, True), errors[..., None])[..., 0]

    return jax.lax.map(correct, (draws, features, waves, noise))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["draws", "features", "solved", "data", "centre", "width", "size_centre", "size_width", "accepted"],
    meta_fields=["languages", "targets", "varies", "notes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class FittedStructuredGP(FittedLaw):
    """A fitted `StructuredGP`.

    Attributes:
      draws: parameters drawn from the posterior, by name, `[draws, ...]`; the names are those of `_prior`.
      features: u and x of the table's rows, `[draws, rows, languages + sizes]` each.
      solved: `[draws, targets, rows]`, inverse covariance times the standardised log-losses.
      data: the table's rows, padded: `ratios`, `sizes`, `counts` (0 in padding), `y`, `own`.
      centre, width: `[targets]`, mean and standard deviation of the log-losses.
      size_centre, size_width: `[2]`, mean and standard deviation of log N and log D.
      varies: indices of those of N (0) and D (1) that vary in the table.
      accepted: share of the proposals of Hamiltonian Monte Carlo that were accepted.
    """

    languages: tuple[str, ...]
    targets: tuple[str, ...]
    draws: dict[str, np.ndarray]
    features: tuple[np.ndarray, np.ndarray]
    solved: np.ndarray
    data: dict[str, np.ndarray]
    centre: np.ndarray
    width: np.ndarray
    size_centre: np.ndarray
    size_width: np.ndarray
    accepted: float
    varies: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def _points(self, ratios, n_params, tokens):
        """Returns ratios `[points, languages]`, sizes `[points, sizes]`, and the leading shape."""
        ratios = jnp.asarray(ratios, jnp.float64)
        sizes = [jnp.log(jnp.asarray(size, jnp.float64)) for size in (n_params, tokens)]
        shape = jnp.broadcast_shapes(ratios.shape[:-1], *(size.shape for size in sizes))
        columns = [(jnp.broadcast_to(sizes[i], shape).ravel() - self.size_centre[i]) / self.size_width[i]
                   for i in self.varies]
        ratios = jnp.broadcast_to(ratios, (*shape, ratios.shape[-1])).reshape(-1, ratios.shape[-1])
        return ratios, jnp.stack(columns, axis=1) if columns else jnp.zeros((len(ratios), 0)), shape

    def losses(self, ratios, n_params, tokens):
        ratios, sizes, shape = self._points(ratios, n_params, tokens)
        means_by_draw = jax.vmap(_means, in_axes=(0, 0, 0, None, None))
        mean = lambda point: means_by_draw(self.draws, self.features, self.solved, *point).mean(axis=0)  # noqa: E731
        means = jax.lax.map(mean, (ratios, sizes), batch_size=_POINTS)
        return jnp.exp(self.centre + self.width * means).reshape(*shape, len(self.targets))

    def replicates(self, runs: ProxyRuns, count: int, seed: int = 0) -> "list[SampledStructuredGP]":
        """Returns functions drawn from the posterior, one per draw of the parameters in turn; see `FittedLaw`.

        By pathwise conditioning (Wilson et al., arXiv 2002.09309): a function from the prior, its smooth part as
        `_WAVES` random Fourier features, is corrected by the posterior mean of its errors at the table's rows.
        """
        rng = np.random.default_rng(seed)
        draw_index = np.resize(np.arange(len(self.solved)), count)
        draws, features = jax.tree.map(lambda x: x[draw_index], (self.draws, self.features))
        targets, columns = draws["slope"].shape[1:]
        waves = {
            "constant": _CONSTANT**0.5 * rng.normal(size=(count, targets)),
            "slope": draws["slope"] * rng.normal(size=(count, targets, columns)),
            "frequency": draws["scale"][:, :, None] * rng.normal(size=(count, targets, _WAVES, columns)),
            "phase": rng.uniform(0, 2 * np.pi, (count, targets, _WAVES)),
            "height": draws["amplitude"][..., None] * np.full((count, targets, _WAVES), (2 / _WAVES) ** 0.5),
        }
        noise = rng.normal(size=(count, targets, self.solved.shape[-1]))
        with float64():
            solved = jax.device_get(_corrections(draws, features, self.data, waves, noise))
        pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        return [SampledStructuredGP(dataclasses.replace(self, draws=pick(draws, slice(i, i + 1)),
                                                   features=pick(features, slice(i, i + 1)), solved=solved[i : i + 1]),
                               pick(waves, i)) for i in range(count)]  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "waves"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class SampledStructuredGP(FittedLaw):
    """A function drawn from the posterior: one from the prior, corrected at the table's rows.

    Attributes:
      mean: the fitted process with one draw of the parameters, and the correction in place of `solved`.
      waves: the function from the prior, see `_wave`.
    """

    mean: FittedStructuredGP
    waves: dict[str, np.ndarray]

    @property
    def languages(self):
        return self.mean.languages

    @property
    def targets(self):
        return self.mean.targets

    def losses(self, ratios, n_params, tokens):
        points, sizes, shape = self.mean._points(ratios, n_params, tokens)
        draw = {name: values[0] for name, values in self.mean.draws.items()}
        wave = _wave(self.waves, _features(draw, points, sizes)).reshape(*shape, len(self.targets))
        return self.mean.losses(ratios, n_params, tokens) * jnp.exp(self.mean.width * wave)


def _distinct_rows(runs: ProxyRuns) -> tuple[ProxyRuns, np.ndarray]:
    """Returns the distinct rows and how often each occurs: a copy is no second measurement."""
    columns = np.column_stack([runs.ratios, runs.n_params, runs.tokens, runs.losses])
    _, first, counts = np.unique(columns, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return runs.rows(first[order]), counts[order].astype(np.float64)


def _padded(rows: dict[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
    """Adds rows that count 0 times, so that tables of nearly the same length share a compiled program."""
    extra = -len(rows["y"]) % _ROWS_MULTIPLE
    data = {name: np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) for name, x in rows.items()}
    return {**data, "y": data["y"].T, "own": own}


@gin.configurable
class StructuredGP:
    """Our Gaussian process on effective ratios; see the module.

        fitted = StructuredGP().fit(regmix_runs("train_mixture_1m.csv", "train_pile_loss_1m.csv"))
        fitted.at(ratios, n_params=1e6, tokens=1e9)     # losses [..., targets] of mixtures [..., languages]
        fitted.replicates(runs, 100)                    # functions drawn from the posterior, for intervals
    """

    name = "structured_gp"

    def __init__(self, draws: int = 15, warm_up: int = 12, full_rows: int = 128):
        """Sets the options of Monte Carlo.

        Args:
          draws: draws from the posterior of the hyperparameters, over which predictions are averaged.
          warm_up: iterations of Monte Carlo before the first draw.
          full_rows: rows of a table from which on `draws` and `warm_up` fall in proportion to `full_rows / rows`: the
            more rows, the narrower is the posterior and the longer takes an iteration.

        Raises:
          InputError: an argument is not positive.
        """
        if min(draws, warm_up, full_rows) < 1:
            raise InputError(
                f"StructuredGP: draws {draws}, warm_up {warm_up} and full_rows {full_rows} must be positive")
        self.draws, self.warm_up, self.full_rows = draws, warm_up, full_rows

    def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedStructuredGP:
        """Fits the process; see `Law.fit`.

        Raises:
          InputError: fewer than 2 distinct rows.
        """
        table, counts = _distinct_rows(runs)
        if len(table) < 2:
            raise InputError("structured_gp: at least 2 distinct runs are needed")
        log_losses, logs = np.log(table.losses), np.log(np.stack([table.n_params, table.tokens], axis=1))
        centre, size_centre = np.average(log_losses, axis=0, weights=counts), logs.mean(axis=0)
        width = np.sqrt(np.average((log_losses - centre) ** 2, axis=0, weights=counts))
        width[width < 1e-12] = 1.0
        varies = np.ptp(logs, axis=0) > 0
        size_width = np.where(varies, logs.std(axis=0), 0.0)
        own = (runs.own_columns[:, None] == np.arange(len(runs.languages))).astype(np.float64)
        rows = {"ratios": table.ratios, "sizes": (logs - size_centre)[:, varies] / size_width[varies],
                "counts": counts, "y": (log_losses - centre) / width}
        prior, rng = _prior(own, int(varies.sum())), np.random.default_rng(seed)
        share, data = min(1.0, self.full_rows / len(table)), _padded(rows, own)
        warm_up, n_draws = (max(1, int(share * n)) for n in (self.warm_up, self.draws))
        with float64():
            mode = _mode(prior, data)
            draws, accepted = _draw(mode, prior, data, rng, warm_up, n_draws)
            parameters, features, solved = jax.device_get(_conditioned(draws, prior, data))
        notes = [
            f"predictions are supported by runs only between {low:.3g} and {high:.3g} {name}"
            for name, low, high in zip(("parameters", "tokens"), np.exp(logs.min(axis=0)), np.exp(logs.max(axis=0)))
            if low < high
        ]
        if accepted < 0.3:
            notes.append(f"Monte Carlo accepted {accepted:.0%} of its proposals: predictions and intervals are rough")
        return FittedStructuredGP(runs.languages, runs.targets, parameters, features, solved, data, centre, width,
                             size_centre, size_width, accepted, tuple(np.flatnonzero(varies).tolist()), tuple(notes))
