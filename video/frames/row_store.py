"""Stores the results for each item of a list as rows of TensorStore arrays; a killed run resumes where it stopped.

In a job of several processes all of them fill a store with the same calls, and process 0 alone writes.

    FOLDER/settings.json   settings that the rows depend on; rows of other settings are refused
    FOLDER/rows.jsonl      {"id", "row", ...} for every complete row; {"id", "rejected": reason} for items without one
    FOLDER/<array>/        zarr3, [items, ...], one row in each chunk
    FOLDER/manifest.json   written last: counts; its presence means "complete"
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.artifacts import check_settings, read_settings
from mlx_pretrain.data.token_store import zarr3_spec
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl, write_atomic, write_json
from mlx_pretrain.parallel import cluster

VERSION = 2  # version 1 has wrong frames of some videos: its reader took others than it named
SETTINGS, ROWS, MANIFEST = "settings.json", "rows.jsonl", "manifest.json"


class RowWriter:
    """Fills a store, also one that a killed run left incomplete.

        writer = RowWriter("out", "losses", {"model": "llm"}, len(items), {"loss": ((4,), np.dtype(np.float32))})
        for item in items:
            if item.id not in writer.done:
                writer.add(item.id, {"loss": compute(item)})
        writer.complete()

    Attributes:
      path: the folder.
      done: ids that have a row or were rejected.
      rejected: number of rejected ids.
    """

    def __init__(
        self,
        path: epath.PathLike,
        artifact_type: str,
        settings: Mapping[str, Any],
        items: int,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    ):
        """Opens a store, or creates it.

        Args:
          path: folder.
          artifact_type: name of the contents, e.g. "frames".
          settings: all that the rows depend on; JSON.
          items: greatest number of rows.
          arrays: name -> shape and dtype of a row.

        Raises:
          InputError: the folder holds rows of another type, other settings, or another number of items.
        """
        self.path = epath.Path(path)
        content = {"kind": artifact_type, "version": VERSION, "items": items, "arrays": {
            name: [list(shape), np.dtype(dtype).name] for name, (shape, dtype) in arrays.items()}, **settings}
        content = json.loads(json.dumps(content))
        lines = self._open(content, items, arrays) if cluster.is_main() else []
        count = cluster.share(len(lines))
        if not cluster.is_main():  # process 0 may have added lines in the meantime
            lines = [line for _, line in read_jsonl(self.path / ROWS)][:count]
        self.done = {line["id"] for line in lines}
        self._next = sum("row" in line for line in lines)
        self.rejected = len(lines) - self._next

    def _open(
        self, content: Mapping[str, Any], items: int, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    ) -> list[dict[str, Any]]:
        """Creates or checks the files; returns the lines of rows.jsonl."""
        claim_folder(self.path, content)
        self._arrays = {name: _open(self.path / name, (items, *shape), np.dtype(dtype))
                        for name, (shape, dtype) in arrays.items()}
        lines = [line for _, line in read_jsonl(self.path / ROWS)] if (self.path / ROWS).exists() else []
        # A killed run may have left half a line.
        write_atomic(self.path / ROWS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines

    def add(self, id: str, arrays: Mapping[str, np.ndarray], **more: Any) -> None:
        """Writes the row of an item; `more` goes into rows.jsonl."""
        if cluster.is_main():
            for future in [self._arrays[name][self._next].write(value) for name, value in arrays.items()]:
                future.result()
        self._line({"id": id, "row": self._next, **more})
        self._next += 1

    def reject(self, id: str, reason: str) -> None:
        """Notes that an item has no row, and why."""
        self._line({"id": id, "rejected": reason})
        self.rejected += 1

    def _line(self, line: Mapping[str, Any]) -> None:
        if cluster.is_main():
            with open(self.path / ROWS, "a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add(line["id"])

    def complete(self, **more: Any) -> None:
        """Ends the store after all items; behind this call every process can read it. `more` goes into the manifest."""
        counts = {"rows": self._next, "rejected": self.rejected}
        if cluster.is_main():
            write_json(self.path / MANIFEST, {**counts, "version": __version__, **more})
        cluster.barrier()


class RowStore:
    """A complete store.

        store = RowStore("out", "losses")
        [line["id"] for line in store.rows]   # ids by row
        store.read("loss", [0, 5])            # two rows of an array

    Attributes:
      path: the folder.
      settings: settings that `RowWriter` was given.
      manifest: values that `RowWriter.complete` was given, and counts.
      rows: lines of rows.jsonl that have a row, in the order of the rows.
      rejected: id -> reason why it has no row.
    """

    def __init__(self, path: epath.PathLike, artifact_type: str, cache: int = 0):
        """Opens a store; `cache`: bytes of decoded rows that are kept in memory.

        Raises:
          InputError: it is not complete, readable and of that type.
        """
        self.path = epath.Path(path)
        if not (self.path / MANIFEST).exists():
            raise InputError(f"{path}: no complete {artifact_type} (no {MANIFEST}; was it interrupted? run it again)")
        self.manifest = read_json(self.path / MANIFEST)
        self.settings = read_settings(self.path / SETTINGS)
        stored_type, version = self.settings.get("kind"), self.settings.get("version")
        if stored_type != artifact_type:
            raise InputError(f"{path}: holds {stored_type}, not {artifact_type}")
        if version != VERSION:
            raise InputError(f"{path}: {artifact_type} of version {version}, now it is {VERSION}; make them again, in "
                             "another folder or after deleting this one")
        lines = [line for _, line in read_jsonl(self.path / ROWS)]
        self.rows = sorted((line for line in lines if "row" in line), key=lambda line: line["row"])
        self.rejected = {line["id"]: line["rejected"] for line in lines if "row" not in line}
        if len(self.rows) != self.manifest["rows"]:
            raise InputError(f"{self.path / ROWS}: {len(self.rows)} rows, the manifest says {self.manifest['rows']}")
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
        self._arrays: dict[str, ts.TensorStore] = {}

    def read(self, name: str, rows: Iterable[int] | None = None) -> np.ndarray:
        """Reads rows `[rows, ...]` of an array; None: all rows.

        Raises:
          InputError: the array cannot be read.
        """
        index = np.arange(len(self.rows)) if rows is None else np.asarray(list(rows), np.int64)
        try:
            if name not in self._arrays:
                # Rows of a complete store never change.
                self._arrays[name] = ts.open(zarr3_spec(self.path / name), open=True, read=True,
                                             recheck_cached_data=False, context=self._context).result()
            return self._arrays[name][index].read().result()
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path / name}: cannot be read: {str(error).splitlines()[0]}") from None


def claim_folder(folder: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Reserves a folder that fills up over several runs for one choice of settings, by its settings.json.

    Raises:
      InputError: it holds results of other settings; names what differs.
    """
    folder = epath.Path(folder)
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, settings)
        return
    check_settings(folder, SETTINGS, settings, remedy="name another output, or delete this one",
                   quiet=not (folder / MANIFEST).exists())


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
