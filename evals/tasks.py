"""MuBench's files: `{Dataset}/{mode}_{language}_test.jsonl`, one object `{"_id", "prompt", "choices", "label"}` a line.

Items of one dataset and mode are aligned across languages by `_id`: one that is missing or malformed in a language is
dropped in all. What joins prompt and choice is one space (those at the end of a prompt or the beginning of a choice do
not add to it), or nothing in scripts without spaces, or the row's own `delimiter` (ours).
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from evals.language_families import UNSPACED, by_family
from mlx_pretrain.data.documents import match_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer

MODES = ("en_template", "local_template", "lighteval", "mix_lighteval", "mix")
_NAME = re.compile(
    rf"(?P<mode>{'|'.join(MODES)})_(?P<language>[a-z]{{2,3}})(?:_(?P<most>\d+))?_(?P<split>[a-z]+)\.jsonl"
)

# Datasets judged by plain accuracy; the others by accuracy per character (MuBench, section 4).
PLAIN_ACCURACY = ("SNLI", "MNLI", "MultiNLI", "WinoGrande", "BMLAMA")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: the same in all languages.
      prompt: may be empty: then options are whole texts.
      choices: two at least.
      label: of the right one.
      delimiter: between prompt and choice.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    delimiter: str


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """A dataset in one mode.

    Attributes:
      dataset: name of its folder, with or without "Dataset" at the end.
      mode: of MODES, with "_2" behind for code-switched text of at most two languages besides English.
    """

    dataset: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.dataset}_{self.mode}"

    @property
    def plain_mode(self) -> str:
        """One of MODES."""
        return re.sub(r"_\d+$", "", self.mode)

    @property
    def metric(self) -> str:
        """The normalisation that MuBench reports for the dataset."""
        return "acc" if self.dataset.removesuffix("Dataset") in PLAIN_ACCURACY else "acc_norm"


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Items of a task, in the same order in all languages.

    Attributes:
      languages: by family.
      items: language -> items.
      rejected: (file and line, reason) of rows that are no items.
      dropped: id -> languages it is missing in.
    """

    languages: tuple[str, ...]
    items: Mapping[str, tuple[Item, ...]]
    rejected: tuple[tuple[str, str], ...]
    dropped: Mapping[str, tuple[str, ...]]


def find_tasks(
    patterns: Sequence[str], languages: Sequence[str] | None = None, split: str = "test"
) -> dict[Task, dict[str, epath.Path]]:
    """Files by task and language.

    Args:
      patterns: globs of files, local or gs://, e.g. "mubench/*/lighteval_*_test.jsonl".
      languages: to take; None: all that are there.
      split: at the end of the files' names.

    Raises:
      InputError: a glob matches nothing, a file is not named like one of MuBench's, two files are of the same task and
        language, or a language that was asked for is missing.
    """
    found: dict[Task, dict[str, epath.Path]] = {}
    there: set[str] = set()
    for pattern in patterns:
        for path in match_files(pattern):
            match = _NAME.fullmatch(path.name)
            if match is None:
                raise InputError(f"{path}: not named <mode>_<language>_<split>.jsonl with a mode of {', '.join(MODES)}")
            if match["split"] != split:
                continue
            there.add(match["language"])
            if languages is not None and match["language"] not in languages:
                continue
            mode = match["mode"] + (f"_{match['most']}" if match["most"] else "")
            files = found.setdefault(Task(path.parent.name, mode), {})
            if files.setdefault(match["language"], path) != path:
                raise InputError(f"{path}: {files[match['language']]} is of the same dataset, mode and language")
    if not found:
        raise InputError(f"{', '.join(patterns)}: no file of the split {split!r}" + (
            "" if languages is None else f" in {', '.join(languages)}; there is {', '.join(sorted(there))}"))
    for task, files in found.items():
        if missing := sorted(set(languages or ()) - set(files)):
            raise InputError(f"{task.name}: no file for {', '.join(missing)}; there is {', '.join(sorted(there))}")
    return {task: {language: found[task][language] for language in by_family(found[task])} for task in sorted(found)}


def read_items(path: epath.Path, language: str) -> tuple[dict[str, Item], list[tuple[str, str]]]:
    """Items of a file by id, and (file and line, reason) of rows that are none.

    Raises:
      InputError: the file is missing or no UTF-8.
    """
    try:
        lines = path.read_text().split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    items: dict[str, Item] = {}
    rejected = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), language)
            if item.id in items:
                raise ValueError(f"the id {item.id!r} is there twice")
            items[item.id] = item
        except ValueError as error:
            rejected.append((f"{path}:{number}", str(error)))
    return items, rejected


def _item(row: Any, language: str) -> Item:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    missing = [name for name in ("_id", "prompt", "choices", "label") if name not in row]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    choices, label, prompt = row["choices"], row["label"], row["prompt"]
    delimiter = row.get("delimiter", "" if language in UNSPACED else " ")
    if not isinstance(prompt, str) or not isinstance(delimiter, str):
        raise ValueError("prompt and delimiter must be text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of texts")
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise ValueError("two choices are needed, and none may be empty")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"label {label!r} is none of 0 to {len(choices) - 1}")
    # One space joins them, whoever brings it along.
    if delimiter.startswith(" "):
        prompt = prompt.rstrip(" ")
    if delimiter.endswith(" "):
        choices = [choice.lstrip(" ") for choice in choices]
    return Item(str(row["_id"]), prompt, tuple(choices), label, delimiter if prompt else "")


def align(files: Mapping[str, epath.Path], limit: int | None = None) -> Aligned:
    """Reads a task's files.

    Args:
      files: language -> file.
      limit: so many items, evenly spaced among those that all languages have; None: all.

    Raises:
      InputError: no item is there in all languages.
    """
    items, rejected = {}, []
    for language, path in files.items():
        items[language], bad = read_items(path, language)
        rejected += bad
    order = list(dict.fromkeys(id for found in items.values() for id in found))
    dropped = {id: tuple(language for language in items if id not in items[language]) for id in order}
    dropped = {id: languages for id, languages in dropped.items() if languages}
    kept = []
    for id in order:
        if id in dropped:
            continue
        same = {(len(found[id].choices), found[id].label) for found in items.values()}
        if len(same) > 1:
            rejected.append((id, "choices or label differ between languages"))
            dropped[id] = tuple(items)
        else:
            kept.append(id)
    if not kept:
        raise InputError(f"{', '.join(map(str, files.values()))}: no item is there in all languages" + (
            f"; {rejected[0][0]}: {rejected[0][1]}" if rejected else ""))
    if limit is not None and limit < len(kept):
        kept = [kept[n * len(kept) // limit] for n in range(limit)]
    chosen = {language: tuple(found[id] for id in kept) for language, found in items.items()}
    return Aligned(tuple(items), chosen, tuple(rejected), dropped)


def read_examples(files: Mapping[str, epath.Path], count: int) -> dict[str, tuple[Item, ...]]:
    """Solved examples for a task's test files: the first items of the split "dev" beside them, language by language.

    Raises:
      InputError: there are fewer in all languages.
    """
    if not count:
        return dict.fromkeys(files, ())
    beside = {language: path.parent / path.name.replace("_test.", "_dev.") for language, path in files.items()}
    found = align(beside)
    if (there := len(found.items[found.languages[0]])) < count:
        raise InputError(f"{beside[found.languages[0]]}: few_shot = {count}, but only {there} examples are there in "
                         "all languages")
    return {language: items[:count] for language, items in found.items.items()}


def file_of(task: Task, language: str, split: str = "test") -> str:
    """Name of a file in MuBench's form, <dataset>/<mode>_<language>_<split>.jsonl; the number of languages in a
    code-switched one follows its language."""
    most = task.mode.removeprefix(task.plain_mode)
    return f"{task.dataset}/{task.plain_mode}_{language}{most}_{split}.jsonl"


def write_items(folder: epath.PathLike, task: Task, language: str, items: Iterable[Item], split: str = "test") -> int:
    """Writes a file in MuBench's form, FOLDER/<dataset>/<mode>_<language>_<split>.jsonl; returns how many items."""
    count = 0
    with atomic_writer(epath.Path(folder) / file_of(task, language, split)) as file:
        for item in items:
            row = {"_id": item.id, "prompt": item.prompt, "choices": list(item.choices), "label": item.label,
                   "delimiter": item.delimiter}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            count += 1
    return count
