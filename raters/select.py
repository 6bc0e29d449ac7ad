"""Keeps the best documents of every language: `python -m raters.select --gin_file=gin/raters/select.gin`.

    OUTPUT/train/<language>/<input file>.jsonl.gz   the documents kept, with `quality_score`; read them with
                                                    Corpus.root = OUTPUT, Corpus.files = "{split}/{language}/*"
    OUTPUT/unscored.jsonl                           documents without a score, which are never kept, and why
    OUTPUT/selection.json                           what was kept of what; `raters.selection_report` shows it

What to keep is decided from the score files alone; then the documents are copied through, one at a time. Memory: about
a quarter of a kilobyte a document, however long.
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

from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_json
from raters.filtering import quotas, stages
from raters.filtering.quotas import Scores

FORMAT, VERSION = "mlx-selection", 1
MANIFEST, UNSCORED = "selection.json", "unscored.jsonl"
EXAMPLE_QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)
_EXAMPLE_LENGTH = 400  # characters


@gin.configurable("select")
@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """What to keep.

    Attributes:
      documents: path or glob of the rated files.
      scores: folder of the score files of the rater that decides.
      output: folder for what is kept.
      others: folders of further raters' scores, for the report on how far they agree.
      exclude: removal lists of `raters.duplicates`, `.languages`, `.decontaminate`; quotas are of what they leave.
      fraction: of each language's tokens to keep, for all or language -> fraction.
      tokens: in place of a fraction, tokens to keep of each language, for all or language -> tokens.
      temperature: 0 keeps the best; above, samples with probability proportional to exp(score / temperature), the
        scores standardised within each language.
      per_source: divides the quota among a language's sources as its tokens are, so that no source is preferred.
      source_caps: largest share of a language's quota that a source may take, for all or source -> share.
      seed: of the sampling and of the order among equal scores.
      split: name of the output's split.
      overwrite: replaces an output made from other files or settings.
    """

    documents: str = gin.REQUIRED
    scores: str = gin.REQUIRED
    output: str = gin.REQUIRED
    others: Sequence[str] = ()
    exclude: Sequence[str] = ()
    fraction: float | Mapping[str, float] = 0.1
    tokens: int | Mapping[str, int] | None = None
    temperature: float = 0.0
    per_source: bool = False
    source_caps: float | Mapping[str, float] | None = None
    seed: int = 0
    split: str = "train"
    overwrite: bool = False

    def __post_init__(self):
        for name, most in (("fraction", 1.0), ("tokens", math.inf), ("source_caps", 1.0)):
            value = getattr(self, name)
            for key, one in (value if isinstance(value, Mapping) else {"": value}).items():
                if one is not None and not (isinstance(one, (int, float)) and 0 <= one <= most):
                    raise InputError(f"select.{name}{f' of {key}' if key else ''} = {one!r}: must be a number from 0 "
                                     f"to {most:g}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise InputError(f"select.temperature = {self.temperature!r}: must be a number, 0 or above")
        if self.per_source and self.source_caps is not None:
            raise InputError("select: per_source gives each source its own quota; source_caps has no say then")
        if not re.fullmatch(r"[^/.]+", self.split):
            raise InputError(f"select.split = {self.split!r}: must be a name without '/' and '.'")


def _per_language(name: str, value: float | Mapping[str, float], languages: Sequence[str]) -> np.ndarray:
    """The setting for each language, `[languages]`. Raises InputError where names differ."""
    if not isinstance(value, Mapping):
        return np.full(len(languages), float(value))
    if differ := sorted(set(value) ^ set(languages)):
        raise InputError(f"select.{name}: {', '.join(differ)} stand in it or among the rated languages, not in both")
    return np.array([float(value[language]) for language in languages])


def token_quotas(config: SelectConfig, scores: Scores) -> np.ndarray:
    """Tokens to keep of each language, float64 `[languages]`."""
    if config.tokens is not None:
        return _per_language("tokens", config.tokens, scores.languages)
    rated = np.isfinite(scores.score)
    total = np.bincount(scores.language[rated], scores.tokens[rated], len(scores.languages))
    return _per_language("fraction", config.fraction, scores.languages) * total


def _caps(config: SelectConfig, scores: Scores) -> dict[int, float] | None:
    caps = config.source_caps
    if caps is None:
        return None
    if not isinstance(caps, Mapping):
        return dict.fromkeys(range(len(scores.sources)), float(caps))
    if unknown := sorted(set(caps) - set(scores.sources)):
        raise InputError(f"select.source_caps: no document of source {unknown[0]!r} was rated; there is "
                         f"{', '.join(scores.sources)}")
    return {scores.sources.index(source): cap for source, cap in caps.items()}


class Copier:
    """The second pass: copies what is kept, notes what has no score, picks up the examples."""

    def __init__(self, config: SelectConfig, scores: Scores, kept: np.ndarray, removed: Mapping[str, np.ndarray]):
        self._config, self._scores, self._kept, self._removed = config, scores, kept, removed
        self.examples = dict(quotas.examples(scores, EXAMPLE_QUANTILES))
        self.texts: dict[int, tuple[str, str]] = {}  # row -> id and beginning of the text of an example
        self.unscored: dict[str, int] = {}
        self.excluded = 0

    def copy(self, name: str, path: epath.Path, folder: epath.Path, note: Callable[[Mapping[str, Any]], None]) -> None:
        """Copies one file below `folder`; `note` is given every document without a score.

        Raises:
          InputError: the scores are not those of this file.
        """
        scores = self._scores
        rows = np.flatnonzero(scores.file == scores.files.index(name))
        row_of = ((int(at), int(row)) for at, row in zip(scores.number[rows], rows))
        number, row = next(row_of, (math.inf, -1))
        output = stages.output_name(name).replace("/", "-")

        def unscored(at: int, document_id: str | None, reason: str, kind: str) -> None:
            self.unscored[kind] = self.unscored.get(kind, 0) + 1
            note({"file": name, "number": at, "id": document_id, "reason": reason})

        def unreadable(at: int, reason: str) -> None:
            if at == number:
                raise InputError(f"{reason}; it was rated, with other names of fields?")
            unscored(at, None, reason, "unreadable")

        with contextlib.ExitStack() as stack:
            writers: dict[int, Callable[[Mapping[str, Any]], None]] = {}
            removed = set(self._removed.get(name, np.zeros(0)).tolist())
            for document in read_documents(path, extra=None, rejected=unreadable):
                if number < document.number:
                    raise InputError(f"{quotas.score_file(self._config.scores, name)}: has a score for {number}, "
                                     f"where {path} has no document; rate it again")
                if document.number in removed:
                    self.excluded += 1
                    continue
                if document.number < number:
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
                        writers[language] = stack.enter_context(stages.jsonl_writer(
                            folder / scores.languages[language] / output))
                    writers[language](stages.to_record(document, quality_score=float(scores.score[row])))
                number, row = next(row_of, (math.inf, -1))
            if number < math.inf:
                raise InputError(f"{quotas.score_file(self._config.scores, name)}: has a score for {number}, where "
                                 f"{path} has no document; rate it again")

    def _check(self, document: Document, row: int, path: epath.Path) -> None:
        scores = self._scores
        names = scores.languages[scores.language[row]], scores.sources[scores.source[row]]
        if quotas.document_key(self._config.seed, *names, document.id) != int(scores.key[row]):
            raise InputError(f"{path}:{document.number}: {document.id!r} is not the document that was rated here; "
                             "rate the file again")


def _without(scores: Scores, removed: Mapping[str, np.ndarray]) -> Scores:
    """The scores of the documents that are on no removal list."""
    keep = np.ones(len(scores), bool)
    for position, name in enumerate(scores.files):
        rows = scores.file == position
        keep[rows] = ~np.isin(scores.number[rows], removed.get(name, []))
    return scores.rows(keep)


def _languages(scores: Scores, kept: np.ndarray, preference: np.ndarray, quota: np.ndarray) -> Iterator[dict[str, Any]]:
    """What was asked for and kept of each language."""
    edges = quotas.score_bins(scores)
    table = quotas.counts(scores, kept, scores.language, len(scores.languages))
    for i, language in enumerate(scores.languages):
        rows = scores.language == i
        yield {"language": language, **{name: column[i] for name, column in table.items()}, "quota": float(quota[i]),
               "without_score": int((rows & ~np.isfinite(scores.score)).sum()),
               "threshold": float(preference[rows & kept].min()) if (rows & kept).any() else None,
               "lowest_score": float(scores.score[rows & kept].min()) if (rows & kept).any() else None,
               **quotas.distribution(scores, kept, rows, edges)}


def describe(config: SelectConfig, scores: Scores, kept: np.ndarray, preference: np.ndarray, quota: np.ndarray,
             others: Sequence[Scores]) -> dict[str, Any]:
    """The calibration: what was kept of each language, source, length, and how far the raters agree."""
    edges, n_sources = quotas.score_bins(scores), len(scores.sources)
    sources = quotas.counts(scores, kept, scores.source, n_sources)
    cells = quotas.counts(scores, kept, scores.language * n_sources + scores.source,
                             n_sources * len(scores.languages))
    length, upper = quotas.length_groups(scores.tokens) if len(scores) else (scores.tokens, [])
    raters, masks = {scores.rater: scores.score}, {scores.rater: kept}
    for other in others:
        values = quotas.aligned(scores, other)
        seen = dataclasses.replace(scores, score=values)
        raters[other.rater] = values
        masks[other.rater] = quotas.select(seen, quotas.preferences(seen, config.temperature), quota,
                                              config.per_source, _caps(config, scores))
    return {
        "bins": edges.tolist(),
        "quantiles": list(quotas.QUANTILES),
        "languages": list(_languages(scores, kept, preference, quota)),
        "sources": [{"source": name, **{key: column[i] for key, column in sources.items()},
                     **quotas.distribution(scores, kept, scores.source == i, edges)}
                    for i, name in enumerate(scores.sources)],
        "cells": [{"language": scores.languages[i // n_sources], "source": scores.sources[i % n_sources],
                   **{key: column[i] for key, column in cells.items()}}
                  for i in range(len(cells["documents"])) if cells["documents"][i]],
        "lengths": {"upper": upper, **quotas.counts(scores, kept, length, len(upper))},
        "variance": quotas.variance_table(scores),
        "agreement": quotas.agreement(scores, raters, masks),
    }


def _rated(config: SelectConfig) -> tuple[dict[str, epath.Path], list[str]]:
    """The files with scores, and those that the rater could not read to their end and says so in its markers.

    Raises:
      InputError: a file has changed since it was rated.
    """
    files, failed = stages.input_files(config.documents), []
    for name, path in files.items():
        marker = epath.Path(config.scores) / f"{name}.done.json"
        record = read_json(marker, "marker") if marker.exists() else {}
        if record.get("status") == "failed":
            failed.append(name)
            stages.say(f"note: {path}: left out, it could not be rated")
        elif record.get("input", {}).get("sha256") not in (None, sha256(path)):
            raise InputError(f"{path}: has changed since it was rated; rate it again")
    return {name: path for name, path in files.items() if name not in failed}, failed


def _read(config: SelectConfig, files: Mapping[str, epath.Path]) -> tuple[Scores, list[Scores]]:
    """The deciding rater's scores and the others'. Raises InputError where two raters have one name."""
    found = [quotas.read_scores(folder, list(files), config.seed) for folder in (config.scores, *config.others)]
    names = [scores.rater for scores in found]
    if len(set(names)) < len(names):
        raise InputError(f"select.others: two folders hold scores of one rater: {', '.join(names)}")
    if bad := [name for name in found[0].languages if not re.fullmatch(r"[^/.]*", name)]:
        raise InputError(f"{config.scores}: language {bad[0]!r} cannot be the name of a folder")
    if not np.isfinite(found[0].score).any():
        raise InputError(f"{config.scores}: no document has a score")
    return found[0], found[1:]


def select(config: SelectConfig) -> None:
    """Keeps the best documents of every language, and writes them with selection.json.

    Raises:
      InputError: files or settings are wrong, or another output is in the way; nothing is written then.
    """
    started = time.perf_counter()
    files, failed = _rated(config)
    flat = [stages.output_name(name).replace("/", "-") for name in files]
    if len(set(flat)) < len(flat):
        raise InputError(f"{config.documents}: two files would have one name in the output")
    score_files = {f"{folder}/{name}": quotas.score_file(folder, name)
                   for folder in (config.scores, *config.others) for name in files}
    made_from = stages.provenance("raters.select", config, {**files, **score_files})
    if stages.is_made(config.output, made_from, config.overwrite, MANIFEST):
        return
    removed = stages.read_removed(config.exclude)
    scores, others = _read(config, files)
    scores = _without(scores, removed)
    preference = quotas.preferences(scores, config.temperature)
    quota = token_quotas(config, scores)
    kept = quotas.select(scores, preference, quota, config.per_source, _caps(config, scores))
    stages.say(f"decided on {len(scores):,} documents in {time.perf_counter() - started:.1f} s")
    copier = Copier(config, scores, kept, removed)
    with stages.new_folder(config.output) as folder:
        with stages.jsonl_writer(folder / UNSCORED) as note:
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
    _summary(config, manifest, time.perf_counter() - started)


def _examples(scores: Scores, kept: np.ndarray, copier: Copier) -> list[dict[str, Any]]:
    return [{"language": scores.languages[scores.language[row]], "source": scores.sources[scores.source[row]],
             "file": scores.files[scores.file[row]], "number": int(scores.number[row]), "quantile": quantile,
             "score": float(scores.score[row]), "tokens": int(scores.tokens[row]), "kept": bool(kept[row]),
             "id": copier.texts[row][0], "text": copier.texts[row][1]}
            for row, quantile in copier.examples.items() if row in copier.texts]


def _summary(config: SelectConfig, manifest: Mapping[str, Any], seconds: float) -> None:
    total = {key: sum(one[key] for one in manifest["languages"])
             for key in ("documents", "tokens", "kept_documents", "kept_tokens")}
    for one in manifest["languages"]:
        short = one["kept_tokens"] < one["quota"]
        stages.say(f"{one['language']:<8} kept {one['kept_documents']:>9,} of {one['documents']:>11,} "
                   f"documents, {one['kept_tokens']:>13,} of {one['tokens']:>15,} tokens"
                   + (f", quota {one['quota']:,.0f} not reached" if short else ""))
    unscored = ", ".join(f"{count:,} {reason}" for reason, count in manifest["unscored"].items()) or "none"
    stages.say(f"{config.output}: {total['kept_documents']:,} of {total['documents']:,} documents, "
               f"{total['kept_tokens'] / max(total['tokens'], 1):.2%} of the tokens, in {seconds:.1f} s; "
               f"without score: {unscored}")


def main() -> None:
    """Keeps the best documents of every language. Parameters: select.* (see SelectConfig)."""
    select(SelectConfig())


if __name__ == "__main__":
    run(main, "raters.select")
