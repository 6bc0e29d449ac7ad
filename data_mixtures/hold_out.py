"""Divides documents into those to train on and those to evaluate on: `python -m data_mixtures.hold_out`.

    python -m data_mixtures.hold_out --gin.Corpus.root=web --gin.Corpus.files='{language}/*.jsonl.gz' \\
        --gin.hold_out.corpus='@Corpus()' --gin.hold_out.output=runs/documents

    OUTPUT/train/<language>/<input file>.jsonl.gz      what is trained on
    OUTPUT/heldout/<language>/<input file>.jsonl.gz    what is evaluated on, never trained on
    OUTPUT/held_out.json                               counts

Which documents are held out depends on their ids alone, so that it stays the same when files are cut or ordered
otherwise. Documents that repeat each other may end on both sides: `raters.duplicates` finds them.
"""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping

import gin
import numpy as np
from etils import epath

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import SPLITS, Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import flat_output_name, jsonl_writer, to_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_json
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.parallel.cluster import log

MARKER = "held_out.json"
TRAIN, HELDOUT = SPLITS


@gin.configurable("hold_out")
@dataclasses.dataclass(frozen=True)
class HoldOutConfig:
    """Parameters of the division.

    Attributes:
      corpus: the documents; a {split} in their paths is ignored.
      output: folder for both splits.
      share: share of each language's documents to hold out. At least one is, and one stays.
      largest: most documents to hold out of a language.
      seed: seed of the choice.
      overwrite: replaces an output made from other files or settings.
    """

    corpus: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    share: float = 0.02
    largest: int = 2000
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise InputError(f"hold_out.share = {self.share!r}: must be a number above 0 and below 1")
        if self.largest < 1:
            raise InputError(f"hold_out.largest = {self.largest!r}: must be at least 1")


def _key(document: Document, seed: int) -> int:
    """Returns a number that depends on a document's language and id alone."""
    text = f"{seed}\n{document.language}\n{document.id}"
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _thresholds(config: HoldOutConfig) -> dict[str, int]:
    """Returns language -> largest key of the documents to hold out.

    Raises:
      InputError: a document has no language, or a language has a single document.
    """
    keys: dict[str, list[int]] = {}
    for name in config.corpus.paths():
        for document in config.corpus.read(name):
            if document.language == UNDETERMINED:
                raise InputError(f"{config.corpus.paths()[name]}:{document.number}: the language of this document is "
                                 "not known; put {language} into Corpus.files, or name the field in "
                                 "Corpus.language_key")
            keys.setdefault(document.language, []).append(_key(document, config.seed))
    thresholds = {}
    for language, values in keys.items():
        # Documents of one id count as one: all of them go to the same side.
        unique = np.unique(np.array(values, np.uint64))
        if len(unique) < 2:
            raise InputError(f"{config.corpus.location}: {language} has a single document; there is none to hold out")
        count = min(max(round(config.share * len(unique)), 1), config.largest, len(unique) - 1)
        thresholds[language] = int(unique[count - 1])
    return thresholds


def hold_out(config: HoldOutConfig) -> None:
    """Divides the documents of every language into a training and a held-out split.

    Raises:
      InputError: documents cannot be read or have no language, or the output has another origin.
    """
    files = config.corpus.paths()
    made_from = provenance("data_mixtures.hold_out", config, {name: sha256(path) for name, path in files.items()})
    if is_current(config.output, read_folder_record(config.output, MARKER), made_from, overwrite=config.overwrite,
                  contents={MARKER, *SPLITS}):
        return
    thresholds = _thresholds(config)
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    with new_folder(config.output, MARKER) as folder:
        for name in files:
            _divide(config, name, thresholds, folder, counts)
        write_json(folder / MARKER, {"provenance": made_from, "documents": counts})
    log(f"{config.output}: {counts[HELDOUT].total():,} of {sum(map(Counter.total, counts.values())):,} documents held "
        f"out, in {len(thresholds)} languages")


def _divide(config: HoldOutConfig, name: str, thresholds: Mapping[str, int], folder: epath.Path,
            counts: Mapping[str, Counter[str]]) -> None:
    """Copies the documents of one file, and adds to `counts`: split -> language -> documents."""
    with contextlib.ExitStack() as stack:
        writers = {}
        for document in config.corpus.read(name, extra=None):
            split = HELDOUT if _key(document, config.seed) <= thresholds[document.language] else TRAIN
            part = split, document.language
            if part not in writers:
                path = folder / split / document.language / flat_output_name(name)
                writers[part] = stack.enter_context(jsonl_writer(path))
            writers[part](to_record(document))
            counts[split][document.language] += 1


if __name__ == "__main__":
    run(hold_out, HoldOutConfig, "data_mixtures.hold_out")
