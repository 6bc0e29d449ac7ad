"""The report of an allocation: one self-contained HTML file, and each figure as a file of its own for papers.

Made from allocation.json, which `data_mixtures.climb.allocate` writes. Lists are in the order of `languages` (what the
mixture is made of) or `targets` (whose losses are predicted); null stands where a method has no such thing:

    format "mlx-allocation", version 1, languages, targets
    n_params, tokens      the model size N and the training tokens D the ratios are meant for
    unique_tokens         language -> tokens of unique text, or null;  natural: its ratios, or null
    weights, weights_name of the losses, per target, and where they come from
    constraints           floor, max_epochs, fixed {language: ratio}, as far as set
    law                   name, family, notes: what a user must know of the fit
    method                the recommended one of `methods`
    methods               name -> ratios, ratio_low, ratio_high, losses, loss_low, loss_high (predicted by the
                          recommended law), effective (per language, or per target where their numbers differ), epochs,
                          weighted_loss, mean_loss, kkt, joint_gap,
                          binding [[language, "floor" | "max_epochs" | "fixed"], ...]
    transfer              values, low, high, identified [[per language] per target], meaning; or null
    validation            law -> r2, mae, spearman per target, cross-validated, and seconds
    predictions           run, n_params, tokens, measured, predicted [[per target] per row], out of fold; or null
    effective             ratio, effective (measured), predicted [[per target] per row], tokens; or null
    proxies               runs, rows, and path where known;  provenance: what else is worth keeping
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.climb import ALLOCATION_FORMAT, ALLOCATION_VERSION
from data_mixtures.climb.plots import Plots, display_name, thinning
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_atomic
from mlx_pretrain.reports.figures import number, plot_style, render_page, save_figures
from mlx_pretrain.reports.run_history import parse_time

_BINDING = {"floor": "floor", "max_epochs": "epoch cap", "fixed": "fixed"}


class _Fields:
    """Access to an object of the file that stops with the file and the field where something is not as it must be."""

    def __init__(self, path: epath.PathLike, value: Any, place: str = ""):
        self._path, self._place = path, place
        if not isinstance(value, dict):
            raise InputError(f"{path}: {place or 'the file'} is not a JSON object")
        self._value = value

    def _fail(self, name: str, what: str) -> InputError:
        return InputError(f"{self._path}: {self._place + '.' if self._place else ''}{name} {what}")

    def get(self, name: str, kind: type | tuple[type, ...], what: str) -> Any:
        """The field, which must be there and of one of the kinds; a boolean is not a number."""
        value = self._value.get(name)
        if name not in self._value:
            raise self._fail(name, "is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._fail(name, f"is {_short(value)}, not {what}")
        return value

    def object(self, name: str) -> "_Fields":
        """The field, which must be an object."""
        value = self.get(name, dict, "an object")
        return _Fields(self._path, value, f"{self._place + '.' if self._place else ''}{name}")

    def items(self) -> list[tuple[str, "_Fields"]]:
        """The fields, each of which must be an object."""
        return [(name, self.object(name)) for name in self._value]

    def names(self, name: str) -> list[str]:
        """The field, which must be a list of different strings."""
        value = self.get(name, list, "a list of names")
        if not value or not all(isinstance(item, str) for item in value) or len(set(value)) < len(value):
            raise self._fail(name, "is not a list of different names")
        return value

    def number(self, name: str, optional: bool = False, positive: bool = False) -> float | None:
        """The field, which must be a finite number, or null where `optional`."""
        value = self.get(name, (int, float, type(None)) if optional else (int, float), "a number")
        if value is not None and not (math.isfinite(value) and (value > 0 or not positive)):
            raise self._fail(name, f"is {value}, not a {'positive' if positive else 'finite'} number")
        return value

    def array(self, name: str, *shape: int, optional: bool = False, gaps: bool = False) -> np.ndarray | None:
        """The field as float64 of that shape; null gives None where `optional`; with `gaps`, nulls in it give NaN."""
        value = self.get(name, (list, type(None)) if optional else list, "a list")
        if value is None:
            return None
        try:
            array = np.array(value, np.float64)
        except (ValueError, TypeError):
            raise self._fail(name, "is not an array of numbers") from None
        if array.shape != shape and not (array.size == 0 and math.prod(shape) == 0):
            raise self._fail(name, f"has the shape {_shape(array.shape)}, not {_shape(shape)}")
        if not np.isfinite(array if not gaps else array[~np.isnan(array)]).all():
            raise self._fail(name, "has values that are not finite")
        return array.reshape(shape)


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
            raise fields._fail("binding", f"holds {_short(pair)}, not a language and one of {', '.join(_BINDING)}")
    method["binding"] = [(language, _BINDING[bound]) for language, bound in binding]
    if (method["ratios"] < 0).any() or not math.isclose(method["ratios"].sum(), 1, abs_tol=0.01):
        raise fields._fail("ratios", f"are negative or sum to {method['ratios'].sum():.4f}, not to 1")
    if (method["losses"] <= 0).any():
        raise fields._fail("losses", "are not all positive")
    return method


def read_allocation(path: epath.PathLike) -> dict[str, Any]:
    """allocation.json with its lists as float64 arrays, and `baseline`: the method the others are compared with.

    Raises:
      InputError: the file is missing or malformed; the message names the field.
    """
    fields = _Fields(path, read_json(path, "allocation"))
    kind = fields.get("format", str, "a text"), fields.get("version", int, "a number")
    if kind != (ALLOCATION_FORMAT, ALLOCATION_VERSION):
        raise InputError(f"{path}: format {kind[0]!r} version {kind[1]}; this reads {ALLOCATION_FORMAT!r} version "
                         f"{ALLOCATION_VERSION}")
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
        "validation": {name: {**{score: one.array(score, t, gaps=True) for score in ("r2", "mae", "spearman")},
                              "seconds": one.number("seconds", optional=True)}
                       for name, one in fields.object("validation").items()},
        "predictions": predictions and _read_rows(predictions, ("measured", "predicted"), ("n_params", "tokens"), t),
        "effective": effective and _read_rows(effective, ("ratio", "effective", "predicted"), ("tokens",), t),
        "proxies": {**fields.get("proxies", dict, "an object"),
                    **{name: fields.object("proxies").get(name, int, "a count") for name in ("runs", "rows")}},
        "provenance": fields.get("provenance", dict, "an object"),
    }
    cap = allocation["constraints"].get("max_epochs")
    if cap is not None and (not isinstance(cap, int | float) or isinstance(cap, bool) or not 0 < cap < math.inf):
        raise InputError(f"{path}: constraints.max_epochs is {_short(cap)}, not a positive number")
    others = [name for name in ("natural", "uniform") if name in methods and name != best]
    return {**allocation, "baseline": others[0] if others else None}


def _read_rows(fields: _Fields, matrices: Sequence[str], lists: Sequence[str], n_targets: int) -> dict[str, np.ndarray]:
    """Arrays `[rows, targets]`, with gaps, and lists `[rows]`."""
    rows = len(fields.get("tokens", list, "a list"))
    return {**{name: fields.array(name, rows) for name in lists},
            **{name: fields.array(name, rows, n_targets, gaps=True) for name in matrices}}


def table(allocation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per language (and per target that is none), largest ratio first; None where there is no such number."""
    a, best = allocation, allocation["methods"][allocation["method"]]
    base = a["methods"][a["baseline"]] if a["baseline"] else None
    natural = a["natural"] if a["natural"] is not None else a["methods"].get("natural", {}).get("ratios")
    own = {name: k for k, name in enumerate(a["languages"])}
    losses = {name: k for k, name in enumerate(a["targets"])}

    def pick(values: np.ndarray | None, at: int | None) -> float | None:
        return None if values is None or at is None else float(values[at])

    rows = []
    for name in [*a["languages"], *(name for name in a["targets"] if name not in own)]:
        i, t = own.get(name), losses.get(name)
        effective = best["effective"]
        at = i if effective is None or len(effective) == len(own) else t
        loss, before = pick(best["losses"], t), pick(base and base["losses"], t)
        rows.append({
            "name": name, "natural": pick(natural, i), "ratio": pick(best["ratios"], i),
            "ratio_low": pick(best["ratio_low"], i), "ratio_high": pick(best["ratio_high"], i),
            "effective": pick(effective, at), "epochs": pick(best["epochs"], i), "loss": loss,
            "loss_low": pick(best["loss_low"], t), "loss_high": pick(best["loss_high"], t),
            "change": None if loss is None or before is None else loss / before - 1,
            "bound": ", ".join(bound for language, bound in best["binding"] if language == name),
        })
    return sorted(rows, key=lambda row: -(row["ratio"] or 0))


def summary(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """What the first lines say: the gain, how many languages gain, how well the law predicts, how far it reaches."""
    best, base = (allocation["methods"].get(allocation[name]) for name in ("method", "baseline"))
    found: dict[str, Any] = {"gain": None, "error": None, "reach": {}}
    if base:
        found["gain"] = best["weighted_loss"] / base["weighted_loss"] - 1
        moved = best["ratios"] - base["ratios"]
        order = [k for k in np.argsort(-np.abs(moved), kind="stable") if abs(moved[k]) >= 0.0005]
        found["moved"] = {
            word: [(allocation["languages"][k], base["ratios"][k], best["ratios"][k])
                   for k in order if sign * moved[k] > 0][:3] for word, sign in (("more", 1), ("less", -1))}
        found["better"] = int((best["losses"] < base["losses"]).sum())
        if best["loss_low"] is not None and best["loss_high"] is not None:
            found["surely_better"] = int((best["loss_high"] < base["losses"]).sum())
            found["surely_worse"] = int((best["loss_low"] > base["losses"]).sum())
    predictions = allocation["predictions"]
    if predictions is not None and len(predictions["tokens"]):
        error = np.abs(predictions["predicted"] / predictions["measured"] - 1)
        found["error"] = float(np.nanmean(error)) if np.isfinite(error).any() else None
        found["reach"] = {name: allocation[name] / float(predictions[name].max()) for name in ("n_params", "tokens")}
    return found


def share(value: float | None, digits: int = 2) -> str:
    """A ratio in per cent, two significant digits or `digits` decimals, whichever is more; a dash for None."""
    if value is None or value == 0:
        return "–" if value is None else "0"
    return number(100 * value, max(digits, 1 - math.floor(math.log10(abs(100 * value)))))


def laws(validation: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and worst scores of each law over the targets, best R2 first; None where no target has the score."""
    def over(values: np.ndarray, function: Any) -> float | None:
        values = values[np.isfinite(values)]
        return float(function(values)) if len(values) else None

    rows = [{"name": name, "seconds": one["seconds"], "r2": over(one["r2"], np.mean), "worst": over(one["r2"], np.min),
             "mae": over(one["mae"], np.mean), "spearman": over(one["spearman"], np.mean)}
            for name, one in validation.items()]
    return sorted(rows, key=lambda row: -math.inf if row["r2"] is None else -row["r2"])


@gin.configurable("climb_report")
def report(folder: epath.PathLike = gin.REQUIRED) -> None:
    """Writes the report of an allocation: FOLDER/report.html, and FOLDER/figures with each figure as SVG and PNG.

    Args:
      folder: where allocation.json lies.

    Raises:
      InputError: allocation.json is missing or malformed; nothing is written then.
    """
    folder = epath.Path(folder)
    allocation = read_allocation(folder / "allocation.json")
    with plot_style():
        figures = save_figures(Plots(allocation).all(), folder / "figures")
    n_targets = len(allocation["targets"])
    drawn = {name: (len(allocation[name]["tokens"]), thinning(len(allocation[name]["tokens"]), panels))
             for name, panels in (("predictions", n_targets), ("effective", 2 * n_targets)) if allocation[name]}
    methods = sorted(allocation["methods"].items(), key=lambda item: item[1]["weighted_loss"])
    page = render_page(
        epath.Path(__file__).parent / "report.html.j2",
        name=folder.absolute().name, a=allocation, best=allocation["methods"][allocation["method"]],
        base=allocation["methods"].get(allocation["baseline"]), methods=methods, figures=figures, drawn=drawn,
        method_name=display_name, started=parse_time(allocation["provenance"].get("started")),
        rows=table(allocation), share=share, summary=summary(allocation), laws=laws(allocation["validation"]))
    write_atomic(folder / "report.html", page)


if __name__ == "__main__":
    run(report, "data_mixtures.climb.report")
