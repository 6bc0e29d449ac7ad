"""Makes cloze items in MuBench's form from aligned documents: which line continues the text (our own formulation).

    python -m evals.completion --gin.completion.corpus='@Corpus()' \\
        --gin.Corpus.files='samples/text/heldout/*.jsonl.xz' --gin.completion.output=DIR

Documents are aligned when they have the same source, id and number of lines in all languages; others are left out.
Every line but the first is an item: the lines before it are the prompt, the line itself is the right choice, and three
lines of other documents of the same source are the wrong ones, the same in all languages.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import gin
import numpy as np
from etils import epath

from evals.tasks.language_families import by_family
from evals.tasks.task_files import Item, Task, file_name, is_current, write_items
from mlx_pretrain.artifacts import provenance, settings_of
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log

TASK = Task("CompletionDataset", "lighteval")
N_CHOICES = 4

Lines = dict[tuple[str, str], list[str]]  # (source, id) of a document -> its lines
LinePosition = tuple[tuple[str, str], int]  # (source, id) of a document, line number


@gin.configurable("completion")
@dataclasses.dataclass(frozen=True)
class CompletionConfig:
    """Settings of the items.

    Attributes:
      corpus: documents in several languages, aligned by `source` and `id`.
      output: folder of the tasks.
      languages: languages to take; None: all.
      min_characters, max_characters: bounds on the length of a choice in every language; for scripts of syllables and
        words (zh, ja, ko) the first is halved and the second divided by three.
      prompt_characters: greatest length of a prompt in whole lines; one line is always kept.
      seed: seed of the wrong choices and the order.
      overwrite: replaces tasks that were made from other documents or settings.
    """

    corpus: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    languages: Sequence[str] | None = None
    min_characters: int = 12
    max_characters: int = 300
    prompt_characters: int = 400
    seed: int = 0
    overwrite: bool = False


def main(config: CompletionConfig) -> int:
    """Makes cloze items from aligned documents and writes them to OUTPUT/CompletionDataset.

    Returns:
      The number of items in every language.

    Raises:
      InputError: a language is missing, no item is left, or tasks made from others are in the way.
    """
    corpus = config.corpus
    lines = _read_lines(corpus, config.languages)
    made_from = provenance("evals.completion", {**settings_of(config), "languages": list(lines)},
                           {name: sha256(path) for name, path in corpus.paths().items()})
    languages = [language for language in lines if not is_current(
        epath.Path(config.output) / file_name(TASK, language), made_from, overwrite=config.overwrite)]
    aligned = _aligned_documents(lines)
    bounds = {language: (config.min_characters // 2, config.max_characters // 3) if language in ("zh", "ja", "ko")
              else (config.min_characters, config.max_characters) for language in lines}
    positions = [(document, number) for document in aligned for number in range(1, len(aligned[document]))
                 if all(low <= len(lines[language][document][number]) <= high
                        for language, (low, high) in bounds.items())]
    items = _with_wrong_choices(positions, np.random.default_rng(config.seed))
    if not items:
        raise InputError(f"{corpus.location}: no line is left that is aligned in {', '.join(lines)}")
    for language in languages:
        write_items(config.output, TASK, language, (
            _make_item(lines[language], choices, label, config.prompt_characters) for choices, label in items),
            made_from=made_from)
    log(f"{len(items)} items in {len(lines)} languages")
    return len(items)


def _read_lines(corpus: Corpus, languages: Sequence[str] | None) -> dict[str, Lines]:
    """Returns language -> lines of its documents, languages by family."""
    lines: dict[str, Lines] = {}
    for name in corpus.paths():
        for document in corpus.read(name):
            lines.setdefault(document.language, {})[document.source, document.id] = [
                line.strip() for line in document.text.split("\n") if line.strip()]
    if missing := sorted(set(languages or ()) - set(lines)):
        raise InputError(
            f"{corpus.location}: no documents in {', '.join(missing)}; available: {', '.join(sorted(lines))}")
    return {language: lines[language] for language in by_family(languages or lines)}


def _aligned_documents(lines: Mapping[str, Lines]) -> Lines:
    """Returns the documents of the first language that have the same number of lines in all languages."""
    first, *rest = lines.values()
    return {document: document_lines for document, document_lines in first.items()
            if all(len(other.get(document, ())) == len(document_lines) for other in rest)}


def _with_wrong_choices(
    positions: Sequence[LinePosition], rng: np.random.Generator
) -> list[tuple[list[LinePosition], int]]:
    """Returns (positions of the choices, index of the right one) of each item.

    Lines without enough lines in other documents of their source are left out.
    """
    items = []
    for document, number in positions:
        others = [position for position in positions if position[0][0] == document[0] and position[0] != document]
        if len(others) < N_CHOICES - 1:
            continue
        wrong = [others[i] for i in rng.choice(len(others), N_CHOICES - 1, replace=False)]
        label = int(rng.integers(N_CHOICES))
        items.append(([*wrong[:label], (document, number), *wrong[label:]], label))
    return items


def _make_item(lines: Lines, choices: Sequence[LinePosition], label: int, prompt_characters: int) -> Item:
    document, number = choices[label]
    before = lines[document][:number]
    while len(before) > 1 and sum(map(len, before)) > prompt_characters:
        before = before[1:]
    return Item(f"{document[0]}/{document[1]}:{number}", "\n".join(before),
                tuple(lines[other][line] for other, line in choices), label, "\n")


if __name__ == "__main__":
    run(main, CompletionConfig, "evals.completion")
