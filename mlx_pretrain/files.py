"""Files that are whole or absent: atomic writes and content hashes, on local disks and object stores."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from mlx_pretrain.errors import InputError


@contextlib.contextmanager
def atomic_writer(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A file to write to; a killed run, or an error in the block, leaves the old file, the block's end the new one."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with scratch.open("wb") as file:
            yield file
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_atomic(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` so that a killed run leaves the old file or the new one, never a part."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: epath.PathLike, what: str = "file") -> Any:
    """Reads JSON; raises InputError naming the file (a `what`) when it is missing or malformed."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid JSON {what}: {error}") from None


def read_jsonl(path: epath.PathLike) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file; a truncated last line, as a killed writer leaves it, is left out.

    Raises:
      InputError: the file is missing, or a line before the last is not a JSON object.
    """
    try:
        lines = [(n, line) for n, line in enumerate(epath.Path(path).read_bytes().split(b"\n"), 1) if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    found = []
    for number, line in lines:
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise InputError(f"{path}:{number}: not a valid JSON line: {error}") from None
        found.append((number, value))
    return found


def kvstore(folder: epath.PathLike) -> dict[str, Any]:
    """TensorStore's description of a folder, local or gs://, as a key-value store: names of files are the keys.

    `ts.KvStore.open(kvstore(folder)).result()` gives writes under a condition (`if_equal=` the generation that was
    read), which epath has not.
    """
    path = str(folder)
    if path.startswith("gs://"):
        bucket, _, inside = path.removeprefix("gs://").rstrip("/").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/" if inside else ""}
    return {"driver": "file", "path": f"{epath.Path(path).absolute()}/"}


def sha256(path: epath.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
