"""The project's corpora as TensorFlow datasets: one configuration per language, prepared from local files.

    python -m data_mixtures.corpora --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare_tfds.gin

then, with or without this module, `tfds.load("text_corpora/fi:1.0.0", data_dir=...)`.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import gin
import seqio
import tensorflow_datasets as tfds
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError

VERSION = "1.0.0"


@dataclasses.dataclass(eq=False)
class LanguageConfig(tfds.core.BuilderConfig):
    """One language of a corpus; `name` is the language."""

    corpus: Corpus | None = None

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """What the dataset is made of, kept as its metadata."""
        hashes = {split: self.corpus.hashes(split, self.name) for split in self.corpus.splits_of(self.name)}
        return {"inputs": hashes, **self.corpus.settings}


class TextCorpora(tfds.core.GeneratorBasedBuilder):
    """Documents of one language in the order of their files. Needs no network.

    Prepared with `TextCorpora(config=LanguageConfig(name="fi", corpus=corpus))`; which languages there are depends on
    the files, so none is listed in the class.
    """

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents of one language, prepared from local files.",
            features=tfds.features.FeaturesDict({
                "id": tfds.features.Text(), "source": tfds.features.Text(), "text": tfds.features.Text(),
            }),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self.builder_config.made_from),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.builder_config.made_from["inputs"]}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        documents = self.builder_config.corpus.documents(split, self.builder_config.name)
        for number, document in enumerate(documents):
            yield number, {"id": document.id, "source": document.source, "text": document.text}


class _OrderedSource(seqio.TfdsDataSource):
    """Reads in the order of the files, which TFDS insists on; SeqIO shuffles the rows afterwards."""

    def get_dataset(self, split: str | None = None, shuffle: bool = True, *args: Any, **kwargs: Any):
        return super().get_dataset(split, False, *args, **kwargs)


@gin.configurable
def prepare_corpora(corpus: Corpus = gin.REQUIRED, data_dir: epath.PathLike = gin.REQUIRED,
                    overwrite: bool = False) -> None:
    """Writes all languages of a corpus as TensorFlow datasets; those made before from the same files are kept.

    Args:
      corpus: the documents.
      data_dir: folder of the datasets.
      overwrite: replaces datasets that were made from other files.

    Raises:
      InputError: documents cannot be read, or a dataset made from other files is in the way.
    """
    tfds.disable_progress_bar()
    for language in corpus.all_languages:
        config = LanguageConfig(name=language, corpus=corpus)
        builder = TextCorpora(config=config, data_dir=data_dir, file_format="tfrecord")
        folder = epath.Path(builder.data_dir)
        if folder.exists():
            if dict(builder.info.metadata) == config.made_from:
                print(f"{folder}: made before from the same files, kept", file=sys.stderr)
                continue
            if not overwrite:
                raise InputError(f"{folder}: made from other files; set prepare_corpora.overwrite=True to replace it")
            folder.rmtree()
            builder = TextCorpora(config=config, data_dir=data_dir, file_format="tfrecord")
        builder.download_and_prepare()
        print(f"{folder}: {sum(split.num_examples for split in builder.info.splits.values()):,} documents",
              file=sys.stderr)


@gin.configurable
def tfds_sources(data_dir: epath.PathLike) -> dict[str, seqio.DataSource]:
    """language -> SeqIO source on the prepared datasets of a folder.

    Raises:
      InputError: none is there.
    """
    folders = sorted((epath.Path(data_dir) / TextCorpora.name).glob(f"*/{VERSION}/dataset_info.json"))
    if not folders:
        raise InputError(f"{data_dir}: no {TextCorpora.name} datasets here; prepare them with data_mixtures.corpora")
    languages = [path.parent.parent.name for path in folders]
    return {language: _OrderedSource(f"{TextCorpora.name}/{language}:{VERSION}", tfds_data_dir=str(data_dir))
            for language in languages}


if __name__ == "__main__":
    run(prepare_corpora, "data_mixtures.corpora")
