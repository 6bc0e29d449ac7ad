"""Makes pairs of documents with preferences: `python -m raters.pairs --gin_file=gin/raters/pairs.gin`.

Stages 1 and 2 of MuRating (arXiv 2507.01785), by one of two methods:

    MuRater(E)   English documents are rated; their translations keep the preference
    MuRater(M)   documents in many languages are kept as they are; their translations into English are rated

The pairs are monolingual, cross-lingual (A and B in different languages) or parallel (one document in two languages,
preference 0.5); see `raters.preferences.pair_file` for the output.
"""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import gin
import numpy as np
import tqdm
from etils import epath

from mlx_pretrain import artifacts
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer, sha256
from mlx_pretrain.parallel.cluster import log
from raters.preferences import pair_file
from raters.preferences.pair_file import PAIR_TYPES
from raters.preferences.rated_documents import RatedDocuments
from raters.preferences.sampling import MarginBands, PairSampler, language_pairs, split_evenly
from raters.preferences.translation import Translator
from raters.rater_plugins.base import PairRater, Rater


@gin.configurable("pairs")
@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Settings of the documents to rate and the pairs to make.

    Attributes:
      corpus: English documents for the method "E", documents in any languages for "M".
      raters: raters of documents, e.g. [@Heuristics(), @NgramClassifier()], or of pairs, e.g. @PairJudgements().
      translator: plug-in that brings documents into other languages, e.g. @AlignedDocuments().
      output: JSONL file of training pairs.
      method: "E" or "M".
      monolingual, cross_lingual, parallel: pairs wanted of each type, spread evenly over languages or language pairs.
      languages: languages of the pairs; None: all.
      rated_language: language that the raters read.
      margins: least |P(B>A) - 0.5| of a band -> share of the pairs wanted from it; pairs with share 0 are never taken.
      validation_output: JSONL file of validation pairs, whose documents, in any language, are in no training pair;
        None: none.
      validation: number of validation pairs of each type, as a share of the training pairs wanted.
      heldout_documents: share of the documents, drawn by id and source, that validation pairs are made of.
      heldout_ids: text file with further ids of such documents, one a line; None: none.
      heldout_languages: languages of validation pairs only.
      seed: seed of all draws.
      overwrite: replaces pairs that were made from other inputs or settings.
    """

    corpus: Corpus = gin.REQUIRED
    raters: Sequence[Rater | PairRater] = gin.REQUIRED
    translator: Translator = gin.REQUIRED
    output: str = gin.REQUIRED
    method: str = "E"
    monolingual: int = 150_000
    cross_lingual: int = 150_000
    parallel: int = 75_000
    languages: Sequence[str] | None = None
    rated_language: str = "en"
    margins: Mapping[float, float] = dataclasses.field(default_factory=lambda: {0.0: 0.2, 0.1: 0.3, 0.4: 0.5})
    validation_output: str | None = None
    validation: float = 0.02
    heldout_documents: float = 0.05
    heldout_ids: str | None = None
    heldout_languages: Sequence[str] = ()
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if self.method not in ("E", "M"):
            raise InputError(f"pairs.method = {self.method!r}: must be 'E' or 'M'")
        for name in ("monolingual", "cross_lingual", "parallel"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(f"pairs.{name} = {value!r}: must be a number of pairs")
        for name in ("validation", "heldout_documents"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"pairs.{name} = {getattr(self, name)!r}: must be a share in [0, 1]")
        if isinstance(self.raters, str) or not self.raters or any(
                not isinstance(rater, (Rater, PairRater)) for rater in self.raters):
            raise InputError(f"pairs.raters = {self.raters!r}: must be a list of raters, e.g. [@Heuristics()]")
        names = [rater.name for rater in self.raters]
        if len(set(names)) < len(names):
            raise InputError(f"pairs.raters: names must differ, but are {', '.join(names)}")
        MarginBands.from_shares(self.margins)

    def counts(self, share: float) -> dict[str, int]:
        """Returns pair type -> number of pairs wanted."""
        counts = (self.monolingual, self.cross_lingual, self.parallel)
        return {pair_type: round(share * count) for pair_type, count in zip(PAIR_TYPES, counts)}


def read_documents(config: PairsConfig) -> RatedDocuments:
    """Reads and rates the documents of the corpus.

    Raises:
      InputError: see `RatedDocuments`; or a held-out language has no documents, or no other language is left.
    """
    languages = None if config.languages is None else [*config.languages, *config.heldout_languages]
    documents = RatedDocuments(config.corpus, config.raters, config.translator, method=config.method,
                               rated_language=config.rated_language, languages=languages)
    if missing := sorted(set(config.heldout_languages) - set(documents.languages)):
        raise InputError(f"pairs.heldout_languages: no document is available in {', '.join(missing)}")
    if not set(documents.languages) - set(config.heldout_languages):
        raise InputError("pairs.heldout_languages: no language is left for training pairs")
    return documents


def heldout_mask(config: PairsConfig, documents: RatedDocuments) -> np.ndarray:
    """Returns True for documents of validation pairs, the same in every language: bool `[documents]`.

    Raises:
      InputError: the file of ids is missing, or validation pairs are wanted and no document is held out.
    """
    named = set()
    if config.heldout_ids is not None:
        path = epath.Path(config.heldout_ids)
        if not path.exists():
            raise InputError(f"{path}: no such list of ids")
        named = set(path.read_text().splitlines())
    heldout = np.array([id in named or _uniform(config.seed, source, id) < config.heldout_documents
                        for _, source, id in documents.names])
    if config.validation_output and not heldout.any():
        raise InputError("pairs.validation_output: no document is held out for validation (pairs.heldout_documents)")
    return heldout


def _uniform(seed: int, source: str, id: str) -> float:
    """Returns a number in [0, 1), the same for a document in every language."""
    digest = hashlib.sha256(f"{seed}\0{source}\0{id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


@dataclasses.dataclass(frozen=True)
class ChosenPairs:
    """The pairs of one file, in the order of writing.

    Attributes:
      pair_type, language_a, language_b: index into PAIR_TYPES and into the documents' languages; int `[pairs]`.
      a, b: numbers of the documents; int `[pairs]`.
      p_b: P(B>A), float `[pairs]`.
      preferences: each rater's P(B>A), float `[raters, pairs]`, nan without one.
      counts: pair type -> counts by language, margin and reason.
    """

    pair_type: np.ndarray
    language_a: np.ndarray
    language_b: np.ndarray
    a: np.ndarray
    b: np.ndarray
    p_b: np.ndarray
    preferences: np.ndarray
    counts: Mapping[str, Mapping[str, Any]]


def choose_pairs(
    config: PairsConfig, documents: RatedDocuments, heldout: np.ndarray, validation: bool
) -> ChosenPairs:
    """Chooses the pairs for training or for validation.

    Args:
      config: settings.
      documents: rated documents.
      heldout: bool `[documents]`, see `heldout_mask`.
      validation: True: chooses among the held-out documents; False: among the training documents.
    """
    bands = MarginBands.from_shares(config.margins)
    pair_raters = [rater for rater in config.raters if isinstance(rater, PairRater)]
    sampler = PairSampler(documents.ids, documents.contents, documents.scores, pair_raters, bands)
    used = [l for l in documents.languages if validation or l not in config.heldout_languages]
    index = {language: i for i, language in enumerate(documents.languages)}
    members = {l: np.flatnonzero(documents.available[:, index[l]] & (heldout == validation)) for l in used}
    groups = {"monolingual": [(l, l) for l in used], "cross-lingual": language_pairs(used),
              "parallel": language_pairs(used)}
    columns, preferences, counts = [], [], {}
    for number, (pair_type, count) in enumerate(config.counts(config.validation if validation else 1.0).items()):
        judged = unjudged = 0
        start = len(columns)
        group_counts = split_evenly(count, len(groups[pair_type]))
        for i, (wanted, group) in enumerate(zip(group_counts, groups[pair_type])):
            rng = np.random.default_rng([config.seed, validation, number, i])
            first, second = (members[language] for language in group)
            if pair_type == "parallel":
                a, b = _same_contents(rng, wanted, documents.contents, first, second)
                p_b, own = np.full(len(a), 0.5), np.full((len(config.raters), len(a)), np.nan)
            else:
                sampled = sampler.draw(rng, wanted, first, second)
                a, b, p_b, own = sampled.a, sampled.b, sampled.p_b, sampled.preferences
                judged, unjudged = judged + sampled.judged, unjudged + sampled.unjudged
            # Half of the pairs change sides, so that neither a language nor the preferred document is on one side.
            turned = rng.random(len(a)) < 0.5
            sides = np.where(turned, [[index[group[1]]], [index[group[0]]]], [[index[group[0]]], [index[group[1]]]])
            columns.append((np.full(len(a), number), *sides, np.where(turned, b, a), np.where(turned, a, b),
                            np.where(turned, 1 - p_b, p_b)))
            preferences.append(np.where(turned, 1 - own, own))
        counts[pair_type] = _count_pairs(
            columns[start:], count, documents.languages, None if pair_type == "parallel" else bands)
        if pair_type != "parallel":
            counts[pair_type] |= {"candidates": judged + unjudged, "unjudged": unjudged}
    fields = [np.concatenate(parts) for parts in zip(*columns)]
    order = np.random.default_rng([config.seed, validation, len(PAIR_TYPES)]).permutation(len(fields[0]))
    # The sampler puts raters of documents first; this restores the order of config.raters.
    rows = np.argsort(np.argsort([isinstance(rater, PairRater) for rater in config.raters], kind="stable"))
    return ChosenPairs(*(field[order] for field in fields), np.concatenate(preferences, axis=1)[rows][:, order], counts)


def _same_contents(
    rng: np.random.Generator, count: int, contents: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns up to `count` pairs of documents of `first` and `second` that are translations of each other."""
    _, i, j = np.intersect1d(contents[first], contents[second], return_indices=True)
    chosen = rng.permutation(len(i))[:count]
    return first[i[chosen]], second[j[chosen]]


def _count_pairs(
    columns: Sequence[tuple], wanted: int, languages: Sequence[str], bands: MarginBands | None
) -> dict[str, Any]:
    """Counts the pairs of one type, also per language (a pair counts in each of its languages) and margin band."""
    _, first, second, _, _, p_b = (np.concatenate(parts) for parts in zip(*columns)) if columns else [np.zeros(0)] * 6
    per_language = Counter(languages[i] for pair in zip(first, second) for i in set(pair))
    counts: dict[str, Any] = {"wanted": wanted, "pairs": len(p_b), "languages": dict(sorted(per_language.items()))}
    if bands is not None:
        per_band = np.bincount(bands.band(p_b), minlength=len(bands.edges)).tolist()
        counts["margins"] = {f"{edge:g}": n for edge, n in zip(bands.edges, per_band)}
    return counts


def write_pairs(
    file: BinaryIO, config: PairsConfig, made_from: Mapping[str, Any], documents: RatedDocuments, pairs: ChosenPairs
) -> None:
    """Writes the header and the pairs, translating the documents that need it."""
    names = [rater.name for rater in config.raters]
    pair_file.write_line(file, pair_file.header({
        **made_from, "documents": len(documents), "left_out": documents.left_out, "repeated": documents.repeated,
        "counts": pairs.counts, "configuration": gin.operative_config_str()}))
    for i, language in enumerate(documents.languages):
        sides = ((pairs.a, pairs.language_a), (pairs.b, pairs.language_b))
        documents.translate(np.concatenate([numbers[languages == i] for numbers, languages in sides]), language)
    for i in tqdm.trange(len(pairs.a), desc="writing", unit=" pairs", disable=None):
        preferences = dict(zip(names, pairs.preferences[:, i].tolist()))
        pair_file.write_line(file, {
            "kind": PAIR_TYPES[pairs.pair_type[i]],
            "a": documents.record(int(pairs.a[i]), documents.languages[pairs.language_a[i]]),
            "b": documents.record(int(pairs.b[i]), documents.languages[pairs.language_b[i]]),
            "p_b": float(pairs.p_b[i]),
            "raters": {name: value for name, value in preferences.items() if not np.isnan(value)},
        })


def _made_from(config: PairsConfig) -> dict[str, Any]:
    inputs: dict[str, Any] = {"documents": {name: sha256(path) for name, path in config.corpus.paths().items()}}
    if config.heldout_ids is not None and epath.Path(config.heldout_ids).exists():
        inputs["heldout_ids"] = sha256(config.heldout_ids)
    made_from = artifacts.provenance("raters.pairs", config, inputs)
    del made_from["settings"]["validation_output"]
    return {**made_from, "raters": [rater.name for rater in config.raters]}


def main(config: PairsConfig) -> None:
    """Rates documents and writes pairs of them with preferences."""
    made_from = _made_from(config)
    outputs = {config.output: False} | ({config.validation_output: True} if config.validation_output else {})
    outputs = {path: validation for path, validation in outputs.items() if not artifacts.is_current(
        path, pair_file.read_provenance(path), made_from, overwrite=config.overwrite)}
    if not outputs:
        return
    for rater in config.raters:
        if one_order := getattr(rater, "one_order", None):
            log(f"note: {rater.name}: {len(one_order)} of {len(rater.pairs)} pairs were judged in one order only: "
                "their preferences hold the position bias")
    documents = read_documents(config)
    heldout = heldout_mask(config, documents)
    log(f"{len(documents)} documents rated, {int(heldout.sum())} of them held out; {documents.left_out} left out for "
        f"lack of a translation, {documents.repeated} for a repeated id")
    with contextlib.ExitStack() as stack:
        for path, validation in outputs.items():
            pairs = choose_pairs(config, documents, heldout, validation)
            write_pairs(stack.enter_context(atomic_writer(path)), config, made_from, documents, pairs)
            log(f"{path}:")
            for pair_type, counts in pairs.counts.items():
                log(_format_counts(pair_type, counts))


def _format_counts(pair_type: str, counts: Mapping[str, Any]) -> str:
    text = f"  {counts['pairs']} {pair_type} pairs of {counts['wanted']} wanted"
    if "margins" in counts:
        text += "; margins " + ", ".join(f"{edge}+ {n}" for edge, n in counts["margins"].items())
        text += f"; {counts['unjudged']} of {counts['candidates']} candidates dropped: no rater could judge"
    return text + "\n    " + " ".join(f"{language} {n}" for language, n in counts["languages"].items())


if __name__ == "__main__":
    run(main, PairsConfig, "raters.pairs")
