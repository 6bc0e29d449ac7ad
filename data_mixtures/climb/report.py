"""The report of an allocation: one self-contained HTML file, and each figure as a separate file for papers.

    python -m data_mixtures.climb.report --gin.climb_report.folder=runs/sample/climb

It is made from allocation.json alone; see `data_mixtures.climb.allocation_file`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.climb import allocation_file
from data_mixtures.climb.plot_parts import thinning
from data_mixtures.climb.plots import Plots, display_name
from mlx_pretrain.command_line import run
from mlx_pretrain.files import write_atomic
from mlx_pretrain.reports.figures import plot_style, render_page, save_figures
from mlx_pretrain.reports.numbers import number
from mlx_pretrain.reports.run_history import parse_time


@gin.configurable("climb_report")
@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Parameters of the report.

    Attributes:
      folder: folder with allocation.json, in which the report is written.
    """

    folder: str = gin.REQUIRED


def table(allocation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per language (and per target that is none), largest ratio first; None for missing numbers."""
    a, best = allocation, allocation["methods"][allocation["method"]]
    base = a["methods"][a["baseline"]] if a["baseline"] else None
    natural = a["natural"] if a["natural"] is not None else a["methods"].get("natural", {}).get("ratios")
    language_index = {name: k for k, name in enumerate(a["languages"])}
    target_index = {name: k for k, name in enumerate(a["targets"])}

    def pick(values: np.ndarray | None, at: int | None) -> float | None:
        return None if values is None or at is None else float(values[at])

    rows = []
    for name in [*a["languages"], *(name for name in a["targets"] if name not in language_index)]:
        i, t = language_index.get(name), target_index.get(name)
        effective = best["effective"]
        at = i if effective is None or len(effective) == len(language_index) else t
        loss, base_loss = pick(best["losses"], t), pick(base and base["losses"], t)
        rows.append({
            "name": name, "natural": pick(natural, i), "ratio": pick(best["ratios"], i),
            "ratio_low": pick(best["ratio_low"], i), "ratio_high": pick(best["ratio_high"], i),
            "effective": pick(effective, at), "epochs": pick(best["epochs"], i), "loss": loss,
            "loss_low": pick(best["loss_low"], t), "loss_high": pick(best["loss_high"], t),
            "change": None if loss is None or base_loss is None else loss / base_loss - 1,
            "bound": ", ".join(bound for language, bound in best["binding"] if language == name),
        })
    return sorted(rows, key=lambda row: -(row["ratio"] or 0))


def summary(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of the first lines: the gain, the languages that gain, the law's error and its reach."""
    best, base = (allocation["methods"].get(allocation[name]) for name in ("method", "baseline"))
    figures: dict[str, Any] = {"gain": None, "error": None, "reach": {}}
    if base:
        figures["gain"] = best["weighted_loss"] / base["weighted_loss"] - 1
        moved = best["ratios"] - base["ratios"]
        order = [k for k in np.argsort(-np.abs(moved), kind="stable") if abs(moved[k]) >= 0.0005]
        figures["moved"] = {
            word: [(allocation["languages"][k], base["ratios"][k], best["ratios"][k])
                   for k in order if sign * moved[k] > 0][:3] for word, sign in (("more", 1), ("less", -1))}
        figures["better"] = int((best["losses"] < base["losses"]).sum())
        if best["loss_low"] is not None and best["loss_high"] is not None:
            figures["surely_better"] = int((best["loss_high"] < base["losses"]).sum())
            figures["surely_worse"] = int((best["loss_low"] > base["losses"]).sum())
    predictions = allocation["predictions"]
    if predictions is not None and len(predictions["tokens"]):
        error = np.abs(predictions["predicted"] / predictions["measured"] - 1)
        figures["error"] = float(np.nanmean(error)) if np.isfinite(error).any() else None
        figures["reach"] = {name: allocation[name] / float(predictions[name].max()) for name in ("n_params", "tokens")}
    return figures


def share(value: float | None, digits: int = 2) -> str:
    """Returns a ratio in per cent, with `digits` decimals, or two significant digits if more; a dash for None."""
    if value is None or value == 0:
        return "–" if value is None else "0"
    return number(100 * value, max(digits, 1 - math.floor(math.log10(abs(100 * value)))))


def laws(validation: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and worst scores of each law over the targets, best R2 first; None where no target has the score."""
    def over(values: np.ndarray, function: Any) -> float | None:
        values = values[np.isfinite(values)]
        return float(function(values)) if len(values) else None

    rows = [{"name": name, "seconds": scores["seconds"], "r2": over(scores["r2"], np.mean),
             "worst": over(scores["r2"], np.min), "mae": over(scores["mae"], np.mean),
             "spearman": over(scores["spearman"], np.mean)} for name, scores in validation.items()]
    return sorted(rows, key=lambda row: -math.inf if row["r2"] is None else -row["r2"])


def main(config: ReportConfig) -> None:
    """Writes the report of an allocation: FOLDER/report.html, and FOLDER/figures with each figure as SVG and PNG.

    Raises:
      InputError: allocation.json is missing or malformed; nothing is written then.
    """
    folder = epath.Path(config.folder)
    allocation = allocation_file.read_allocation(folder / allocation_file.NAME)
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
    print(folder / "report.html")


if __name__ == "__main__":
    run(main, ReportConfig, "data_mixtures.climb.report")
