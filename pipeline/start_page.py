"""The start page of a pipeline, OUTPUT/index.html: the figure of each stage that matters, and links to all reports.

Every figure is read from the files that the stages wrote; what a stage did not write is left out.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from mlx_pretrain import __version__
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import MANIFEST, read_manifest
from mlx_pretrain.files import file_sizes, read_json, read_jsonl, write_atomic
from mlx_pretrain.languages import LANGUAGES
from mlx_pretrain.reports.figures import ACCENT, MUTED, RULE, inline_svg, legend, plot_style, render_page, rows_panel
from mlx_pretrain.reports.numbers import compact
from mlx_pretrain.reports.run_history import mean_bits, per_language
from pipeline.settings import PipelineConfig
from pipeline.stages import Stage

PAGE = "index.html"
_MAX_SHEETS, _MAX_SAMPLES = 2, 12
_NOISE = 0.01  # bits per byte; one run each does not tell smaller differences
_FIGURE_WIDTH = 476  # CSS pixels, the widest that a phone shows whole: the page shrinks it


@dataclasses.dataclass(frozen=True)
class Card:
    """What the page tells of one part of the pipeline.

    Attributes:
      title: name of the part.
      value: its figure.
      unit: what the figure counts.
      note: a sentence to read it by.
      link: report below the pipeline's folder; None: there is none.
    """

    title: str
    value: str
    unit: str
    note: str
    link: str | None = None


def write_start_page(config: PipelineConfig, stages: Sequence[Stage], seconds: Mapping[str, float]) -> epath.Path:
    """Writes the page and returns its path.

    Args:
      config: the pipeline.
      stages: its stages.
      seconds: stage -> seconds that it took.
    """
    folder = config.folder
    evaluations = _evaluations(folder / "pretrain")
    ours, control = evaluations[-1] if evaluations else None, _last_evaluation(folder / "control/run")
    with plot_style():
        figure = inline_svg(_bits_figure(ours, control), "bits", "bits per byte by language") if ours else None
    sheets = sorted((folder / "video/selected/sheets").glob("*.png"))[:_MAX_SHEETS]
    page = render_page(
        epath.Path(__file__).parent / "start_page.html.j2", name=folder.name, output=config.output,
        version=__version__,
        cards=_cards(config, evaluations, control), figure=figure, steps=ours.get("step") if ours else None,
        ours=mean_bits(ours) if ours else None, control=mean_bits(control) if control else None,
        better=_better(ours, control) if ours and control else None, noise=_NOISE,
        kept_tokens=_kept_tokens(folder / "selected"), control_tokens=_kept_tokens(folder / "control/selected"),
        samples=[line for _, line in read_jsonl(folder / "pretrain/samples.jsonl")][:_MAX_SAMPLES]
        if config.prompts and (folder / "pretrain/samples.jsonl").exists() else [],
        sheets=[str(path.relative_to(folder)) for path in sheets],
        stages=[(stage, seconds.get(stage.name)) for stage in stages], total=sum(seconds.values()))
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def _evaluations(run_dir: epath.Path) -> list[dict[str, Any]]:
    """Returns the evaluations of a run on held-out data, in order."""
    path = run_dir / "metrics.jsonl"
    return [line for _, line in read_jsonl(path) if line.get("kind") == "eval"] if path.exists() else []


def _last_evaluation(run_dir: epath.Path) -> dict[str, Any] | None:
    """Returns the last evaluation on held-out data of a run; None without one."""
    return next(reversed(_evaluations(run_dir)), None)


def _kept_tokens(selected: epath.Path) -> int | None:
    """Returns the tokens of a selection, of the rater's tokenizer; None without one."""
    path = selected / "selection.json"
    return sum(language["kept_tokens"] for language in read_json(path)["languages"]) if path.exists() else None


def _better(ours: Mapping[str, Any], control: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the number of languages with fewer bits per byte than in the control, and of those compared."""
    first, second = (per_language(line, "bits_per_byte") for line in (ours, control))
    shared = first.keys() & second.keys()
    return sum(first[language] < second[language] for language in shared), len(shared)


def _bits_figure(ours: Mapping[str, Any], control: Mapping[str, Any] | None) -> Figure:
    """Returns the bits per byte of each language, beside those of the control."""
    bits = per_language(ours, "bits_per_byte")
    other = per_language(control, "bits_per_byte") if control else {}
    languages = sorted(bits, key=bits.get)
    labels = [LANGUAGES.get(language, (language, language))[1] for language in languages]
    figure, axes, rows = rows_panel("Bits per byte of held-out text", labels, width=_FIGURE_WIDTH)
    if other:
        shared = [row for row, language in zip(rows, languages) if language in other]
        ends = [(bits[languages[row]], other[languages[row]]) for row in shared]
        axes.hlines(shared, *zip(*((min(pair), max(pair)) for pair in ends)), color=RULE, linewidth=2.4)
        axes.plot([pair[1] for pair in ends], shared, "o", color=MUTED, markersize=5.5, label="random text, natural")
    axes.plot([bits[language] for language in languages], rows, "o", color=ACCENT, markersize=5.5,
              label="this pipeline")
    if other:
        legend(axes)
    return figure


def _cards(
    config: PipelineConfig, evaluations: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None
) -> list[Card]:
    """Returns the parts of the pipeline that have results, in order."""
    folder = config.folder
    makers = (_rater_card, _removal_card, _selection_card, _tokens_card, _climb_card)
    cards = [maker(folder) for maker in makers]
    if evaluations:
        first, ours = evaluations[0], evaluations[-1]
        note = f"mean over languages after {ours['step']:,} steps"
        if first["step"] == 0 < ours["step"]:
            note += f", {mean_bits(first):.3f} before"
        if control:
            note += f"; {mean_bits(control):.3f} with about as much random text at natural weights"
        cards.append(Card("Pretrain", f"{mean_bits(ours):.3f}", "bits per byte", note, "pretrain/report.html"))
    cards += [_evaluation_card(folder, config.without_tasks), _frames_card(folder)]
    return [card for card in cards if card is not None]


def _rater_card(folder: epath.Path) -> Card | None:
    last = _last_evaluation(folder / "rater/run")
    if last is None or "accuracy" not in last:
        return None
    languages = _count(len(per_language(last, "accuracy").keys() - {"monolingual", "cross-lingual"}), "language")
    return Card("Rate", f"{100 * last['accuracy']:.0f} %", "of held-out pairs in order",
                f"the rater's agreement with English preferences carried to {languages}; chance is 50 %")


def _removal_card(folder: epath.Path) -> Card | None:
    counts = {}
    for name, words in (("languages", "in another language"), ("duplicates", "that repeat others"),
                        ("decontaminate", "with evaluation items")):
        lists = folder / f"removed/{name}/removed"
        if lists.exists():
            counts[words] = sum(len(read_jsonl(lists / path)) for path in file_sizes(lists))
    if not counts:
        return None
    note = ", ".join(f"{count:,} {words}" for words, count in counts.items())
    checked = folder / "removed/languages/report.json"
    verdicts = read_json(checked)["languages"] if checked.exists() else {}
    if lost := [language for language, found in verdicts.items() if found.keys() == {"removed"}]:
        note += f"; nothing is left of {', '.join(lost)}"
    return Card("Remove", f"{sum(counts.values()):,}", "documents", note)


def _selection_card(folder: epath.Path) -> Card | None:
    path = folder / "selected/selection.json"
    if not path.exists():
        return None
    languages = read_json(path)["languages"]
    kept, of = (sum(language[key] for language in languages) for key in ("kept_documents", "documents"))
    return Card("Select", f"{kept:,}", "documents kept", f"of {of:,} that were rated, the best of every language and "
                "source", "selected/report.html" if (folder / "selected/report.html").exists() else None)


def _tokens_card(folder: epath.Path) -> Card | None:
    if not (folder / "tokens" / MANIFEST).exists():
        return None
    parts = read_manifest(folder / "tokens").splits["train"]
    return Card("Export", compact(sum(part.tokens for part in parts.values())), "tokens",
                f"to train on, in {_count(len(parts), 'language')}")


def _climb_card(folder: epath.Path) -> Card | None:
    path = folder / "climb/rates.json"
    if not path.exists():
        return None
    rates = load_rates(path)
    largest, smallest = max(rates, key=rates.get), min(rates, key=rates.get)
    note = f"the largest share, {largest}; the smallest is {100 * rates[smallest]:.1f} %, {smallest}"
    if not (folder / "climb/allocation.json").exists():
        return Card("Mixture", f"{100 * rates[largest]:.1f} %", "of the training text",
                    f"{note}; natural shares, small languages raised, as no proxy runs were made")
    allocation = read_json(folder / "climb/allocation.json")
    validation = allocation["validation"].get(allocation["law"]["name"])
    if validation:
        note += f"; R² of held-out proxy runs {statistics.fmean(validation['r2']):.2f}"
    return Card("Climb", f"{100 * rates[largest]:.1f} %", f"from {allocation['proxies']['runs']} proxy runs", note,
                "climb/report.html" if (folder / "climb/report.html").exists() else None)


def _evaluation_card(folder: epath.Path, without_tasks: Sequence[str]) -> Card | None:
    ours, control = (_consistency(folder / name) for name in ("evals", "control/evals"))
    if ours is None:
        return None
    accuracy = ours["mean_accuracy"]
    note = f"mean over {_count(len(ours['languages']), 'language')}, interval {_percent(accuracy, 'low')} to " \
           f"{_percent(accuracy, 'high')} %"
    if ours.get("guessing"):
        note += f"; guessing gives {100 * ours['guessing']:.1f} %"
    if ours.get("mlc"):
        note += f"; two languages agree on {_percent(ours['mlc'], 'value')} % of the answers, by chance on " \
                f"{_percent(ours['chance'], 'value')} %"
    if control:
        note += f"; the comparison has {_percent(control['mean_accuracy'], 'value')} %"
    if without_tasks:
        note += f"; not evaluated, as there are no tasks in them: {', '.join(without_tasks)}"
    return Card("Evaluate", f"{_percent(accuracy, 'value')} %", "accuracy", note, "evals/report.html")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _percent(interval: Mapping[str, float], name: str) -> str:
    return f"{100 * interval[name]:.1f}"


def _consistency(folder: epath.Path) -> dict[str, Any] | None:
    """Returns the results of the first task of the latest evaluation in a folder; None without one."""
    files = sorted(folder.glob("results_*.json")) if folder.exists() else []
    tasks = read_json(files[-1])["consistency"] if files else {}
    return next(iter(tasks.values()), None)


def _frames_card(folder: epath.Path) -> Card | None:
    last = _last_evaluation(folder / "video/voyager")
    if last is None or "ranking_accuracy" not in last:
        return None
    return Card("Choose frames", f"{100 * last['ranking_accuracy']:.0f} %", "of frame combinations in order",
                "Frame-Voyager on held-out rendered videos; chance is 50 %, and this short training learns next to "
                "nothing")
