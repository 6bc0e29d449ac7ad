"""gs:// without TensorFlow: uploads, appending, and errors in one line.

epath reads and writes objects through gcsfs (the extra `gcs`), arrays go through TensorStore's own client; both take
the credentials of `gcloud auth application-default login`, of GOOGLE_APPLICATION_CREDENTIALS or of the machine.
Objects are written whole or not at all, and can neither be appended to nor cheaply renamed: hence `upload` and
`Appender`.
"""

import contextlib
import logging
import mimetypes
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from mlx_pretrain.errors import InputError

_log = logging.getLogger(__name__)

# Other hosts, and TensorStore on this one, write below the same folders, so that cached listings soon miss files.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def is_gs(path: epath.PathLike) -> bool:
    """Returns whether a path begins with gs://."""
    return str(path).startswith("gs://")


def split(path: epath.PathLike) -> tuple[str, str]:
    """Returns the bucket of a gs:// path, and the name in it."""
    bucket, _, name = str(path).removeprefix("gs://").rstrip("/").partition("/")
    return bucket, name


def filesystem() -> Any:
    """Returns the gcsfs.GCSFileSystem that epath uses too. Raises ImportError without the extra `gcs`."""
    return fsspec.filesystem("gcs", finalize_on_close=True)  # epath's arguments: the same object


@contextlib.contextmanager
def named_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns errors of the clients about a gs:// path into InputError, one line with the path and the cause.

    A FileNotFoundError is raised unchanged if the bucket exists, and so are all errors about local paths.
    """
    if not is_gs(path):
        yield
        return
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        check_bucket(path)
        raise
    except Exception as error:
        raise InputError(f"{path}: {cause(error)}") from None


def check_bucket(path: epath.PathLike) -> None:
    """Raises InputError if the bucket of a gs:// path does not exist or cannot be reached."""
    if is_gs(path):
        bucket, _ = split(path)
        try:
            exists = filesystem().exists(bucket)
        except Exception as error:
            raise InputError(f"{path}: {cause(error)}") from None
        if not exists:
            raise InputError(f"{path}: no bucket {bucket!r}")


def is_client_error(error: BaseException) -> bool:
    """Returns whether an exception comes from the client libraries of gs://, or from their absence."""
    library = type(error).__module__.split(".")[0]
    return (library in ("gcsfs", "google", "aiohttp", "requests") or "install gcsfs" in str(error)
            or (isinstance(error, OSError) and str(error).startswith("Forbidden: ")))


def cause(error: BaseException) -> str:
    """Returns an exception of one of the clients as one line."""
    if isinstance(error, ImportError):
        return "gs:// needs the extra `gcs`: pip install 'mlx-pretrain[gcs]'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Forbidden: "):
        return f"no permission: {' '.join(lines[1:]) or lines[0]}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def upload(source: str, path: epath.PathLike) -> None:
    """Uploads a local file; the object, or its new content, appears when the upload is complete."""
    with named_errors(path):
        filesystem().put_file(source, str(path), content_type=mimetypes.guess_type(str(path))[0])


class Appender:
    """Appends to an object, which object stores cannot do by themselves.

    The new bytes are uploaded under a name beside it, and one request then joins the two on the server, under the
    condition that the object is still the one last written: its readers see it with all the new bytes or none, and
    a second writer is noticed. A killed process loses the bytes written since the last `flush`.
    """

    def __init__(self, path: epath.PathLike, every: float | None = 30.0):
        """Opens an object to append to, created by the first bytes.

        Args:
          path: gs:// path.
          every: seconds between flushes by a thread; None flushes only when `flush` is called.
        """
        self._path, (self._bucket, self._name) = str(path), split(path)
        self._pending = bytearray()
        self._pending_lock, self._flush_lock = threading.Lock(), threading.Lock()
        self._failed: InputError | None = None
        with named_errors(path):
            try:
                self._generation = int(filesystem().info(self._path)["generation"])
            except FileNotFoundError:
                check_bucket(path)
                self._generation = 0  # the API's generation of an object that does not exist
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._flush_regularly, args=(every,), daemon=True) if every else None
        if self._thread:
            self._thread.start()

    def write(self, content: bytes) -> None:
        """Adds bytes to the next flush. Raises InputError if another process has written the object."""
        if self._failed:
            raise self._failed
        with self._pending_lock:
            self._pending += content

    def flush(self) -> None:
        """Appends the bytes written so far; after a network error they wait for the next flush, with a warning.

        Raises:
          InputError: another process has written the object.
        """
        try:
            self._flush()
        except InputError:
            raise
        except Exception as error:
            _log.warning("%s: %d bytes not appended yet: %s", self._path, len(self._pending), cause(error))

    def close(self) -> None:
        """Appends the remaining bytes. Raises InputError if that fails."""
        if not self._closed.is_set():
            self._closed.set()
            if self._thread:
                self._thread.join()
            with named_errors(self._path):
                self._flush()

    def _flush_regularly(self, every: float) -> None:
        while not self._closed.wait(every):
            try:
                self.flush()
            except InputError as error:
                self._failed = error
                return

    def _flush(self) -> None:
        with self._flush_lock:
            with self._pending_lock:
                content = bytes(self._pending)
            if not content:
                return
            gcs, token = filesystem(), uuid.uuid4().hex
            folder, _, name = self._name.rpartition("/")
            part = f"{folder}/.{name}.{token}".lstrip("/")
            sources = [self._name, part] if self._generation else [part]
            gcs.pipe_file(f"{self._bucket}/{part}", content)
            try:
                made = gcs.call(
                    "POST", "b/{}/o/{}/compose", self._bucket, self._name, ifGenerationMatch=str(self._generation),
                    json={"sourceObjects": [{"name": source} for source in sources],
                          "destination": {"metadata": {"appended": token}}}, json_out=True,
                )
            except FileExistsError:
                # The condition failed: another writer came first, or this request succeeded and its answer got lost.
                made = gcs.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
            gcs.rm_file(f"{self._bucket}/{part}")
            if made.get("metadata", {}).get("appended") != token:
                raise InputError(f"{self._path}: written by another process meanwhile")
            self._generation = int(made["generation"])
            with self._pending_lock:
                del self._pending[: len(content)]
