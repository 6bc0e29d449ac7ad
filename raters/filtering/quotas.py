"""Which documents to keep, decided from their scores alone; and what a rater's scores follow besides quality."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain.errors import InputError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LENGTH_GROUPS = 10
_BINS = 48
_COLUMNS = {"number": pa.int64(), "id": pa.string(), "language": pa.string(), "source": pa.string(),
            "quality_score": pa.float32(), "n_tokens": pa.int32(), "rater": pa.string()}


@dataclasses.dataclass(frozen=True)
class Scores:
    """One rater's scores of all documents, row by row.

    Attributes:
      rater: its name and version.
      files: names of the input files; `file` int32 `[rows]` counts in them.
      number: line or row in the file, int64 `[rows]`, ascending within a file.
      key: hash of seed, language, source and id, uint64 `[rows]`: breaks ties and seeds the sampling, so that neither
        depends on the order of files or rows.
      languages, sources: names, "und" for an unknown language; `language` and `source` int32 `[rows]` count in them.
      score: float64 `[rows]`, nan where the rater has none.
      tokens: int64 `[rows]`.
    """

    rater: str
    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray
    key: np.ndarray
    languages: tuple[str, ...]
    language: np.ndarray
    sources: tuple[str, ...]
    source: np.ndarray
    score: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    def rows(self, keep: np.ndarray) -> "Scores":
        """Those rows only; `keep` is a mask or indices."""
        columns = ("file", "number", "key", "language", "source", "score", "tokens")
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in columns})


def document_key(seed: int, language: str, source: str, name: str) -> int:
    """64-bit hash that stands for a document whatever file it is in."""
    digest = hashlib.blake2b("\0".join((str(seed), language, source, name)).encode(errors="surrogatepass"),
                             digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def score_file(folder: epath.PathLike, name: str) -> epath.Path:
    """Where a rater's scores of the input file `name` lie. Raises InputError when they do not."""
    path = epath.Path(folder) / f"{name}.scores.parquet"
    if not path.exists():
        raise InputError(f"{path}: no such score file; the documents were not rated by this rater")
    return path


def read_scores(folder: epath.PathLike, files: Sequence[str], seed: int = 0) -> Scores:
    """Reads a rater's score files of the input `files`: 40 bytes of memory a document, while reading twice that.

    Raises:
      InputError: a file is missing, damaged, lacks a column or token counts, is not in the order of the input, or is of
        another rater.
    """
    raters: set[str] = set()
    names: dict[str, dict[str, int]] = {"language": {}, "source": {}}
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in (
        ("file", np.int32), ("number", np.int64), ("key", np.uint64), ("language", np.int32), ("source", np.int32),
        ("score", np.float64), ("tokens", np.int64))}
    for position, name in enumerate(files):
        path = score_file(folder, name)
        last = 0
        for batch in _batches(path):
            rows = {field: batch.column(field) for field in _COLUMNS}
            if rows["number"].null_count:
                raise InputError(f"{path}: rows without a number; is this a file of raters.score?")
            number = rows["number"].to_numpy()
            if len(number) and (number[0] <= last or (np.diff(number) <= 0).any()):
                raise InputError(f"{path}: numbers are not ascending, as those of the input's lines are")
            last = number[-1] if len(number) else last
            texts = {field: rows[field].fill_null("").to_pylist() for field in ("id", "language", "source")}
            texts["language"] = [language or "und" for language in texts["language"]]
            raters.update(rows["rater"].unique().to_pylist())
            columns["file"].append(np.full(len(number), position, np.int32))
            columns["number"].append(number)
            columns["key"].append(np.array([document_key(seed, *values) for values in zip(
                texts["language"], texts["source"], texts["id"])], np.uint64))
            for field, known in names.items():
                columns[field].append(np.array([known.setdefault(v, len(known)) for v in texts[field]], np.int32))
            columns["score"].append(rows["quality_score"].cast(pa.float64()).to_numpy(zero_copy_only=False))
            if rows["n_tokens"].null_count:
                raise InputError(f"{path}: no token counts, which quotas are made of; rate with a tokenizer")
            columns["tokens"].append(rows["n_tokens"].to_numpy().astype(np.int64))
    if len(raters) > 1:
        raise InputError(f"{folder}: scores of several raters: {', '.join(sorted(map(str, raters)))}")
    found = {name: np.concatenate(parts) for name, parts in columns.items()}
    for field, known in names.items():  # numbered by name, so that nothing depends on the order of files
        ranks = np.argsort(np.argsort(np.array(list(known), object))).astype(np.int32)
        found[field] = ranks[found[field]] if len(known) else found[field]
    return Scores(next(iter(raters), ""), tuple(files), languages=tuple(sorted(names["language"])),
                  sources=tuple(sorted(names["source"])), **found)


def _batches(path: epath.Path):
    try:
        with path.open("rb") as raw:
            table = pa.parquet.ParquetFile(raw)
            for name, kind in _COLUMNS.items():
                if name not in table.schema_arrow.names or table.schema_arrow.field(name).type != kind:
                    raise InputError(f"{path}: no column {name!r} of type {kind}; is this a file of raters.score?")
            yield from table.iter_batches(columns=list(_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None


def aligned(scores: Scores, other: Scores) -> np.ndarray:
    """`other`'s scores of the documents of `scores`, float64 `[rows]`; nan where it has none."""
    found = np.full(len(scores), np.nan)
    for position, name in enumerate(scores.files):
        mine, theirs = scores.file == position, other.file == other.files.index(name)
        numbers = other.number[theirs]
        at = np.searchsorted(numbers, scores.number[mine])
        same = np.append(numbers, -1)[at] == scores.number[mine]
        found[mine] = np.where(same, np.append(other.score[theirs], np.nan)[at], np.nan)
    return found


def preferences(scores: Scores, temperature: float) -> np.ndarray:
    """What documents are ranked by within their language: float64 `[rows]`, higher is better.

    The score; with a temperature, the score standardised within its language, over the temperature, plus Gumbel noise
    that depends on the seed and the document: the highest of these are a sample without replacement with probabilities
    proportional to exp(score / temperature) (arXiv 2402.09739, which standardises over all documents).
    """
    if not temperature:
        return scores.score
    found = np.full(len(scores), np.nan)
    for language in range(len(scores.languages)):
        rows = np.flatnonzero((scores.language == language) & np.isfinite(scores.score))
        if len(rows):
            values = scores.score[rows]
            found[rows] = (values - values.mean()) / (values.std() or 1.0) / temperature
    # 52 bits, for float64 holds each of these halves: it is never rounded to 1, whose noise would be infinite.
    uniform = ((scores.key >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    return found - np.log(-np.log(uniform))


def ranking(scores: Scores, preference: np.ndarray) -> np.ndarray:
    """Rows from best to worst; those without a score are left out. Ties: by document, then by file and number."""
    rows = np.flatnonzero(np.isfinite(preference))
    order = np.lexsort((scores.number[rows], scores.file[rows], scores.key[rows], -preference[rows]))
    return rows[order]


def take(tokens: np.ndarray, quota: float, sources: np.ndarray | None = None,
         caps: Mapping[int, float] | None = None) -> np.ndarray:
    """Documents taken, best first, until the quota is reached: a mask `[documents]`.

    The document that reaches the quota is the last one, so that the quota is exceeded by less than one document.

    Args:
      tokens: `[documents]`, from best to worst.
      quota: tokens to take.
      sources: `[documents]`; caps: source -> share of the quota at which no more of it is taken; likewise exceeded by
        less than one document.
    """
    allowed = np.ones(len(tokens), bool)
    for source, cap in (caps or {}).items():
        rows = sources == source
        allowed[rows] = np.cumsum(tokens[rows]) - tokens[rows] < cap * quota
    taken = np.where(allowed, tokens, 0)
    return allowed & (np.cumsum(taken) - taken < quota)


def select(scores: Scores, preference: np.ndarray, quotas: Sequence[float], per_source: bool = False,
           caps: Mapping[int, float] | None = None) -> np.ndarray:
    """Mask `[rows]` of the documents kept.

    Args:
      preference: `[rows]`, see `preferences`.
      quotas: tokens of each language.
      per_source: divides a language's quota among its sources as its tokens are.
      caps: source -> largest share of a language's quota.
    """
    kept = np.zeros(len(scores), bool)
    order = ranking(scores, preference)
    for language, quota in enumerate(quotas):
        rows = order[scores.language[order] == language]
        tokens, sources = scores.tokens[rows], scores.source[rows]
        if not per_source:
            kept[rows[take(tokens, quota, sources, caps)]] = True
            continue
        seen = taken_tokens = 0  # a document too many or too few in one source is made up for in the next
        for source in np.unique(sources):
            own = rows[sources == source]
            seen += scores.tokens[own].sum()
            taken = own[take(scores.tokens[own], quota * seen / max(tokens.sum(), 1) - taken_tokens)]
            taken_tokens += scores.tokens[taken].sum()
            kept[taken] = True
    return kept


def _residual(values: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Sum of squares within groups and its degrees of freedom."""
    _, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    means = np.bincount(index, values) / counts
    return float(((values - means[index]) ** 2).sum()), len(values) - len(counts)


def explained(values: np.ndarray, groups: np.ndarray, within: np.ndarray | None = None) -> float | None:
    """Share of the variance of `values` `[n]` that group membership explains, adjusted for the number of groups.

    Epsilon squared of the one-way analysis of variance (Kelley 1935); with `within`, of the variance left inside
    those groups. None where there is nothing to explain or too little data.
    """
    within = np.zeros(len(values), np.int64) if within is None else np.asarray(within, np.int64)
    joint = within * (int(groups.max(initial=0)) + 1) + groups
    (total, total_freedom), (rest, rest_freedom) = _residual(values, within), _residual(values, joint)
    if rest_freedom <= 0 or total <= 1e-12 * max(float((values**2).sum()), 1e-300):
        return None
    return max(0.0, 1 - (rest / rest_freedom) / (total / total_freedom))


def length_groups(tokens: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The tenth of the documents, by length, that each belongs to, `[rows]`; and the tenths' upper bounds in tokens."""
    # In whole numbers: quantiles are a rank too high where a tenth, .3 say, is rounded up.
    ranks = -(-np.arange(1, LENGTH_GROUPS + 1) * len(tokens) // LENGTH_GROUPS)
    edges = np.sort(tokens)[ranks - 1]
    return np.searchsorted(edges, tokens), edges.tolist()


def variance_table(scores: Scores) -> dict[str, Any]:
    """Shares of the score's variance that language, source and length explain, over all and within languages."""
    s = scores.rows(np.isfinite(scores.score))
    if not len(s):
        return {"over_all": {}, "within_languages": {}}
    length, _ = length_groups(s.tokens)
    cell = s.language.astype(np.int64) * len(s.sources) + s.source
    both = cell * LENGTH_GROUPS + length
    return {
        "over_all": {"language": explained(s.score, s.language), "source": explained(s.score, s.source),
                     "length": explained(s.score, length), "all three": explained(s.score, both)},
        "within_languages": {"source": explained(s.score, s.source, s.language),
                             "length": explained(s.score, length, s.language),
                             "source and length": explained(s.score, both, s.language)},
    }


def counts(scores: Scores, kept: np.ndarray, groups: np.ndarray, n_groups: int) -> dict[str, list[int]]:
    """Documents and tokens, of the input and kept, of each group."""
    def count(rows: np.ndarray, weights: np.ndarray | None = None) -> list[int]:
        found = np.bincount(groups[rows], None if weights is None else weights[rows], n_groups)
        return [round(x) for x in found.tolist()]

    every = np.isfinite(scores.score)
    return {"documents": count(every), "tokens": count(every, scores.tokens),
            "kept_documents": count(kept), "kept_tokens": count(kept, scores.tokens)}


def score_bins(scores: Scores) -> np.ndarray:
    """Edges of the histograms of scores, `[bins + 1]`: the middle 99 % of the documents; the ends hold the rest."""
    values = scores.score[np.isfinite(scores.score)]
    low, high = np.quantile(values, (0.005, 0.995)) if len(values) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)


def distribution(scores: Scores, kept: np.ndarray, rows: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Quantiles of a group's scores and histograms of all and of the kept ones; `rows` is the group's mask."""
    rows = rows & np.isfinite(scores.score)
    histogram = lambda mask: np.histogram(  # noqa: E731
        np.clip(scores.score[mask], edges[0], edges[-1]), edges)[0].tolist()
    values = scores.score[rows]
    return {"quantiles": np.quantile(values, QUANTILES).tolist() if len(values) else None,
            "histogram": histogram(rows), "kept_histogram": histogram(rows & kept)}


def agreement(scores: Scores, raters: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """How far each two raters agree, on the documents that both have rated.

    Args:
      raters: name -> scores `[rows]`; kept: name -> mask `[rows]` of what the same quotas keep by that rater.

    Returns:
      For each pair: Spearman's rank correlation over all documents, within each language, and the mean of the latter;
      the share of the first one's selected tokens that the second selects too, and what chance would make it.
    """
    found = []
    for a, b in itertools.combinations(raters, 2):
        both = np.isfinite(raters[a]) & np.isfinite(raters[b])
        languages = {name: _spearman(raters[a], raters[b], both & (scores.language == i))
                     for i, name in enumerate(scores.languages)}
        known = [value for value in languages.values() if value is not None]
        selected, chance = float(scores.tokens[kept[a]].sum()), float(scores.tokens[both].sum())
        found.append({
            "raters": [a, b], "documents": int(both.sum()), "spearman": _spearman(raters[a], raters[b], both),
            "spearman_within": float(np.mean(known)) if known else None, "spearman_by_language": languages,
            "overlap": scores.tokens[kept[a] & kept[b]].sum() / selected if selected else None,
            "chance": _expected_overlap(scores, kept[a], kept[b]) / selected if selected and chance else None,
        })
    return found


def _spearman(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float | None:
    if rows.sum() < 3 or np.ptp(a[rows]) == 0 or np.ptp(b[rows]) == 0:
        return None
    from scipy import stats  # takes longer to load than most selections take

    value = float(stats.spearmanr(a[rows], b[rows]).statistic)
    return value if math.isfinite(value) else None


def _expected_overlap(scores: Scores, a: np.ndarray, b: np.ndarray) -> float:
    """Tokens of `a` that a selection as large as `b` in each language would hold if it were drawn at random."""
    n = len(scores.languages)
    total, mine, theirs = (np.bincount(scores.language[m], scores.tokens[m], n) for m in (
        np.isfinite(scores.score), a, b))
    return float((mine * theirs / np.maximum(total, 1)).sum())


def examples(scores: Scores, quantiles: Sequence[float]) -> list[tuple[int, float]]:
    """(row, quantile) of the documents at quantiles of each language's scores, language by language."""
    order = ranking(scores, scores.score)[::-1]
    found = []
    for language in range(len(scores.languages)):
        rows = order[scores.language[order] == language]
        at = {round(q * (len(rows) - 1)): q for q in quantiles} if len(rows) else {}
        found += [(int(rows[position]), q) for position, q in sorted(at.items())]
    return found
