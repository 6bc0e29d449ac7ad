import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixtures.climb.complementarity import solve_complementarity
from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, float64
from data_mixtures.climb.mixture_problem import MixtureProblem, reference_weights
from data_mixtures.climb.solve import solve_by_sampling, solve_joint, solve_two_step
from mlx_pretrain.errors import InputError

N, D = 1e8, 1e10


class Tree:
    """Makes a law a pytree, as laws have to be: its arrays are leaves, all else is static."""

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        jax.tree_util.register_pytree_node_class(cls)

    def tree_flatten(self):
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        rest = tuple((name, value) for name, value in vars(self).items() if name not in arrays)
        return list(arrays.values()), (tuple(arrays), rest)

    @classmethod
    def tree_unflatten(cls, names, arrays):
        law = object.__new__(cls)
        vars(law).update(zip(names[0], arrays), **dict(names[1]))
        return law


class Synthetic(Tree, FittedEffectiveLaw):
    """Chinchilla losses of effective ratios to which the others add, saturating in r_j, fading in r_i and D."""

    def __init__(self, n: int, seed: int, transfer: float = 0.15):
        rng = np.random.default_rng(seed)
        self.languages = self.targets = tuple(f"l{i:02}" for i in range(n))
        self.e = rng.uniform(1.5, 2.5, n)
        self.a = rng.uniform(200, 600, n)
        self.b = np.exp(rng.uniform(np.log(300), np.log(1500), n))
        self.beta = rng.uniform(0.25, 0.4, n)
        gift = rng.exponential(transfer, (n, n)) if transfer else np.zeros((n, n))
        # A few languages disturb others, by less than the least that keeps effective ratios positive.
        self.gift = np.where(rng.random((n, n)) < 0.15, -0.05 * gift, gift) * (1 - np.eye(n))

    def permuted(self, order) -> "Synthetic":
        law = Synthetic(len(order), 0)
        law.languages = law.targets = tuple(self.languages[i] for i in order)
        law.e, law.a, law.b, law.beta = (x[order] for x in (self.e, self.a, self.b, self.beta))
        law.gift = self.gift[np.ix_(order, order)]
        return law

    def effective_ratios(self, ratios, n_params, tokens):
        ratios = jnp.asarray(ratios)
        transferred = (ratios / (1 + ratios / 0.3)) @ self.gift.T
        transferred = transferred * jnp.exp(-ratios / 0.3) * (jnp.expand_dims(jnp.asarray(tokens), -1) / 1e9) ** -0.1
        return (ratios + transferred + jnp.sqrt((ratios + transferred) ** 2 + 1e-10)) / 2

    def isolated_losses(self, effective, n_params, tokens):
        n_params, tokens = (jnp.expand_dims(jnp.asarray(x, float), -1) for x in (n_params, tokens))
        return self.e + self.a / n_params**0.35 + self.b / (effective * tokens) ** self.beta

    def curve(self, benefit: float, weights: np.ndarray, tokens: float) -> np.ndarray:
        """rt* `[languages]` at which every marginal benefit -w_i dL_i/d(rt_i) is `benefit`."""
        return (weights * self.beta * self.b * tokens**-self.beta / benefit) ** (1 / (1 + self.beta))


class Sealed(FittedLaw):
    """The same predictions, without a derivative."""

    differentiable = False

    def __init__(self, law: Synthetic):
        self.law, self.languages, self.targets = law, law.languages, law.targets

    def losses(self, ratios, n_params, tokens):
        return np.asarray(compiled(self.law)(ratios, n_params, tokens))


class Watched(Sealed):
    """A law that records the mixtures it is evaluated at."""

    def __init__(self, law: Synthetic):
        super().__init__(law)
        self.seen = []

    def losses(self, ratios, n_params, tokens):
        self.seen.append(np.array(ratios))
        return super().losses(ratios, n_params, tokens)


class Mixing(Tree, FittedLaw):
    """`c + exp(t . r)`: three languages, and two targets that are not languages."""

    languages, targets = ("en", "fi", "sw"), ("web", "books")

    def losses(self, ratios, n_params, tokens):
        return 1.5 + jnp.exp(jnp.asarray(ratios) @ np.array([[-2.0, 0.5], [-1.0, -1.5], [1.0, -0.5]]))


class TwoValleys(Tree, FittedLaw):
    """Two minima; the deeper one is narrow and in a corner."""

    languages, targets = ("en", "fi", "sw"), ("loss",)

    def losses(self, ratios, n_params, tokens):
        broad = ((jnp.asarray(ratios) - np.array([0.6, 0.3, 0.1])) ** 2).sum(-1)
        narrow = ((jnp.asarray(ratios) - np.array([0.05, 0.1, 0.85])) ** 2).sum(-1)
        return (3 - jnp.exp(-broad / 0.1) - 1.5 * jnp.exp(-narrow / 0.05))[..., None]


LAWS = {n: Synthetic(n, seed=n) for n in (2, 3, 5, 12)}


@st.composite
def problems(draw, n: int) -> dict:
    """Keyword arguments of the solvers: D, weights and feasible constraints, some of which bind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    law, tokens = LAWS[n], float(np.exp(rng.uniform(np.log(1e9), np.log(1e11))))
    floor = draw(st.sampled_from([0.0, 0.3 / n, 0.9 / n]))
    max_epochs = unique = fixed = None
    if draw(st.booleans()):
        inside = rng.dirichlet(np.ones(n)) * 0.5 + 0.5 / n  # where the caps leave room, so that something is feasible
        max_epochs = 4.0
        unique = dict(zip(law.languages, np.maximum(inside * rng.uniform(1.1, 3, n), floor) * tokens / 4))
    elif n > 2 and draw(st.booleans()):
        fixed = {law.languages[1]: 1.05 * floor + 0.01}
    return {
        "law": law,
        "n_params": N,
        "tokens": tokens,
        "weights": rng.uniform(0.2, 1.0, n),
        "constraints": Constraints(floor, max_epochs, unique, fixed),
        "starts": 4,
    }


@functools.cache
def compiled(law):
    return jax.jit(law.losses)


def losses(law, ratios, tokens=D):
    ratios = np.asarray(ratios, np.float64)
    with float64():
        return np.asarray(compiled(law)(ratios, np.full(ratios.shape[:-1], N), np.full(ratios.shape[:-1], tokens)))


def simplex(lower=0.0, upper=1.0, count=1000) -> np.ndarray:
    """All mixtures of three languages within the bounds, at multiples of 1 / count: `[mixtures, 3]`."""
    first, second = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    grid = np.stack([first, second, count - first - second], -1).reshape(-1, 3) / count
    return grid[((grid >= lower - 1e-9) & (grid <= upper + 1e-9)).all(1)]


CASES = {
    "free": Constraints(),
    "floor": Constraints(floor={"l00": 0.5, "l02": 0.1}),
    "cap": Constraints(max_epochs=4, unique_tokens={"l00": 1e10, "l01": 5e8, "l02": 2e9}),
    "fixed": Constraints(fixed={"l01": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_joint_solution_is_where_an_exhaustive_grid_has_its_minimum(case):
    law, weights = LAWS[3], np.array([0.5, 0.2, 0.3])
    grid = simplex(*CASES[case].bounds(law.languages, D))
    best = grid[np.argmin(losses(law, grid) @ weights)]
    allocation = solve_joint(law, N, D, weights, CASES[case])
    np.testing.assert_allclose(allocation.ratios, best, atol=1e-3)
    assert allocation.kkt < 1e-6


@pytest.mark.parametrize("case", ["free", "floor"])
def test_two_step_solution_is_the_furthest_along_the_curve_on_an_exhaustive_grid(case):
    law, weights = LAWS[3], np.array([0.5, 0.2, 0.3])
    grid = simplex(*CASES[case].bounds(law.languages, D))
    with float64():
        effective = np.asarray(law.effective_ratios(grid, N, np.full(len(grid), D)))
    # rt(r) has reached the point of the curve that no language falls short of.
    benefits = weights * law.beta * law.b * D**-law.beta * effective ** (-law.beta - 1)
    best = grid[np.argmin(benefits.max(axis=1))]
    allocation = solve_two_step(law, N, D, weights, CASES[case])
    np.testing.assert_allclose(allocation.ratios, best, atol=1.5e-3)
    assert allocation.kkt < 1e-6


@pytest.mark.parametrize("n", LAWS)
@settings(max_examples=12)
@given(data=st.data())
def test_any_problem_is_solved_within_its_bounds(n, data):
    problem = data.draw(problems(n))
    law, tokens, weights = problem["law"], problem["tokens"], problem["weights"] / problem["weights"].sum()
    lower, upper = problem["constraints"].bounds(law.languages, tokens)
    two_step = solve_two_step(**problem)
    joint = two_step.joint
    for allocation in (joint, two_step):
        assert allocation.kkt < 1e-6
        assert abs(allocation.ratios.sum() - 1) < 1e-12
        assert (allocation.ratios >= lower).all() and (allocation.ratios <= upper).all()
        assert allocation.weighted_loss == pytest.approx(weights @ losses(law, allocation.ratios, tokens), rel=1e-12)
        at_bound = (allocation.ratios == lower) | (allocation.ratios == upper)
        assert {language for language, _ in allocation.binding} == {law.languages[i] for i in np.flatnonzero(at_bound)}
    assert two_step.joint_gap > -1e-12

    # Joint: no small move from one language to another lowers the loss.
    moved = joint.ratios + 1e-5 * (np.eye(n)[:, None] - np.eye(n)).reshape(-1, n)
    allowed = ((moved >= lower) & (moved <= upper)).all(axis=1)
    assert (losses(law, moved, tokens) @ weights)[allowed].min(initial=np.inf) > joint.weighted_loss - 1e-10

    # Two-step: on the curve, beyond it only at the lower bound, short of it only at the upper one.
    slopes = weights * law.beta * law.b * tokens**-law.beta * two_step.effective ** (-law.beta - 1)
    between = (two_step.ratios > lower) & (two_step.ratios < upper)
    if between.any():
        ahead = two_step.effective / law.curve(slopes[between].mean(), weights, tokens) - 1
        assert np.abs(ahead[between]).max() < 1e-6
        assert (ahead[(two_step.ratios == lower) & (lower < upper)] > -1e-6).all()
        assert (ahead[(two_step.ratios == upper) & (lower < upper)] < 1e-6).all()


@settings(max_examples=10)
@given(weights=st.lists(st.floats(0.1, 1), min_size=4, max_size=4), floor=st.sampled_from([0.0, 0.1, 0.2]))
def test_without_transfer_both_solvers_agree(weights, floor):
    allocation = solve_two_step(WITHOUT_TRANSFER, N, D, weights, Constraints(floor=floor), starts=2)
    np.testing.assert_allclose(allocation.ratios, allocation.joint.ratios, atol=1e-9)
    assert abs(allocation.joint_gap) < 1e-12


WITHOUT_TRANSFER = Synthetic(4, seed=1, transfer=0)


@settings(max_examples=8)
@given(problem=problems(5), scale=st.sampled_from([1e-6, 3.0, 1e6]))
def test_scaling_all_weights_changes_nothing(problem, scale):
    plain = solve_two_step(**problem)
    scaled = solve_two_step(**problem | {"weights": scale * problem["weights"]})
    np.testing.assert_allclose(scaled.ratios, plain.ratios, atol=1e-9)
    np.testing.assert_allclose(scaled.joint.ratios, plain.joint.ratios, atol=1e-9)
    assert scaled.weighted_loss == pytest.approx(plain.weighted_loss, rel=1e-12)


@pytest.mark.parametrize("constraints", [Constraints(), Constraints(floor={"l01": 0.4}, fixed={"l03": 0.1})])
def test_the_order_of_the_languages_changes_nothing(constraints):
    order = [3, 0, 4, 1, 2]
    plain = solve_two_step(LAWS[5], N, D, None, constraints)
    permuted = solve_two_step(LAWS[5].permuted(order), N, D, None, constraints)
    np.testing.assert_allclose(permuted.ratios, plain.ratios[order], atol=1e-9)
    np.testing.assert_allclose(permuted.joint.ratios, plain.joint.ratios[order], atol=1e-9)
    assert set(permuted.binding) == set(plain.binding)


def test_binding_constraints_are_named():
    unique = {"l00": 1e10, "l01": 1e8, "l02": 1e10, "l03": 1e10, "l04": 1e10}
    constraints = Constraints({"l02": 0.6}, max_epochs=2, unique_tokens=unique, fixed={"l04": 0.05})
    allocation = solve_two_step(LAWS[5], N, D, None, constraints)
    for each in (allocation, allocation.joint):
        assert set(each.binding) == {("l02", "floor"), ("l01", "max_epochs"), ("l04", "fixed")}
        assert each.ratios[[1, 2, 4]].tolist() == [0.02, 0.6, 0.05]


def test_a_floor_that_is_just_what_the_text_allows_is_no_contradiction():
    """0.18 * tokens / 4 * 4 / tokens is a rounding less than 0.18."""
    tokens = 14194258279.67757
    unique = {"l00": tokens, "l01": 0.18 * tokens / 4}
    assert 4 * unique["l01"] / tokens < 0.18
    lower, upper = Constraints(0.18, max_epochs=4, unique_tokens=unique).bounds(("l00", "l01"), tokens)
    assert lower[1] == upper[1] == 0.18


def test_a_mixture_without_any_freedom_is_returned_as_it_is():
    allocation = solve_two_step(LAWS[3], N, D, None, Constraints(fixed={"l00": 0.5, "l01": 0.2, "l02": 0.3}))
    assert allocation.ratios.tolist() == [0.5, 0.2, 0.3]
    assert (allocation.kkt, allocation.joint.kkt, allocation.joint_gap) == (0, 0, 0)
    allocation = solve_joint(LAWS[12], N, D, None, Constraints(floor=1 / 12))
    np.testing.assert_allclose(allocation.ratios, 1 / 12, atol=1e-12)


def test_of_several_two_step_solutions_the_one_of_least_benefit_is_taken():
    """Transfer so strong that equal benefits are reached in two ways; the smaller lambda is further along the curve."""
    law = Synthetic(3, 15, 2.0)
    allocation = solve_two_step(law, N, D, None, Constraints())
    problem = MixtureProblem(law, N, D, None, Constraints())
    other = solve_complementarity(problem.two_step_field, np.array([0.5, 0.01, 0.49]), problem.lower, problem.upper)
    assert problem.two_step_kkt(other) < 1e-8 and allocation.kkt < 1e-8
    # Logarithms of 1 / lambda.
    logs = [problem.two_step_field(ratios)[0][ratios > 0].max() for ratios in (allocation.ratios, other)]
    assert logs[0] > logs[1] + 0.1


def test_the_joint_solution_goes_down_the_valley_that_the_two_step_one_found():
    law = Synthetic(3, 1, 2.0)
    alone = solve_joint(law, N, D, None, Constraints(), starts=1)
    allocation = solve_two_step(law, N, D, None, Constraints(), starts=1)
    assert allocation.weighted_loss < alone.weighted_loss - 1e-5
    assert allocation.joint.weighted_loss <= allocation.weighted_loss and allocation.joint_gap >= 0


def test_a_language_without_text_gets_nothing():
    unique = {"l00": 1e9, "l01": 0, "l02": 1e9}
    allocation = solve_two_step(LAWS[3], N, D, None, Constraints(unique_tokens=unique))
    assert allocation.ratios[1] == allocation.joint.ratios[1] == 0
    assert ("l01", "max_epochs") in allocation.binding


def test_a_law_without_a_finite_loss_within_the_constraints_is_an_error_that_names_the_language():
    law = Synthetic(3, seed=1, transfer=0)
    law.effective_ratios = lambda ratios, n_params, tokens: jnp.asarray(ratios)
    with pytest.raises(InputError, match="no finite loss for l01"):
        solve_joint(law, N, D, [1, 1, 1], Constraints(unique_tokens={"l00": 1, "l01": 0, "l02": 1}))


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(floor=0.4), r"floors sum to 1.2 \(l00 0.4, l01 0.4, l02 0.4\): more than 1"),
        (Constraints({"l01": 0.8}, fixed={"l00": 0.3}), r"fixed ratios sum to 0.3 .* and the floors sum to 0.8"),
        (Constraints(fixed={"l00": 0.8, "l02": 0.7}), r"fixed ratios sum to 1.5 \(l00 0.8, l02 0.7\): more than 1"),
        (Constraints(fixed={"l00": 0.2, "l01": 0.2, "l02": 0.2}), r"fixed ratios sum to 0.6 .*: less than 1"),
        (
            Constraints(max_epochs=2, unique_tokens={"l00": 1e9, "l01": 5e8, "l02": 1e9}),
            r"max_epochs 2 allows sums to 0.5 \(l00 0.2, l02 0.2, l01 0.1\): less than 1 at 1e\+10 tokens",
        ),
        (
            Constraints({"l01": 0.2}, 2, {"l00": 1e10, "l01": 5e8, "l02": 1e9}),
            r"floor 0.2 of l01 is above 0.1: that is max_epochs 2 of its 5e\+08 unique_tokens",
        ),
        (
            Constraints(max_epochs=2, unique_tokens={"l00": 1e10, "l01": 5e8, "l02": 1e9}, fixed={"l02": 0.3}),
            "fixed ratio 0.3 of l02 is above 0.2",
        ),
        (Constraints(0.1, unique_tokens={"l00": 1, "l01": 0, "l02": 1}), "floor 0.1 of l01, which has no text"),
        (Constraints(0.1, fixed={"l00": 0.05}), "fixed ratio 0.05 of l00 is below its floor 0.1"),
        (Constraints({"xx": 0.1}), "floor names xx; the law has l00, l01, l02"),
        (Constraints(fixed={"xx": 0.1}), "fixed ratio names xx"),
        (Constraints(-0.1), "floor of l00 is -0.1"),
        (Constraints(fixed={"l00": 1.5}), r"fixed ratio of l00 is 1.5, not a number in \[0, 1\]"),
        (Constraints(unique_tokens={"l00": 1e9, "l01": 1e9}), "unique_tokens has no number for l02"),
        (Constraints(unique_tokens=dict.fromkeys(("l00", "l01", "l02"), float("inf"))), "unique_tokens of l00 is inf"),
        (Constraints(max_epochs=4), "max_epochs needs unique_tokens"),
        (Constraints(max_epochs=0, unique_tokens=dict.fromkeys(("l00", "l01", "l02"), 1e9)), "must be positive, got 0"),
    ],
)
def test_constraints_that_no_mixture_satisfies_are_named(constraints, message):
    with pytest.raises(InputError, match=message):
        solve_two_step(LAWS[3], N, D, [1, 1, 1], constraints)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "2 numbers for 3 targets"),
        ([1, -1, 1], "0 or more"),
        ([0, 0, 0], "not all 0"),
        ({"l00": 1, "l01": 1, "xx": 1}, "l02, xx are in only one of the weights and the law's targets"),
    ],
)
def test_weights_that_do_not_fit_the_law_are_an_error(weights, message):
    with pytest.raises(InputError, match=message):
        solve_joint(LAWS[3], N, D, weights)


def test_default_weights_are_one_over_the_losses_of_the_reference_mixture():
    natural = {"l00": 5e9, "l01": 3e9, "l02": 2e9}
    np.testing.assert_allclose(reference_weights(LAWS[3], N, D, natural), 1 / losses(LAWS[3], [0.5, 0.3, 0.2]))
    uniform = solve_joint(LAWS[3], N, D)
    np.testing.assert_allclose(np.ptp(uniform.weights * losses(LAWS[3], np.ones(3) / 3)), 0, atol=1e-12)
    with pytest.raises(InputError, match="names xx"):
        reference_weights(LAWS[3], N, D, {"xx": 1})


def test_targets_that_are_no_languages_leave_the_joint_solver_only():
    weights = {"web": 0.7, "books": 0.3}
    grid = simplex()
    allocation = solve_joint(Mixing(), N, D, weights)
    np.testing.assert_allclose(allocation.ratios, grid[np.argmin(losses(Mixing(), grid) @ [0.7, 0.3])], atol=1e-3)
    assert allocation.kkt < 1e-6 and allocation.effective is None and allocation.joint_gap is None
    with pytest.raises(InputError, match="Mixing has no effective ratios"):
        solve_two_step(Mixing(), N, D, weights)


@pytest.mark.parametrize(("ratios", "shrink", "grow", "between"), [
    ([0.0, 0.4, 0.6], [1, 2], [0, 1, 2], [1, 2]),
    ([0.2, 0.2, 0.6], [0, 1, 2], [0, 1, 2], [0, 1, 2]),
    ([1.0, 0.0, 0.0], [0], [1, 2], [0, 1, 2]),  # none between its bounds: all that have room between them
])
def test_the_residual_of_a_mixture_that_is_no_solution(ratios, shrink, grow, between):
    """The largest gain of moving text from one language to another, over the largest slope between the bounds."""
    table, weights = np.array([[-2.0, 0.5], [-1.0, -1.5], [1.0, -0.5]]), np.array([0.7, 0.3])
    slopes = table @ (weights * np.exp(ratios @ table))
    problem = MixtureProblem(Mixing(), N, D, weights, Constraints())
    expected = (slopes[shrink].max() - slopes[grow].min()) / np.abs(slopes[between]).max()
    assert problem.joint_kkt(np.array(ratios)) == pytest.approx(expected, rel=1e-9)


def test_the_deeper_of_two_valleys_is_found():
    grid = simplex()
    best = grid[np.argmin(losses(TwoValleys(), grid)[:, 0])]
    allocation = solve_joint(TwoValleys(), N, D, [1.0])
    np.testing.assert_allclose(allocation.ratios, best, atol=1e-3)
    assert best[2] > 0.8  # the starts at the uniform mixture end in the other one
    assert solve_joint(TwoValleys(), N, D, [1.0], starts=1).ratios[0] > 0.4


@pytest.mark.parametrize("case", CASES)
def test_a_law_without_derivatives_is_solved_by_sampling_within_the_bounds(case):
    constraints, weights = CASES[case], [0.5, 0.2, 0.3]
    lower, upper = constraints.bounds(LAWS[3].languages, D)
    allocation = solve_by_sampling(Sealed(LAWS[3]), N, D, weights, constraints, samples=20_000)
    joint = solve_joint(LAWS[3], N, D, weights, constraints)
    assert (allocation.ratios >= lower).all() and (allocation.ratios <= upper).all()
    assert abs(allocation.ratios.sum() - 1) < 1e-12
    assert joint.weighted_loss <= allocation.weighted_loss < joint.weighted_loss * (1 + 1e-4)
    assert (allocation.method, allocation.kkt) == ("sampling", None)


@pytest.mark.parametrize("centre", [None, {"l00": 6.0, "l01": 3.0, "l02": 1.0}])
def test_samples_are_dirichlet_around_the_centre_and_as_spiky_as_stated(centre):
    """Concentration 3 s times the mean m: a ratio's variance is m (1 - m) / (3 s + 1), s log-uniform from .1 to 10."""
    law, mean = Watched(LAWS[3]), np.array([0.6, 0.3, 0.1]) if centre else np.ones(3) / 3
    allocation = solve_by_sampling(law, N, D, [0.5, 0.2, 0.3], centre=centre, samples=20_000)
    mixtures, values = np.concatenate(law.seen[:-1]), losses(LAWS[3], np.concatenate(law.seen[:-1])) @ [0.5, 0.2, 0.3]
    assert mixtures.shape == (20_000, 3) and len(np.unique(mixtures, axis=0)) > 19_000
    np.testing.assert_allclose(mixtures.mean(axis=0), mean, atol=0.01)
    spread = np.log(100 * (3 * 0.1 + 1) / (3 * 10 + 1)) / np.log(100)  # the mean of 1 / (3 s + 1)
    np.testing.assert_allclose(mixtures.var(axis=0), mean * (1 - mean) * spread, rtol=0.05)
    np.testing.assert_allclose(allocation.ratios, mixtures[np.argsort(values)[:100]].mean(axis=0), atol=1e-12)


def test_a_language_that_the_centre_leaves_out_gets_next_to_nothing():
    centre = {"l00": 2, "l02": 1}
    allocation = solve_by_sampling(Sealed(LAWS[3]), N, D, [1, 1, 1], centre=centre, samples=1000, best=1000)
    np.testing.assert_allclose(allocation.ratios, [2 / 3, 0, 1 / 3], atol=0.03)


def test_a_centre_or_a_number_of_the_best_that_cannot_be_meant_is_named():
    law = Sealed(LAWS[3])
    with pytest.raises(InputError, match="centre: no share is positive"):
        solve_by_sampling(law, N, D, centre=dict.fromkeys(law.languages, 0.0))
    for best in (0, 11):
        with pytest.raises(InputError, match=rf"best must be in \[1, samples = 10\], got {best}"):
            solve_by_sampling(law, N, D, samples=10, best=best)
    assert solve_by_sampling(law, N, D, samples=10, best=10).ratios.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", [1, 2, 5, 6, 10])
def test_transfer_so_strong_that_newtons_method_finds_nothing_is_left_to_homotopies(seed):
    law, tokens = Synthetic(12, seed, transfer=3.0), 1e9
    allocation = solve_two_step(law, N, tokens, starts=1)
    slopes = allocation.weights * law.beta * law.b * tokens**-law.beta * allocation.effective ** (-law.beta - 1)
    above = allocation.ratios > 0
    assert allocation.kkt < 1e-8 and above.sum() > 1
    np.testing.assert_allclose(slopes[above], slopes[above][0], rtol=1e-6)
    assert (slopes[~above] <= slopes[above].max() * (1 + 1e-6)).all()


def test_the_joint_solver_leaves_a_law_without_derivatives_to_sampling():
    allocation = solve_joint(Sealed(LAWS[2]), N, D, None, seed=3)
    assert allocation.method == "sampling"
    np.testing.assert_array_equal(allocation.ratios, solve_by_sampling(Sealed(LAWS[2]), N, D, None, seed=3).ratios)
