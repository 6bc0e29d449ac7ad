"""Keeps the best documents of every language: `python -m raters.select --gin_file=gin/raters/select.gin`.

    OUTPUT/train/<language>/<input file>.jsonl.gz   the documents kept, with `quality_score`; read them with
                                                    Corpus.root = OUTPUT, Corpus.files = "{split}/{language}/*"
    OUTPUT/unscored.jsonl                           documents without a score, which are never kept, and why
    OUTPUT/selection.json                           counts of what was kept; `raters.selection_report` shows it

The work is done in phases of tasks (see `make_plan` and `mlx_pretrain.parallel.phases`). Memory does not grow with the
number of documents, but with the largest file of scores. Counts are exact; distributions and the agreement of raters
are those of a sample of a million documents.
"""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.artifacts import provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.record_files import flat_output_name, jsonl_writer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, read_json, sha256
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan, complete
from raters.filtering import quotas, score_statistics, selection_totals
from raters.filtering.cells import Cells, cells_of, join_cells, reduced_table, undecided
from raters.filtering.document_copier import DocumentCopier
from raters.filtering.removal_lists import RemovalLists
from raters.filtering.score_columns import (
    join_tables,
    read_array,
    read_cells,
    read_table,
    write_array,
    write_cells,
    write_table,
)
from raters.filtering.score_table import ScoreTable, aligned, read_scores, score_path
from raters.filtering.selection_totals import Totals
from raters.scoring.shards import MARKER

FORMAT, VERSION = "mlx-selection", 1
MANIFEST, UNSCORED = "selection.json", "unscored.jsonl"
_REPORT = ("report.html", "figures")  # of `raters.selection_report`
COLUMNS, CELLS, CUT, WHOLE = "columns", "cells", "cut.npy", "whole.npy"  # what tasks leave for others
SINGLE, SAMPLED, KEPT, KEPT_CELLS = "single", "sampled", "kept", "kept_cells.npy"
SAMPLE = 1_000_000  # documents that the statistics are made from
_CELLS_JOINED = 4_000_000
EXAMPLE_QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)


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


def token_quotas(config: SelectConfig, totals: Totals) -> np.ndarray:
    """Returns the tokens to keep of each language, float64 `[languages]`."""
    if config.tokens is not None:
        return _per_language("tokens", config.tokens, totals.languages)
    return _per_language("fraction", config.fraction, totals.languages) * np.sum(totals.tokens, axis=1)


def _caps(config: SelectConfig, sources: Sequence[str]) -> dict[int, float] | None:
    """Returns source -> largest share of a language's quota."""
    caps = config.source_caps
    if caps is None:
        return None
    if not isinstance(caps, Mapping):
        return dict.fromkeys(range(len(sources)), float(caps))
    if unknown := sorted(set(caps) - set(sources)):
        raise InputError(f"select.source_caps: no document of source {unknown[0]!r} was rated; available: "
                         f"{', '.join(sources)}")
    return {sources.index(source): cap for source, cap in caps.items()}


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
        names, all_files = list(self._files), ["all"]
        self.plan = Plan(
            config.output, MANIFEST, contents, provenance("raters.select", config, {}), [
                Phase("read", names, self._read, self._inputs), Phase("totals", all_files, self._total),
                Phase("cells", names, self._count_cells), Phase("borders", all_files, self._find_borders),
                Phase("gather", names, self._gather), Phase("decide", all_files, self._decide),
                Phase("copy", names, self._copy, self._inputs), Phase("unscored", all_files, self._join_unscored)],
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
        write_table(folder / COLUMNS / name, table, [aligned(table, other) for other in others])
        return {"raters": [one.rater for one in (table, *others)], "excluded": len(removed),
                **selection_totals.describe_file(table)}

    def _rated(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, result of `_read`) of the files with scores."""
        for name, result in zip(self._files, self.plan.results("read")):
            if result is not None:
                yield name, result

    def _total(self, _: str, folder: epath.Path) -> dict[str, Any]:
        """Returns the `Totals` of all files, which the scores must fit."""
        totals = selection_totals.join_files(self._config.scores, self._rated())
        _check(self._config, totals)
        return dataclasses.asdict(totals)

    @functools.cached_property
    def _totals(self) -> Totals:
        return Totals(**self.plan.result("totals", "all"))

    def _table(self, name: str) -> tuple[ScoreTable, list[np.ndarray]]:
        """Returns (scores of a file, scores of each other rater for its rows); no rows without scores."""
        if (read := self.plan.result("read", name)) is None:
            return self._totals.empty_table(name), [np.zeros(0)] * (len(self._totals.raters) - 1)
        table, others = read_table(self.plan.files / COLUMNS / name, self._totals.empty_table(name),
                                   len(self._totals.raters) - 1)
        language, source = (np.array([names.index(one) for one in read[field]], np.int32) for field, names in (
            ("languages", self._totals.languages), ("sources", self._totals.sources)))
        return dataclasses.replace(table, language=language[table.language], source=source[table.source]), others

    def _preferences(self, table: ScoreTable) -> np.ndarray:
        return quotas.preferences(table, self._config.temperature, self._totals.moments)

    def _cells(self, table: ScoreTable) -> tuple[np.ndarray, Cells]:
        """Returns (rows with a score, their cells)."""
        rows = np.flatnonzero(table.rated)
        by_source = self._config.per_source or self._config.source_caps is not None
        return rows, cells_of(table.rows(rows), self._preferences(table)[rows], by_source)

    def _count_cells(self, name: str, folder: epath.Path) -> None:
        write_cells(folder / CELLS / name, join_cells([self._cells(self._table(name)[0])[1]]))

    def _choice(self) -> tuple[np.ndarray, bool, dict[int, float] | None]:
        """Returns the quotas, `per_source` and the caps of `quotas.choose`."""
        config, totals = self._config, self._totals
        return token_quotas(config, totals), config.per_source, _caps(config, totals.sources)

    def _find_borders(self, _: str, folder: epath.Path) -> None:
        """Divides the cells into those whose documents are looked at one by one, and the others."""
        parts, fresh = [], 0
        for name in self._files:
            parts.append(read_cells(self.plan.files / CELLS / name))
            fresh += len(parts[-1])
            if fresh > _CELLS_JOINED:
                parts, fresh = [join_cells(parts)], 0
        cells = join_cells(parts)
        cut = undecided(cells, *self._choice())
        write_cells(folder / CUT, cells.rows(cut))
        write_cells(folder / WHOLE, cells.rows(~cut))

    def _gather(self, name: str, folder: epath.Path) -> None:
        """Writes the scores of a file's documents in undecided cells, and of its part of the sample."""
        table, others = self._table(name)
        rows, cells = self._cells(table)
        single = rows[read_cells(self.plan.files / CUT).contain(cells)]
        write_table(folder / SINGLE / name, table.rows(single), [])
        sample = self._totals.sample(table, SAMPLE)
        write_table(folder / SAMPLED / name, table.rows(sample), [values[sample] for values in others])

    def _decide(self, _: str, folder: epath.Path) -> dict[str, Any]:
        """Decides on cells and documents; returns statistics of a sample, and the examples without their texts."""
        config, totals, files = self._config, self._totals, self.plan.files
        whole = read_cells(files / WHOLE)
        single = join_tables([read_table(files / SINGLE / name, totals.empty_table(name))[0] for name in self._files])
        quota, per_source, caps = self._choice()
        table, preference = reduced_table(whole, single, self._preferences(single))
        chosen = quotas.choose(table, preference, quota, per_source, caps)
        kept_cells = whole.rows(chosen[: len(whole)])
        write_cells(folder / KEPT_CELLS, kept_cells)
        kept_single = single.rows(chosen[len(whole) :])
        numbers = np.split(kept_single.number, np.searchsorted(kept_single.file, np.arange(1, len(self._files))))
        sampled, of_others, masks = [], [], []
        for name, of_file in zip(self._files, numbers):
            write_array(folder / KEPT / f"{name}.npy", of_file)
            part, others = read_table(files / SAMPLED / name, totals.empty_table(name), len(totals.raters) - 1)
            sampled.append(part)
            of_others.append(others)
            masks.append(self._kept(part, kept_cells, of_file))
        scores, kept = join_tables(sampled), np.concatenate(masks)
        others = [dataclasses.replace(scores, rater=rater, score=np.concatenate(columns))
                  for rater, columns in zip(totals.raters[1:], zip(*of_others))]
        share = np.bincount(scores.language[scores.rated], scores.tokens[scores.rated], len(quota)) / np.maximum(
            np.sum(totals.tokens, axis=1), 1)
        statistics = describe(config, scores, kept, self._preferences(scores), quota * share, others)
        shown = [{"language": scores.languages[scores.language[row]], "source": scores.sources[scores.source[row]],
                  "file": scores.files[scores.file[row]], "number": int(scores.number[row]), "quantile": quantile,
                  "score": float(scores.score[row]), "tokens": int(scores.tokens[row]), "kept": bool(kept[row])}
                 for row, quantile in score_statistics.examples(scores, EXAMPLE_QUANTILES)]
        return {"statistics": statistics, "examples": shown}

    def _kept(self, table: ScoreTable, kept_cells: Cells, numbers: np.ndarray) -> np.ndarray:
        """Returns the mask `[rows]` of the documents of a file to keep: those of whole cells, and single ones."""
        rows, cells = self._cells(table)
        kept = np.isin(table.number, numbers)
        kept[rows[kept_cells.contain(cells)]] = True
        return kept

    def _copy(self, name: str, folder: epath.Path) -> dict[str, Any] | None:
        """Copies the documents of one file that are kept.

        Returns:
          JSON: "texts", number -> [id, beginning of the text] of the examples; "unscored", reason -> documents without
          a score, which UNSCORED names; "kept", [language, source, documents, tokens] of each group; "lowest",
          [language, preference, score]; "outputs", path -> SHA-256.

        Raises:
          InputError: the scores or removal lists are not of this file.
        """
        if not self._inputs(name):
            return None
        files, (table, _) = self.plan.files, self._table(name)
        kept = self._kept(table, read_cells(files / KEPT_CELLS), read_array(files / KEPT / f"{name}.npy"))
        copier = DocumentCopier(self._config.corpus, name, self._config.seed, [
            example["number"] for example in self.plan.result("decide", "all")["examples"] if example["file"] == name])
        with jsonl_writer(folder / UNSCORED / f"{name}.jsonl") as note:
            copier.copy(table, kept, self._removed, folder / OUTPUT / self._config.split, note)
        outputs = {path: sha256(folder / OUTPUT / path) for path in sorted(file_sizes(folder / OUTPUT))}
        chosen, preference = table.rows(kept), self._preferences(table)[kept]
        groups = [group[:4] for group in selection_totals.describe_file(chosen)["groups"]]
        lowest = [[language, float(preference[own].min()), float(chosen.score[own].min())]
                  for language in np.unique(chosen.language).tolist() if (own := chosen.language == language).any()]
        return {"texts": copier.texts, "unscored": copier.unscored, "kept": groups, "lowest": lowest,
                "outputs": outputs}

    def _join_unscored(self, _: str, folder: epath.Path) -> None:
        (folder / OUTPUT).mkdir()
        with (folder / OUTPUT / UNSCORED).open("wb") as joined:
            for name, _ in self._rated():
                joined.write((self.plan.files / UNSCORED / f"{name}.jsonl").read_bytes())

    def manifest(self) -> dict[str, Any]:
        """Returns the content of selection.json, without its provenance."""
        totals, decision = self._totals, self.plan.result("decide", "all")
        texts, outputs, unscored = {}, {}, collections.Counter()
        kept = np.zeros((2, *np.shape(totals.documents)), np.int64)
        lowest: dict[int, list[float]] = {}
        for name, result in zip(self._files, self.plan.results("copy")):
            if result is None:
                continue
            texts |= {(name, int(number)): text for number, text in result["texts"].items()}
            outputs |= result["outputs"]
            unscored.update(result["unscored"])
            for language, source, *counts in result["kept"]:
                kept[:, language, source] += counts
            for language, *values in result["lowest"]:
                lowest[language] = list(map(min, values, lowest.get(language, values)))
        counts = np.stack([totals.documents, totals.tokens, *kept])  # of the whole; the statistics are of a sample
        examples = [{**example, **dict(zip(("id", "text"), texts[example["file"], example["number"]]))}
                    for example in decision["examples"] if (example["file"], example["number"]) in texts]
        rated = dict(self._rated())
        return {
            "format": FORMAT, "version": VERSION, "rater": totals.raters[0],
            "corpus": {"pattern": "{split}/{language}/*"},
            **with_counts(decision["statistics"], totals, counts, token_quotas(self._config, totals), lowest),
            "examples": examples, "unscored": unscored,
            "excluded": sum(result["excluded"] for result in rated.values()),
            "failed_files": [name for name in self._files if name not in rated],
            "outputs": dict(sorted(outputs.items(), key=lambda item: epath.Path(item[0]).parts)),
        }


def describe(config: SelectConfig, scores: ScoreTable, kept: np.ndarray, preference: np.ndarray, quota: np.ndarray,
             others: Sequence[ScoreTable]) -> dict[str, Any]:
    """Returns the statistics of a selection, or of a sample of it: by language, source and length, and the agreement of
    raters."""
    edges = score_statistics.score_bins(scores)
    length, upper = score_statistics.length_groups(scores.tokens) if len(scores) else (scores.tokens, [])
    raters, masks = {scores.rater: scores.score}, {scores.rater: kept}
    for other in others:
        raters[other.rater] = other.score
        masks[other.rater] = quotas.choose(other, quotas.preferences(other, config.temperature), quota,
                                           config.per_source, _caps(config, scores.sources))
    distributions = ([score_statistics.distribution(scores, kept, column == i, edges) for i in range(len(names))]
                     for names, column in ((scores.languages, scores.language), (scores.sources, scores.source)))
    languages, sources = distributions
    return {
        "bins": edges.tolist(), "quantiles": list(score_statistics.QUANTILES), "languages": languages,
        "sources": sources, "lengths": {"upper": upper, **score_statistics.counts(scores, kept, length, len(upper))},
        "variance": score_statistics.variance_table(scores),
        "agreement": score_statistics.agreement(scores, raters, masks),
    }


def with_counts(statistics: Mapping[str, Any], totals: Totals, counts: np.ndarray, quota: np.ndarray,
                lowest: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Returns the statistics with the counts of all documents.

    Args:
      statistics: as `describe` makes them.
      totals: languages and sources.
      counts: documents, tokens, documents kept and tokens kept, `[4, languages, sources]`.
      quota: tokens to keep of each language.
      lowest: language -> lowest preference and lowest score of those kept.
    """
    def named(values: np.ndarray) -> dict[str, int]:
        return dict(zip(("documents", "tokens", "kept_documents", "kept_tokens"), values.tolist()))

    languages = [{"language": language, **named(counts[:, i].sum(axis=1)), "quota": float(quota[i]),
                  "without_score": totals.without_score[i], "threshold": lowest.get(i, (None, None))[0],
                  "lowest_score": lowest.get(i, (None, None))[1], **statistics["languages"][i]}
                 for i, language in enumerate(totals.languages)]
    sources = [{"source": source, **named(counts[:, :, i].sum(axis=1)), **statistics["sources"][i]}
               for i, source in enumerate(totals.sources)]
    cells = [{"language": language, "source": source, **named(counts[:, i, j])}
             for i, language in enumerate(totals.languages) for j, source in enumerate(totals.sources)
             if counts[0, i, j]]
    return {**{key: statistics[key] for key in ("bins", "quantiles")}, "languages": languages, "sources": sources,
            "cells": cells, **{key: statistics[key] for key in ("lengths", "variance", "agreement")}}


def _check(config: SelectConfig, totals: Totals) -> None:
    """Raises InputError when the scores of all files cannot be used together."""
    if len(set(totals.raters)) < len(totals.raters):
        raise InputError(f"select.others: two folders hold scores of one rater: {', '.join(totals.raters)}")
    if bad := [name for name in totals.languages if not re.fullmatch(r"[^/.]*", name)]:
        raise InputError(f"{config.scores}: language {bad[0]!r} cannot be the name of a folder")
    if not np.sum(totals.documents):
        raise InputError(f"{config.scores}: no document has a score")
    count, first = totals.undetermined
    if count and not config.allow_undetermined:
        raise InputError(f"{config.scores}: {count:,} documents were rated without a language, the first is {first}; "
                         "rate them again with {language} in Corpus.files, another Corpus.language_key or "
                         "score.detect_language, or set select.allow_undetermined=True")
    token_quotas(config, totals)
    _caps(config, totals.sources)


def make_plan(config: SelectConfig) -> Plan:
    """Returns the work of a selection.

    The scores of each file are read, and counted in cells by preference (`raters.filtering.cells`); the documents of
    the few cells in which a quota ends are gathered, and decided on; the documents of each file are copied.
    """
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
