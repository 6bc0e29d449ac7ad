"""The plan of proxy runs: corners that identify transfer, draws that stay put when the plan grows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixtures.baselines import temperature_rates
from data_mixtures.climb.proxy_plan import given_mixtures, planned_mixtures
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.errors import InputError

COUNTS = {"fi": 1000, "sv": 3000, "en": 6000}


def test_the_corners_are_there():
    plan = planned_mixtures(COUNTS, mixtures=0, pair_shares=(0.5, 0.2))
    assert plan["only-fi"] == {"fi": 1.0}
    assert plan["without-en"] == pytest.approx({"fi": 0.25, "sv": 0.75})
    assert plan["pair-en-fi-0.2"] == {"en": 0.2, "fi": 0.8}
    assert len(plan) == 3 + 3 + 3 * 2


@settings(max_examples=30)
@given(n=st.integers(2, 8), mixtures=st.integers(0, 12), seed=st.integers(0, 3))
def test_every_mixture_sums_to_one_over_known_languages(n, mixtures, seed):
    counts = {f"l{i}": 10 ** (i % 4 + 1) for i in range(n)}
    plan = planned_mixtures(counts, mixtures=mixtures, seed=seed)
    for rates in plan.values():
        assert set(rates) <= set(counts)
        assert sum(rates.values()) == pytest.approx(1, abs=1e-12) and min(rates.values()) > 0


def test_a_plan_can_be_extended():
    small, large = planned_mixtures(COUNTS, mixtures=3, pairs=1), planned_mixtures(COUNTS, mixtures=9, pairs=3)
    assert small.items() <= large.items()
    assert planned_mixtures(COUNTS, mixtures=3, seed=1)["mix-000"] != small["mix-000"]


def test_draws_are_centred_on_the_flattened_natural_ratios():
    plan = planned_mixtures(COUNTS, mixtures=3000, monolingual=False, leave_one_out=False, pairs=0, temperature=2.0)
    mean = {l: np.mean([rates.get(l, 0) for rates in plan.values()]) for l in COUNTS}
    assert mean == pytest.approx(temperature_rates(COUNTS, 2.0), abs=0.015)


@pytest.mark.parametrize("arguments, cause", [
    ({"counts": {"fi": 10}}, "cannot be mixed"),
    ({"mixtures": 0, "monolingual": False, "leave_one_out": False, "pairs": 0}, "empty"),
    ({"concentration": (2, 1)}, "concentration"),
    ({"pair_shares": (1.0,)}, "pair_shares"),
    ({"counts": {"fi": 0, "sv": 5}}, "no text in fi"),
])
def test_impossible_plans(arguments, cause):
    with pytest.raises(InputError, match=cause):
        planned_mixtures(**{"counts": COUNTS, **arguments})


def test_mixtures_from_rates_files(tmp_path):
    save_rates(tmp_path / "a.json", {"fi": 1, "sv": 3}, {})
    assert given_mixtures(COUNTS, [tmp_path / "a.json"]) == {"a": {"fi": 0.25, "sv": 0.75}}
    with pytest.raises(InputError, match="would clash"):
        given_mixtures(COUNTS, [tmp_path / "a.json", tmp_path / "a.json"])
    with pytest.raises(InputError, match="unknown language 'sv'"):
        given_mixtures({"fi": 1, "en": 1}, [tmp_path / "a.json"])
