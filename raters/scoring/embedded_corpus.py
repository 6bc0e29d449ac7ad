"""The folder of a corpus's scores with embeddings (`QualityScorer.embeddings`), file by file."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from mlx_pretrain.artifacts import differences
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, read_json
from raters.scoring.shards import FORMAT, MARKER, VERSION, Shard, has_input, scored_root


@dataclasses.dataclass(frozen=True)
class EmbeddedCorpus:
    """Files of documents whose embeddings are whole, or that could not be read.

    Attributes:
      folder: folder of the scores and embeddings.
      root: absolute root of the corpus, as it is recorded.
      settings: all that the embeddings depend on, the same for all files.
      markers: name of a file, relative to the root -> its marker; sorted.
    """

    folder: epath.Path
    root: str
    settings: Mapping[str, Any]
    markers: Mapping[str, Mapping[str, Any]]

    def shard(self, name: str) -> Shard:
        """Returns a file with the scores and embeddings that are here."""
        return Shard(name, epath.Path(self.root) / name, self.folder, self.markers[name]["input"]["language"])

    def check_documents(self) -> None:
        """Checks that the documents are those that were embedded, where they are still in their place.

        Raises:
          InputError: a file has changed since.
        """
        def changed(name: str) -> bool:
            shard, marker = self.shard(name), self.markers[name]
            return marker["status"] == "done" and shard.fingerprint()["size"] > 0 and not has_input(shard, marker)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            stale = [name for name, is_stale in zip(self.markers, pool.map(changed, self.markers)) if is_stale]
        if stale:
            raise InputError(f"{epath.Path(self.root) / stale[0]}: has changed since its embeddings were made, as have "
                             f"{len(stale) - 1} other files; run raters.score again, which embeds those only")


def read_corpus(folder: epath.PathLike) -> EmbeddedCorpus:
    """Returns the files with embeddings in a folder of `raters.score`.

    Raises:
      InputError: there are none, or they were made by several raters or with several settings.
    """
    folder = epath.Path(folder)
    names = sorted(name.removesuffix(MARKER) for name in file_sizes(folder) if name.endswith(MARKER))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        markers = dict(zip(names, pool.map(lambda name: read_json(folder / (name + MARKER), "marker"), names)))
    for name, marker in markers.items():
        if not isinstance(marker, dict) or (marker.get("format"), marker.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{folder / (name + MARKER)}: not the marker of scores of version {VERSION}")
        if not marker["settings"].get("embeddings"):
            raise InputError(f"{folder / (name + MARKER)}: scores without embeddings; run raters.score with "
                             "QualityScorer.embeddings='float16'")
    if not markers:
        raise InputError(f"{folder}: no embeddings; make them with raters.score and QualityScorer.embeddings='float16'")
    first, settings = next((name, marker["settings"]) for name, marker in markers.items())
    for name, marker in markers.items():
        if different := differences(settings, marker["settings"]):
            raise InputError(f"{folder / (name + MARKER)}: made with other settings than {first}{MARKER}: "
                             f"{', '.join(different)}")
    root = scored_root(folder)
    if root is None:
        raise InputError(f"{folder}: has no record of the corpus's root (corpus.json); run raters.score again")
    return EmbeddedCorpus(folder, root, settings, markers)
