"""The table of laws is in order, and the default law suits the table of runs."""

import dataclasses

import numpy as np
import pytest

from data_mixtures.climb.laws import LAWS, Climb, StructuredGP, default_law
from data_mixtures.climb.proxy_table import make_runs


@pytest.mark.parametrize("name", LAWS)
def test_a_law_stands_under_its_own_name(name):
    assert LAWS[name]().name == name


def test_the_default_extrapolates_where_the_table_can_tell():
    languages = ("aa", "bb")
    halves, losses = np.full((2, 2), 0.5), np.ones((2, 2))
    runs = make_runs("table", languages, languages, ["x", "x"], [1e6] * 2, [1e5, 2e5], halves, losses)
    assert isinstance(default_law(runs), Climb)
    assert isinstance(default_law(runs.rows([0])), StructuredGP)  # neither N nor D varies
    assert isinstance(default_law(dataclasses.replace(runs, targets=("aa", "elsewhere"))), StructuredGP)
