"""Baseline mixtures: the formulas, and no language repeated more often than allowed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_mixtures.baselines import BaselineConfig, capped_budgets, temperature_rates, unimax_rates, write_baseline
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import read_manifest
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json

counts_strategy = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 10**12), min_size=1,
                                  max_size=20)


def unimax_of_the_paper(counts, budget, epochs):
    """Algorithm 1 of arXiv 2304.09151, as printed."""
    given_budget, left = {}, budget
    ordered = sorted(counts, key=lambda language: counts[language])
    for i, language in enumerate(ordered):
        share = left / (len(ordered) - i)
        given_budget[language] = counts[language] * epochs if share > counts[language] * epochs else share
        left -= given_budget[language]
    total = sum(given_budget.values())
    return {language: value / total for language, value in given_budget.items()}


@given(counts_strategy, st.floats(0.01, 1.0), st.floats(0.1, 20))
def test_unimax_is_that_of_the_paper(counts, fullness, epochs):
    budget = fullness * epochs * sum(counts.values()) * (1 - 1e-9)
    expected = unimax_of_the_paper(counts, budget, epochs)
    assert unimax_rates(counts, budget, epochs) == pytest.approx(expected, rel=1e-6)


@given(counts_strategy, st.floats(0.01, 1.0), st.floats(0.1, 20), st.floats(0.2, 50))
def test_no_language_is_repeated_more_than_allowed(counts, fullness, epochs, temperature):
    budget = fullness * epochs * sum(counts.values()) * (1 - 1e-9)
    rates = unimax_rates(counts, budget, epochs, temperature)
    assert math.fsum(rates.values()) == pytest.approx(1)
    seen = {language: rate * budget / counts[language] for language, rate in rates.items()}
    assert max(seen.values()) <= epochs * (1 + 1e-6)
    # Languages below the cap keep the proportions of the temperature mixture.
    wanted = temperature_rates(counts, temperature)
    free = [rates[language] / wanted[language] for language in rates if seen[language] < epochs * (1 - 1e-6)]
    assert max(free, default=1) == pytest.approx(min(free, default=1), rel=1e-4)


def test_temperature():
    counts = {"a": 16, "b": 1}
    assert temperature_rates(counts, 1) == pytest.approx({"a": 16 / 17, "b": 1 / 17})
    assert temperature_rates(counts, 2) == pytest.approx({"a": 4 / 5, "b": 1 / 5})
    assert temperature_rates(counts, math.inf) == {"a": 0.5, "b": 0.5}
    assert temperature_rates({"a": 10**15, "b": 1}, 0.01)["a"] == 1


def test_budgets_beyond_all_text_give_every_language_its_cap():
    assert capped_budgets({"a": 0.9, "b": 0.1}, 100, {"a": 5, "b": 7}) == {"a": 5, "b": 7}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"temperature": 0}, "temperature must be positive"),
    ({"temperature": "hot"}, "'hot' is no number"),
    ({"max_epochs": 4}, "needs write_baseline.total_tokens"),
    ({"max_epochs": 1, "total_tokens": 10**9}, "cannot be had"),
    ({"max_epochs": -1, "total_tokens": 10**3}, "must be positive"),
    ({"split": "test"}, "no split 'test'"),
])
def test_settings_that_make_no_sense_are_named(store_path, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        write_baseline(BaselineConfig(store_path, tmp_path / "rates.json", **arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_language_without_text_is_named():
    with pytest.raises(InputError, match="no text in b"):
        temperature_rates({"a": 3, "b": 0})


def test_rates_files_come_from_the_store(store_path, tmp_path):
    tokens = {language: part.tokens for language, part in read_manifest(store_path).splits["train"].items()}
    total = sum(tokens.values())
    write_baseline(BaselineConfig(store_path, tmp_path / "natural.json"))
    assert load_rates(tmp_path / "natural.json") == pytest.approx({k: v / total for k, v in tokens.items()})
    write_baseline(BaselineConfig(store_path, tmp_path / "uniform.json", "inf"))
    assert load_rates(tmp_path / "uniform.json") == pytest.approx(dict.fromkeys(tokens, 1 / 3))
    budget = 2 * min(tokens.values()) * 3
    write_baseline(BaselineConfig(store_path, tmp_path / "unimax.json", "inf", max_epochs=1.5, total_tokens=budget))
    assert load_rates(tmp_path / "unimax.json") == pytest.approx(unimax_of_the_paper(tokens, budget, 1.5))
    assert max(read_json(tmp_path / "unimax.json")["epochs"].values()) == pytest.approx(1.5)


def test_rates_are_kept_refused_or_replaced(store_path, tmp_path, capsys):
    path = tmp_path / "rates.json"
    for _ in range(2):
        write_baseline(BaselineConfig(store_path, path))
    assert f"{path}: made before from the same inputs and settings, kept" in capsys.readouterr().err
    natural = path.read_bytes()
    with pytest.raises(InputError, match=r'config temperature = "1.0" \(now "inf"\); set overwrite=True to replace it'):
        write_baseline(BaselineConfig(store_path, path, "inf"))
    assert path.read_bytes() == natural
    write_baseline(BaselineConfig(store_path, path, "inf", overwrite=True))
    assert path.read_bytes() != natural
    path.write_text('{"format": "mlx-rates", "version": 1, "rates": {"en": 1}}')  # written by hand
    with pytest.raises(InputError, match=r"has no record of what it was made from; set overwrite=True"):
        write_baseline(BaselineConfig(store_path, path, "inf"))
