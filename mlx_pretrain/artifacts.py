"""Files and folders that commands make: kept when they are current, made again when damaged, never replaced unasked.

Every command records in its output what it was made from, and looks at that record before it begins:

    made_from = provenance("raters.duplicates", config, {name: sha256(path) for name, path in files.items()})
    if is_current(config.output, read_folder_record(config.output, "report.json"), made_from,
                  overwrite=config.overwrite):
        return
    with new_folder(config.output, "report.json") as folder:
        ...
        write_json(folder / "report.json", {"provenance": made_from, ...})

    the output is            the command
    absent                   makes it
    made from the same       keeps it
    damaged, from the same   makes it again
    made from other inputs   refuses, names what differs; with overwrite=True it replaces the output
    without readable record  refuses; with overwrite=True it replaces the output
    of another program       refuses, whatever overwrite is

A command that is killed leaves the former output, on gs:// or none, never a part; `files.atomic_writer` does that for
one file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from etils import epath

from mlx_pretrain import __version__, gcs
from mlx_pretrain.errors import InputError, shortened
from mlx_pretrain.files import move_folder, read_json, sha256, write_atomic, write_json
from mlx_pretrain.parallel import cluster

_SHOWN = 4  # differences in a message
_NAMED = 2  # files in a difference
_HASH = re.compile(r"[0-9a-f]{64}")
_NOT_SETTINGS = ("output", "overwrite", "workers")
_REMEDY = "set overwrite=True to replace it, or name another output"


def provenance(program: str, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all that an output depends on, as JSON.

    Args:
      program: the command, e.g. "raters.duplicates".
      config: dataclass of its settings, or name -> value of those that the output depends on. Of a dataclass, where the
        output goes, whether it may be replaced and how many processes make it is left out; of a value that has
        `settings` itself, as a `Corpus` has, these are taken.
      inputs: name -> SHA-256 of each file that is read; may be nested.
    """
    settings = config if isinstance(config, Mapping) else settings_of(config)
    return as_json({"program": program, "version": __version__, "settings": settings, "inputs": inputs})


def settings_of(config: Any) -> dict[str, Any]:
    """Returns the fields of a command's dataclass as JSON, but for `output`, `overwrite` and `workers`."""
    return as_json({field.name: getattr(config, field.name) for field in dataclasses.fields(config)
                    if field.name not in _NOT_SETTINGS})


def as_json(value: Any) -> Any:
    """Returns a value as JSON has it once it was written and read: tuples are lists, keys and paths are strings."""
    return json.loads(json.dumps(_with_plain_keys(value), default=lambda part: _with_plain_keys(_to_json(part))))


def _with_plain_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {os.fspath(key) if isinstance(key, os.PathLike) else key: _with_plain_keys(part)
                for key, part in value.items()}
    return [_with_plain_keys(part) for part in value] if isinstance(value, (list, tuple)) else value


def _to_json(value: Any) -> Any:
    if hasattr(value, "settings"):
        return value.settings
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} is no setting that JSON can hold")


def read_record(path: epath.PathLike, key: str | None = None) -> dict[str, Any] | None:
    """Returns what a JSON file records of an output.

    Args:
      path: the file.
      key: the part of it that is the record, e.g. "provenance"; None: all of it.

    Returns:
      None where there is no such file; {} for one that holds no record, or is damaged, which is logged.
    """
    path = epath.Path(path)
    if not path.exists():
        return None
    with gcs.named_errors(path):
        content = path.read_bytes()
    try:
        record = json.loads(content)
    except ValueError as error:
        cluster.log(f"{path}: damaged (no JSON: {error})")
        return {}
    if key is not None:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def read_folder_record(output: epath.PathLike, marker: str, key: str | None = "provenance") -> dict[str, Any] | None:
    """Returns the record in the file `marker` of a folder, as `read_record`; {} for a folder with other files only."""
    output = epath.Path(output)
    _restore_former(output)
    if not output.exists() or (output.is_dir() and not _names(output)):
        return None
    return read_record(output / marker, key) if (output / marker).exists() else {}


def _names(folder: epath.PathLike) -> set[str]:
    folder = epath.Path(folder)
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def is_current_file(path: epath.PathLike, record: epath.PathLike, made_from: Mapping[str, Any], *,
                    overwrite: bool) -> bool:
    """Returns `is_current` for a file that `write_with_record` writes, and whose record is the JSON file `record`."""
    recorded = (read_record(record) or {}) if epath.Path(path).exists() else None

    def damage() -> str | None:
        return None if sha256(path) == recorded.get("sha256") else "not the file that its record describes"

    return is_current(path, recorded, made_from, overwrite=overwrite, damage=damage)


def write_with_record(
    path: epath.PathLike, content: bytes, record: epath.PathLike, recorded: Mapping[str, Any]
) -> None:
    """Writes a file, and into the JSON file `record` what is recorded of it and its SHA-256."""
    epath.Path(path).unlink(missing_ok=True)  # the record is written first, so that a file always has its own record
    write_json(record, {**recorded, "sha256": hashlib.sha256(content).hexdigest()})
    write_atomic(path, content)


def is_current(
    output: epath.PathLike,
    recorded: Mapping[str, Any] | None,
    made_from: Mapping[str, Any],
    *,
    overwrite: bool,
    damage: Callable[[], str | None] | None = None,
    contents: Collection[str] | None = None,
    remedy: str = _REMEDY,
    quiet: bool = False,
) -> bool:
    """Returns whether an output was made from the same inputs and settings, and is whole; logs what becomes of it.

    Args:
      output: the output, for messages.
      recorded: what is recorded of the output that is there; None: there is none; {}: it has no readable record.
      made_from: what the output is to be made from, e.g. a `provenance`. What is recorded besides is not compared.
      overwrite: whether an output made from other inputs, or without a readable record, may be replaced.
      damage: looks for damage in an output from the same inputs; returns its cause, or None for a whole output.
      contents: names of all that the command, and those that follow it, write into the folder `output`; a folder that
        holds anything else is not replaced, as that would be lost. None: the command replaces no folder.
      remedy: advice in the message about an output that may not be replaced.
      quiet: does not log that the output is kept.

    Raises:
      InputError: the output was made from other inputs, or has no readable record, and may not be replaced; another
        program made it; or it is to be replaced and holds anything else.
    """
    if recorded is None:
        return False
    made_from = as_json(made_from)
    program = made_from.get("program")
    if program and recorded.get("program", program) != program:
        raise InputError(f"{output}: exists and was not made by {program}; name another output")
    reason = _why_other(recorded, made_from)
    if reason and not overwrite:
        raise InputError(f"{output}: {reason}; {remedy}")
    cause = damage() if damage is not None and not reason else None
    if not reason and not cause:
        if not quiet:
            cluster.log(f"{output}: made before from the same inputs and settings, kept")
        return True
    if contents is not None and (others := _names(output) - set(contents)):
        raise InputError(f"{output}: holds {', '.join(sorted(others)[:_SHOWN])} besides what {program} makes; move it "
                         "away, or name another output")
    if cause:
        cluster.log(f"{output}: damaged ({cause}), made again")
    return False


def _why_other(recorded: Mapping[str, Any], made_from: Mapping[str, Any]) -> str | None:
    """Returns in words why a record does not prove that an output was made from `made_from`; None: it does."""
    if (made_from and not recorded) or ("program" in made_from and "program" not in recorded):
        return "has no record of what it was made from"
    if not (different := differences(recorded, made_from)):
        return None
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return f"exists, made with {', '.join(different[:_SHOWN])}{more}"


def check_settings(
    folder: epath.PathLike, name: str, settings: Mapping[str, Any], *, remedy: str, later: Collection[str] = (),
    quiet: bool = True,
) -> None:
    """Checks that a folder that fills up over several runs belongs to these settings, neither fewer nor more.

    Args:
      folder: the folder.
      name: name of the file in it that records its settings. A missing or damaged one is an error, as nothing else
        says what the results belong to.
      settings: the settings.
      remedy: advice in the message about other settings.
      later: settings that earlier versions did not record, taken for equal there.
      quiet: does not log that the folder is kept.

    Raises:
      InputError: the folder belongs to other settings, which are named, or the file cannot be read.
    """
    settings = as_json(settings)
    recorded = {key: settings[key] for key in later if key in settings} | read_settings(epath.Path(folder) / name)
    is_current(folder, recorded, {**dict.fromkeys(recorded), **settings}, overwrite=False, remedy=remedy, quiet=quiet)


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """Returns the settings in a JSON file.

    Raises:
      InputError: the file is missing, or holds no JSON object.
    """
    settings = read_json(path, "settings")
    if not isinstance(settings, dict):
        raise InputError(f"{path}: not a JSON object of settings")
    return settings


def differences(recorded: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between a record and what an output is to be made from, both as JSON.

        differences({"seed": 1, "inputs": {"a": HASH, "b": HASH}}, {"seed": 2, "inputs": {"a": OTHER_HASH}})
        == ["seed = 1 (now 2)", "other inputs a", "more inputs b"]

    Of many files that differ alike, the first are named: "inputs that lack a, b and 5 more".
    """
    words: dict[str, list[str]] = {}  # a difference, or what is alike in the differences of files -> the files
    for name, value in made_from.items():
        for difference, *file in _differences(name, recorded.get(name), value):
            words.setdefault(difference, []).extend(file)
    return [" ".join([difference, *_some(files)]) for difference, files in words.items()]


def _some(files: list[str]) -> list[str]:
    """Returns the names of the first files and the number of the others, as one string; [] without files."""
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return [", ".join(files[:_NAMED]) + more] if files else []


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, ...]]:
    """Yields (difference,), or (what differs, file) for a file."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(f"{name} {key}", old.get(key), new.get(key))
    elif any(isinstance(value, dict) or _HASH.fullmatch(str(value)) for value in (old, new)):
        # The text of a hash or a table tells a reader nothing.
        what, *file = name.split(" ", 1)
        yield (f"{'other' if new else 'more'} {what}" if old is not None else
               f"{what} that lack" if file else f"no {what}", *file)
    else:
        old, new = (shortened(json.dumps(value, ensure_ascii=False)) for value in (old, new))
        yield (f"{name} = {old} (now {new})",)


@contextlib.contextmanager
def new_folder(output: epath.PathLike, marker: str) -> Iterator[epath.Path]:
    """Gives a hidden folder that takes the place of `output` when the block ends without an error.

    Args:
      output: the folder; replaced when it is there.
      marker: name of the file that says that the folder is whole; on gs:// it is moved last.
    """
    output = epath.Path(output)
    partial = output.parent / f".{output.name}.partial"
    _restore_former(output)
    if partial.exists():  # of a killed run
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
    replace_folder(partial, output, marker)


def replace_folder(folder: epath.PathLike, output: epath.PathLike, marker: str) -> None:
    """Moves a folder to the place of `output`, which may exist; `marker` as for `new_folder`."""
    output = epath.Path(output)
    former = _former(output)
    if output.exists() and gcs.is_gs(output):
        (output / marker).unlink(missing_ok=True)
        output.rmtree()
    elif output.exists():
        if former.exists():  # a run was killed after it had replaced that
            former.rmtree()
        output.rename(former)
    move_folder(folder, output, last=marker)
    if former.exists():
        former.rmtree()


def _former(output: epath.Path) -> epath.Path:
    return output.parent / f".{output.name}.former"


def _restore_former(output: epath.Path) -> None:
    """Puts the former output back in its place, from which a run that was killed then had moved it."""
    if not output.exists() and _former(output).exists():
        _former(output).rename(output)
