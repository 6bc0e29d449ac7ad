"""The file allocation.json: the result of `data_mixtures.climb.allocate`, which `data_mixtures.climb.report` shows.

Lists are in the order of `languages` (the parts of the mixture) or `targets` (whose losses are predicted); null stands
where a method has no such value:

    format "mlx-allocation", version 1, languages, targets
    n_params, tokens      the model size N and the training tokens D the ratios are meant for
    unique_tokens         language -> tokens of unique text, or null;  natural: its ratios, or null
    weights, weights_name weights of the losses, per target, and where they come from
    constraints           floor, max_epochs, fixed {language: ratio}, as far as set
    law                   name, family (of transfer), notes: limits of the fit that users must know
    method                the recommended one of `methods`
    methods               name -> ratios, ratio_low, ratio_high, losses, loss_low, loss_high (predicted by the
                          recommended law), effective (per language, or per target where their numbers differ), epochs,
                          weighted_loss, mean_loss, kkt, joint_gap,
                          binding [[language, "floor" | "max_epochs" | "fixed"], ...]
    transfer              values, low, high, identified [[per language] per target], meaning; or null
    validation            law -> r2, mae, spearman per target, cross-validated, and seconds
    predictions           run, n_params, tokens, measured, predicted [[per target] per row], out of fold; or null
    effective             ratio, effective (measured), predicted [[per target] per row], tokens; or null
    proxies               runs, rows, and path where known
    provenance            program, version, settings and inputs
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError, shortened
from mlx_pretrain.files import read_json

NAME, FORMAT, VERSION = "allocation.json", "mlx-allocation", 1

_BINDING = {"floor": "floor", "max_epochs": "epoch cap", "fixed": "fixed"}  # as the report names them


class _Fields:
    """An object of the file; access to a malformed field raises an InputError that names the file and the field."""

    def __init__(self, path: epath.PathLike, value: Any, place: str = ""):
        self._path, self._place = path, place
        if not isinstance(value, dict):
            raise InputError(f"{path}: {place or 'the file'} is not a JSON object")
        self._value = value

    def error(self, name: str, problem: str) -> InputError:
        """Returns the error about a field."""
        return InputError(f"{self._path}: {self._place + '.' if self._place else ''}{name} {problem}")

    def get(self, name: str, types: type | tuple[type, ...], expected: str) -> Any:
        """Returns the field, which must be present and of one of the types; a boolean is not a number."""
        value = self._value.get(name)
        if name not in self._value:
            raise self.error(name, "is missing")
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.error(name, f"is {_as_text(value)}, not {expected}")
        return value

    def object(self, name: str) -> "_Fields":
        """Returns the field, which must be an object."""
        value = self.get(name, dict, "an object")
        return _Fields(self._path, value, f"{self._place + '.' if self._place else ''}{name}")

    def items(self) -> list[tuple[str, "_Fields"]]:
        """Returns all fields, each of which must be an object."""
        return [(name, self.object(name)) for name in self._value]

    def names(self, name: str) -> list[str]:
        """Returns the field, which must be a list of different strings."""
        value = self.get(name, list, "a list of names")
        if not value or not all(isinstance(item, str) for item in value) or len(set(value)) < len(value):
            raise self.error(name, "is not a list of different names")
        return value

    def number(self, name: str, optional: bool = False, positive: bool = False) -> float | None:
        """Returns the field, which must be a finite number, or null where `optional`."""
        value = self.get(name, (int, float, type(None)) if optional else (int, float), "a number")
        if value is not None and not (math.isfinite(value) and (value > 0 or not positive)):
            raise self.error(name, f"is {value}, not a {'positive' if positive else 'finite'} number")
        return value

    def array(self, name: str, *shape: int, optional: bool = False, gaps: bool = False) -> np.ndarray | None:
        """Returns the field as float64 of a shape; None for null where `optional`; with `gaps`, nulls in it are NaN."""
        value = self.get(name, (list, type(None)) if optional else list, "a list")
        if value is None:
            return None
        try:
            array = np.array(value, np.float64)
        except (ValueError, TypeError):
            raise self.error(name, "is not an array of numbers") from None
        if array.shape != shape and not (array.size == 0 and math.prod(shape) == 0):
            raise self.error(name, f"has the shape {_shape(array.shape)}, not {_shape(shape)}")
        if not np.isfinite(array if not gaps else array[~np.isnan(array)]).all():
            raise self.error(name, "has values that are not finite")
        return array.reshape(shape)


def _as_text(value: Any) -> str:
    return "null" if value is None else shortened(repr(value), 60)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _read_method(fields: _Fields, languages: Sequence[str], n_targets: int) -> dict[str, Any]:
    n = len(languages)
    method: dict[str, Any] = {name: fields.array(name, n, optional=name != "ratios")
                              for name in ("ratios", "ratio_low", "ratio_high", "epochs")}
    effective = fields.get("effective", (list, type(None)), "a list")
    per_target = effective is not None and len(effective) == n_targets != n
    method["effective"] = fields.array("effective", n_targets if per_target else n, optional=True)
    method.update({name: fields.array(name, n_targets, optional=name != "losses")
                   for name in ("losses", "loss_low", "loss_high")})
    method.update({name: fields.number(name) for name in ("weighted_loss", "mean_loss")})
    method.update({name: fields.number(name, optional=True) for name in ("kkt", "joint_gap")})
    binding = fields.get("binding", list, "a list")
    for pair in binding:
        if not (isinstance(pair, list) and len(pair) == 2 and pair[0] in languages and pair[1] in _BINDING):
            raise fields.error("binding", f"holds {_as_text(pair)}, not a language and one of {', '.join(_BINDING)}")
    method["binding"] = [(language, _BINDING[bound]) for language, bound in binding]
    if (method["ratios"] < 0).any() or not math.isclose(method["ratios"].sum(), 1, abs_tol=0.01):
        raise fields.error("ratios", f"are negative or sum to {method['ratios'].sum():.4f}, not to 1")
    if (method["losses"] <= 0).any():
        raise fields.error("losses", "are not all positive")
    return method


def read_allocation(path: epath.PathLike) -> dict[str, Any]:
    """Returns allocation.json with its lists as float64 arrays, and `baseline`: the method to compare the others with.

    Raises:
      InputError: the file is missing or malformed; the message names the field.
    """
    fields = _Fields(path, read_json(path, "allocation"))
    format_name, version = fields.get("format", str, "a text"), fields.get("version", int, "a number")
    if (format_name, version) != (FORMAT, VERSION):
        raise InputError(f"{path}: format {format_name!r} version {version}; this reads {FORMAT!r} version {VERSION}")
    languages, targets = fields.names("languages"), fields.names("targets")
    n, t = len(languages), len(targets)
    methods = {name: _read_method(method, languages, t) for name, method in fields.object("methods").items()}
    best = fields.get("method", str, "the name of a method")
    if best not in methods:
        raise InputError(f"{path}: method {best!r} is not one of methods")
    law = fields.object("law")
    notes = law.get("notes", list, "a list of texts")
    transfer, predictions, effective = (
        None if fields.get(name, (dict, type(None)), "an object") is None else fields.object(name)
        for name in ("transfer", "predictions", "effective"))
    unique = fields.get("unique_tokens", (dict, type(None)), "an object")
    allocation = {
        "languages": languages, "targets": targets, "method": best, "methods": methods,
        "n_params": fields.number("n_params", positive=True), "tokens": fields.number("tokens", positive=True),
        "unique_tokens": None if unique is None else {
            name: _Fields(path, unique, "unique_tokens").number(name) for name in unique},
        "natural": fields.array("natural", n, optional=True), "weights": fields.array("weights", t),
        "weights_name": fields.get("weights_name", str, "a text"), "interval": fields.array("interval", 2),
        "constraints": fields.get("constraints", dict, "an object"),
        "law": {"name": law.get("name", str, "a text"), "family": law.get("family", (str, type(None)), "a text"),
                "notes": [str(note) for note in notes]},
        "transfer": transfer and {
            **{name: transfer.array(name, t, n, gaps=True, optional=name in ("low", "high"))
               for name in ("values", "low", "high")},
            "identified": transfer.array("identified", t, n, gaps=True) > 0,
            "meaning": transfer.get("meaning", str, "a text")},
        "validation": {name: {**{score: scores.array(score, t, gaps=True) for score in ("r2", "mae", "spearman")},
                              "seconds": scores.number("seconds", optional=True)}
                       for name, scores in fields.object("validation").items()},
        "predictions": predictions and _read_rows(predictions, ("measured", "predicted"), ("n_params", "tokens"), t),
        "effective": effective and _read_rows(effective, ("ratio", "effective", "predicted"), ("tokens",), t),
        "proxies": {**fields.get("proxies", dict, "an object"),
                    **{name: fields.object("proxies").get(name, int, "a count") for name in ("runs", "rows")}},
        "provenance": fields.get("provenance", dict, "an object"),
    }
    cap = allocation["constraints"].get("max_epochs")
    if cap is not None and (not isinstance(cap, int | float) or isinstance(cap, bool) or not 0 < cap < math.inf):
        raise InputError(f"{path}: constraints.max_epochs is {_as_text(cap)}, not a positive number")
    others = [name for name in ("natural", "uniform") if name in methods and name != best]
    return {**allocation, "baseline": others[0] if others else None}


def _read_rows(fields: _Fields, matrices: Sequence[str], lists: Sequence[str], n_targets: int) -> dict[str, np.ndarray]:
    """Returns arrays `[rows, targets]`, with gaps, and lists `[rows]`, by name."""
    rows = len(fields.get("tokens", list, "a list"))
    return {**{name: fields.array(name, rows) for name in lists},
            **{name: fields.array(name, rows, n_targets, gaps=True) for name in matrices}}
