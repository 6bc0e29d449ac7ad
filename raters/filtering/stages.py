"""What selection and the stages around it share: names of files, removal lists, folders that are whole or absent.

A stage leaves its input as it is and writes a folder:

    report.json        counts, what was found, provenance
    removed.jsonl      a removal list: one object per document to leave out, {"file", "number", "id", "reason", ...}
    documents/         if asked for: the documents that stay, one .jsonl.gz per input file

A document is known by its file (the path below the part of the pattern without wildcards) and its line or row there.
So stages run on the same files in any order, and `raters.select` leaves out what any of them removed.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.data.documents import Document, match_files, read_documents, without_extension
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import move_folder, read_json, sha256, write_atomic
from mlx_pretrain.parallel import cluster

REPORT, REMOVED, DOCUMENTS = "report.json", "removed.jsonl", "documents"


def say(text: str) -> None:
    """A line for who watches."""
    print(text, file=sys.stderr, flush=True)


def input_files(pattern: epath.PathLike) -> dict[str, epath.Path]:
    """name -> path of the files matching a path or glob, sorted; the name is relative to its wildcard-free part.

    Raises:
      InputError: as `match_files`.
    """
    parts = epath.Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts) - 1)
    return {str(path.relative_to(epath.Path(*parts[:fixed]))): path for path in match_files(pattern)}


def output_name(name: str) -> str:
    """The name of the .jsonl.gz file that a stage makes of the input file `name`."""
    return without_extension(name) + ".jsonl.gz"


def language_of(document: Document, name: str) -> str:
    """The declared language: the record's, else the file's name up to the first dot ("en" of "train/en.jsonl.xz")."""
    return document.language or epath.Path(name).name.split(".")[0]


def to_record(document: Document, **more: Any) -> dict[str, Any]:
    """The document as a record with its further fields, and `more`; empty fields are left out."""
    record = {"id": document.id, "source": document.source, "lang": document.language, "text": document.text,
              **document.extra, **more}
    return {name: value for name, value in record.items() if value not in ("", None) or name == "text"}


@contextlib.contextmanager
def jsonl_writer(path: epath.Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that appends a record; .gz is compressed, without the time, so that equal content is equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, (gzip.GzipFile("", "wb", 6, raw, 0) if path.suffix == ".gz"
                                  else contextlib.nullcontext(raw)) as file:
        # Half a surrogate pair, which some field may hold, becomes the JSON escape it came from; dates of a parquet
        # column become text.
        yield lambda record: file.write(json.dumps(record, ensure_ascii=False, default=str).encode(
            errors="backslashreplace") + b"\n")


def provenance(program: str, config: Any, files: Mapping[str, epath.Path]) -> dict[str, Any]:
    """All that an output follows from, as JSON has it: program, version, settings, SHA-256 of every file.

    `config` is the program's dataclass of settings; the removal lists in its `exclude` are files, too.

    Raises:
      InputError: a removal list is missing.
    """
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
                if field.name not in ("output", "overwrite")}
    for path in config.exclude:
        if not epath.Path(path).exists():
            raise InputError(f"{path}: no such removal list")
    files = {**files, **{path: epath.Path(path) for path in config.exclude}}
    found = {"program": program, "version": __version__, "settings": settings,
             "inputs": {name: sha256(path) for name, path in files.items()}}
    return json.loads(json.dumps(found))


def is_made(output: epath.PathLike, made_from: Mapping[str, Any], overwrite: bool, report: str = REPORT) -> bool:
    """Whether the folder `output` was made from the same; its `report` holds the provenance.

    Raises:
      InputError: it was made from other files or settings and may not be overwritten, or is no output of the program.
    """
    output = epath.Path(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    found = read_json(output / report) if (output / report).exists() else {}
    found = found.get("provenance", {}) if isinstance(found, dict) else {}
    if found.get("program") != made_from["program"]:
        raise InputError(f"{output}: exists and was not made by {made_from['program']}; name another folder")
    if all(found.get(key) == value for key, value in made_from.items()):
        say(f"{output}: made before from the same files and settings, kept")
        return True
    if not overwrite:
        differ = ", ".join(key for key, value in made_from.items() if found.get(key) != value)
        raise InputError(f"{output}: exists, made otherwise ({differ} differ); set overwrite=True to replace it")
    return False


@contextlib.contextmanager
def new_folder(output: epath.PathLike) -> Iterator[epath.Path]:
    """A hidden folder beside `output` that takes its name, and its place, when the block ends without an error."""
    output = epath.Path(output)
    scratch = output.parent / f".{output.name}.partial"
    if scratch.exists():
        scratch.rmtree()  # of a killed run
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if output.exists():
            output.rmtree()
        move_folder(scratch, output, last=REPORT)
    except BaseException:
        scratch.rmtree(missing_ok=True)
        raise


def read_removed(paths: Iterable[epath.PathLike]) -> dict[str, np.ndarray]:
    """file -> sorted numbers, int64, of the documents on removal lists.

    Raises:
      InputError: a list is malformed.
    """
    found: dict[str, set[int]] = {}
    for path in map(epath.Path, paths):
        with path.open() as lines:
            for at, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    found.setdefault(str(record["file"]), set()).add(int(record["number"]))
                except (ValueError, KeyError, TypeError):
                    raise InputError(f'{path}:{at}: not a JSON object with "file" and "number"') from None
    return {name: np.array(sorted(numbers), np.int64) for name, numbers in found.items()}


def map_files(
    output: epath.PathLike, made_by: Mapping[str, Any], files: Mapping[str, epath.Path],
    function: Callable[[str, epath.Path], Any],
) -> list[Any] | None:
    """Applies a function to each input file; the processes of `--shard=I/N` share the files.

    A process with a shard leaves its results in a hidden folder beside `output`. The command without `--shard` takes
    what is there, does what is left, and completes the output.

    Args:
      output: of the command.
      made_by: what the results depend on besides the file.
      files: name -> path.
      function: (name, path) -> JSON.

    Returns:
      The results, in order of `files`; None in a process with a shard.
    """
    number, count = cluster.shard()
    results = []
    for name, path in list(files.items())[number::count]:
        part = _parts(output) / f"{name}.json"
        made_from = {**made_by, "input": sha256(path)} if count > 1 or part.exists() else None
        known = read_json(part) if part.exists() else {}
        if made_from and known.get("made_from") == made_from:
            results.append(known["result"])
            continue
        results.append(json.loads(json.dumps(function(name, path))))
        if count > 1:
            # With escapes, for a field may hold half a surrogate pair.
            write_atomic(part, json.dumps({"made_from": made_from, "result": results[-1]}))
    if count == 1:
        return results
    say(f"{output}: {len(results):,} of {len(files):,} files are done in this shard; when all shards are, the same "
        "command without --shard completes the output")
    return None


def remove_parts(output: epath.PathLike) -> None:
    """Removes what shards have left for `map_files`."""
    if _parts(output).exists():
        _parts(output).rmtree()


def _parts(output: epath.PathLike) -> epath.Path:
    output = epath.Path(output)
    return output.parent / f".{output.name}.parts"


class Unreadable:
    """Counts records that could not be read, and keeps the reasons of the first."""

    def __init__(self, most: int = 20):
        self.count, self.reasons, self._most = 0, [], most

    def __call__(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.reasons) < self._most:
            self.reasons.append(reason)

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.reasons}

    def add(self, other: Mapping[str, Any]) -> None:
        """Adds what was counted elsewhere, as JSON."""
        self.count += other["count"]
        self.reasons += other["first"][: self._most - len(self.reasons)]


def documents(
    files: Mapping[str, epath.Path], exclude: Sequence[epath.PathLike], rejected: Callable[[int, str], None],
    extra: Sequence[str] | None = (),
) -> Iterator[tuple[int, Document, str]]:
    """(position of the file, document, name of the file) of the documents that are on no removal list."""
    removed = read_removed(exclude)
    for position, (name, path) in enumerate(files.items()):
        for document in kept_documents(name, path, removed, rejected, extra):
            yield position, document, name


def kept_documents(
    name: str, path: epath.Path, removed: Mapping[str, np.ndarray], rejected: Callable[[int, str], None],
    extra: Sequence[str] | None = (),
) -> Iterator[Document]:
    """The documents of one file that are not on a removal list, see `read_removed`."""
    out = set(removed.get(name, np.zeros(0)).tolist())
    return (document for document in read_documents(path, extra=extra, rejected=rejected)
            if document.number not in out)


def write_kept(
    files: Mapping[str, epath.Path], exclude: Sequence[epath.PathLike], folder: epath.Path
) -> None:
    """Copies the records that are on no removal list below `folder`."""
    outputs = [output_name(name) for name in files]
    kept = documents(files, exclude, lambda number, reason: None, extra=None)
    for position, of_file in itertools.groupby(kept, key=lambda one: one[0]):
        with jsonl_writer(folder / outputs[position]) as write:
            for _, document, _ in of_file:
                write(to_record(document))
