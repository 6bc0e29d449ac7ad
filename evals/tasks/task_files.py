"""Benchmarks as files in MuBench's form (arXiv 2506.19468), one per dataset, mode and language.

    FOLDER/<dataset>/<mode>_<language>_<split>.jsonl         one item a line:
    {"_id": "7", "prompt": "The cat sat on", "choices": ["the mat", "the moon"], "label": 0}

Prompt and choice are joined by one space (spaces at the end of a prompt or the beginning of a choice do not add to it),
without a delimiter in scripts without spaces, or by the row's own `delimiter` (a field of ours).

A file that a command made has a record beside it, FOLDER/<dataset>/made_from.<mode>_<language>_<split>.json.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from evals.tasks.language_families import UNSPACED, by_family
from mlx_pretrain import artifacts
from mlx_pretrain.configuration.gin_files import find_shipped
from mlx_pretrain.data.documents import match_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic

MODES = ("en_template", "local_template", "lighteval", "mix_lighteval", "mix")
_FILE_NAME = re.compile(
    rf"(?P<mode>{'|'.join(MODES)})_(?P<language>[a-z]{{2,3}})(?:_(?P<mixed>\d+))?_(?P<split>[a-z]+)\.jsonl"
)
_RECORD = "made_from."

# Datasets for which MuBench reports plain accuracy; for the others it is accuracy per character (section 4).
PLAIN_ACCURACY = ("SNLI", "MNLI", "MultiNLI", "WinoGrande", "BMLAMA")


@dataclasses.dataclass(frozen=True)
class Item:
    """A multiple-choice question in one language.

    Attributes:
      id: identifier, the same in all languages.
      prompt: text before the choice; empty where the choices are whole texts.
      choices: possible answers, at least two.
      label: index of the right choice.
      delimiter: text between prompt and choice.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    delimiter: str


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """A benchmark: one dataset in one mode, in any number of languages.

        tasks = find_tasks(["mubench/*/lighteval_*_test.jsonl"], languages=["en", "de"])
        for task, files in tasks.items():      # Task("SNLIDataset", "lighteval"), {"en": path, "de": path}
            items = align_items(files).items   # {"en": (Item, ...), "de": (Item, ...)}, in the same order
            print(task.name, task.main_metric)

    Attributes:
      dataset: name of the folder, with or without "Dataset" at the end.
      mode: prompt format, one of MODES; code-switched modes end in the number of other languages, e.g. "mix_2".
    """

    dataset: str
    mode: str

    @property
    def name(self) -> str:
        """Dataset and mode, as in the names of results."""
        return f"{self.dataset}_{self.mode}"

    @property
    def plain_mode(self) -> str:
        """The mode without a number of languages: one of MODES."""
        return re.sub(r"_\d+$", "", self.mode)

    @property
    def main_metric(self) -> str:
        """The accuracy that MuBench reports for the dataset, a name in `scoring.metrics.METRICS`."""
        return "acc" if self.dataset.removesuffix("Dataset") in PLAIN_ACCURACY else "acc_norm"


def find_tasks(
    patterns: Sequence[str], languages: Sequence[str] | None = None, split: str = "test"
) -> dict[Task, dict[str, epath.Path]]:
    """Returns the files that match, by task and language.

    Args:
      patterns: globs of files, local or gs://, e.g. "mubench/*/lighteval_*_test.jsonl". Those of the repository
        (samples/tasks) are found from any folder.
      languages: languages to take; None: all.
      split: end of the file names.

    Raises:
      InputError: a glob matches no file, a file is not named as above, two files are of the same task and language, or
        one of `languages` is missing.
    """
    tasks: dict[Task, dict[str, epath.Path]] = {}
    all_languages: set[str] = set()
    for pattern in patterns:
        for path in match_files(find_shipped(os.fspath(pattern))):
            if path.name.startswith(_RECORD):
                continue
            match = _FILE_NAME.fullmatch(path.name)
            if match is None:
                raise InputError(f"{path}: not named <mode>_<language>_<split>.jsonl with a mode of {', '.join(MODES)}")
            if match["split"] != split:
                continue
            all_languages.add(match["language"])
            if languages is not None and match["language"] not in languages:
                continue
            mode = match["mode"] + (f"_{match['mixed']}" if match["mixed"] else "")
            files = tasks.setdefault(Task(path.parent.name, mode), {})
            if files.setdefault(match["language"], path) != path:
                raise InputError(f"{path}: {files[match['language']]} is of the same dataset, mode and language")
    if not tasks:
        raise InputError(f"{', '.join(patterns)}: no file of the split {split!r}" + (
            "" if languages is None else f" in {', '.join(languages)}; available: {', '.join(sorted(all_languages))}"))
    for task, files in tasks.items():
        if missing := sorted(set(languages or ()) - set(files)):
            raise InputError(
                f"{task.name}: no file for {', '.join(missing)}; available: {', '.join(sorted(all_languages))}")
    return {task: {language: tasks[task][language] for language in by_family(tasks[task])} for task in sorted(tasks)}


def read_items(path: epath.Path, language: str) -> tuple[dict[str, Item], list[tuple[str, str]]]:
    """Returns the items of a file by id, and (file and line, reason) of each malformed row.

    Raises:
      InputError: the file is missing or not UTF-8.
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
            item = _parse_row(json.loads(line), language)
            if item.id in items:
                raise ValueError(f"the id {item.id!r} appears twice")
            items[item.id] = item
        except ValueError as error:
            rejected.append((f"{path}:{number}", str(error)))
    return items, rejected


def _parse_row(row: Any, language: str) -> Item:
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
        raise ValueError(f"label {label!r} is not one of 0 to {len(choices) - 1}")
    # Published prompts end in a space, or their choices begin with one; the delimiter brings it.
    if delimiter.startswith(" "):
        prompt = prompt.rstrip(" ")
    if delimiter.endswith(" "):
        choices = [choice.lstrip(" ") for choice in choices]
    return Item(str(row["_id"]), prompt, tuple(choices), label, delimiter if prompt else "")


def file_name(task: Task, language: str, split: str = "test") -> str:
    """Returns <dataset>/<mode>_<language>_<split>.jsonl; a code-switched mode's number follows the language."""
    number = task.mode.removeprefix(task.plain_mode)
    return f"{task.dataset}/{task.plain_mode}_{language}{number}_{split}.jsonl"


def write_items(
    folder: epath.PathLike, task: Task, language: str, items: Iterable[Item], split: str = "test",
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes FOLDER/<dataset>/<mode>_<language>_<split>.jsonl, as `write_rows`."""
    write_rows(epath.Path(folder) / file_name(task, language, split), (
        {"_id": item.id, "prompt": item.prompt, "choices": list(item.choices), "label": item.label,
         "delimiter": item.delimiter} for item in items), made_from)


def write_rows(path: epath.Path, rows: Iterable[Mapping[str, Any]], made_from: Mapping[str, Any] | None) -> None:
    """Writes a task file and the record of its origin beside it; None: no record."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if made_from is None:
        write_atomic(path, content)
    else:
        artifacts.write_with_record(path, content, _record_path(path), made_from)


def is_current(path: epath.Path, made_from: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Returns whether a task file was made from the same inputs and settings, and is whole.

    Raises:
      InputError: as `artifacts.is_current`.
    """
    return artifacts.is_current_file(path, _record_path(path), made_from, overwrite=overwrite)


def _record_path(path: epath.Path) -> epath.Path:
    return path.parent / f"{_RECORD}{path.stem}.json"
