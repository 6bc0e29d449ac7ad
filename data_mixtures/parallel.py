"""Makes parallel text: documents of sentences, each followed by its translation, from aligned documents.

    python -m data_mixtures.parallel --gin_file=my.gin --gin_file=gin/mixtures/parallel.gin

A document of one language and the document of the other with the same `source` and `id` become one document of pairs:

    en: "Files\\nOpen the file."      zh: "文件\\n打开文件。"
    en-zh: "Files\\n文件\\nOpen the file.\\n打开文件。"        or zh first: "文件\\nFiles\\n打开文件。\\nOpen the file."

The pairs are the non-blank lines of the two, in order. Documents with unlike numbers of lines are left out, as nothing
says which lines belong together. A record is `{"id", "source", "lang": "en-zh", "text", "first": "en"}`; which
language comes first depends on the seed, source and id alone.

Parallel text is one more "language" of the corpus and of the token store, so that `data_mixtures.parallel_rates`, or
any rates file, gives its share of the tokens.

MuBench (arXiv 2506.19468) keeps pairs with a COMET score above 0.8. COMET is a neural network outside this project:
`score_key` names the field in which its scores lie. `max_length_ratio` finds lines that were cut or left out, and does
not judge translations.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer, sha256, write_json
from mlx_pretrain.parallel.cluster import log

RECORD = "parallel.json"
Pair = tuple[Document, Document]  # a document in the first and in the second language


@gin.configurable("parallel")
@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Parameters of the parallel text.

    Attributes:
      corpus: documents of both languages, with {split} and {language} in their paths, aligned by `source` and `id`.
      languages: the two languages, e.g. ["en", "zh"]; joined by "-" they name the parallel text.
      output: folder of the parallel text: <split>/<name>.jsonl, and parallel.json with counts and origin.
      max_length_ratio: a pair is left out when one of its lines has more than this many times the UTF-8 bytes of the
        other; None: pairs of any lengths are taken. Pairs of the same line twice are always left out.
      score_key: field of the second language's records with the quality of the whole translation, e.g. "comet"; None:
        records have no scores.
      min_score: documents with a lower score are left out; needs score_key. MuBench's threshold for COMET is 0.8.
      seed: seed of the choice of the language that comes first.
      overwrite: replaces parallel text that was made from other documents or settings.
    """

    corpus: Corpus = gin.REQUIRED
    languages: Sequence[str] = gin.REQUIRED
    output: epath.PathLike = gin.REQUIRED
    max_length_ratio: float | None = 4.0
    score_key: str | None = None
    min_score: float | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if isinstance(self.languages, str) or len(set(self.languages)) != 2 or len(self.languages) != 2:
            raise InputError(f"parallel.languages: {self.languages!r} are not two languages")
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise InputError(f"parallel.max_length_ratio: {self.max_length_ratio} must be at least 1")
        if (self.score_key is None) != (self.min_score is None):
            raise InputError("parallel: score_key and min_score must be set together")

    @property
    def name(self) -> str:
        """Name of the parallel text, which stands for a language."""
        return "-".join(self.languages)


def aligned(corpus: Corpus, split: str, languages: Sequence[str], extra: Sequence[str] = ()) -> Iterator[Pair]:
    """Yields the documents that both languages have, in the order in which the second of each pair is read.

    Both languages are read side by side. Memory holds the documents whose translation has not come yet: few where the
    languages are in the same order.

    Args:
      corpus: documents with `source` and `id`.
      split: split to read.
      languages: the two languages.
      extra: further fields of the records to keep.

    Raises:
      InputError: documents cannot be read, or two documents of a language wait for the same translation.
    """
    waiting: tuple[dict, dict] = {}, {}
    streams = ((document for name in corpus.files_of(split, language) for document in corpus.read(name, extra=extra))
               for language in languages)
    for both in itertools.zip_longest(*streams):
        for side, document in enumerate(both):
            if document is None:
                continue
            key = document.source, document.id
            if key in waiting[side]:
                raise InputError(f"{corpus.location}: {split} has two documents with source {document.source!r} and "
                                 f"id {document.id!r} in {languages[side]}")
            if (other := waiting[1 - side].pop(key, None)) is None:
                waiting[side][key] = document
            else:
                yield (other, document) if side else (document, other)


def non_blank_lines(text: str) -> list[str]:
    """Returns the lines of a text, without white space around them."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def _kept_pairs(config: ParallelConfig, pair: Pair, counts: collections.Counter[str]) -> list[tuple[str, str]]:
    """Returns the pairs of lines of two documents that pass the filters; counts what does not."""
    if config.score_key is not None and not _score(config, pair[1]) >= config.min_score:
        counts["documents_below_min_score"] += 1
        return []
    first, second = (non_blank_lines(document.text) for document in pair)
    if len(first) != len(second):
        counts["documents_with_unlike_lines"] += 1
        return []
    kept = []
    for lines in zip(first, second):
        short, long = sorted(len(line.encode()) for line in lines)
        if lines[0] == lines[1]:
            counts["pairs_of_the_same_line"] += 1
        elif config.max_length_ratio is not None and long > config.max_length_ratio * short:
            counts["pairs_of_unlike_lengths"] += 1
        else:
            kept.append(lines)
    counts["documents_without_pairs"] += not kept
    return kept


def _score(config: ParallelConfig, document: Document) -> float:
    score = document.extra[config.score_key]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise InputError(f"{config.corpus.location}: document {document.id!r} in {config.languages[1]} has no number "
                         f"{config.score_key!r}")
    return score


def parallel_records(config: ParallelConfig, split: str, counts: collections.Counter[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of a split's parallel documents; adds to `counts` what was kept and what was left out.

    Raises:
      InputError: as `aligned`, or a document has no score.
    """
    extra = () if config.score_key is None else (config.score_key,)
    for pair in aligned(config.corpus, split, config.languages, extra):
        pairs = _kept_pairs(config, pair, counts)
        if not pairs:
            continue
        document = pair[0]
        reverse = hashlib.sha256(json.dumps([config.seed, document.source, document.id]).encode()).digest()[0] % 2
        text = "\n".join(line for lines in pairs for line in (reversed(lines) if reverse else lines))
        counts.update(documents=1, pairs=len(pairs), bytes=len(text.encode()))
        yield {"id": document.id, "source": document.source, "lang": config.name, "text": text,
               "first": config.languages[reverse]}


def main(config: ParallelConfig) -> dict[str, dict[str, int]]:
    """Makes parallel text from aligned documents: every line is followed by its translation.

    Returns:
      Split -> counts of what was kept and what was left out; {} where text made before is kept.

    Raises:
      InputError: a language is missing, documents cannot be read, a split has no pair, or other text is in the way.
    """
    corpus, output = config.corpus, epath.Path(config.output)
    splits = [split for split in corpus.all_splits
              if all(split in corpus.splits_of(language) for language in config.languages)]
    if not splits:
        raise InputError(f"{corpus.location}: no split has documents in both {' and '.join(config.languages)}")
    hashes = {split: {language: corpus.hashes(split, language) for language in config.languages} for split in splits}
    made_from = provenance("data_mixtures.parallel", config, hashes)

    def damage() -> str | None:
        files = read_folder_record(output, RECORD, "files")
        return next((f"{name} is not the file that its record describes" for name, hash in files.items()
                     if not (output / name).exists() or sha256(output / name) != hash), None)

    if is_current(output, read_folder_record(output, RECORD), made_from, overwrite=config.overwrite, damage=damage,
                  contents=[*splits, RECORD]):
        return {}
    counts: dict[str, dict[str, int]] = {}
    with new_folder(output, RECORD) as folder:
        for split in splits:
            counter: collections.Counter[str] = collections.Counter()
            with atomic_writer(folder / split / f"{config.name}.jsonl") as file:
                for record in parallel_records(config, split, counter):
                    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            if not counter["documents"]:
                raise InputError(f"{corpus.location}: no pair of lines in the split {split!r}; documents are aligned "
                                 f"by source and id ({_in_words(counter) or 'none has a translation'})")
            counts[split] = dict(sorted(counter.items()))
            log(f"{split}/{config.name}: {_in_words(counter)}")
        files = {f"{split}/{config.name}.jsonl": sha256(folder / split / f"{config.name}.jsonl") for split in splits}
        write_json(folder / RECORD, {"counts": counts, "files": files, "provenance": made_from})
    return counts


def _in_words(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(counts.items()) if count)


if __name__ == "__main__":
    run(main, ParallelConfig, "data_mixtures.parallel")
