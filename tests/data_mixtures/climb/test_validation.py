"""Scores are the textbook's, no run is on both sides of a fold, and effective ratios invert the isolated law."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw
from data_mixtures.climb.proxy_table import make_runs
from data_mixtures.climb.validation import cross_validate, measured_effective_ratios, scores
from mlx_pretrain.errors import InputError


@dataclasses.dataclass
class Remembering(FittedLaw):
    """A law that predicts 1 for the runs it was fitted to and 2 for all others."""

    runs: set

    def losses(self, ratios, n_params, tokens):
        raise NotImplementedError

    def predict(self, runs):
        return np.array([[1.0 if run in self.runs else 2.0] * len(runs.targets) for run in runs.run])


class RememberingLaw:
    name = "remembering"
    fitted: list

    def __init__(self):
        self.fitted = []

    def fit(self, runs, seed=0):
        self.fitted.append(set(runs.run))
        return Remembering(set(runs.run))


class PowerLaw(FittedEffectiveLaw):
    """Loss `1 + (effective D / 1e6 + 0.01)^-0.5`, of two languages."""

    languages = targets = ("aa", "bb")

    def effective_ratios(self, ratios, n_params, tokens):
        return ratios

    def isolated_losses(self, effective, n_params, tokens):
        return 1 + (effective * jnp.asarray(tokens)[:, None] / 1e6 + 0.01) ** -0.5


def table(n_runs: int, losses=None):
    """`n_runs` runs of two languages with three checkpoints each."""
    rng = np.random.default_rng(0)
    ratios = np.repeat(rng.dirichlet([1, 1], n_runs), 3, axis=0)
    losses = rng.uniform(2, 3, (3 * n_runs, 2)) if losses is None else losses
    names = [f"run{row // 3}" for row in range(3 * n_runs)]
    return make_runs("table", ["aa", "bb"], ["aa", "bb"], names, [1e6] * len(names),
                     [1e6, 2e6, 4e6] * n_runs, ratios, losses)  # fmt: skip


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(20, 3))
    predicted = measured + 0.3 * rng.normal(size=(20, 3))
    agreement = scores(measured, predicted)
    np.testing.assert_allclose(agreement.r2, metrics.r2_score(measured, predicted, multioutput="raw_values"))
    mae = metrics.mean_absolute_error(measured, predicted, multioutput="raw_values")
    np.testing.assert_allclose(agreement.mae, mae)
    ranks = [np.argsort(np.argsort(x, axis=0), axis=0) for x in (measured, predicted)]
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(ranks[0].T, ranks[1].T)]
    np.testing.assert_allclose(agreement.spearman, correlation)
    assert agreement.mean["mae"] == pytest.approx(np.abs(measured - predicted).mean())


def test_constant_losses_have_no_correlation():
    agreement = scores(np.ones((4, 1)), np.array([[1.0], [2.0], [3.0], [4.0]]))
    assert np.isnan(agreement.r2[0]) and np.isnan(agreement.spearman[0]) and agreement.mae[0] == 1.5


@pytest.mark.parametrize("measured, predicted", [((1, 2), (1, 2)), ((3, 2), (3, 1)), ((3,), (3,))])
def test_what_cannot_be_compared_is_refused(measured, predicted):
    with pytest.raises(InputError, match="scores: "):
        scores(np.ones(measured), np.ones(predicted))


def test_every_run_is_predicted_by_a_law_that_has_not_seen_it():
    runs, law = table(7), RememberingLaw()
    validation = cross_validate(law, runs, folds=3)
    assert (validation.predicted == 2.0).all()
    assert len(law.fitted) == 3 and set.union(*law.fitted) == set(runs.run)
    left_out = [set(runs.run) - fitted for fitted in law.fitted]
    assert sorted(len(names) for names in left_out) == [2, 2, 3]


def test_losses_on_languages_that_a_run_has_none_of_are_not_judged():
    runs = table(7)
    runs.ratios[:3] = [1, 0]  # of run0
    validation = cross_validate(RememberingLaw(), runs, folds=3)
    assert np.isnan(validation.predicted[:3, 1]).all() and np.isnan(validation.predicted).sum() == 3
    np.testing.assert_allclose(validation.scores.mae[1], np.abs(runs.losses[3:, 1] - 2.0).mean())


@pytest.mark.parametrize("folds", [1, 8])
def test_too_few_runs_for_the_folds(folds):
    with pytest.raises(InputError, match="folds of 7 runs"):
        cross_validate(RememberingLaw(), table(7), folds=folds)


class KnownLanguagesLaw:
    """The mean of the runs that have the target's language; refuses a target no run has."""

    name = "known languages"

    def fit(self, runs, seed=0):
        for target, own in zip(runs.targets, runs.own_columns):
            if not (runs.ratios[:, own] > 0).any():
                raise InputError(f"no run has any {target!r}")
        return Remembering(set(runs.run))


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_language_of_one_run_only_is_not_judged(n_rows):
    """The other languages are judged, on the runs without it."""
    runs = table(7)
    ratios = np.concatenate([runs.ratios, np.zeros((21, 1))], axis=1)
    ratios[:n_rows] = 0.3, 0.3, 0.4  # rows of run0
    names = ("aa", "bb", "cc")
    runs = make_runs("table", names, names, runs.run, runs.n_params, runs.tokens, ratios,
                     np.tile(runs.losses, 2)[:, :3])
    validation = cross_validate(KnownLanguagesLaw(), runs, folds=3)
    assert np.isnan(validation.predicted[:, 2]).all()
    assert np.isnan(validation.predicted[:n_rows]).all() and (validation.predicted[n_rows:, :2] == 2.0).all()
    late = scores(runs.losses[n_rows:, :2], np.full((21 - n_rows, 2), 2.0))
    np.testing.assert_allclose(validation.scores.r2, [*late.r2, np.nan])
    assert validation.scores.mean["mae"] == pytest.approx(late.mae.mean())
    assert validation.notes == (
        f"not judged by cross-validation: {n_rows} rows with cc, which no run of the other folds has",
        "not judged by cross-validation: the loss of cc, with fewer than 2 rows to compare")


def test_pooled_r2_weighs_targets_by_their_variation():
    """Errors of squares 1 and 300 about means of squares 2 and 200."""
    measured = np.array([[1.0, 10.0], [3.0, 30.0]])
    agreement = scores(measured, np.array([[1.0, 0.0], [2.0, 30 + np.sqrt(200)]]))
    np.testing.assert_allclose(agreement.r2, [0.5, -0.5])
    assert agreement.pooled_r2 == pytest.approx(1 - 301 / 202) and agreement.mean["r2"] == pytest.approx(0)


def test_effective_ratios_are_those_that_explain_the_losses():
    runs = table(5)
    ratios = np.random.default_rng(1).uniform(1e-4, 3, runs.losses.shape)
    losses = 1 + (ratios * runs.tokens[:, None] / 1e6 + 0.01) ** -0.5
    effective = measured_effective_ratios(PowerLaw(), table(5, losses))
    np.testing.assert_allclose(effective, ratios, rtol=1e-9)


def test_losses_out_of_the_isolated_laws_reach():
    losses = np.full((15, 2), 3.0)
    losses[0] = 0.9, 11.5  # the asymptote is 1, no tokens give 11
    effective = measured_effective_ratios(PowerLaw(), table(5, losses))
    assert np.isinf(effective[0, 0]) and effective[0, 1] == 0
    assert np.isfinite(effective[1:]).all() and (effective[1:] > 0).all()
