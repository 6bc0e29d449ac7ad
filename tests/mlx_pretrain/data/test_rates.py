"""Rates files: accepted content, and messages for the rest."""

import json

import pytest

from mlx_pretrain.data.rates import load_rates, save_rates
from mlx_pretrain.errors import InputError


def test_round_trip_is_normalised_and_drops_zeros(tmp_path):
    path = tmp_path / "rates.json"
    save_rates(path, {"en": 3, "fi": 1, "xx": 0}, {"made_by": "test"}, epochs={"en": 1.5})
    assert load_rates(path, known=["en", "fi", "de"]) == {"en": 0.75, "fi": 0.25}
    save_rates(path, {"fi": 1, "en": 3}, {}, epochs={"en": 1.5})
    assert list(load_rates(path)) == ["en", "fi"]
    assert json.loads(path.read_text())["epochs"] == {"en": 1.5}


@pytest.mark.parametrize(
    "rates, message",
    [
        ({"en": -0.1, "fi": 1}, "'en' is negative"),
        ({"en": 0, "fi": 0}, "sum to"),
        ({"en": float("nan")}, "not a finite number"),
        ({"en": "much"}, "not a finite number"),
        ({"en": True}, "not a finite number"),
        ({"xx": 1}, "unknown language 'xx'; there is text for en, fi"),
    ],
)
def test_bad_rates_name_file_and_cause(tmp_path, rates, message):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"format": "mlx-rates", "version": 1, "rates": rates}))
    with pytest.raises(InputError, match=message) as error:
        load_rates(path, known=["en", "fi"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rates": {"en": 1}}', '{"format": "mlx-rates", "version": 9, "rates": {}}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(InputError, match="rates"):
        load_rates(path)
    with pytest.raises(InputError, match="no such"):
        load_rates(tmp_path / "missing.json")
