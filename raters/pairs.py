"""From documents and raters to pairs of documents with preferences: `python -m raters.pairs --gin_file=...`.

Stage 1 and 2 of MuRating (arXiv 2507.01785), in one of two ways:

    MuRater(E)   English documents are rated; their translations keep the preference
    MuRater(M)   documents in many languages are kept as they are; their translations into English are rated

and three kinds of pairs: monolingual (A and B in one language), cross-lingual (A in one, B in another), and parallel
(one document in two languages, preference 0.5). What comes out is JSONL (`FORMAT`): a first line with the format and
how it was made, then one pair a line:

    {"kind": "monolingual", "a": {"id", "lang", "source", "text"}, "b": {...}, "p_b": 0.75, "raters": {"ngrams": 1.0}}

p_b is P(B>A) by `raters.preferences.aggregate`; "raters" has each rater's own P(B>A), those without one left out.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import gin
import numpy as np
import tqdm
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document, match_files, read_documents
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer, sha256
from raters.log import log
from raters.preferences.sampling import PairSampler, Strata, language_pairs, spread
from raters.preferences.translation import DocumentStore, Translator, with_language
from raters.rater_plugins.base import PairRater, Rater, record_fields

FORMAT = "mlx-rater-pairs"
VERSION = 1
KINDS = ("monolingual", "cross-lingual", "parallel")
_BATCH = 1024  # documents rated at a time


@gin.configurable("pairs")
@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """What to rate and which pairs to make.

    Attributes:
      documents: path or glob, or several: English documents for "E", documents in any languages for "M".
      raters: of documents, e.g. [@Heuristics(), @NgramClassifier()], or of pairs, e.g. @PairJudgements().
      translator: e.g. @AlignedDocuments().
      output: JSONL file of training pairs.
      method: "E" or "M".
      monolingual, cross_lingual, parallel: pairs wanted of each kind, evenly over languages or pairs of languages.
      languages: of the pairs; None: all there are.
      rated_language: the one the raters read.
      margins: least |P(B>A) - 0.5| of a band -> share of the pairs wanted from it; a share of 0 takes none.
      validation_output: JSONL file of validation pairs, whose documents, in whatever language, are in no training pair.
      validation: validation pairs as a share of the pairs wanted for training, of each kind.
      heldout_documents: share of the documents, drawn by id and source, that validation pairs are made of.
      heldout_ids: text file with further ids of such documents, one a line.
      heldout_languages: languages of validation pairs only.
      seed: of everything drawn.
    """

    documents: str | Sequence[str] = gin.REQUIRED
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
        if isinstance(self.raters, str) or not self.raters or any(not hasattr(r, "name") for r in self.raters):
            raise InputError(f"pairs.raters = {self.raters!r}: must be a list of raters, e.g. [@Heuristics()]")
        names = [rater.name for rater in self.raters]
        if len(set(names)) < len(names):
            raise InputError(f"pairs.raters: each must have a name of its own, not {', '.join(names)}")
        Strata.of(self.margins)

    def counts(self, share: float) -> dict[str, int]:
        """Kind -> pairs wanted."""
        wanted = (self.monolingual, self.cross_lingual, self.parallel)
        return {kind: round(share * count) for kind, count in zip(KINDS, wanted)}


class Pool:
    """The rated documents, and the languages each can be had in. Texts stay on disk, everything else in memory.

    Attributes:
      ids: of the documents, as are all that follow.
      contents: int `[documents]`, equal for documents that are translations of each other (same id and source).
      scores: of the raters of single documents, float64 `[raters, documents]`.
      languages: of the pairs, sorted.
      available: bool `[documents, languages]`.
      heldout: bool `[documents]`, for validation only.
      left_out: documents that could not be rated for want of a translation.
      repeated: documents passed over because one of the same language, source and id came before.
      files: those read, with their SHA-256.
    """

    def __init__(self, config: PairsConfig):
        """Reads and rates the documents.

        Raises:
          InputError: a file cannot be read, ids do not tell sources apart where they must, or a document is not in the
            language it should be in.
        """
        self._config, self._translator, self._store = config, config.translator, DocumentStore()
        self._keys: list[tuple[str, str, str]] = []  # language, source, id
        self.left_out, self.repeated, self.files = 0, 0, {}
        carried = self._carried_languages()
        raters = [rater for rater in config.raters if hasattr(rater, "score")]
        scores, available = [np.zeros((len(raters), 0))], [np.zeros((0, len(carried)), bool)]
        documents = iter(tqdm.tqdm(self._read(), "rating", unit=" documents", disable=None))
        while batch := list(itertools.islice(documents, _BATCH)):
            batch, rated = self._in_rated_language(batch)
            self._keys += [(document.language, document.source, document.id) for document in batch]
            scores.append(np.array([rater.score(rated) for rater in raters]).reshape(len(raters), len(batch)))
            covered = [self._translator.covers(batch, language) | (language == config.rated_language)
                       for language in carried]
            available.append(np.array(covered, bool).reshape(len(carried), len(batch)).T)
        if not self._keys:
            raise InputError(f"{config.documents}: none of the {self.left_out} documents there has a translation into "
                             f"{config.rated_language!r}, which the raters read")
        self.scores = np.concatenate(scores, axis=1)
        if config.method == "E":
            self.languages, self.available = carried, np.concatenate(available)
        else:
            self.languages = sorted({*(config.languages or {key[0] for key in self._keys}), *config.heldout_languages})
            self.available = np.array([[key[0] == l for l in self.languages] for key in self._keys])
        if missing := [l for l, any_there in zip(self.languages, self.available.any(axis=0)) if not any_there]:
            raise InputError(f"pairs.languages: no document can be had in {', '.join(missing)}")
        if not set(self.languages) - set(config.heldout_languages):
            raise InputError("pairs.heldout_languages: no language is left for training pairs")
        self._name_contents()

    def _carried_languages(self) -> list[str]:
        """Languages that translations carry preferences to; with the method "M" there are none."""
        config = self._config
        if config.method == "M":
            return []
        every = config.languages or [*self._translator.languages, config.rated_language]
        return sorted({*every, *config.heldout_languages})

    def _name_contents(self) -> None:
        """Finds out what is a translation of what, and what is held out."""
        config = self._config
        self.ids = [id for _, _, id in self._keys]
        if any(not hasattr(rater, "score") for rater in config.raters):
            sources: dict[str, str] = {}
            for _, source, id in self._keys:
                if sources.setdefault(id, source) != source:
                    raise InputError(f"{config.documents}: id {id!r} is in two sources, {source!r} and "
                                     f"{sources[id]!r}; judgements of pairs name documents by id alone")
        numbers: dict[tuple[str, str], int] = {}
        self.contents = np.array([numbers.setdefault(key[1:], len(numbers)) for key in self._keys])
        named = set()
        if config.heldout_ids is not None:
            path = epath.Path(config.heldout_ids)
            if not path.exists():
                raise InputError(f"{path}: no such list of ids")
            named = set(path.read_text().splitlines())
        heldout = [id in named or _uniform(config.seed, source, id) < config.heldout_documents
                   for source, id in numbers]
        self.heldout = np.array(heldout)[self.contents]

    def _read(self) -> Iterator[Document]:
        config = self._config
        fields = record_fields(config.raters)
        for pattern in [config.documents] if isinstance(config.documents, str) else config.documents:
            for path in match_files(pattern):
                self.files[str(path)] = sha256(path)
                for document in read_documents(path, extra=fields):
                    if config.method == "M":
                        document = with_language(document, path)
                    elif (document.language or config.rated_language) != config.rated_language:
                        raise InputError(f"{path}:{document.number}: a document in {document.language!r}; the method "
                                         f"'E' rates documents in {config.rated_language!r} (pairs.rated_language)")
                    else:
                        document = dataclasses.replace(document, language=config.rated_language)
                    if self._store.add(document):
                        yield document
                    else:
                        self.repeated += 1

    def _in_rated_language(self, batch: list[Document]) -> tuple[list[Document], list[Document]]:
        """Documents that can be rated, and what the raters read of them."""
        language = self._config.rated_language
        foreign = np.array([document.language != language for document in batch])
        covered = ~foreign
        covered[foreign] = self._translator.covers([d for d, f in zip(batch, foreign) if f], language)
        self.left_out += int((~covered).sum())
        kept = [document for document, there in zip(batch, covered) if there]
        translated = iter(self._translator.translate([d for d in kept if d.language != language], language))
        return kept, [document if document.language == language else next(translated) for document in kept]

    def carry(self, numbers: np.ndarray, language: str) -> None:
        """Translates the documents of these numbers that are in another language, each once."""
        keys = [self._keys[number] for number in np.unique(numbers)]
        missing = iter([key for key in keys if not self._store.has(language, *key[1:])])
        while batch := list(itertools.islice(missing, _BATCH)):
            for document in self._translator.translate([self._store.get(*key) for key in batch], language):
                self._store.add(document)

    def text(self, number: int, language: str) -> dict[str, str]:
        """Id, language, source and text of a document that is in `language` or was carried there."""
        _, source, id = self._keys[number]
        return {"id": id, "lang": language, "source": source, "text": self._store.get(language, source, id).text}


def _uniform(seed: int, source: str, id: str) -> float:
    """In [0, 1), the same for a document in every language."""
    digest = hashlib.sha256(f"{seed}\0{source}\0{id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


@dataclasses.dataclass(frozen=True)
class Selection:
    """Chosen pairs of one file, in the order of writing.

    Attributes:
      kind, language_a, language_b: index into KINDS and into the pool's languages; int `[pairs]`.
      a, b: numbers of the documents; int `[pairs]`.
      p_b: float `[pairs]`.
      preferences: of each rater, float `[raters, pairs]`, nan where there is none.
      report: kind -> how many of what.
    """

    kind: np.ndarray
    language_a: np.ndarray
    language_b: np.ndarray
    a: np.ndarray
    b: np.ndarray
    p_b: np.ndarray
    preferences: np.ndarray
    report: Mapping[str, Mapping[str, Any]]


def select(config: PairsConfig, pool: Pool, validation: bool) -> Selection:
    """Chooses the pairs for training or for validation."""
    strata = Strata.of(config.margins)
    pair_raters = [rater for rater in config.raters if not hasattr(rater, "score")]
    sampler = PairSampler(pool.ids, pool.contents, pool.scores, pair_raters, strata)
    used = [l for l in pool.languages if validation or l not in config.heldout_languages]
    index = {language: i for i, language in enumerate(pool.languages)}
    documents = {l: np.flatnonzero(pool.available[:, index[l]] & (pool.heldout == validation)) for l in used}
    groups = {"monolingual": [(l, l) for l in used], "cross-lingual": language_pairs(used),
              "parallel": language_pairs(used)}
    columns, preferences, report = [], [], {}
    for number, (kind, count) in enumerate(config.counts(config.validation if validation else 1.0).items()):
        judged = unjudged = 0
        start = len(columns)
        for i, (wanted, group) in enumerate(zip(spread(count, len(groups[kind])), groups[kind])):
            rng = np.random.default_rng([config.seed, validation, number, i])
            first, second = (documents[language] for language in group)
            if kind == "parallel":
                a, b = _same_contents(rng, wanted, pool.contents, first, second)
                p_b, own = np.full(len(a), 0.5), np.full((len(config.raters), len(a)), np.nan)
            else:
                drawn = sampler.draw(rng, wanted, first, second)
                a, b, p_b, own = drawn.a, drawn.b, drawn.p_b, drawn.preferences
                judged, unjudged = judged + drawn.judged, unjudged + drawn.unjudged
            # Either language comes first as often, and with it either side is preferred as often.
            turned = rng.random(len(a)) < 0.5
            sides = np.where(turned, [[index[group[1]]], [index[group[0]]]], [[index[group[0]]], [index[group[1]]]])
            columns.append((np.full(len(a), number), *sides, np.where(turned, b, a), np.where(turned, a, b),
                            np.where(turned, 1 - p_b, p_b)))
            preferences.append(np.where(turned, 1 - own, own))
        report[kind] = _report(columns[start:], count, pool.languages, None if kind == "parallel" else strata)
        if kind != "parallel":
            report[kind] |= {"candidates": judged + unjudged, "unjudged": unjudged}
    fields = [np.concatenate(parts) for parts in zip(*columns)]
    order = np.random.default_rng([config.seed, validation, len(KINDS)]).permutation(len(fields[0]))
    # In the order of config.raters: the sampler puts raters of documents first.
    scored = [hasattr(rater, "score") for rater in config.raters]
    rows = np.argsort(np.argsort(np.logical_not(scored), kind="stable"))
    return Selection(*(field[order] for field in fields), np.concatenate(preferences, axis=1)[rows][:, order], report)


def _same_contents(
    rng: np.random.Generator, count: int, contents: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Documents of `first` and `second` that are one document in two languages, `count` at most."""
    _, i, j = np.intersect1d(contents[first], contents[second], return_indices=True)
    chosen = rng.permutation(len(i))[:count]
    return first[i[chosen]], second[j[chosen]]


def _report(columns: Sequence[tuple], wanted: int, languages: Sequence[str], strata: Strata | None) -> dict[str, Any]:
    """How many pairs of one kind, per language (a pair counts in each of its languages), per band of margins."""
    _, first, second, _, _, p_b = (np.concatenate(parts) for parts in zip(*columns)) if columns else [np.zeros(0)] * 6
    counts = Counter(languages[i] for pair in zip(first, second) for i in set(pair))
    found: dict[str, Any] = {"wanted": wanted, "pairs": len(p_b), "languages": dict(sorted(counts.items()))}
    if strata is not None:
        per_band = np.bincount(strata.band(p_b), minlength=len(strata.edges)).tolist()
        found["margins"] = {f"{edge:g}": n for edge, n in zip(strata.edges, per_band)}
    return found


def _write(file: BinaryIO, config: PairsConfig, pool: Pool, selection: Selection) -> None:
    provenance = {"program": "raters.pairs", "version": __version__, "method": config.method, "seed": config.seed,
                  "raters": [rater.name for rater in config.raters], "documents": len(pool.ids),
                  "left_out": pool.left_out, "repeated": pool.repeated, "sha256": pool.files,
                  "counts": selection.report,
                  "configuration": gin.operative_config_str()}
    _write_line(file, {"format": FORMAT, "version": VERSION, "provenance": provenance})
    names = [rater.name for rater in config.raters]
    for i, language in enumerate(pool.languages):
        sides = ((selection.a, selection.language_a), (selection.b, selection.language_b))
        pool.carry(np.concatenate([numbers[languages == i] for numbers, languages in sides]), language)
    for i in tqdm.trange(len(selection.a), desc="writing", unit=" pairs", disable=None):
        own = {name: value for name, value in zip(names, selection.preferences[:, i].tolist()) if value == value}
        _write_line(file, {
            "kind": KINDS[selection.kind[i]],
            "a": pool.text(int(selection.a[i]), pool.languages[selection.language_a[i]]),
            "b": pool.text(int(selection.b[i]), pool.languages[selection.language_b[i]]),
            "p_b": float(selection.p_b[i]),
            "raters": own,
        })


def _write_line(file: BinaryIO, value: Mapping[str, Any]) -> None:
    file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())


def pairs() -> None:
    """Rates documents and writes pairs of them. Parameters: pairs.* (see PairsConfig) and those of the raters."""
    config = PairsConfig()
    for rater in config.raters:
        if one_order := getattr(rater, "one_order", None):
            log(f"note: {rater.name}: {len(one_order)} of {len(rater.pairs)} pairs were judged in one order only: "
                "their preferences hold the bias for a place")
    pool = Pool(config)
    log(f"{len(pool.ids)} documents rated, {int(pool.heldout.sum())} of them held out; {pool.left_out} left out for "
         f"want of a translation, {pool.repeated} for a repeated id")
    outputs = {config.output: False} | ({config.validation_output: True} if config.validation_output else {})
    if config.validation_output and not pool.heldout.any():
        raise InputError("pairs.validation_output: no document is held out for validation (pairs.heldout_documents)")
    with contextlib.ExitStack() as stack:
        for path, validation in outputs.items():
            selection = select(config, pool, validation)
            _write(stack.enter_context(atomic_writer(path)), config, pool, selection)
            log(f"{path}:")
            for kind, counts in selection.report.items():
                log(_describe(kind, counts))


def _describe(kind: str, counts: Mapping[str, Any]) -> str:
    text = f"  {counts['pairs']} {kind} pairs of {counts['wanted']} wanted"
    if "margins" in counts:
        text += "; margins " + ", ".join(f"{edge}+ {n}" for edge, n in counts["margins"].items())
        text += f"; {counts['unjudged']} of {counts['candidates']} candidates dropped: no rater could judge"
    return text + "\n    " + " ".join(f"{language} {n}" for language, n in counts["languages"].items())


if __name__ == "__main__":
    run(pairs, "raters.pairs")
