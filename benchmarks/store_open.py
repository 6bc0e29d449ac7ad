"""Opening a token store of 15,000 shards: seconds on a local disk, requests and seconds on gs://.

    python -m benchmarks.store_open [shards]

The files are empty but for their size in the manifest: what is measured is the check that none is missing or truncated.
gs:// is the server of the tests on this machine, so its seconds are those of the clients, without a network; requests
count what a network multiplies. "one by one" is the former method: `exists` and `stat` of each file, here of the
first 300.
"""

import os
import pathlib
import sys
import tempfile
import time

from etils import epath

from mlx_pretrain.files import file_sizes
from tests.gcs_server import GcsServer, Object

LANGUAGES, ONE_BY_ONE = 60, 300


def one_by_one(folder: epath.Path, names: list[str]) -> None:
    for name in names[:ONE_BY_ONE]:
        (folder / name).exists()
        (folder / name).stat()


def measure(place: str, folder: epath.Path, names: list[str], server: GcsServer) -> None:
    for method, act, scale in (("listing", lambda: file_sizes(folder), 1),
                               ("one by one", lambda: one_by_one(folder, names), len(names) / ONE_BY_ONE)):
        with server.counted() as requests:
            start = time.perf_counter()
            act()
            seconds = time.perf_counter() - start
        print(f"{place}, {method}: {len(names):,} files, {seconds * scale:.2f} s, "
              f"{len(requests) * scale:,.0f} requests")


def main() -> None:
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 15_000
    names = [f"l{number % LANGUAGES:02}/c/{number // LANGUAGES}/0" for number in range(shards)]
    with tempfile.TemporaryDirectory() as folder, GcsServer() as server:
        os.environ.update(server.environment())
        for name in names:
            path = pathlib.Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        server.buckets["bucket"] = {f"store/train/{name}": Object(b"", 1) for name in names}
        measure("local", epath.Path(folder), names, server)
        measure("gs://", epath.Path("gs://bucket/store/train"), names, server)


if __name__ == "__main__":
    main()
