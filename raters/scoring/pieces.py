"""Documents of shards in pieces for the workers, and in windows that are batched together."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from raters.scoring.chunks import Prepared
from raters.scoring.progress import Progress
from raters.scoring.shards import ShardWriter

_PIECE_CHARACTERS, _PIECE_DOCUMENTS = 1 << 18, 1024  # handed to a worker at a time


@dataclasses.dataclass
class Piece:
    """Some documents of a shard, in order.

    Attributes:
      writer: writer of the shard.
      documents: the documents.
      last: True for the shard's last piece.
      failure: in the last piece, the reason why the shard could not be read; None: it was.
    """

    writer: ShardWriter
    documents: list[Document]
    last: bool = False
    failure: str | None = None


def read_pieces(
    writers: Iterable[ShardWriter], corpus: Corpus, extra: Sequence[str], progress: Progress
) -> Iterator[Piece]:
    """Streams the documents of all shards, with the fields `extra`, and rejects records that cannot be scored."""
    for writer in writers:
        documents, size, failure = [], 0, None
        try:
            for document in corpus.read(writer.shard.name, extra=extra, rejected=writer.reject):
                if not _is_unicode(document):
                    writer.reject(document.number, "id, language or source is not valid Unicode")
                    continue
                documents.append(document)
                size += len(document.text)
                if size >= _PIECE_CHARACTERS or len(documents) >= _PIECE_DOCUMENTS:
                    progress.read(writer, len(documents), size)
                    yield Piece(writer, documents)
                    documents, size = [], 0
        except InputError as error:
            documents, size, failure = [], 0, str(error)
        progress.read(writer, len(documents), size)
        yield Piece(writer, documents, True, failure)


def _is_unicode(document: Document) -> bool:
    """Returns False for half a surrogate pair, which JSON can spell but no file can hold."""
    try:
        f"{document.id}{document.language}{document.source}".encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass
class Window:
    """Documents of one shard that are batched together.

    Attributes:
      writer: writer of the shard.
      documents: the documents without their texts.
      n_tokens, chunks, owners, weights: see `Prepared`, piece by piece; owners count in `documents`.
      tokens: tokens of all chunks.
      last, failure: see `Piece`.
    """

    writer: ShardWriter
    documents: list[Document] = dataclasses.field(default_factory=list)
    n_tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)
    owners: list[np.ndarray] = dataclasses.field(default_factory=list)
    weights: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens: int = 0
    last: bool = False
    failure: str | None = None

    def add(self, piece: Piece, prepared: Prepared) -> None:
        """Adds a piece, without its texts."""
        self.owners.append(prepared.owners + len(self.documents))
        self.documents += [dataclasses.replace(document, text="", language=language, extra={})
                           for document, language in zip(piece.documents, prepared.languages)]
        self.n_tokens.append(prepared.n_tokens)
        self.chunks += prepared.chunks
        self.weights.append(prepared.weights)
        self.tokens += sum(map(len, prepared.chunks))
        self.last, self.failure = piece.last, piece.failure


def windows(prepared: Iterable[tuple[Piece, Prepared]], tokens: int) -> Iterator[tuple[Window, list[np.ndarray]]]:
    """Yields (window, its chunks): pieces together until they have `tokens` tokens, or their shard ends."""
    window = None
    for piece, result in prepared:
        window = window or Window(piece.writer)
        window.add(piece, result)
        if window.last or window.tokens >= tokens:
            yield window, window.chunks
            window = None
