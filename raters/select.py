"""Keeps the best documents of every language: `python -m raters.select --gin_file=gin/raters/select.gin`.

    OUTPUT/train/<language>/<input file>.jsonl.gz   the documents kept, with `quality_score`; read them with
                                                    Corpus.root = OUTPUT, Corpus.files = "{split}/{language}/*"
    OUTPUT/unscored.jsonl                           documents without a score, which are never kept, and why
    OUTPUT/selection.json                           counts of what was kept; `raters.selection_report` shows it

The documents to keep are chosen from the score files alone, and then copied one at a time. Memory: about a quarter of a
kilobyte a document, however long.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import flat_output_name, jsonl_writer, to_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_json
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.parallel.cluster import log
from raters.filtering import quotas, score_statistics
from raters.filtering.removal_lists import RemovalLists
from raters.filtering.score_table import ScoreTable, aligned, document_key, read_scores, score_path
from raters.scoring.shards import MARKER

FORMAT, VERSION = "mlx-selection", 1
MANIFEST, UNSCORED = "selection.json", "unscored.jsonl"
_REPORT = ("report.html", "figures")  # of `raters.selection_report`
EXAMPLE_QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)
_EXAMPLE_LENGTH = 400  # characters


@gin.configurable("select")
@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Parameters of the selection.

    Attributes:
      corpus: the rated documents.
      scores: folder of the score files of the rater that decides.
      output: folder for the documents kept.
      others: folders of further raters' scores; the report shows their agreement.
      exclude: outputs of `raters.duplicates`, `.languages`, `.decontaminate`: documents on their removal lists are left
        out, and quotas are shares of what remains.
      fraction: share of each language's tokens to keep, one number or language -> share.
      tokens: tokens to keep of each language in place of a fraction, one number or language -> tokens.
      temperature: 0 keeps the best; above, samples with probability proportional to exp(score / temperature), the
        scores standardised within each language.
      per_source: divides a language's quota among its sources like its tokens, so that no source is preferred.
      source_caps: largest share of a language's quota that a source may take, one number or source -> share.
      allow_undetermined: True: treats documents of unknown language ("und") as one more language.
      seed: seed of the sampling and of the order among equal scores.
      split: name of the output's split.
      overwrite: replaces an output made from other files or settings.
    """

    corpus: Corpus = gin.REQUIRED
    scores: str = gin.REQUIRED
    output: str = gin.REQUIRED
    others: Sequence[str] = ()
    exclude: Sequence[str] = ()
    fraction: float | Mapping[str, float] = 0.1
    tokens: int | Mapping[str, int] | None = None
    temperature: float = 0.0
    per_source: bool = False
    source_caps: float | Mapping[str, float] | None = None
    allow_undetermined: bool = False
    seed: int = 0
    split: str = "train"
    overwrite: bool = False

    def __post_init__(self):
        for name, largest in (("fraction", 1.0), ("tokens", math.inf), ("source_caps", 1.0)):
            setting = getattr(self, name)
            for key, value in (setting if isinstance(setting, Mapping) else {"": setting}).items():
                if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= largest):
                    raise InputError(f"select.{name}{f' of {key}' if key else ''} = {value!r}: must be a number from 0 "
                                     f"to {largest:g}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise InputError(f"select.temperature = {self.temperature!r}: must be a number, 0 or above")
        if self.per_source and self.source_caps is not None:
            raise InputError("select: per_source gives each source its own quota; source_caps cannot be set, too")
        if not re.fullmatch(r"[^/.]+", self.split):
            raise InputError(f"select.split = {self.split!r}: must be a name without '/' and '.'")


def _per_language(name: str, value: float | Mapping[str, float], languages: Sequence[str]) -> np.ndarray:
    """Returns a setting for each language, `[languages]`. Raises InputError where it names other languages."""
    if not isinstance(value, Mapping):
        return np.full(len(languages), float(value))
    if differ := sorted(set(value) ^ set(languages)):
        raise InputError(f"select.{name}: the rated languages are {', '.join(languages)}; the setting differs in "
                         f"{', '.join(differ)}")
    return np.array([float(value[language]) for language in languages])


def token_quotas(config: SelectConfig, scores: ScoreTable) -> np.ndarray:
    """Returns the tokens to keep of each language, float64 `[languages]`."""
    if config.tokens is not None:
        return _per_language("tokens", config.tokens, scores.languages)
    total = np.bincount(scores.language[scores.rated], scores.tokens[scores.rated], len(scores.languages))
    return _per_language("fraction", config.fraction, scores.languages) * total


def _caps(config: SelectConfig, scores: ScoreTable) -> dict[int, float] | None:
    """Returns source -> largest share of a language's quota."""
    caps = config.source_caps
    if caps is None:
        return None
    if not isinstance(caps, Mapping):
        return dict.fromkeys(range(len(scores.sources)), float(caps))
    if unknown := sorted(set(caps) - set(scores.sources)):
        raise InputError(f"select.source_caps: no document of source {unknown[0]!r} was rated; available: "
                         f"{', '.join(scores.sources)}")
    return {scores.sources.index(source): cap for source, cap in caps.items()}


class DocumentCopier:
    """The second pass over the documents: copies those kept, notes those without a score, reads the examples.

    Attributes:
      examples: row of the scores -> quantile, of the documents whose text the report shows.
      texts: row -> (id, beginning of the text) of an example.
      unscored: reason -> documents without a score.
      excluded: documents on removal lists.
    """

    def __init__(self, config: SelectConfig, scores: ScoreTable, kept: np.ndarray, removed: RemovalLists):
        """`kept` is the mask `[rows]` of the documents to copy."""
        self._config, self._scores, self._kept, self._removed = config, scores, kept, removed
        self.examples = dict(score_statistics.examples(scores, EXAMPLE_QUANTILES))
        self.texts: dict[int, tuple[str, str]] = {}
        self.unscored: dict[str, int] = {}
        self.excluded = 0

    def copy(self, name: str, path: epath.Path, folder: epath.Path, note: Callable[[Mapping[str, Any]], None]) -> None:
        """Copies one file below `folder`; calls `note` with every document without a score.

        Raises:
          InputError: the scores or removal lists are not of this file.
        """
        scores = self._scores
        rows = np.flatnonzero(scores.file == scores.files.index(name))
        rated = ((int(number), int(row)) for number, row in zip(scores.number[rows], rows))
        rated_number, row = next(rated, (math.inf, -1))
        output = flat_output_name(name)
        self.excluded += len(self._removed.numbers(name))

        def unscored(number: int, document_id: str | None, reason: str, category: str) -> None:
            self.unscored[category] = self.unscored.get(category, 0) + 1
            note({"file": name, "number": number, "id": document_id, "reason": reason})

        def unreadable(number: int, reason: str) -> None:
            if number == rated_number:
                raise InputError(f"{reason}; it was rated, with other keys of the corpus?")
            unscored(number, None, reason, "unreadable")

        with contextlib.ExitStack() as stack:
            writers: dict[int, Callable[[Mapping[str, Any]], None]] = {}
            documents = self._config.corpus.read(name, extra=None, rejected=unreadable)
            for document in self._removed.keep(name, documents):
                if rated_number < document.number:
                    break
                if document.number < rated_number:
                    unscored(document.number, document.id, "not in the score file", "not in the score file")
                    continue
                self._check(document, row, path)
                if not np.isfinite(scores.score[row]):
                    unscored(document.number, document.id, "the rater gave none", "the rater gave none")
                if row in self.examples:
                    self.texts[row] = document.id, document.text[:_EXAMPLE_LENGTH]
                if self._kept[row]:
                    language = int(scores.language[row])
                    if language not in writers:
                        writers[language] = stack.enter_context(jsonl_writer(
                            folder / scores.languages[language] / output))
                    writers[language](to_record(document, quality_score=float(scores.score[row])))
                rated_number, row = next(rated, (math.inf, -1))
            if rated_number < math.inf:
                raise InputError(f"{score_path(self._config.scores, name)}: has a score for {rated_number}, where "
                                 f"{path} has no document; rate it again")

    def _check(self, document: Document, row: int, path: epath.Path) -> None:
        scores = self._scores
        language, source = scores.languages[scores.language[row]], scores.sources[scores.source[row]]
        if document_key(self._config.seed, language, source, document.id) != int(scores.key[row]):
            raise InputError(f"{path}:{document.number}: {document.id!r} is not the document that was rated here; "
                             "rate the file again")


def _without(scores: ScoreTable, removed: RemovalLists) -> ScoreTable:
    """Returns the scores of the documents that are on no removal list."""
    keep = np.ones(len(scores), bool)
    for index, name in enumerate(scores.files):
        rows = scores.file == index
        keep[rows] = ~np.isin(scores.number[rows], removed.numbers(name))
    return scores.rows(keep)


def _languages(
    scores: ScoreTable, kept: np.ndarray, preference: np.ndarray, quota: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yields each language's quota, counts and distribution of scores."""
    edges = score_statistics.score_bins(scores)
    table = score_statistics.counts(scores, kept, scores.language, len(scores.languages))
    for i, language in enumerate(scores.languages):
        rows = scores.language == i
        yield {"language": language, **{name: column[i] for name, column in table.items()}, "quota": float(quota[i]),
               "without_score": int((rows & ~scores.rated).sum()),
               "threshold": float(preference[rows & kept].min()) if (rows & kept).any() else None,
               "lowest_score": float(scores.score[rows & kept].min()) if (rows & kept).any() else None,
               **score_statistics.distribution(scores, kept, rows, edges)}


def describe(config: SelectConfig, scores: ScoreTable, kept: np.ndarray, preference: np.ndarray, quota: np.ndarray,
             others: Sequence[ScoreTable]) -> dict[str, Any]:
    """Returns the statistics of a selection: by language, source and length, and the agreement of raters."""
    edges, n_sources = score_statistics.score_bins(scores), len(scores.sources)
    sources = score_statistics.counts(scores, kept, scores.source, n_sources)
    cells = score_statistics.counts(scores, kept, scores.language * n_sources + scores.source,
                                    n_sources * len(scores.languages))
    length, upper = score_statistics.length_groups(scores.tokens) if len(scores) else (scores.tokens, [])
    raters, masks = {scores.rater: scores.score}, {scores.rater: kept}
    for other in others:
        by_other = dataclasses.replace(scores, score=aligned(scores, other))
        raters[other.rater] = by_other.score
        masks[other.rater] = quotas.choose(by_other, quotas.preferences(by_other, config.temperature), quota,
                                           config.per_source, _caps(config, scores))
    return {
        "bins": edges.tolist(),
        "quantiles": list(score_statistics.QUANTILES),
        "languages": list(_languages(scores, kept, preference, quota)),
        "sources": [{"source": name, **{key: column[i] for key, column in sources.items()},
                     **score_statistics.distribution(scores, kept, scores.source == i, edges)}
                    for i, name in enumerate(scores.sources)],
        "cells": [{"language": scores.languages[i // n_sources], "source": scores.sources[i % n_sources],
                   **{key: column[i] for key, column in cells.items()}}
                  for i in range(len(cells["documents"])) if cells["documents"][i]],
        "lengths": {"upper": upper, **score_statistics.counts(scores, kept, length, len(upper))},
        "variance": score_statistics.variance_table(scores),
        "agreement": score_statistics.agreement(scores, raters, masks),
    }


def _rated_files(config: SelectConfig) -> tuple[dict[str, epath.Path], list[str]]:
    """Returns the files with scores, and the names of those that the rater could not read, according to its markers.

    Raises:
      InputError: a file has changed since it was rated.
    """
    files, failed = config.corpus.paths(), []
    for name, path in files.items():
        marker = epath.Path(config.scores) / (name + MARKER)
        record = read_json(marker, "marker") if marker.exists() else {}
        if record.get("status") == "failed":
            failed.append(name)
            log(f"note: {path}: left out, it could not be rated")
        elif record.get("input", {}).get("sha256") not in (None, sha256(path)):
            raise InputError(f"{path}: is not the file that was rated as {name}, or has changed since; rate it again, "
                             "or set Corpus.root as it was then")
    return {name: path for name, path in files.items() if name not in failed}, failed


def _read_scores(config: SelectConfig, files: Mapping[str, epath.Path]) -> tuple[ScoreTable, list[ScoreTable]]:
    """Returns the scores of the deciding rater and those of the other raters.

    Raises:
      InputError: scores cannot be read or used, or two raters have one name.
    """
    scores, *others = [read_scores(folder, list(files), config.seed, config.corpus.folder)
                       for folder in (config.scores, *config.others)]
    names = [table.rater for table in (scores, *others)]
    if len(set(names)) < len(names):
        raise InputError(f"select.others: two folders hold scores of one rater: {', '.join(names)}")
    if bad := [name for name in scores.languages if not re.fullmatch(r"[^/.]*", name)]:
        raise InputError(f"{config.scores}: language {bad[0]!r} cannot be the name of a folder")
    if not scores.rated.any():
        raise InputError(f"{config.scores}: no document has a score")
    return scores, others


def _refuse_undetermined(config: SelectConfig, scores: ScoreTable) -> None:
    codes = [code for code, language in enumerate(scores.languages) if language == UNDETERMINED]
    rows = np.flatnonzero(np.isin(scores.language, codes) & scores.rated)
    if len(rows) and not config.allow_undetermined:
        raise InputError(f"{config.scores}: {len(rows):,} documents were rated without a language, the first is "
                         f"{scores.files[scores.file[rows[0]]]}:{scores.number[rows[0]]}; rate them again with "
                         "{language} in Corpus.files, another Corpus.language_key or score.detect_language, or set "
                         "select.allow_undetermined=True")


def main(config: SelectConfig) -> None:
    """Keeps the best documents of every language, and writes them with selection.json.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    files, failed = _rated_files(config)
    if len(set(map(flat_output_name, files))) < len(files):
        raise InputError(f"{config.corpus.location}: two files would have one name in the output")
    score_files = {f"{folder}/{name}": score_path(folder, name, config.corpus.folder)
                   for folder in (config.scores, *config.others) for name in files}
    removed = RemovalLists(config.exclude, config.corpus.paths())
    lists = {str(path): path for name in files for path in removed.paths(name)}
    inputs = {**files, **score_files, **lists}
    made_from = provenance("raters.select", config, {name: sha256(path) for name, path in inputs.items()})
    recorded = read_folder_record(config.output, MANIFEST)
    splits = {config.split, ((recorded or {}).get("settings") or {}).get("split")}
    if is_current(config.output, recorded, made_from, overwrite=config.overwrite,
                  contents={MANIFEST, UNSCORED, *splits, *_REPORT}):
        return
    scores, others = _read_scores(config, files)
    scores = _without(scores, removed)
    _refuse_undetermined(config, scores)
    preference = quotas.preferences(scores, config.temperature)
    quota = token_quotas(config, scores)
    kept = quotas.choose(scores, preference, quota, config.per_source, _caps(config, scores))
    log(f"decided on {len(scores):,} documents in {time.perf_counter() - started:.1f} s")
    copier = DocumentCopier(config, scores, kept, removed)
    with new_folder(config.output, MANIFEST) as folder:
        with jsonl_writer(folder / UNSCORED) as note:
            for name, path in files.items():
                copier.copy(name, path, folder / config.split, note)
        manifest = {
            "format": FORMAT, "version": VERSION, "rater": scores.rater,
            "corpus": {"pattern": "{split}/{language}/*"},
            **describe(config, scores, kept, preference, quota, others),
            "examples": _examples(scores, kept, copier),
            "unscored": copier.unscored, "excluded": copier.excluded, "failed_files": failed,
            "outputs": {str(path.relative_to(folder)): sha256(path)
                        for path in sorted((folder / config.split).glob("*/*"))},
            "provenance": made_from,
        }
        write_json(folder / MANIFEST, manifest)
    _log_summary(config, manifest, time.perf_counter() - started)


def _examples(scores: ScoreTable, kept: np.ndarray, copier: DocumentCopier) -> list[dict[str, Any]]:
    return [{"language": scores.languages[scores.language[row]], "source": scores.sources[scores.source[row]],
             "file": scores.files[scores.file[row]], "number": int(scores.number[row]), "quantile": quantile,
             "score": float(scores.score[row]), "tokens": int(scores.tokens[row]), "kept": bool(kept[row]),
             "id": copier.texts[row][0], "text": copier.texts[row][1]}
            for row, quantile in copier.examples.items() if row in copier.texts]


def _log_summary(config: SelectConfig, manifest: Mapping[str, Any], seconds: float) -> None:
    total = {key: sum(counts[key] for counts in manifest["languages"])
             for key in ("documents", "tokens", "kept_documents", "kept_tokens")}
    for counts in manifest["languages"]:
        short = score_statistics.quota_not_reached(counts, config.source_caps is not None)
        log(f"{counts['language']:<8} kept {counts['kept_documents']:>9,} of {counts['documents']:>11,} "
            f"documents, {counts['kept_tokens']:>13,} of {counts['tokens']:>15,} tokens"
            + (f", quota {counts['quota']:,.0f} not reached" if short else ""))
    unscored = ", ".join(f"{count:,} {reason}" for reason, count in manifest["unscored"].items()) or "none"
    log(f"{config.output}: {total['kept_documents']:,} of {total['documents']:,} documents, "
        f"{total['kept_tokens'] / max(total['tokens'], 1):.2%} of the tokens, in {seconds:.1f} s; "
        f"without score: {unscored}")


if __name__ == "__main__":
    run(main, SelectConfig, "raters.select")
