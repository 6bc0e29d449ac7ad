"""What is computed for every item of a list, in TensorStore arrays with a row for each; it can be killed at any time.

In a job of several processes all of them fill a store with the same calls, and process 0 alone writes.

    FOLDER/settings.json   what the rows depend on, so that no store ever mixes two kinds
    FOLDER/rows.jsonl      {"id", "row", ...} of every row that is whole; {"id", "rejected"} of what has none, and why
    FOLDER/<array>/        zarr3, [items, ...], a row in every chunk
    FOLDER/manifest.json   written last: counts; its presence means "complete"
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.data.token_store import zarr3_spec
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl, write_atomic, write_json
from mlx_pretrain.parallel import cluster

VERSION = 2  # 1: frames by another reader, which gave other ones than were named in some files
SETTINGS, ROWS, MANIFEST = "settings.json", "rows.jsonl", "manifest.json"


class RowWriter:
    """Fills a store, or goes on with one.

    Attributes:
      path: the folder.
      done: ids that have a row or were rejected.
      rejected: how many of these were.
    """

    def __init__(
        self,
        path: epath.PathLike,
        kind: str,
        settings: Mapping[str, Any],
        items: int,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    ):
        """Opens (creating it) a store.

        Args:
          path: folder.
          kind: of store.
          settings: what the rows depend on; JSON.
          items: as many rows as there can be.
          arrays: name -> shape and dtype of a row.

        Raises:
          InputError: the folder holds rows of another kind, other settings, or another number of items.
        """
        self.path = epath.Path(path)
        content = {"kind": kind, "version": VERSION, "items": items, "arrays": {
            name: [list(shape), np.dtype(dtype).name] for name, (shape, dtype) in arrays.items()}, **settings}
        content = json.loads(json.dumps(content))
        lines = self._open(content, items, arrays) if cluster.is_main() else []
        count = cluster.share(len(lines))
        if not cluster.is_main():  # process 0 may have added some since
            lines = [line for _, line in read_jsonl(self.path / ROWS)][:count]
        self.done = {line["id"] for line in lines}
        self._next = sum("row" in line for line in lines)
        self.rejected = len(lines) - self._next

    def _open(
        self, content: Mapping[str, Any], items: int, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    ) -> list[dict[str, Any]]:
        """Creates or checks the files; returns the lines of rows.jsonl."""
        if (self.path / SETTINGS).exists():
            _check_same(self.path / SETTINGS, content)
        else:
            write_json(self.path / SETTINGS, content)
        self._arrays = {name: _open(self.path / name, (items, *shape), np.dtype(dtype))
                        for name, (shape, dtype) in arrays.items()}
        lines = [line for _, line in read_jsonl(self.path / ROWS)] if (self.path / ROWS).exists() else []
        # A killed run may have left half a line.
        write_atomic(self.path / ROWS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines

    def add(self, id: str, arrays: Mapping[str, np.ndarray], **more: Any) -> None:
        """A row; `more` goes into rows.jsonl."""
        if cluster.is_main():
            for future in [self._arrays[name][self._next].write(value) for name, value in arrays.items()]:
                future.result()
        self._line({"id": id, "row": self._next, **more})
        self._next += 1

    def reject(self, id: str, reason: str) -> None:
        """An item without a row."""
        self._line({"id": id, "rejected": reason})
        self.rejected += 1

    def _line(self, line: Mapping[str, Any]) -> None:
        if cluster.is_main():
            with open(self.path / ROWS, "a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add(line["id"])

    def complete(self, **more: Any) -> None:
        """All items have been added or rejected, every process can read the store; `more` goes into the manifest."""
        counts = {"rows": self._next, "rejected": self.rejected}
        if cluster.is_main():
            write_json(self.path / MANIFEST, {**counts, "version": __version__, **more})
        cluster.barrier()


class RowStore:
    """A complete store.

    Attributes:
      path: the folder.
      settings: what `RowWriter` was given.
      manifest: what `RowWriter.complete` was given, and counts.
      rows: the lines of rows.jsonl that have a row, by row.
      rejected: id -> why it has no row.
    """

    def __init__(self, path: epath.PathLike, kind: str):
        """Raises InputError when there is no complete, readable store of that kind."""
        self.path = epath.Path(path)
        if not (self.path / MANIFEST).exists():
            raise InputError(f"{path}: no {kind} here (no {MANIFEST}; was it interrupted? run it again)")
        self.manifest = read_json(self.path / MANIFEST)
        self.settings = read_json(self.path / SETTINGS)
        found, version = self.settings.get("kind"), self.settings.get("version")
        if found != kind:
            raise InputError(f"{path}: holds {found}, not {kind}")
        if version != VERSION:
            raise InputError(f"{path}: {kind} of version {version}, now it is {VERSION}; make them again, in another "
                             "folder or after deleting this one")
        lines = [line for _, line in read_jsonl(self.path / ROWS)]
        self.rows = sorted((line for line in lines if "row" in line), key=lambda line: line["row"])
        self.rejected = {line["id"]: line["rejected"] for line in lines if "row" not in line}
        if len(self.rows) != self.manifest["rows"]:
            raise InputError(f"{self.path / ROWS}: {len(self.rows)} rows, the manifest says {self.manifest['rows']}")

    def read(self, name: str, rows: Iterable[int] | None = None) -> np.ndarray:
        """Rows `[rows, ...]` of an array; None: all that there are.

        Raises:
          InputError: it cannot be read.
        """
        index = np.arange(len(self.rows)) if rows is None else np.asarray(list(rows), np.int64)
        try:
            return ts.open(zarr3_spec(self.path / name), open=True, read=True).result()[index].read().result()
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path / name}: cannot be read: {str(error).splitlines()[0]}") from None


def _check_same(path: epath.Path, content: Mapping[str, Any]) -> None:
    old = read_json(path, "settings")
    for name in {**old, **content}:
        if old.get(name) != content.get(name):
            raise InputError(f"{path}: made with {name} = {_short(old.get(name))}, now it is "
                             f"{_short(content.get(name))}; use another folder, or delete this one")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _open(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *shape[1:]]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                   {"name": "zstd", "configuration": {"level": 1}}],
        "fill_value": 0,
    }
    return ts.open({**zarr3_spec(path), "metadata": metadata}, open=True, create=True).result()
