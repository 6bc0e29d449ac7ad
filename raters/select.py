"""Keeps the best documents of every language: `python -m raters.select --gin_file=gin/raters/select.gin`.

    OUTPUT/train/<language>/<input file>.jsonl.gz   the documents kept, with `quality_score`; read them with
                                                    Corpus.root = OUTPUT, Corpus.files = "{split}/{language}/*"
    OUTPUT/unscored.jsonl                           documents without a score, which are never kept, and why
    OUTPUT/selection.json                           counts of what was kept; `raters.selection_report` shows it

The work is done in phases (see `mlx_pretrain.parallel.phases`): the scores of each file are read, one task decides on
all of them, with about a tenth of a kilobyte a document, and the documents of each file are copied one at a time.
"""

import collections
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

from mlx_pretrain.artifacts import provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import flat_output_name, jsonl_writer, to_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, read_json, sha256
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan, complete
from raters.filtering import quotas, score_statistics
from raters.filtering.removal_lists import RemovalLists
from raters.filtering.score_columns import join_columns, read_array, write_array, write_columns
from raters.filtering.score_table import ScoreTable, aligned, document_key, read_scores, score_path
from raters.scoring.shards import MARKER

FORMAT, VERSION = "mlx-selection", 1
MANIFEST, UNSCORED = "selection.json", "unscored.jsonl"
_REPORT = ("report.html", "figures")  # of `raters.selection_report`
COLUMNS, KEPT = "columns", "kept"  # what tasks leave for others
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
      workers: processes that share the work on this machine; 1: the command does it itself.
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
    workers: int = 1
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


class Selection:
    """The tasks of a selection, see `make_plan`.

    Attributes:
      plan: the phases.
    """

    def __init__(self, config: SelectConfig):
        """Raises InputError where two outputs would have one name, or as `RemovalLists`."""
        self._config = config
        self._files = config.corpus.paths()
        if len(set(map(flat_output_name, self._files))) < len(self._files):
            raise InputError(f"{config.corpus.location}: two files would have one name in the output")
        self._removed = RemovalLists(config.exclude, self._files)
        recorded = read_folder_record(config.output, MANIFEST) or {}
        contents = {MANIFEST, UNSCORED, config.split, (recorded.get("settings") or {}).get("split"), *_REPORT}
        names = list(self._files)
        self.plan = Plan(
            config.output, MANIFEST, contents, provenance("raters.select", config, {}),
            [Phase("read", names, self._read, self._inputs), Phase("decide", ["all"], self._decide),
             Phase("copy", names, self._copy, self._inputs), Phase("unscored", ["all"], self._join_unscored)],
            config.overwrite)

    def _marker(self, name: str) -> dict[str, Any]:
        """Returns what `raters.score` recorded of a file; {} for scores of another program."""
        marker = epath.Path(self._config.scores) / (name + MARKER)
        return read_json(marker, "marker") if marker.exists() else {}

    def _inputs(self, name: str) -> dict[str, epath.Path]:
        if self._marker(name).get("status") == "failed":  # the rater could not read it
            return {}
        folders = (self._config.scores, *self._config.others)
        scores = {f"{folder}/{name}": score_path(folder, name, self._config.corpus.folder) for folder in folders}
        return {name: self._files[name], **scores, **{str(path): path for path in self._removed.paths(name)}}

    def _read(self, name: str, folder: epath.Path) -> dict[str, Any] | None:
        """Reads the scores of one file, but for documents on removal lists; returns None for one that was not rated.

        Raises:
          InputError: scores cannot be read or used, or the file has changed since it was rated.
        """
        marker, path, config = self._marker(name), self._files[name], self._config
        if marker.get("status") == "failed":
            return None
        if marker.get("input", {}).get("sha256") not in (None, sha256(path)):
            raise InputError(f"{path}: is not the file that was rated as {name}, or has changed since; rate it again, "
                             "or set Corpus.root as it was then")
        table, *others = [read_scores(scores, [name], config.seed, config.corpus.folder)
                          for scores in (config.scores, *config.others)]
        removed = self._removed.numbers(name)
        table = table.rows(~np.isin(table.number, removed))
        write_columns(folder / COLUMNS / name, table, [aligned(table, other) for other in others])
        return {"raters": [one.rater for one in (table, *others)], "languages": table.languages,
                "sources": table.sources, "excluded": len(removed)}

    def _rated(self) -> dict[str, dict[str, Any]]:
        """Returns name -> result of `_read`, of the files with scores."""
        return {name: result for name, result in zip(self._files, self.plan.results("read")) if result is not None}

    def _decide(self, _: str, folder: epath.Path) -> dict[str, Any]:
        """Chooses the documents to keep, of all files; returns the statistics, and the examples without their texts."""
        config, rated = self._config, self._rated()
        scores, others = join_columns(self.plan.files / COLUMNS, rated)
        _check(config, scores, others)
        preference = quotas.preferences(scores, config.temperature)
        quota = token_quotas(config, scores)
        kept = quotas.choose(scores, preference, quota, config.per_source, _caps(config, scores))
        starts = np.searchsorted(scores.file, np.arange(len(scores.files) + 1))
        for name, start, stop in zip(scores.files, starts, starts[1:]):
            write_array(folder / KEPT / name, kept[start:stop])
        shown = [{"language": scores.languages[scores.language[row]], "source": scores.sources[scores.source[row]],
                  "file": scores.files[scores.file[row]], "number": int(scores.number[row]), "quantile": quantile,
                  "score": float(scores.score[row]), "tokens": int(scores.tokens[row]), "kept": bool(kept[row])}
                 for row, quantile in score_statistics.examples(scores, EXAMPLE_QUANTILES)]
        return {"rater": scores.rater, "statistics": describe(config, scores, kept, preference, quota, others),
                "examples": shown}

    def _copy(self, name: str, folder: epath.Path) -> dict[str, Any] | None:
        """Copies the documents of one file that are kept.

        Returns:
          JSON: "texts", number -> [id, beginning of the text] of the examples; "unscored", reason -> documents without
          a score, which UNSCORED names; "outputs", path -> SHA-256.

        Raises:
          InputError: the scores or removal lists are not of this file.
        """
        if not self._inputs(name):
            return None
        decision = self.plan.result("decide", "all")
        copier = DocumentCopier(self._config, name, self._files[name], [
            example["number"] for example in decision["examples"] if example["file"] == name])
        scores, _ = join_columns(self.plan.files / COLUMNS, {name: self.plan.result("read", name)})
        with jsonl_writer(folder / UNSCORED / f"{name}.jsonl") as note:
            copier.copy(scores, read_array(self.plan.files / KEPT / name), self._removed, folder / OUTPUT, note)
        outputs = {path: sha256(folder / OUTPUT / path) for path in sorted(file_sizes(folder / OUTPUT))}
        return {"texts": copier.texts, "unscored": copier.unscored, "outputs": outputs}

    def _join_unscored(self, _: str, folder: epath.Path) -> None:
        (folder / OUTPUT).mkdir()
        with (folder / OUTPUT / UNSCORED).open("wb") as joined:
            for name in self._rated():
                joined.write((self.plan.files / UNSCORED / f"{name}.jsonl").read_bytes())

    def manifest(self) -> dict[str, Any]:
        """Returns the content of selection.json, without its provenance."""
        [decision] = self.plan.results("decide")
        texts, outputs, unscored = {}, {}, collections.Counter()
        for name, result in zip(self._files, self.plan.results("copy")):
            if result is not None:
                texts |= {(name, int(number)): text for number, text in result["texts"].items()}
                outputs |= result["outputs"]
                unscored.update(result["unscored"])
        examples = [{**example, **dict(zip(("id", "text"), texts[example["file"], example["number"]]))}
                    for example in decision["examples"] if (example["file"], example["number"]) in texts]
        rated = self._rated()
        return {
            "format": FORMAT, "version": VERSION, "rater": decision["rater"],
            "corpus": {"pattern": "{split}/{language}/*"}, **decision["statistics"], "examples": examples,
            "unscored": unscored, "excluded": sum(result["excluded"] for result in rated.values()),
            "failed_files": [name for name in self._files if name not in rated],
            "outputs": dict(sorted(outputs.items(), key=lambda item: epath.Path(item[0]).parts)),
        }


class DocumentCopier:
    """The second pass over the documents of a file: copies those kept, notes those without a score, reads examples.

    Attributes:
      texts: number -> (id, beginning of the text) of an example.
      unscored: reason -> documents without a score.
    """

    def __init__(self, config: SelectConfig, name: str, path: epath.Path, examples: Sequence[int]):
        """`examples` are the numbers of the documents whose text the report shows."""
        self._config, self._name, self._path, self._examples = config, name, path, set(examples)
        self.texts: dict[int, tuple[str, str]] = {}
        self.unscored: dict[str, int] = {}

    def copy(self, scores: ScoreTable, kept: np.ndarray, removed: RemovalLists, folder: epath.Path,
             note: Callable[[Mapping[str, Any]], None]) -> None:
        """Copies the documents below `folder`; calls `note` with every document without a score.

        Args:
          scores: scores of the file.
          kept: mask `[rows]` of the documents to copy.
          removed: the removal lists.
          folder, note: see above.

        Raises:
          InputError: the scores or removal lists are not of this file.
        """
        name = self._name
        rated = ((int(number), row) for row, number in enumerate(scores.number))
        rated_number, row = next(rated, (math.inf, -1))
        output = flat_output_name(name)

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
            for document in removed.keep(name, documents):
                if rated_number < document.number:
                    break
                if document.number < rated_number:
                    unscored(document.number, document.id, "not in the score file", "not in the score file")
                    continue
                self._check(document, scores, row)
                if not np.isfinite(scores.score[row]):
                    unscored(document.number, document.id, "the rater gave none", "the rater gave none")
                if document.number in self._examples:
                    self.texts[document.number] = document.id, document.text[:_EXAMPLE_LENGTH]
                if kept[row]:
                    language = int(scores.language[row])
                    if language not in writers:
                        writers[language] = stack.enter_context(jsonl_writer(
                            folder / self._config.split / scores.languages[language] / output))
                    writers[language](to_record(document, quality_score=float(scores.score[row])))
                rated_number, row = next(rated, (math.inf, -1))
            if rated_number < math.inf:
                raise InputError(f"{score_path(self._config.scores, name)}: has a score for {rated_number}, where "
                                 f"{self._path} has no document; rate it again")

    def _check(self, document: Document, scores: ScoreTable, row: int) -> None:
        language, source = scores.languages[scores.language[row]], scores.sources[scores.source[row]]
        if document_key(self._config.seed, language, source, document.id) != int(scores.key[row]):
            raise InputError(f"{self._path}:{document.number}: {document.id!r} is not the document that was rated "
                             "here; rate the file again")


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
        raters[other.rater] = other.score
        masks[other.rater] = quotas.choose(other, quotas.preferences(other, config.temperature), quota,
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


def _check(config: SelectConfig, scores: ScoreTable, others: Sequence[ScoreTable]) -> None:
    """Raises InputError when the scores of all files cannot be used together."""
    names = [table.rater for table in (scores, *others)]
    if len(set(names)) < len(names):
        raise InputError(f"select.others: two folders hold scores of one rater: {', '.join(names)}")
    if bad := [name for name in scores.languages if not re.fullmatch(r"[^/.]*", name)]:
        raise InputError(f"{config.scores}: language {bad[0]!r} cannot be the name of a folder")
    if not scores.rated.any():
        raise InputError(f"{config.scores}: no document has a score")
    _refuse_undetermined(config, scores)


def _refuse_undetermined(config: SelectConfig, scores: ScoreTable) -> None:
    codes = [code for code, language in enumerate(scores.languages) if language == UNDETERMINED]
    rows = np.flatnonzero(np.isin(scores.language, codes) & scores.rated)
    if len(rows) and not config.allow_undetermined:
        raise InputError(f"{config.scores}: {len(rows):,} documents were rated without a language, the first is "
                         f"{scores.files[scores.file[rows[0]]]}:{scores.number[rows[0]]}; rate them again with "
                         "{language} in Corpus.files, another Corpus.language_key or score.detect_language, or set "
                         "select.allow_undetermined=True")


def make_plan(config: SelectConfig) -> Plan:
    """Returns the work of a selection: reading scores by file, deciding on all, and copying documents by file."""
    return Selection(config).plan


def main(config: SelectConfig) -> None:
    """Keeps the best documents of every language, and writes them with selection.json.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    if complete(make_plan, config, config.workers) is None:
        return
    selection = Selection(config)
    manifest = selection.manifest()
    selection.plan.finish(manifest)
    for name in manifest["failed_files"]:
        log(f"note: {config.corpus.paths()[name]}: left out, it could not be rated")
    _log_summary(config, manifest, time.perf_counter() - started)


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
    run(main, SelectConfig, "raters.select", has_phases=True)
