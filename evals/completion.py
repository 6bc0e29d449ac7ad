"""Which line goes on? Cloze items from aligned documents, in MuBench's form (our own formulation).

    python -m evals.completion --gin.completion.documents='samples/text/heldout/*.jsonl.xz' --gin.completion.output=DIR

Of documents that have the same number of lines in several languages, every line but the first is an item: the lines
before it are the prompt, the line itself is right, and three lines of other documents of the same source are wrong, the
same ones in all languages. Documents that are not aligned in all the languages are left out.
"""

from collections.abc import Mapping, Sequence

import gin
import numpy as np

from evals.language_families import by_family
from evals.tasks import Item, Task, write_items
from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import match_files, read_documents
from mlx_pretrain.errors import InputError

TASK = Task("CompletionDataset", "lighteval")
N_CHOICES = 4

# (source, id) -> lines.
Lines = dict[tuple[str, str], list[str]]


@gin.configurable
def completion(
    documents: str = gin.REQUIRED,
    output: str = gin.REQUIRED,
    languages: Sequence[str] | None = None,
    min_characters: int = 12,
    max_characters: int = 300,
    prompt_characters: int = 400,
    seed: int = 0,
) -> int:
    """Writes CompletionDataset/lighteval_<language>_test.jsonl.

    Args:
      documents: glob of files <language>.jsonl[.xz], aligned by `source` and `id`.
      output: folder of the tasks.
      languages: to take; None: all that are there.
      min_characters, max_characters: of a line that is a choice, in every language; the first is halved, the second
        divided by three for scripts of syllables and words (zh, ja, ko).
      prompt_characters: so many at the end of the lines before it, whole lines, one at least.
      seed: of the wrong choices and the order.

    Returns:
      How many items, the same ones in every language.

    Raises:
      InputError: a language is missing, or no item is left.
    """
    texts = {}
    for path in match_files(documents):
        if (other := texts.setdefault(path.name.split(".")[0], path)) != path:
            raise InputError(f"{path}: its language has {other.name}, too; one file a language is read")
    if missing := sorted(set(languages or ()) - set(texts)):
        raise InputError(f"{documents}: no file for {', '.join(missing)}; there is {', '.join(sorted(texts))}")
    lines = {language: _lines(texts[language]) for language in by_family(languages or texts)}
    aligned = _aligned(lines)
    bounds = {language: (min_characters // 2, max_characters // 3) if language in ("zh", "ja", "ko")
              else (min_characters, max_characters) for language in lines}
    places = [(document, number) for document in aligned for number in range(1, len(aligned[document]))
              if all(low <= len(found[document][number]) <= high
                     for found, (low, high) in ((lines[language], bounds[language]) for language in lines))]
    chosen = _with_wrong_choices(places, np.random.default_rng(seed))
    if not chosen:
        raise InputError(f"{documents}: no line is left that is aligned in {', '.join(lines)}")
    for language, found in lines.items():
        write_items(output, TASK, language, (_item(found, choices, label, prompt_characters)
                                             for choices, label in chosen))
    print(f"{len(chosen)} items in {len(lines)} languages")
    return len(chosen)


def _lines(path) -> Lines:
    return {(document.source, document.id): [line.strip() for line in document.text.split("\n") if line.strip()]
            for document in read_documents(path)}


def _aligned(lines: Mapping[str, Lines]) -> Lines:
    """Documents of the first language that have as many lines in all."""
    first, *rest = lines.values()
    return {document: found for document, found in first.items()
            if all(len(other.get(document, ())) == len(found) for other in rest)}


def _with_wrong_choices(places: Sequence, rng: np.random.Generator) -> list[tuple[list, int]]:
    """(places of the choices, which is right) of each item; places without three others of their source are left."""
    items = []
    for document, number in places:
        others = [place for place in places if place[0][0] == document[0] and place[0] != document]
        if len(others) < N_CHOICES - 1:
            continue
        wrong = [others[i] for i in rng.choice(len(others), N_CHOICES - 1, replace=False)]
        label = int(rng.integers(N_CHOICES))
        items.append(([*wrong[:label], (document, number), *wrong[label:]], label))
    return items


def _item(lines: Lines, choices: Sequence, label: int, prompt_characters: int) -> Item:
    document, number = choices[label]
    before = lines[document][:number]
    while len(before) > 1 and sum(map(len, before)) > prompt_characters:
        before = before[1:]
    return Item(f"{document[0]}/{document[1]}:{number}", "\n".join(before),
                tuple(lines[other][line] for other, line in choices), label, "\n")


if __name__ == "__main__":
    run(completion, "evals.completion")
