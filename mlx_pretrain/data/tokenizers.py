"""Tokenizers: SentencePiece models of our own (pad 0, eos 1, unk 2, bos 3), and Hugging Face's tokenizer.json."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.errors import InputError


class Tokenizer:
    """Text to ids and back, without TensorFlow. Adds no special tokens by itself.

    Attributes:
      model: the file's bytes.
      sha256: their fingerprint, as manifests record it.
      special_tokens: id -> text of the special tokens, which `decode` leaves out.
    """

    def __init__(self, path: epath.PathLike):
        """Loads a SentencePiece model, local or gs://.

        Raises:
          InputError: the file is missing, is no SentencePiece model, or numbers its special tokens otherwise.
        """
        self.path = epath.Path(path)
        try:
            self.model = self.path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{path}: no such tokenizer") from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        if not self.model:  # SentencePiece would take it for "no model given"
            raise InputError(f"{path}: not a SentencePiece model (empty file)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except (RuntimeError, ValueError, OSError):
            raise InputError(f"{path}: not a SentencePiece model") from None
        found = tuple(getattr(self._processor, f"{name}_id")() for name in ("pad", "eos", "unk", "bos"))
        if found != (PAD_ID, EOS_ID, UNK_ID, BOS_ID):
            raise InputError(f"{path}: pad, eos, unk, bos are {found}, not {(PAD_ID, EOS_ID, UNK_ID, BOS_ID)}; "
                             "train the tokenizer with data_mixtures.tokenizer")
        self.special_tokens = {token: self._processor.id_to_piece(token) for token in (PAD_ID, BOS_ID, EOS_ID)}

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of one text (valid Unicode: no lone surrogates), without bos or eos."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Ids of each text: int32 [tokens] each, without bos or eos."""
        return self._processor.encode(list(texts), return_type="numpy", num_threads=num_threads)

    def wrap(self, ids: Sequence[int]) -> np.ndarray:
        """Ids as an encoder takes them, int32: bos before, eos behind."""
        return np.concatenate([[BOS_ID], np.asarray(ids), [EOS_ID]]).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids below `vocab_size`; pad, bos and eos leave nothing, bytes that are no UTF-8 become U+FFFD."""
        return self._processor.decode([int(i) for i in ids if i not in self.special_tokens])


class SubwordTokenizer:
    """Text to ids and back, as `mlx_pretrain.data.tokenizers.Tokenizer`. Adds special tokens in `wrap` alone.

    A special token spelt out in a text ("</s>") becomes that token, as in transformers.

    Attributes:
      model: the file's bytes.
      sha256: their fingerprint, as manifests record it.
      before, after: int32 ids that the model's template puts around a text, e.g. <s> and </s>; may be empty.
      special_tokens: id -> text of the special tokens, which `decode` leaves out.
    """

    def __init__(self, path: epath.PathLike, model: bytes | None = None):
        """Loads a tokenizer.json, local or gs://, or takes `model` for what would stand in it.

        Raises:
          InputError: the file is missing or no tokenizer.
        """
        self.path = epath.Path(path)
        try:
            self.model = self.path.read_bytes() if model is None else model
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{path}: no such tokenizer") from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.model)
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path}: not a Hugging Face tokenizer ({str(error).splitlines()[0]})") from None
        # A model's own limits, often shorter than its positions, would cut or fill up texts unasked.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.before, self.after = self._template()
        self.special_tokens = {token: added.content
                               for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def _template(self) -> tuple[np.ndarray, np.ndarray]:
        """What the model's template puts before and after a text's ids."""
        text = self._tokenizer.encode("a", add_special_tokens=False)
        wrapped = self._tokenizer.post_process(text, None, True)
        inner = [place for place, special in enumerate(wrapped.special_tokens_mask) if not special]
        start, stop = (inner[0], inner[-1] + 1) if inner else (len(wrapped.ids), len(wrapped.ids))
        return np.asarray(wrapped.ids[:start], np.int32), np.asarray(wrapped.ids[stop:], np.int32)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; tokens added to the model count."""
        return max(self.vocabulary().values()) + 1

    def vocabulary(self) -> dict[str, int]:
        """The id of each piece, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of one text (valid Unicode: no lone surrogates), without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Ids of each text: int32 [tokens] each, without special tokens.

        More than one of `num_threads` means as many as the library takes (RAYON_NUM_THREADS in the environment).
        """
        if num_threads > 1:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        return [np.asarray(self.encode(text), np.int32) for text in texts]

    def wrap(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids with the model's special tokens around them, e.g. <s> ... </s>: int32 [tokens + len(wrap([]))]."""
        return np.concatenate([self.before, np.asarray(ids, np.int32), self.after])

    def with_template(self, prefix_ids: Sequence[int]) -> bytes:
        """A tokenizer.json like this one whose template puts only these ids around a text, before it."""
        changed = tokenizers.Tokenizer.from_buffer(self.model)
        pieces = [(changed.id_to_token(token), token) for token in prefix_ids]
        changed.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*(piece for piece, _ in pieces), "$A"], pair=[*(piece for piece, _ in pieces), "$A", "$B"],
            special_tokens=pieces)
        return changed.to_str().encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids below `vocab_size`; special tokens leave nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def check_vocabulary(path: epath.PathLike, tokenizer: Tokenizer | SubwordTokenizer, vocab_size: int) -> None:
    """Raises InputError when the tokenizer at `path` has ids beyond a model's vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{path}: {tokenizer.vocab_size} token ids, the model has vocab_size={vocab_size}")


def load_tokenizer(path: epath.PathLike) -> Tokenizer | SubwordTokenizer:
    """A SentencePiece model (.model) of this framework's, or a tokenizer.json of Hugging Face's.

    Raises:
      InputError: the file is missing or neither.
    """
    return SubwordTokenizer(path) if epath.Path(path).suffix == ".json" else Tokenizer(path)
