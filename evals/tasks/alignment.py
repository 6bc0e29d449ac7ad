"""Items aligned across the languages of a task: those that all languages have, in the same order."""

import dataclasses
from collections.abc import Mapping

from etils import epath

from evals.tasks.task_files import Item, read_items
from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class AlignedItems:
    """The items of a task, in the same order in all languages.

    Attributes:
      languages: languages by family.
      items: language -> items.
      rejected: (file and line, reason) of each malformed row.
      dropped: id -> languages in which the item is missing or malformed; it is left out in all.
    """

    languages: tuple[str, ...]
    items: Mapping[str, tuple[Item, ...]]
    rejected: tuple[tuple[str, str], ...]
    dropped: Mapping[str, tuple[str, ...]]


def align_items(files: Mapping[str, epath.Path], limit: int | None = None) -> AlignedItems:
    """Reads a task's files and keeps the items that all languages have.

    Args:
      files: language -> file.
      limit: number of items to keep, evenly spaced; None: all.

    Raises:
      InputError: no item exists in all languages.
    """
    items, rejected = {}, []
    for language, path in files.items():
        items[language], malformed = read_items(path, language)
        rejected += malformed
    ids = list(dict.fromkeys(id for by_id in items.values() for id in by_id))
    dropped = {id: tuple(language for language in items if id not in items[language]) for id in ids}
    dropped = {id: languages for id, languages in dropped.items() if languages}
    kept_ids = []
    for id in ids:
        if id in dropped:
            continue
        answers = {(len(by_id[id].choices), by_id[id].label) for by_id in items.values()}
        if len(answers) > 1:
            rejected.append((id, "choices or label differ between languages"))
            dropped[id] = tuple(items)
        else:
            kept_ids.append(id)
    if not kept_ids:
        raise InputError(f"{', '.join(map(str, files.values()))}: no item exists in all languages" + (
            f"; {rejected[0][0]}: {rejected[0][1]}" if rejected else ""))
    if limit is not None and limit < len(kept_ids):
        kept_ids = [kept_ids[n * len(kept_ids) // limit] for n in range(limit)]
    kept = {language: tuple(by_id[id] for id in kept_ids) for language, by_id in items.items()}
    return AlignedItems(tuple(items), kept, tuple(rejected), dropped)


def read_examples(files: Mapping[str, epath.Path], count: int) -> dict[str, tuple[Item, ...]]:
    """Returns solved examples by language: the first items of the split "dev" beside a task's test files.

    Raises:
      InputError: fewer than `count` exist in all languages.
    """
    if not count:
        return dict.fromkeys(files, ())
    dev_files = {language: path.parent / path.name.replace("_test.", "_dev.") for language, path in files.items()}
    examples = align_items(dev_files)
    first_language = examples.languages[0]
    if (available := len(examples.items[first_language])) < count:
        raise InputError(f"{dev_files[first_language]}: few_shot = {count}, but only {available} examples exist in "
                         "all languages")
    return {language: items[:count] for language, items in examples.items.items()}
