"""Draws contact sheets: all candidate frames of a question, the chosen ones marked, the curve of their scores below."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mlx_pretrain.reports.figures import ACCENT, INK, MUTED, PAPER, WARM, plot_style

_COLUMNS = 16
_WIDTH = 900  # CSS pixels


def contact_sheet(
    frames: np.ndarray,
    times: np.ndarray,
    indices: np.ndarray,
    title: str,
    subtitle: str = "",
    curves: Mapping[str, np.ndarray] | None = None,
    spans: tuple[tuple[float, float], ...] = (),
) -> Figure:
    """Draws the contact sheet of one question.

    Args:
      frames: candidates uint8 `[candidates, height, width, 3]`.
      times: float `[candidates]`, seconds.
      indices: the chosen candidates, int `[chosen]`.
      title, subtitle: the question, and a line below it.
      curves: name -> score of every candidate `[candidates]`; the chosen candidates are marked on the first one.
      spans: (start, end) of the evidence in seconds, shaded in the curve.
    """
    curves = curves or {}
    count = len(frames)
    columns = min(_COLUMNS, count)
    rows, cell = -(-count // columns), (_WIDTH - 28) / columns
    height = cell * frames.shape[1] / frames.shape[2] + 18
    top, below = 58, 130 if curves else 12
    total = top + rows * height + below
    with plot_style():
        figure = Figure(figsize=(_WIDTH / 72, total / 72))
        figure.text(14 / _WIDTH, 1 - 24 / total, title, fontsize=13, color=INK, weight="bold")
        figure.text(14 / _WIDTH, 1 - 43 / total, subtitle, fontsize=10.5, color=MUTED)
        chosen = set(np.asarray(indices).tolist())
        for index, frame in enumerate(frames):
            row, column = divmod(index, columns)
            left, bottom = 14 + column * cell + 2, total - top - (row + 1) * height + 16
            axes = figure.add_axes((left / _WIDTH, bottom / total, (cell - 4) / _WIDTH, (height - 18) / total))
            axes.imshow(frame, interpolation="nearest" if frame.shape[0] < 100 else "antialiased", aspect="auto",
                        alpha=1.0 if index in chosen else 0.55)
            axes.set_axis_off()
            if index in chosen:
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=WARM,
                                         linewidth=3.2, clip_on=False))
            axes.set_title(f"{times[index]:.1f} s", fontsize=7.5, y=-0.02, va="top", loc="center", pad=0,
                           color=WARM if index in chosen else MUTED)
        if curves:
            axes = figure.add_axes((52 / _WIDTH, 34 / total, (_WIDTH - 52 - 20) / _WIDTH, (below - 62) / total))
            for start, end in spans:
                axes.axvspan(start, end, color=ACCENT, alpha=0.12, linewidth=0)
            for (name, curve), colour in zip(curves.items(), (ACCENT, MUTED, INK)):
                axes.plot(times, curve, color=colour, label=name, marker="o", markersize=2.5, linewidth=1.3)
            curve = next(iter(curves.values()))
            marked = sorted(chosen)
            axes.plot(times[marked], curve[marked], "o", color=WARM, markersize=7, markeredgecolor=PAPER,
                      label="chosen")
            axes.set_xlim(0, times[-1] + times[0])
            axes.set_xlabel("Seconds")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, fontsize=9.5)
    return figure
