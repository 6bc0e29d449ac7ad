"""Compares raters with people: `python -m raters.human_agreement --gin_file=gin/raters/human_agreement.gin`.

Reads documents that people rated (`raters.human_labels`) and scores of the same documents: made by `raters.score`,
joined by id and language, or made now by raters that read the texts in the label files. Writes a folder, whole or not
at all:

    human_agreement.json    figures and provenance
    report.html, figures/   the same to look at

Agreement is Spearman's rank correlation of the scores with the mean of a document's ratings, within each language,
because scores need not be comparable between languages, and its mean over languages. What people themselves reach is
measured where a document has several ratings: the correlation of one person's rating with the mean of the others', and
beside it that of the rater with the same mean of the others (comparing one rater with one person; our formulation).
Intervals are percentiles over resampled documents, each in all its languages together: translations of a document are
not documents of their own.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath
from matplotlib.figure import Figure

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_atomic, write_json
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.reports.figures import (
    ACCENT,
    GREEN,
    INK,
    MUTED,
    WARM,
    legend,
    plot_style,
    render_page,
    rows_panel,
    save_figures,
    short_label,
)
from raters.human_labels import LabelledDocument, read_labels
from raters.languages import subtag_or_code
from raters.rater_plugins.base import Rater
from raters.scoring.chunks import Preparation
from raters.scoring.head_fitting import spearman
from raters.scoring.quality_scorer import QualityScorer
from raters.scoring.shards import SCORES

FORMAT, VERSION = "mlx-human-agreement", 1
RESULT, REPORT, FIGURES = "human_agreement.json", "report.html", "figures"
_COLOURS = (ACCENT, WARM, GREEN, MUTED)
_DRAWS = 100  # of a person per document, for the estimate of what people reach


@gin.configurable("human_agreement")
@dataclasses.dataclass(frozen=True)
class HumanAgreementConfig:
    """Parameters of the comparison.

    Attributes:
      labels: label files: path or glob, or a list of them.
      output: folder for the result and the report.
      scores: folder of `raters.score`, or several, of one rater each.
      raters: raters that score the texts of the label files now, e.g. [@QualityScorer(), @Heuristics()].
      min_documents: least documents of a language, rated and scored, for a correlation.
      resamples: resamples of the documents for the intervals.
      confidence: share of the resamples inside an interval.
      seed: seed of the resamples.
      overwrite: replaces an output made from other files or settings.
    """

    labels: str | Sequence[str] = gin.REQUIRED
    output: str = gin.REQUIRED
    scores: str | Sequence[str] = ()
    raters: Sequence[QualityScorer | Rater] = ()
    min_documents: int = 20
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if not self.scores and not self.raters:
            raise InputError("human_agreement: no scores; set human_agreement.scores to a folder of raters.score, or "
                             "human_agreement.raters to raters of the labelled texts")
        for name, least in (("min_documents", 3), ("resamples", 1)):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= least):
                raise InputError(f"human_agreement.{name} = {getattr(self, name)!r}: must be a whole number, at least "
                                 f"{least}")
        if not 0 < self.confidence < 1:
            raise InputError(f"human_agreement.confidence = {self.confidence!r}: must be between 0 and 1")


def score_files(folder: epath.PathLike) -> list[epath.Path]:
    """Returns the score files of `raters.score` in a folder, up to four folders deep.

    Raises:
      InputError: there is none.
    """
    files = sorted(path for level in ("*", "*/*", "*/*/*", "*/*/*/*", "*/*/*/*/*")
                   for path in epath.Path(folder).glob(level + SCORES))
    if not files:
        raise InputError(f"{folder}: no scores of raters.score in it (*{SCORES})")
    return files


def joined_scores(folder: epath.PathLike, documents: Sequence[LabelledDocument]) -> tuple[str, np.ndarray]:
    """Reads the scores of labelled documents in a folder of `raters.score`.

    A score belongs to the document with its id and language; a score of undetermined language to the one with its id.

    Returns:
      The rater's name, and its scores, float64 `[documents]`, nan where there is none.

    Raises:
      InputError: there is no score file, or a damaged one; scores of several raters, or two that differ of one
        document; or none of the documents has a score.
    """
    wanted = {document.id for document in documents}
    scores: dict[tuple[str, str], float] = {}
    raters: set[str] = set()
    for path in score_files(folder):
        try:
            with path.open("rb") as file:
                table = pa.parquet.read_table(file, columns=["id", "language", "quality_score", "rater"])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as scores: {str(error).splitlines()[0]}") from None
        raters.update(table["rater"].unique().to_pylist())
        for name, code, score in zip(*(table[key].to_pylist() for key in ("id", "language", "quality_score"))):
            if name in wanted and score is not None and np.isfinite(score):
                key = name, subtag_or_code(code or UNDETERMINED)
                if scores.setdefault(key, score) != score:
                    raise InputError(f"{path}: document {name!r} in {key[1]!r} has two scores that differ; score the "
                                     "label files themselves (human_agreement.raters) where their ids are not unique")
    if len(raters) > 1:
        raise InputError(f"{folder}: scores of several raters: {', '.join(sorted(map(str, raters)))}")
    values = np.array([scores.get((one.id, subtag_or_code(one.language)), scores.get((one.id, UNDETERMINED), np.nan))
                       for one in documents], np.float64)
    if not np.isfinite(values).any():
        raise InputError(f"{folder}: none of the {len(documents):,} labelled documents has a score, by id and "
                         f"language; the first is {documents[0].id!r} in {documents[0].language!r}")
    return next(iter(raters)), values


def scores_of_texts(rater: QualityScorer | Rater, documents: Sequence[LabelledDocument]) -> tuple[str, np.ndarray]:
    """Scores the texts of labelled documents; returns as `joined_scores`.

    Raises:
      InputError: a document has no text.
    """
    if without := [one.id for one in documents if not one.text.strip()]:
        raise InputError(f"human_agreement.raters: {len(without):,} labelled documents have no text, the first is "
                         f"{without[0]!r}; join scores by id instead (human_agreement.scores)")
    texts = [Document(one.id, one.text, one.language, "", number) for number, one in enumerate(documents, 1)]
    if not isinstance(rater, QualityScorer):
        return rater.name, rater.score(texts)
    prepared = Preparation(rater.tokenizer, rater.chunk_length)(texts)
    (_, of_chunks), = rater.bulk([(None, prepared.chunks)])
    return rater.name, rater.document_scores(of_chunks, prepared.owners, prepared.weights, len(texts))[0]


@dataclasses.dataclass(frozen=True)
class RatedLanguage:
    """The documents of a language that have ratings and a rater's score.

    Attributes:
      own: index of each document's id among all ids, `[documents]`.
      score: the rater's, `[documents]`.
      ratings: `[documents, people]`, nan beyond a document's last.
    """

    own: np.ndarray
    score: np.ndarray
    ratings: np.ndarray

    @functools.cached_property
    def _count(self) -> np.ndarray:
        return np.isfinite(self.ratings).sum(axis=1)

    @functools.cached_property
    def _total(self) -> np.ndarray:
        return np.nansum(self.ratings, axis=1)

    @property
    def several(self) -> np.ndarray:
        """Mask `[documents]` of those with several ratings."""
        return self._count > 1

    def with_mean(self, rows: np.ndarray) -> float:
        """Returns the correlation of the rater with the mean rating, over some documents."""
        return spearman(self.score[rows], self._total[rows] / self._count[rows])

    def with_others(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
        """Draws a person of each document; returns the correlations of (person, rater) with the mean of the others.

        Documents with one rating among `rows` are left out.
        """
        rows = rows[self.several[rows]]
        if len(rows) < 3:
            return np.nan, np.nan
        person = self.ratings[rows, (rng.random(len(rows)) * self._count[rows]).astype(np.int64)]
        others = (self._total[rows] - person) / (self._count[rows] - 1)
        return spearman(person, others), spearman(self.score[rows], others)


def compare(documents: Sequence[LabelledDocument], scores: np.ndarray, config: HumanAgreementConfig) -> dict[str, Any]:
    """Compares a rater with people; see the module's text.

    Args:
      documents: the documents; those without a rating are left out.
      scores: float64 `[documents]`, nan where the rater has none.
      config: least documents, resamples, confidence and seed.

    Returns:
      JSON: "spearman" and "interval", of the mean over languages; "person" and "rater_beside_person" with intervals, of
      the mean over the languages with enough documents of several ratings; "languages", the same of each. None where
      there are too few documents, or all scores or ratings are equal.
    """
    names = sorted({one.language for one in documents})
    ids = {name: index for index, name in enumerate(sorted({one.id for one in documents}))}
    most = max((len(one.ratings) for one in documents), default=0)
    rated: dict[str, RatedLanguage] = {}
    for name in names:
        rows = [(one, score) for one, score in zip(documents, scores)
                if one.language == name and one.ratings and np.isfinite(score)]
        rated[name] = RatedLanguage(
            np.array([ids[one.id] for one, _ in rows], np.int64), np.array([score for _, score in rows], np.float64),
            np.array([[*one.ratings, *[np.nan] * (most - len(one.ratings))] for one, _ in rows]).reshape(-1, most))
    enough = {name: one for name, one in rated.items() if len(one.score) >= config.min_documents}
    beside = {name for name, one in enough.items() if one.several.sum() >= config.min_documents}

    def figures(rows_of: Mapping[str, np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
        """Returns (rater with the mean, person, rater beside the person), by language and in the mean: `[n + 1, 3]`."""
        values = np.full((len(enough), 3), np.nan)
        for row, (name, one) in zip(values, enough.items()):
            row[0] = one.with_mean(rows_of[name])
            if name in beside:
                row[1:] = _mean(np.array([one.with_others(rows_of[name], rng) for _ in range(draws)]))
        return np.vstack([values, _mean(values)])

    rng = np.random.default_rng(config.seed)
    estimate = figures({name: np.arange(len(one.score)) for name, one in enough.items()}, _DRAWS, rng)
    resampled = np.full((config.resamples, *estimate.shape), np.nan)
    for sample in resampled:
        copies = np.bincount(rng.integers(len(ids), size=len(ids)), minlength=len(ids))
        rows_of = {name: np.repeat(np.arange(len(one.score)), copies[one.own]) for name, one in enough.items()}
        sample[:] = figures(rows_of, 1, rng)
    tail = (1 - config.confidence) / 2
    bounds = np.moveaxis(_quantiles(resampled, (tail, 1 - tail)), 0, -1)
    rows = dict(zip([*enough, None], zip(estimate, bounds)))

    def as_json(name: str | None) -> dict[str, Any]:
        values, intervals = rows.get(name, (np.full(3, np.nan), np.full((3, 2), np.nan)))
        return {key: value for (one, interval), label in zip(zip(values, intervals), (
            ("spearman", "interval"), ("person", "person_interval"),
            ("rater_beside_person", "rater_beside_person_interval")))
            for key, value in zip(label, (_number(one), [_number(bound) for bound in interval]
                                          if np.isfinite(interval).all() and np.isfinite(one) else None))}

    return {**as_json(None), "languages": [
        {"language": name, "documents": len(one.score), "several_ratings": int(one.several.sum()), **as_json(name)}
        for name, one in rated.items()]}


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the means of the columns over the rows that have a number; nan for a column without one."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def _quantiles(values: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    """Returns the quantiles over the first axis without nan, `[2, ...]`; nan where no value is known."""
    flat = values.reshape(len(values), -1).T
    return np.array([np.quantile(known, at) if len(known := row[np.isfinite(row)]) else (np.nan, np.nan)
                     for row in flat]).reshape(-1, 2).T.reshape(2, *values.shape[1:])


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def describe_labels(documents: Sequence[LabelledDocument]) -> list[dict[str, Any]]:
    """Returns counts of each language: documents, ratings, people, labels as problematic, and documents by rating."""
    by_language: dict[str, list[LabelledDocument]] = {}
    for document in documents:
        by_language.setdefault(document.language, []).append(document)
    return [{
        "language": name, "documents": len(own), "ratings": sum(len(one.ratings) for one in own),
        "people": len({person for one in own for person in one.people}) or None,
        "without_rating": sum(not one.ratings for one in own), "problematic": sum(one.problematic for one in own),
        "distribution": {f"{rating:g}": count for rating, count in sorted(Counter(
            rating for one in own for rating in one.ratings).items())},
    } for name, own in sorted(by_language.items())]


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure, str]]:
    """Yields (name, figure, description) of the agreement by language, and beside one person where that is known."""
    languages = [one["language"] for one in result["labels"]]
    labels = [*map(functools.partial(short_label, longest=12), languages), "mean"]
    for name, title, keys in (
        ("agreement", "Rank correlation with people's mean rating", ("spearman", "interval")),
        ("beside_people", "Rank correlation with the other people's mean",
         ("rater_beside_person", "rater_beside_person_interval")),
    ):
        marks = [(rater["rater"], colour, [*rater["languages"], rater], *keys)
                 for rater, colour in zip(result["raters"], _COLOURS)]
        if name == "beside_people":
            first = result["raters"][0]
            marks.insert(0, ("one person", INK, [*first["languages"], first], "person", "person_interval"))
        if not any(row[key] is not None for _, _, rows, key, _ in marks for row in rows):
            continue
        figure, axes, rows = rows_panel(title, labels, row=max(18, 9 * len(marks)), top=46)
        low = 0.0
        for index, (label, colour, values, key, interval) in enumerate(marks):
            at = rows + 0.5 * ((index + 0.5) / len(marks) - 0.5)
            known = [i for i, row in enumerate(values) if row[key] is not None]
            for i in known:
                if values[i][interval] is not None:
                    axes.plot(values[i][interval], [at[i]] * 2, color=colour, linewidth=1.4)
                    low = min(low, values[i][interval][0])
            axes.plot([values[i][key] for i in known], at[known], "o", color=colour, markersize=4.5, linestyle="none",
                      label=short_label(label, 24))
            low = min([low, *(values[i][key] for i in known)])
        axes.set_xlim(min(-0.05, low - 0.05), 1.02)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.axhline(len(languages) - 0.5, color=MUTED, linewidth=0.9)
        legend(axes)
        yield name, figure, f"{title}, by language, with intervals"


def main(config: HumanAgreementConfig) -> None:
    """Compares raters with people, and writes the result and its report.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    documents, files = read_labels(config.labels)
    folders = [config.scores] if isinstance(config.scores, str) else list(config.scores)
    inputs = {name: sha256(path) for name, path in files.items()}
    inputs |= {str(path): sha256(path) for folder in folders for path in score_files(folder)}
    settings = {"raters": [{"name": rater.name, **rater.settings} for rater in config.raters]}
    made_from = provenance("raters.human_agreement", {
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)
           if field.name not in ("output", "overwrite")}, **settings}, inputs)
    if is_current(config.output, read_folder_record(config.output, RESULT), made_from, overwrite=config.overwrite,
                  contents=(RESULT, REPORT, FIGURES)):
        return
    scored = [joined_scores(folder, documents) for folder in folders]
    scored += [scores_of_texts(rater, documents) for rater in config.raters]
    result = {
        "format": FORMAT, "version": VERSION, "labels": describe_labels(documents),
        "raters": [{"rater": name, "without_score": int(np.isnan(scores).sum()), **compare(documents, scores, config)}
                   for name, scores in scored], "provenance": made_from}
    for rater in result["raters"]:
        if rater["spearman"] is None:
            raise InputError(f"{rater['rater']}: no language has human_agreement.min_documents = "
                             f"{config.min_documents} documents with ratings and scores that differ")
    with new_folder(config.output, RESULT) as folder:
        with plot_style():
            figures = save_figures(_figures(result), folder / FIGURES)
        write_atomic(folder / REPORT, render_page(
            epath.Path(__file__).parent / "human_agreement.html.j2", result=result, figures=figures,
            settings=made_from["settings"]))
        write_json(folder / RESULT, result)
    for rater in result["raters"]:
        low, high = rater["interval"] or (None, None)
        log(f"{config.output}: {rater['rater']}: {rater['spearman']:.3f} [{low}, {high}], mean rank correlation over "
            f"{sum(one['spearman'] is not None for one in rater['languages'])} languages")


if __name__ == "__main__":
    run(main, HumanAgreementConfig, "raters.human_agreement")
