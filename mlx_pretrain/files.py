"""Files that are whole or absent: atomic writes and content hashes, on local disks and object stores."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError

# A file may change again within the resolution of its time of change: hashes of recent files are not remembered.
_RECENT_SECONDS = 3
_hashes: dict[str, tuple[tuple[float, ...], str]] = {}  # path -> (size and time of change, SHA-256)


@contextlib.contextmanager
def atomic_writer(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Gives a file to write to, which replaces the old one at the end of the block.

    An error in the block, or a kill, leaves the old file. On gs:// the file is local and temporary, and is uploaded at
    the end: an object appears when it is complete.

    Raises:
      InputError: the disk is full.
    """
    path = epath.Path(path)
    if gcs.is_gs(path):
        with full_disk_named(tempfile.gettempdir()), tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            gcs.upload(file.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with full_disk_named(path), scratch.open("wb") as file:
            yield file
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def full_disk_named(path: epath.PathLike) -> Iterator[None]:
    """Turns the errors of a full disk, a quota or a limit on files into InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def open_to_append(path: epath.PathLike) -> Any:
    """Opens a file whose `write` appends whole lines, as bytes.

    On local disks each line is written at once. On gs:// lines are appended every 30 seconds and by `flush` and
    `close`, see `gcs.Appender`.
    """
    if gcs.is_gs(path):
        return gcs.Appender(path)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab", buffering=0)


def write_atomic(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` so that a killed run leaves the old file or the new one, never a part of it."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: epath.PathLike, what: str = "file") -> Any:
    """Reads JSON; `what` names the file's content in errors.

    Raises:
      InputError: the file is missing or malformed.
    """
    path = epath.Path(path)
    try:
        with gcs.named_errors(path):
            content = path.read_bytes()
        return json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such {what}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid JSON {what}: {error}") from None


def read_range(path: epath.PathLike, start: int, stop: int) -> bytes:
    """Returns the bytes of a file from `start` to before `stop`; on gs:// in one request."""
    if gcs.is_gs(path):
        with gcs.named_errors(path):
            return gcs.filesystem().cat_file(str(path), start, stop)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def read_jsonl(path: epath.PathLike) -> list[tuple[int, dict[str, Any]]]:
    """Returns (line number, object) of each line of a JSONL file, without a last line that a killed writer cut off.

    Raises:
      InputError: the file is missing, or a line before the last is not a JSON object.
    """
    try:
        with gcs.named_errors(path):
            content = epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    objects = []
    for number, line in lines:
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise InputError(f"{path}:{number}: not a valid JSON line: {error}") from None
        objects.append((number, value))
    return objects


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a local path, and gs:// paths unchanged."""
    # `epath.Path.absolute` puts gs:// paths below the working folder.
    path = epath.Path(path)
    return path if gcs.is_gs(path) else path.absolute()


def kvstore(folder: epath.PathLike) -> dict[str, Any]:
    """Returns TensorStore's description of a folder, local or gs://, as a key-value store: names of files are the keys.

    `ts.KvStore.open(kvstore(folder)).result()` can write under a condition (`if_equal=` the generation that was read),
    which epath cannot.
    """
    if gcs.is_gs(folder):
        bucket, name = gcs.split(folder)
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/" if name else ""}
    return {"driver": "file", "path": f"{absolute(folder)}/"}


def file_sizes(folder: epath.PathLike) -> dict[str, int]:
    """Returns names of the files below a folder, relative to it -> sizes in bytes; empty without the folder.

    On gs:// this is one listing, a request for every 1,000 files, instead of a request for each file.
    """
    if gcs.is_gs(folder):
        with gcs.named_errors(folder):
            listed = gcs.filesystem().find(str(folder), detail=True)
        root = f"{'/'.join(gcs.split(folder))}/"
        return {name.removeprefix(root): entry["size"] for name, entry in listed.items()}
    files = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(file, folder): os.stat(file).st_size for file in files}


def move_folder(source: epath.PathLike, target: epath.PathLike, last: str | None = None) -> None:
    """Moves a folder to a path that does not exist.

    On gs:// its objects are moved one by one, those at the top first. The object named `last` is moved after all
    others, and tells readers that the rest is complete. A killed process leaves the remaining objects where they were.
    """
    source, target = epath.Path(source), epath.Path(target)
    if not gcs.is_gs(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    with gcs.named_errors(source), concurrent.futures.ThreadPoolExecutor(16) as pool:
        move = lambda name: gcs.filesystem().mv_file(str(source / name), str(target / name))  # noqa: E731
        names = file_sizes(source)
        for stage in ([name for name in names if "/" not in name and name != last],
                      [name for name in names if "/" in name and name != last],
                      [name for name in names if name == last]):
            list(pool.map(move, stage))


def fingerprint(path: epath.PathLike) -> list[int]:
    """Returns [size in bytes, time of change] of a file, which all hosts that see the file see alike.

    The time is in nanoseconds, on gs:// in seconds.

    Raises:
      InputError: there is no such file.
    """
    try:
        if gcs.is_gs(path):
            with gcs.named_errors(path):
                stat = epath.Path(path).stat()
            return [stat.length, int(stat.mtime)]
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def sha256(path: epath.PathLike) -> str:
    """Returns the hexadecimal SHA-256 of a file's bytes; a file that has not changed is read once in a process."""
    path = epath.Path(path)
    if gcs.is_gs(path):
        with gcs.named_errors(path):
            stat = path.stat()
        modified, version = stat.mtime, (stat.length, stat.mtime)
    else:
        stat = os.stat(path)
        modified, version = stat.st_mtime, (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if time.time() - modified < _RECENT_SECONDS:
        return _sha256(path)
    if _hashes.get(str(path), (None,))[0] != version:
        _hashes[str(path)] = version, _sha256(path)
    return _hashes[str(path)][1]


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with gcs.named_errors(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
