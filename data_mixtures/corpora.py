"""The project's corpora as TensorFlow datasets: one configuration per language, prepared from local files.

    python -m data_mixtures.corpora --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare_tfds.gin

then, with or without this module, `tfds.load("text_corpora/fi:1.0.0", data_dir=...)`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import gin
import seqio
import tensorflow_datasets as tfds
from etils import epath

from mlx_pretrain.artifacts import is_current, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log

VERSION = "1.0.0"
_INFO, _METADATA = "dataset_info.json", "metadata.json"  # names that TFDS gives


@dataclasses.dataclass(eq=False)
class LanguageConfig(tfds.core.BuilderConfig):
    """Configuration of one language's dataset; `name` is the language."""

    corpus: Corpus | None = None

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Settings and hashes of the documents, kept as the dataset's metadata."""
        hashes = {split: self.corpus.hashes(split, self.name) for split in self.corpus.splits_of(self.name)}
        return {"inputs": hashes, **self.corpus.record_settings}


class TextCorpora(tfds.core.GeneratorBasedBuilder):
    """Documents of one language in the order of their files. Needs no network.

    Prepared with `TextCorpora(config=LanguageConfig(name="fi", corpus=corpus))`. The class lists no languages, as they
    depend on the files.
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
    """Source that reads in the order of the files, as TFDS demands; SeqIO shuffles the rows afterwards."""

    def get_dataset(self, split: str | None = None, shuffle: bool = True, *args: Any, **kwargs: Any):
        return super().get_dataset(split, False, *args, **kwargs)


@gin.configurable("prepare_corpora")
@dataclasses.dataclass(frozen=True)
class CorporaConfig:
    """Parameters of the preparation.

    Attributes:
      corpus: documents, e.g. @Corpus().
      data_dir: folder of the datasets.
      overwrite: replaces datasets that were made from other files.
    """

    corpus: Corpus = gin.REQUIRED
    data_dir: epath.PathLike = gin.REQUIRED
    overwrite: bool = False


def _damage(builder: TextCorpora) -> str | None:
    """Returns the name of a file of the dataset that is missing, in words; None if all are there."""
    paths = [epath.Path(builder.data_dir) / _INFO, *(
        epath.Path(path) for split in builder.info.splits.values() for path in split.filepaths)]
    return next((f"no {path.name}" for path in paths if not path.exists()), None)


def prepare_corpora(config: CorporaConfig) -> None:
    """Writes all languages of a corpus as TensorFlow datasets; those made before from the same files are kept.

    Raises:
      InputError: documents cannot be read, or a dataset made from other files is in the way.
    """
    tfds.disable_progress_bar()
    for language in config.corpus.all_languages:
        language_config = LanguageConfig(name=language, corpus=config.corpus)
        make_builder = functools.partial(TextCorpora, config=language_config, data_dir=config.data_dir,
                                         file_format="tfrecord")
        builder = make_builder()
        folder = epath.Path(builder.data_dir)
        recorded = read_folder_record(folder, _METADATA, key=None)
        if is_current(folder, recorded, language_config.made_from, overwrite=config.overwrite,
                      damage=functools.partial(_damage, builder)):
            continue
        if folder.exists():
            folder.rmtree()
            builder = make_builder()
        builder.download_and_prepare()
        log(f"{folder}: {sum(split.num_examples for split in builder.info.splits.values()):,} documents")


@gin.configurable
def tfds_sources(data_dir: epath.PathLike) -> dict[str, seqio.DataSource]:
    """Returns language -> SeqIO source on the prepared datasets of a folder.

    Args:
      data_dir: folder that `data_mixtures.corpora` wrote.

    Raises:
      InputError: the folder holds no dataset.
    """
    folders = sorted((epath.Path(data_dir) / TextCorpora.name).glob(f"*/{VERSION}/{_INFO}"))
    if not folders:
        raise InputError(f"{data_dir}: no {TextCorpora.name} datasets here; prepare them with data_mixtures.corpora")
    languages = [path.parent.parent.name for path in folders]
    return {language: _OrderedSource(f"{TextCorpora.name}/{language}:{VERSION}", tfds_data_dir=str(data_dir))
            for language in languages}


if __name__ == "__main__":
    run(prepare_corpora, CorporaConfig, "data_mixtures.corpora")
