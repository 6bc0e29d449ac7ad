"""Allocation from tables of every kind follows the law and the constraints."""

import json

import numpy as np
import pytest

from data_mixtures.climb.allocate import AllocateConfig, Allocator, main
from data_mixtures.climb.laws import Isolated, LightGBM, StructuredGP
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.errors import InputError

LANGUAGES = ("fi", "sv", "en")
UNIQUE = {"fi": 2e6, "sv": 3e6, "en": 5e6}
B, BETA = np.array([2.0, 1.5, 1.0]), 0.3
TOKENS = 1e6


def isolated_losses(ratios: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return 1.5 + B * (ratios * tokens[:, None] / TOKENS) ** -BETA


@pytest.fixture(scope="module")
def runs() -> ProxyRuns:
    """A table of languages without transfer, at three token counts."""
    rng = np.random.default_rng(0)
    ratios = np.repeat(np.concatenate([rng.dirichlet(np.full(3, 2.0), 20), np.full((1, 3), 1 / 3)]), 3, axis=0)
    tokens = np.tile([TOKENS / 4, TOKENS / 2, TOKENS], 21)
    names = np.repeat([f"run{i}" for i in range(21)], 3)
    return make_runs("made up", LANGUAGES, LANGUAGES, names, [1e6] * 63, tokens, ratios,
                     isolated_losses(ratios, tokens))


def run(folder, **settings) -> dict:
    settings = {"output": str(folder), "n_params": 1e6, "tokens": TOKENS, "unique_tokens": UNIQUE, "compared": (),
                "replicates": 0, "folds": 3, **settings}
    main(AllocateConfig(**settings))
    return json.loads((folder / "allocation.json").read_text())


def test_without_transfer_the_mixture_is_the_closed_form(runs, tmp_path):
    """Minimise sum_i w_i B_i r_i^-beta: r_i is proportional to (w_i B_i)^(1 / (1 + beta))."""
    allocation = run(tmp_path, runs=runs, law=Isolated(starts=4), weights={"fi": 3, "sv": 2, "en": 1})
    expected = (np.array([3, 2, 1]) * B) ** (1 / (1 + BETA))
    for name in ("isolated-joint", "isolated-two-step"):
        np.testing.assert_allclose(allocation["methods"][name]["ratios"], expected / expected.sum(), atol=2e-3)
    natural = np.array(allocation["methods"]["natural"]["ratios"])
    np.testing.assert_allclose(natural, [0.2, 0.3, 0.5])
    np.testing.assert_allclose(allocation["methods"]["natural"]["losses"],
                               isolated_losses(natural[None], np.array([TOKENS]))[0], atol=2e-3)
    assert allocation["method"] == "isolated-joint"
    assert load_rates(tmp_path / "rates.json") == pytest.approx(
        dict(zip(LANGUAGES, allocation["methods"]["isolated-joint"]["ratios"])))


def test_reference_weights_and_intervals_are_what_they_are_said_to_be(runs):
    """1 / loss at the natural mixture, in the closed form; the middle 90% of the replicates."""
    config = AllocateConfig(runs=runs, output="unused", n_params=1e6, tokens=TOKENS, unique_tokens=UNIQUE,
                            law=Isolated(starts=1), replicates=7)
    allocator = Allocator(config)
    at_natural = isolated_losses(np.array([[0.2, 0.3, 0.5]]), np.array([TOKENS]))[0]
    expected = (B / at_natural) ** (1 / (1 + BETA))
    ratios = allocator.solve(allocator.fitted).ratios
    np.testing.assert_allclose(ratios, expected / expected.sum(), atol=2e-3)
    method = allocator.method(ratios)
    losses = [allocator.predict(fitted, ratios) for fitted in allocator.replicates]
    assert len(losses) == 7
    np.testing.assert_allclose(method["loss_low"], np.quantile(losses, 0.05, axis=0))
    np.testing.assert_allclose(method["loss_high"], np.quantile(losses, 0.95, axis=0))


@pytest.mark.parametrize("law", [StructuredGP(draws=2, warm_up=2), LightGBM()])
def test_tables_of_ratios_alone(runs, law, tmp_path):
    alone = runs.rows(runs.tokens == TOKENS)
    allocation = run(tmp_path, runs=alone, law=law, floor=0.15, fixed={"en": 0.25}, max_epochs=0.3,
                replicates=3, allow_poor_law=law.name == "lightgbm")  # too few runs for a leaf: it predicts the mean
    best = allocation["methods"][allocation["method"]]
    assert allocation["method"] == {"structured_gp": "structured_gp-joint", "lightgbm": "lightgbm-sampling"}[law.name]
    assert best["ratios"][2] == pytest.approx(0.25) and min(best["ratios"]) >= 0.15 - 1e-9
    assert max(best["epochs"]) <= 0.3 + 1e-9
    assert best["kkt"] is None if law.name == "lightgbm" else best["kkt"] < 1e-6
    assert allocation["transfer"] is None and allocation["effective"] is None
    assert allocation["interval"] == [0.05, 0.95]
    intervals = [best[f"{figure}_{end}"] for figure in ("loss", "ratio") for end in ("low", "high")]
    if law.name == "lightgbm":
        assert intervals == [None] * 4
        return
    for low, high in (intervals[:2], intervals[2:]):
        assert (np.array(low) <= high).all() and np.ptp([low, high], axis=0)[:2].min() > 1e-6
    assert intervals[2][2] == intervals[3][2] == pytest.approx(0.25)  # it is fixed


def test_a_law_worse_than_the_mean_recommends_nothing_unless_told_to(runs, tmp_path, capsys):
    """Makes one of ten runs diverge in one language, with a finite loss."""
    diverged = runs.rows(np.flatnonzero(runs.tokens == TOKENS)[:10])
    diverged.losses[3, 1] = 11000.0
    settings = {"runs": diverged, "law": Isolated(starts=2), "compared": ("lightgbm",)}
    with pytest.raises(InputError, match=r"nothing is written: isolated predicts held-out runs worse than their mean "
                                         r"does: cross-validated R2 .*sv: -"):
        run(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []
    named = "run 'run3' at 1,000,000 tokens: the loss of 'sv' is 1.1e+04, far outside the others' range"
    assert named in capsys.readouterr().err
    allocation = run(tmp_path, **settings, allow_poor_law=True)
    assert "WARNING: isolated predicts held-out runs worse than their mean does" in capsys.readouterr().err
    assert named in allocation["law"]["notes"][0] and "worse than their mean" in allocation["law"]["notes"][-1]
    assert (tmp_path / "rates.json").exists()


def test_a_language_of_one_run_only_is_allocated_with_a_note(runs, tmp_path, capsys):
    ratios = np.array(runs.ratios)
    ratios[3:, 1] = 0
    few = make_runs("made up", LANGUAGES, LANGUAGES, runs.run, runs.n_params, runs.tokens,
                    ratios / ratios.sum(axis=1, keepdims=True),
                    isolated_losses(np.maximum(ratios, 1e-3), runs.tokens))
    allocation = run(tmp_path, runs=few, law=Isolated(starts=2), compared=("msl",))
    assert "the loss of sv, with fewer than 2 rows" in capsys.readouterr().err
    assert allocation["validation"]["isolated"]["r2"][1] is None and allocation["validation"]["msl"]["r2"][0] > 0.5
    assert allocation["predictions"]["predicted"][0][1] is None
    assert any("3 rows with sv" in note for note in allocation["law"]["notes"])


def test_bad_settings_and_tables_are_named(runs, tmp_path):
    never = ProxyRuns(**{**vars(runs), "ratios": runs.ratios * [1, 1, 0]})
    for settings, cause in [
        ({"runs": never}, "no run has any en"),
        ({"runs": runs, "unique_tokens": {"fi": 1e6}}, "no text in sv, en"),
        ({"runs": runs, "weights": {"fi": 1.0}}, "en, sv are in only one of the weights"),
        ({"runs": runs, "weights": "natural", "unique_tokens": None}, "needs the tokens of every target's text"),
        ({"runs": runs, "compared": ("olmix",)}, "no law 'olmix'"),
        ({"runs": "proxies.csv"}, "must be a table"),
        ({"runs": runs, "token_store": "store"}, "set only one of them"),
        ({"runs": runs, "solver": "simplex"}, "must be 'two-step' or 'joint'"),
        ({"runs": runs, "weights": "equal"}, "'equal': not one of reference, natural, uniform, "),
        ({"runs": runs, "tokens": -1}, "allocate.tokens = -1: must be a positive number"),
        ({"runs": runs, "floor": 0.5}, r"the floors sum to 1\.5 .*: more than 1"),
        ({"runs": runs, "max_epochs": 0.01}, r"what max_epochs 0\.01 allows sums to .*: less than 1 at "),
        ({"runs": runs, "fixed": {"xx": 0.5}}, "fixed ratio names xx; the law has fi, sv, en"),
    ]:
        with pytest.raises(InputError, match=cause):
            run(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_allocation_is_kept_made_again_or_refused(runs, tmp_path, capsys):
    output, settings = tmp_path / "climb", {"runs": runs, "law": Isolated(starts=1)}
    run(output, **settings)
    (output / "report.html").write_text("the report")
    rates = (output / "rates.json").read_bytes()
    run(output, **settings)
    assert "made before from the same inputs and settings, kept" in capsys.readouterr().err
    assert (output / "report.html").exists()
    (output / "methods" / "natural.json").unlink()
    run(output, **settings)
    assert "damaged (no methods/natural.json), made again" in capsys.readouterr().err
    assert (output / "methods" / "natural.json").exists() and (output / "rates.json").read_bytes() == rates
    with pytest.raises(InputError, match=r"climb: exists, made with settings floor = 0.0 \(now 0.1\); set overwrite"):
        run(output, **settings, floor=0.1)
    assert (output / "rates.json").read_bytes() == rates
    run(output, **settings, floor=0.1, overwrite=True)
    assert (output / "rates.json").read_bytes() != rates
    assert not (output / "report.html").exists()  # it showed the former allocation
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other: holds notes\.txt besides what data_mixtures\.climb\.allocate makes"):
        run(tmp_path / "other", **settings, overwrite=True)
    (output / "proxies").mkdir()  # the proxy runs that the allocation was made from
    with pytest.raises(InputError, match="climb: holds proxies besides what"):
        run(output, **settings, floor=0.2, overwrite=True)
    assert (output / "proxies").exists()
