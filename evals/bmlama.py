"""Converts BMLAMA (arXiv 2310.10378) to MuBench's form.

    python -m evals.bmlama --gin.bmlama.source=DIR --gin.bmlama.output=DIR

In the published tables, `<language>.tsv[.xz]` with the columns sentence, answer, candidates and subject, rows are
aligned and the right candidate is the last. Here candidates are shuffled, the same way in all languages, and rows with
one candidate are left out. The text before the mask is the prompt, a candidate with the text after the mask a choice,
so that sentences with the mask in the middle are scored to their end.
"""

import csv
import dataclasses
import io
import lzma
import re
from collections.abc import Iterator

import gin
import numpy as np
from etils import epath

from evals.tasks.language_families import by_family
from evals.tasks.task_files import Item, Task, file_name, is_current, write_items
from mlx_pretrain.artifacts import provenance
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log

TASK = Task("BMLAMADataset", "lighteval")
MASK = "<mask>"


@gin.configurable("bmlama")
@dataclasses.dataclass(frozen=True)
class BmlamaConfig:
    """Settings of the conversion.

    Attributes:
      source: folder of the tables.
      output: folder of the tasks.
      seed: seed of the shuffling.
      overwrite: replaces tasks that were made from other tables or settings.
    """

    source: str = gin.REQUIRED
    output: str = gin.REQUIRED
    seed: int = 0
    overwrite: bool = False


def main(config: BmlamaConfig) -> dict[str, int]:
    """Converts all tables of a folder to OUTPUT/BMLAMADataset/lighteval_<language>_test.jsonl.

    Returns:
      Language -> number of items.

    Raises:
      InputError: the folder has no tables, one is malformed, or an output has another origin.
    """
    folder = epath.Path(config.source)
    files = {path.name.split(".")[0]: path for path in folder.iterdir()} if folder.is_dir() else {}
    paths = {language: path for language, path in files.items() if re.search(r"\.tsv(\.xz)?$", path.name)}
    if not paths:
        raise InputError(f"{folder}: no <language>.tsv or .tsv.xz in this folder")
    made_from = {language: provenance("evals.bmlama", {"seed": config.seed}, {language: sha256(paths[language])})
                 for language in by_family(paths)}
    kept = {language: is_current(epath.Path(config.output) / file_name(TASK, language), made_from[language],
                                 overwrite=config.overwrite) for language in made_from}
    counts = {}
    for language in made_from:
        items = list(_read_items(paths[language], config.seed))
        if not kept[language]:
            write_items(config.output, TASK, language, items, made_from=made_from[language])
        counts[language] = len(items)
        log(f"{language}: {counts[language]:,} items")
    return counts


def _read_items(path: epath.Path, seed: int) -> Iterator[Item]:
    for number, (sentence, answer, candidates, _) in _read_rows(path):
        candidates = [candidate.strip() for candidate in candidates.split(", ")]
        if len(candidates) < 2:
            continue
        if sentence.count(MASK) != 1:
            raise InputError(f"{path}:{number}: {MASK} occurs {sentence.count(MASK)} times, not once")
        if candidates[-1] != answer.strip():
            raise InputError(f"{path}:{number}: the last candidate is {candidates[-1]!r}, the answer {answer!r}")
        before, after = sentence.split(MASK)
        # The same order in all languages, as their rows and candidates are aligned.
        order = np.random.default_rng([seed, number]).permutation(len(candidates)).tolist()
        prompt = before.rstrip()
        delimiter = " " if prompt and before != prompt else ""
        choices = tuple(candidates[index] + after.rstrip() for index in order)
        yield Item(str(number - 2), prompt, choices, order.index(len(candidates) - 1), delimiter)


def _read_rows(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, columns) of a table's rows."""
    content = path.read_bytes()
    try:
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    rows = csv.reader(io.StringIO(text), delimiter="\t")
    # Columns are read by position: the published Chinese table has "Candidate Ans" split into two names.
    if next(rows, [])[:2] != ["Prompt", "Ans"]:
        raise InputError(f"{path}:1: the columns are not Prompt, Ans, Candidate Ans, Subject")
    for row in rows:
        if len(row) != 4:
            raise InputError(f"{path}:{rows.line_num}: {len(row)} columns, not 4")
        yield rows.line_num, row


if __name__ == "__main__":
    run(main, BmlamaConfig, "evals.bmlama")
