"""Exports documents to a token store: tokens of every split and language, in rows of one length.

    python -m data_mixtures.export --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The manifest is written last: an export that was killed leaves no store, and is simply run again.
"""

import sys
import time
from collections.abc import Iterable, Iterator

import gin
import numpy as np
from etils import epath

from data_mixtures.documents import Corpus
from mlx_pretrain import __version__
from mlx_pretrain.configuration import run
from mlx_pretrain.data import store as token_store
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.store import EOS_ID, PAD_ID, Manifest, Part, PartWriter, TokenStore
from mlx_pretrain.data.tokenizer import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic

_BATCH_BYTES = 1 << 20  # of text tokenised at a time
_EOS = np.array([EOS_ID], np.int32)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Groups texts to about _BATCH_BYTES, with their UTF-8 bytes."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= _BATCH_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def export_part(
    documents: Iterable[Document], tokenizer: Tokenizer, path: epath.PathLike, sequence_length: int,
    dtype: np.dtype, num_threads: int = 2, name: str = "",
) -> Part:
    """Writes one language: documents, each followed by EOS, joined and cut; the last row is padded.

    Args:
      documents: the texts, in order.
      tokenizer: for the ids.
      path: folder of the array.
      sequence_length: tokens per row.
      dtype: of the array.
      num_threads: threads that tokenise.
      name: names the part in the progress lines on stderr.
    """
    writer = PartWriter(path, sequence_length, dtype)
    n_tokens = n_bytes = n_documents = 0
    rest = np.empty(0, np.int32)
    start = last = time.perf_counter()
    for texts, size in _batches(documents):
        ids = tokenizer.encode_batch(texts, num_threads)
        tokens = np.concatenate([rest, *(piece for document in ids for piece in (document, _EOS))])
        n_tokens += len(tokens) - len(rest)
        n_bytes += size
        n_documents += len(texts)
        whole = len(tokens) // sequence_length * sequence_length
        writer.append(tokens[:whole].reshape(-1, sequence_length).astype(dtype))
        rest = tokens[whole:]
        if (now := time.perf_counter()) - last > 10:
            _report(name, n_documents, n_tokens, now - start)
            last = now
    if len(rest):
        row = np.full((1, sequence_length), PAD_ID, dtype)
        row[0, : len(rest)] = rest
        writer.append(row)
    part = writer.close(n_tokens, n_bytes, n_documents)
    _report(name, n_documents, n_tokens, time.perf_counter() - start)
    return part


def _report(name: str, documents: int, tokens: int, seconds: float) -> None:
    print(f"{name:<16} {documents:>10,} documents {tokens:>14,} tokens {tokens / seconds / 1e6:6.2f}M tokens/s",
          file=sys.stderr, flush=True)


def _is_made(store: epath.Path, planned: Manifest, overwrite: bool) -> bool:
    """Whether `store` already holds what is planned, whole.

    Raises:
      InputError: it holds a store made otherwise, and may not be overwritten.
    """
    if not (store / token_store.MANIFEST).exists():
        return False
    try:
        existing = TokenStore(store)
        found = existing.manifest
        same = ((found.sequence_length, found.tokenizer_sha256, found.provenance)
                == (planned.sequence_length, planned.tokenizer_sha256, planned.provenance))
        if same:
            for split in found.splits:
                for language in existing.parts(split):
                    existing.array(split, language)
            return True
        cause = "made from other documents or with other settings"
    except InputError as error:
        cause = f"damaged ({error})"
    if overwrite:
        return False
    raise InputError(f"{store}: holds a token store, {cause}; set export_tokens.overwrite=True to replace it")


@gin.configurable
def export_tokens(
    corpus: Corpus = gin.REQUIRED,
    tokenizer: epath.PathLike = gin.REQUIRED,
    store: epath.PathLike = gin.REQUIRED,
    sequence_length: int = gin.REQUIRED,
    num_threads: int = 2,
    overwrite: bool = False,
) -> None:
    """Exports all splits and languages of a corpus to a token store.

    A whole store made before from the same files and settings is kept; one whose export was interrupted is redone.

    Args:
      corpus: the documents.
      tokenizer: SentencePiece model file; a copy goes into the store.
      store: folder of the store, local or gs://.
      sequence_length: tokens per row.
      num_threads: threads that tokenise.
      overwrite: replaces a store that was made otherwise, or is damaged.

    Raises:
      InputError: documents or tokenizer cannot be read, or another store is in the way.
    """
    if not isinstance(sequence_length, int) or sequence_length < 1:
        raise InputError(f"export_tokens.sequence_length: {sequence_length!r} is no positive number of tokens")
    store, model = epath.Path(store), Tokenizer(tokenizer)
    inputs = {split: {language: corpus.hashes(split, language) for language in corpus.languages(split)}
              for split in corpus.splits}
    provenance = {"program": "data_mixtures.export", "version": __version__, "text_unit": corpus.text_unit,
                  "inputs": inputs}
    splits: dict[str, dict[str, Part]] = {}
    manifest = Manifest(sequence_length, model.vocab_size, model.sha256, splits, provenance)
    if _is_made(store, manifest, overwrite):
        print(f"{store}: made before from the same documents and settings, kept", file=sys.stderr)
        return
    start = time.perf_counter()
    (store / token_store.MANIFEST).unlink(missing_ok=True)
    for split in corpus.splits:
        if (store / split).exists():  # of an earlier store; languages that are gone would stay behind
            (store / split).rmtree()
        splits[split] = {
            language: export_part(corpus.documents(split, language), model, store / split / language, sequence_length,
                                  manifest.dtype, num_threads, f"{split}/{language}")
            for language in corpus.languages(split)
        }
    write_atomic(store / token_store.TOKENIZER, model.model)
    token_store.write_manifest(store, manifest)
    parts = [part for languages in splits.values() for part in languages.values()]
    _report(f"{store}:", sum(p.documents for p in parts), sum(p.tokens for p in parts), time.perf_counter() - start)


if __name__ == "__main__":
    run(export_tokens, "data_mixtures.export")
