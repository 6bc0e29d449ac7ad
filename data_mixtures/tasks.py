"""SeqIO tasks, one a language, and the mixture whose weights come from the rates file.

A task's examples are rows of a fixed length: documents tokenised, each ended by EOS, joined and cut *before* mixing.
SeqIO's rates count examples, so that equal lengths make them token shares. The mixture takes its sources in the order
of `MixtureOrder`, so that the shares are exact to a few rows at every moment. One epoch of a task has the same rows as
the exporter's token store, without groups and shuffling, as both tokenise with the same Python SentencePiece.

The iterator can be checkpointed: every Python function in the graph is a pure function of its arguments.
"""

import functools
import re
import threading
from collections.abc import Iterator, Mapping

import gin
import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.mixture_order import MixtureOrder
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError

# Accelerators belong to JAX; TensorFlow would take their memory.
tf.config.set_visible_devices([], "GPU")
# SeqIO warns that a restart repeats data; here the iterator's checkpoint continues.
logging.get_absl_logger().addFilter(lambda record: "uncached FunctionDataset" not in record.getMessage())

_DOCUMENTS_PER_BLOCK = 16
_ORDER_BLOCK = 4096
_SHUFFLE_BUFFER = 256  # rows per language; the iterator's checkpoint holds them


# AutoGraph's search for control flow costs a second per language, and the functions below have none.
_plain = tf.autograph.experimental.do_not_convert


class TokenizerVocabulary(seqio.Vocabulary):
    """The framework's tokenizer as a SeqIO vocabulary, with the same ids inside TensorFlow graphs and outside."""

    def __init__(self, path: epath.PathLike):
        """Loads the tokenizer. Raises InputError as `Tokenizer` does."""
        super().__init__()
        self.tokenizer = Tokenizer(path)

    bos_id = property(lambda self: BOS_ID)
    eos_id = property(lambda self: EOS_ID)
    unk_id = property(lambda self: UNK_ID)
    _base_vocab_size = property(lambda self: self.tokenizer.vocab_size)

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    # The graph calls Python, as tf_text and Python SentencePiece break ties differently. The function is declared
    # stateless, as a stateful one would make the iterator impossible to checkpoint.
    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            text = np.array(text, object).item()  # eager calls pass the text in an array
            return np.array(self.tokenizer.encode(text.decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self.tokenizer.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.tokenizer.sha256 == other.tokenizer.sha256

    __hash__ = None


class _BlockReader:
    """Reads blocks of a file's documents by number; reads the file only once when they are read in order."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._lock = threading.Lock()
        self._open: tuple[bytes, int, Iterator[Document]] | None = None

    def __call__(self, name: bytes, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (ids, sources, texts), `[documents]` each; empty arrays after the last block."""
        with self._lock:
            if self._open is None or self._open[:2] != (name, index):
                documents = self._corpus.read(name.decode())
                for _ in range(index * _DOCUMENTS_PER_BLOCK):
                    next(documents, None)
            else:
                documents = self._open[2]
            block = [document for _, document in zip(range(_DOCUMENTS_PER_BLOCK), documents)]
            self._open = (name, index + 1, documents)
        return tuple(np.array([getattr(document, name).encode() for document in block], object)
                     for name in ("id", "source", "text"))


def _document_dataset(corpus: Corpus, language: str, split: str, shuffle_files: bool, seed: int | None = None):
    """Returns one language's documents, in file order, as {"id", "source", "text"}, the TFDS builder's features."""
    names = list(corpus.files_of(split, language))
    reader = _BlockReader(corpus)

    @_plain
    def read_block(name: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        block = tf.numpy_function(reader, [name, index], [tf.string] * 3, stateful=False)
        return {key: tf.ensure_shape(value, [None]) for key, value in zip(("id", "source", "text"), block)}

    @_plain
    def read_file(name: tf.Tensor) -> tf.data.Dataset:
        blocks = tf.data.Dataset.counter().map(_plain(lambda index: read_block(name, index)))
        return blocks.take_while(_plain(lambda block: tf.size(block["text"]) > 0)).unbatch()

    files = tf.data.Dataset.from_tensor_slices(names)
    if shuffle_files:
        files = files.shuffle(len(names), seed)
    return files.flat_map(read_file)


@gin.configurable
def document_sources(corpus: Corpus) -> dict[str, seqio.DataSource]:
    """Returns language -> SeqIO source that streams the corpus's files.

    Args:
      corpus: documents, e.g. @Corpus().
    """
    return {
        language: seqio.FunctionDataSource(
            functools.partial(_document_dataset, corpus, language),
            splits=corpus.splits_of(language),
            caching_permitted=False,
        )
        for language in corpus.all_languages
    }


def tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
    """Maps {"text"} to {"tokens": its ids and EOS}.

    SeqIO's own function runs 256 documents at a time, which does not help a Python function, and a checkpoint would
    hold them all.
    """
    vocabulary = output_features["tokens"].vocabulary

    @_plain
    def encode(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"tokens": tf.concat([vocabulary.encode_tf(example["text"]), [vocabulary.eos_id]], 0)}

    return dataset.map(encode)


def chunk(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Joins "tokens" of all examples and cuts them into rows of `sequence_length["tokens"]`; pads the last row."""
    length = sequence_length["tokens"]

    @_plain
    def pad(tokens: tf.Tensor) -> dict[str, tf.Tensor]:
        padded = tf.pad(tokens, [[0, length - tf.shape(tokens)[0]]], constant_values=PAD_ID)
        return {"tokens": tf.ensure_shape(padded, [length])}

    return dataset.map(_plain(lambda example: example["tokens"])).rebatch(length).map(pad)


def _valid_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


def register_tasks(prefix: str, sources: Mapping[str, seqio.DataSource], tokenizer: epath.PathLike) -> dict[str, str]:
    """Registers a task for each language, named "<prefix>_<language>", in place of a former one.

    `get_dataset({"tokens": length})` of a task gives {"tokens": int32 [length]}.

    Args:
      prefix: first part of the names.
      sources: language -> SeqIO source.
      tokenizer: SentencePiece model file.

    Returns:
      language -> task name.

    Raises:
      InputError: the tokenizer cannot be read.
    """
    feature = seqio.Feature(TokenizerVocabulary(tokenizer), add_eos=True, dtype=tf.int32)
    names = {}
    for language, source in sources.items():
        names[language] = _valid_name(f"{prefix}_{language}")
        seqio.TaskRegistry.remove(names[language])
        seqio.TaskRegistry.add(
            names[language],
            source=source,
            preprocessors=[tokenize, chunk],
            output_features={"tokens": feature},
            shuffle_buffer_size=_SHUFFLE_BUFFER,
        )
    return names


def _take_in_order(datasets: list[tf.data.Dataset], rates: list[float], seed: int | None, positions: list[int]):
    """Merges the datasets in the order of `MixtureOrder`, each example with its "language_id": a SeqIO sample_fn.

    Args:
      datasets: dataset of each task, sorted by the tasks' names, as SeqIO does.
      rates: weight of each dataset.
      seed: unused.
      positions: index in `datasets` of each language of the rates file.
    """
    del seed  # the order depends on the weights alone; rows are shuffled within each language
    order = MixtureOrder([rates[position] for position in positions])
    numbered = [_numbered(datasets[position], source) for source, position in enumerate(positions)]

    def block(index: int) -> np.ndarray:
        return order(index * _ORDER_BLOCK, (index + 1) * _ORDER_BLOCK)[0]

    @_plain
    def choices(index: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(block, [index], tf.int64, stateful=False), [_ORDER_BLOCK])

    choice = tf.data.Dataset.counter().map(choices).unbatch()
    return tf.data.Dataset.choose_from_datasets(numbered, choice, stop_on_empty_dataset=True)


def _numbered(dataset: tf.data.Dataset, source: int) -> tf.data.Dataset:
    return dataset.map(_plain(lambda example: {**example, "language_id": tf.constant(source, tf.int32)}))


def register_mixture(name: str, tasks: Mapping[str, str], rates: Mapping[str, float]) -> seqio.Mixture:
    """Registers the mixture of language tasks, in place of a former one.

    Its examples are {"tokens": int32 [length], "language_id": int32 []}, "language_id" counting the languages of
    `rates` in their order. It is endless with SeqIO's default `num_epochs=None`; otherwise it ends with its first task.

    Args:
      name: name of the mixture.
      tasks: language -> task name.
      rates: language -> positive mixture weight.

    Raises:
      InputError: a language of `rates` has no task.
    """
    if unknown := sorted(set(rates) - set(tasks)):
        raise InputError(f"mixture {name}: no task for {', '.join(unknown)}; available: {', '.join(sorted(tasks))}")
    names = [tasks[language] for language in rates]
    positions = [sorted(names).index(task) for task in names]
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, list(zip(names, rates.values())),
                                     sample_fn=functools.partial(_take_in_order, positions=positions))


class MixtureBatches:
    """Endless NumPy batches of a mixture, with the same content as the token loader's, without an export.

    Attributes:
      languages: languages, indexed by "language_id".
    """

    def __init__(self, dataset: tf.data.Dataset, languages: list[str]):
        self.languages = languages
        self._iterator = iter(dataset)

    def __iter__(self) -> "MixtureBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns {"tokens": int32 [batch, length], "language_id": int32 [batch]}.

        Raises:
          InputError: documents cannot be read.
        """
        try:
            return {name: value.numpy() for name, value in next(self._iterator).items()}
        except tf.errors.OpError as error:  # TensorFlow wraps what Python functions in its graph raise
            if cause := re.search(r"InputError: (.*)", error.message):
                raise InputError(cause[1]) from None
            raise

    def save(self, path: epath.PathLike) -> None:
        """Writes the position in the stream as a TensorFlow checkpoint."""
        tf.train.Checkpoint(iterator=self._iterator).write(str(path))

    def restore(self, path: epath.PathLike) -> None:
        """Restores a saved position, so that the next batch is the one that followed `save`.

        Raises:
          InputError: the file holds no position.
        """
        try:
            tf.train.Checkpoint(iterator=self._iterator).read(str(path)).assert_consumed()
        except tf.errors.NotFoundError:
            raise InputError(f"{path}: no saved position of a mixture here") from None


@gin.configurable
def mixture_batches(
    sources: Mapping[str, seqio.DataSource],
    tokenizer: epath.PathLike,
    rates: epath.PathLike,
    sequence_length: int,
    batch_size: int,
    split: str = "train",
    shuffle: bool = True,
    seed: int = 0,
    name: str = "text",
) -> MixtureBatches:
    """Registers the tasks and the mixture of a rates file and iterates over it, for training without an export.

    Args:
      sources: language -> SeqIO source, from `document_sources` or `corpora.tfds_sources`.
      tokenizer: SentencePiece model file.
      rates: rates file.
      sequence_length: tokens per row.
      batch_size: rows per batch.
      split: split to read.
      shuffle: shuffles rows within each language, in a buffer; the weights fix the order of languages.
      seed: seed of the shuffling.
      name: prefix of the tasks' names, "<name>_<language>", and of the mixture's, "<name>_mixture".

    Raises:
      InputError: tokenizer or rates file cannot be read, or a language of the rates has no text in the split.
    """
    weights = load_rates(rates, [language for language, source in sources.items() if split in source.splits])
    tasks = register_tasks(name, {language: sources[language] for language in weights}, tokenizer)
    mixture = register_mixture(f"{name}_mixture", tasks, weights)
    dataset = mixture.get_dataset({"tokens": sequence_length}, split=split, shuffle=shuffle, seed=seed,
                                  num_epochs=None, try_in_mem_cache=False)
    return MixtureBatches(dataset.batch(batch_size, drop_remainder=True), list(weights))
