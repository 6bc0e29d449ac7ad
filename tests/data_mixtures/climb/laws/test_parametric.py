"""Laws recover the parameters behind the data, note those they cannot, and ignore names, order and repetition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixtures.climb.laws import climb
from data_mixtures.climb.laws.base import FittedLaw, float64
from data_mixtures.climb.laws.climb import Climb, Shared
from data_mixtures.climb.laws.formulas import EffectiveFormula, floored
from data_mixtures.climb.laws.isolated import Isolated
from data_mixtures.climb.laws.mixing_law import MixingLaw
from data_mixtures.climb.laws.msl import MSL
from data_mixtures.climb.laws.parametric import FittedEffectiveFormula
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs
from data_mixtures.climb.solve import solve_joint
from data_mixtures.climb.validation import scores
from mlx_pretrain.errors import InputError

LANGUAGES = ("aa", "bb", "cc")
TOKENS = (1e5, 2e5, 4e5, 8e5)
STRENGTHS = np.array([[0, 0.5, 0.1], [0.3, 0, 0.1], [0.05, 0.2, 0]])
E, B, BETA = np.array([1.5, 1.2, 2.0]), np.array([1.0, 1.5, 0.8]), np.array([0.4, 0.5, 0.3])
GAMMA, KAPPA = np.array([0.05, 0.1, 0.03]), np.array([0.2, 0.15, 0.25])
D0 = np.exp(np.log(TOKENS).mean())


def climb_losses(ratios, tokens):
    """`E rt^-gamma + B rt^-kappa / (D / D0 + .02)^beta`; strengths saturate at 0.5, fade with 0.4 and (D / D0)^-0.2."""
    exp = np.exp if isinstance(ratios, np.ndarray) else jnp.exp
    transferred = (ratios / (1 + ratios / 0.5)) @ STRENGTHS.T * exp(-ratios / 0.4) * (tokens[:, None] / D0) ** -0.2
    effective = ratios + transferred
    return E * effective**-GAMMA + B * effective**-KAPPA / (tokens[:, None] / D0 + 0.02) ** BETA


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["languages", "targets"])
@dataclasses.dataclass(frozen=True)
class Truth(FittedLaw):
    """The true loss, in the form of a fitted law."""

    languages: tuple[str, ...]
    targets: tuple[str, ...]

    def losses(self, ratios, n_params, tokens):
        return climb_losses(ratios, jnp.asarray(tokens)[None])[0]


def mixtures(n: int, seed: int, corners: bool = True) -> np.ndarray:
    drawn = np.random.default_rng(seed).dirichlet(np.full(3, 0.8), n)
    return np.concatenate([np.eye(3), drawn]) if corners else drawn


def table(ratios, losses, tokens=TOKENS, n_params=(1e6,), noise=0.0, seed=5) -> ProxyRuns:
    """A run of every ratio and size, with a row at every token count; `losses(ratios, tokens, n_params)`."""
    names, sizes, counts, mixed = [], [], [], []
    for number, row in enumerate(ratios):
        for size in n_params:
            names += [f"{number}-{size:.0f}"] * len(tokens)
            sizes += [size] * len(tokens)
            counts += list(tokens)
            mixed += [row] * len(tokens)
    values = losses(np.array(mixed), np.array(counts), np.array(sizes))
    values = values * np.exp(noise * np.random.default_rng(seed).normal(size=values.shape))
    return make_runs("table", LANGUAGES, LANGUAGES, names, sizes, counts, np.array(mixed), values)


def climb_table(n: int, seed: int, noise: float = 0.0, corners: bool = True) -> ProxyRuns:
    return table(mixtures(n, seed, corners), lambda r, d, _: climb_losses(r, d), noise=noise)


@pytest.fixture(scope="module")
def law():
    return Climb("saturating_fading", starts=3)


@pytest.fixture(scope="module")
def runs() -> ProxyRuns:
    return climb_table(13, 0, noise=0.003)


@pytest.fixture(scope="module")
def fitted(law, runs):
    return law.fit(runs)


def test_climb_predicts_new_mixtures_and_four_times_the_tokens(fitted):
    unseen = climb_table(20, 1, corners=False)
    assert scores(unseen.losses, fitted.predict(unseen)).mean["mae"] < 0.02
    further = table(mixtures(20, 2), lambda r, d, _: climb_losses(r, d), tokens=(3.2e6,))
    assert scores(further.losses, fitted.predict(further)).mean["mae"] < 0.04


def test_climb_finds_who_gives_to_whom(fitted):
    """The marginal worth of tokens at the mean mixture, by finite differences of the truth."""
    mean, step = fitted.mixture, 1e-6
    rt = lambda r: r + (r / (1 + r / 0.5)) @ STRENGTHS.T * np.exp(-r / 0.4)  # noqa: E731
    truth = np.stack([(rt(mean + step * e) - rt(mean - step * e)) / (2 * step) for e in np.eye(3)], axis=1)
    np.fill_diagonal(truth, 1)
    np.testing.assert_allclose(fitted.transfer_matrix, truth, atol=0.03)
    assert fitted.identified[~np.eye(3, dtype=bool)].all() and not np.diag(fitted.identified).any()
    assert not any("not identified" in note for note in fitted.notes)


def test_isolated_law_of_climb_is_that_of_the_monolingual_runs(fitted, runs):
    alone = runs.rows(np.flatnonzero(runs.ratios.max(axis=1) == 1))
    with float64():
        losses = np.asarray(fitted.isolated_losses(alone.ratios, alone.n_params, alone.tokens))
    own = alone.ratios.argmax(axis=1)
    truth = climb_losses(alone.ratios, alone.tokens)
    np.testing.assert_allclose(losses[range(len(own)), own], truth[range(len(own)), own], rtol=0.01)


def test_a_repeated_table_and_other_names_give_the_same_law(law, runs, fitted):
    order = np.array([2, 0, 1])
    renamed = dataclasses.replace(
        runs,
        languages=tuple(LANGUAGES[at] for at in order),
        targets=tuple(LANGUAGES[at] for at in order),
        ratios=runs.ratios[:, order],
        losses=runs.losses[:, order],
    )
    again = law.fit(renamed)
    np.testing.assert_allclose(again.predict(renamed), fitted.predict(runs)[:, order], atol=2e-3)
    np.testing.assert_allclose(again.transfer_matrix, fitted.transfer_matrix[order][:, order], atol=5e-3)
    shuffled = runs.rows(np.random.default_rng(0).permutation(len(runs)))
    np.testing.assert_allclose(law.fit(shuffled).parameters, fitted.parameters, atol=1e-2)


def test_intervals_hold_the_truth_as_often_as_they_say(law):
    """Intervals cover nine in ten, over tables with other noise: losses at four times the tokens, the best mixture."""
    truth = Truth(LANGUAGES, LANGUAGES)
    further, best = 4 * TOKENS[-1], functools.partial(solve_joint, n_params=1e6, tokens=4 * TOKENS[-1], starts=2)
    points, ratios = mixtures(10, 9), best(truth).ratios
    held = {"losses": [], "ratios": []}
    for seed in range(4):
        runs = table(mixtures(13, seed), lambda r, d, _: climb_losses(r, d), noise=0.01, seed=seed)
        replicates = law.fit(runs).replicates(runs, 20, seed)
        for name, true, draws in (
            ("losses", climb_losses(points, np.full(len(points), further)),
             [each.at(points, 1e6, further) for each in replicates]),
            ("ratios", ratios, [best(each).ratios for each in replicates]),
        ):  # fmt: skip
            low, high = np.quantile(draws, (0.05, 0.95), axis=0)
            held[name] += ((low <= true) & (true <= high)).ravel().tolist()
    assert 0.8 < np.mean(held["losses"]) < 0.98
    assert np.mean(held["ratios"]) > 0.7, held["ratios"]  # of 12


def test_replicates_repeat_by_seed(fitted, runs):
    one, same, other = (fitted.replicates(runs, 5, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal([r.parameters for r in one], [r.parameters for r in same])
    assert np.abs(one[0].parameters - other[0].parameters).max() > 0.01


def test_the_family_of_transfer_is_the_likeliest(runs, monkeypatch):
    monkeypatch.setattr(climb, "_CANDIDATES", ("linear", "saturating_fading"))
    fitted = Climb(starts=1).fit(runs)
    assert fitted.transfer_family == "saturating_fading"
    assert any("transfer is of the family saturating_fading; linear is the next" in note for note in fitted.notes)


@pytest.mark.slow
def test_the_family_of_transfer_is_the_one_the_table_was_made_with(monkeypatch):
    candidates = ("saturating_fading", "substitution_fading")
    monkeypatch.setattr(climb, "_CANDIDATES", candidates)
    for family in candidates:
        transfer = TRANSFER_FAMILIES[family](True)
        formula = EffectiveFormula(3, Shared(n_varies=False, d_varies=True, shift=True), transfer)
        drawn = {"log_e": 0.7, "log_gamma": -3, "log_b": 0, "log_kappa": -2, "log_beta": -1.2, "log_shift": -4}
        drawn |= {name: mean for name, (mean, _) in transfer.prior().items()} | {"log_strength": -1.5}
        one = np.concatenate([np.full(size, drawn[name]) for name, size in formula.sizes.items()])
        parameters = one + 0.2 * np.random.default_rng(0).normal(size=(3, len(one)))
        truth = FittedEffectiveFormula(formula, LANGUAGES, LANGUAGES, parameters, parameters, parameters, np.ones(3),
                                       1e6, D0, 1e-3, np.full(3, 1 / 3))
        runs = table(mixtures(13, 0), lambda r, d, _: truth.at(r, 1e6, d), noise=0.003)  # noqa: B023
        fitted = Climb(starts=1).fit(runs)
        assert fitted.transfer_family == family
        assert any(f"transfer is of the family {family}; " in note for note in fitted.notes)


def test_strengths_of_a_language_that_was_never_mixed_in_are_said_to_be_open(law, runs, fitted):
    """Unidentified parameters have the spread of the prior. Includes a language without a loss column."""
    table = dataclasses.replace(
        runs, languages=(*LANGUAGES, "dd"), ratios=np.concatenate([runs.ratios, np.zeros((len(runs), 1))], axis=1))
    wider = law.fit(table)
    np.testing.assert_array_equal(wider.identified, np.concatenate([fitted.identified, np.zeros((3, 1), bool)], axis=1))
    assert any("3 of 9 strengths of transfer are not identified" in note for note in wider.notes)
    drawn = np.std([each["deviation"][:, 3] for each in wider.replicates(table, 60)], axis=0)
    np.testing.assert_allclose(drawn, wider.sd[:, list(wider.formula.sizes).index("deviation") + 3], rtol=0.3)
    with float64():
        assert np.isfinite(wider.losses(np.eye(4), 1e6, 1e5)).all()


def test_without_monolingual_runs_it_is_said(law):
    fitted = law.fit(climb_table(6, 0, corners=False))
    assert any("monolingual runs of aa, bb, cc" in note for note in fitted.notes)


def test_isolated_law_finds_its_own_data_and_says_what_the_table_cannot_tell():
    losses = lambda r, d, n: E + B / (np.maximum(r, 1e-9) * d[:, None] / D0) ** BETA  # noqa: E731
    runs = table(mixtures(8, 3), losses)  # with monolingual runs, from which two languages are absent
    fitted = Isolated(starts=3).fit(runs)
    further = table(mixtures(8, 4, corners=False), losses, tokens=(3.2e6,))
    assert np.abs(fitted.predict(further) / further.losses - 1).max() < 0.01
    np.testing.assert_allclose(fitted["log_beta"], np.log(BETA), atol=0.1)
    assert "one model size" in fitted.notes[0] and "rows without" in fitted.notes[1] and len(fitted.notes) == 2


def test_msl_finds_its_own_data_in_n_and_d():
    def losses(r, d, n):
        return (E + 0.5 / (n / 2e6)[:, None] ** 0.3 + 0.3 / (d / D0)[:, None] ** BETA) * r**-0.1

    fitted = MSL(starts=3).fit(table(mixtures(5, 3, corners=False), losses, n_params=(1e6, 2e6, 4e6)))
    further = table(mixtures(8, 4, corners=False), losses, tokens=(1.6e6,), n_params=(8e6,))
    assert np.abs(fitted.predict(further) / further.losses - 1).max() < 0.01
    np.testing.assert_allclose(fitted["log_gamma"], np.log(0.1), atol=0.1)
    assert fitted.notes == ()


def test_mixing_law_finds_its_own_data():
    t = np.array([[-2.0, -0.5, 0], [0.3, -1.5, 0.2], [0.1, 0, -3.0]])
    losses = lambda r, d, n: 1.5 + np.exp(0.4 + r @ t.T)  # noqa: E731
    fitted = MixingLaw(starts=3).fit(table(mixtures(20, 0), losses, tokens=(1e5,)))
    unseen = table(mixtures(20, 1), losses, tokens=(1e5,))
    np.testing.assert_allclose(fitted.predict(unseen), unseen.losses, atol=0.01)
    assert fitted.notes == ()
    assert "ignores N and D" in MixingLaw(starts=1).fit(climb_table(1, 0)).notes[0]


def test_rows_of_few_languages_weigh_little_whatever_the_largest_share():
    """Gives English half or more of every mixture; the first five rows are runs without cc."""
    names = ("en", "aa", "bb", "cc")
    ratios = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0.9, 0.09, 0.01, 0], [0.4, 0.3, 0.3, 0],
                       [0.7, 0.1, 0.1, 0.1]])
    runs = make_runs("table", names, names, range(6), [1e6] * 6, [1e5] * 6, ratios, np.full((6, 4), 3.0))
    formula = EffectiveFormula(4, Shared(False, False, True), TRANSFER_FAMILIES["substitution_fading"](False))
    np.testing.assert_array_equal(formula.row_weights(runs)[:, 3], [0.03, 0.03, 1, 1, 1, 1])
    np.testing.assert_array_equal(formula.row_weights(runs)[:, 0], np.ones(6))


def test_languages_without_ratios_or_runs_are_refused():
    runs = climb_table(2, 0)
    with pytest.raises(InputError, match="target 'dd' has no ratio column"):
        Climb().fit(dataclasses.replace(runs, targets=("aa", "bb", "dd")))
    with pytest.raises(InputError, match="no run has any 'cc'"):
        MSL().fit(dataclasses.replace(runs, ratios=runs.ratios * [1, 1, 0]))
    with pytest.raises(InputError, match=r"Climb\.family: 'none'"):
        Climb(family="none")


@pytest.mark.parametrize("family", TRANSFER_FAMILIES)
@given(data=st.data())
@settings(max_examples=10)
def test_transfer_is_nothing_without_others_and_finite_always(family, data):
    """Transfer is exactly 0 without other languages, and effective ratios are positive over the whole prior."""
    transfer = TRANSFER_FAMILIES[family](True)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    scale = data.draw(st.floats(-3, 3))
    prior = transfer.prior()
    p = {
        name: prior[name][0] + 1.5 * prior[name][1] * rng.normal(size=size if size > 1 else ())
        for name, size in transfer.sizes(4).items()
    }
    others = np.concatenate([np.zeros((1, 4)), rng.dirichlet(np.full(4, 0.3), 5)])
    with float64(), jax.disable_jit():
        transferred = np.asarray(transfer.transferred(p, np.full(6, 0.2), others, scale))
        effective = np.asarray(floored(0.2 + transferred, data.draw(st.floats(1e-6, 1e-2))))
    assert transferred[0] == 0
    assert np.isfinite(effective).all() and (effective > 0).all()
