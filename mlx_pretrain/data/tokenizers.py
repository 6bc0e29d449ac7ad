"""Tokenizers: the framework's SentencePiece models (pad 0, eos 1, unk 2, bos 3), and Hugging Face's tokenizer.json."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.errors import InputError


class Tokenizer:
    """SentencePiece tokenizer: text to ids and back. Adds special tokens in `wrap` alone.

        tokenizer = Tokenizer("runs/sample/tokenizer.model")
        ids = tokenizer.encode("Hello")        # list of int, without bos and eos
        tokenizer.decode([BOS_ID, *ids, EOS_ID])        # "Hello"
        tokenizer.encode_batch(["Hello", "hei"], num_threads=2)        # int32 [tokens] each

    Attributes:
      path: model file.
      model: bytes of the file.
      sha256: fingerprint of these bytes, as manifests record it.
      special_tokens: id -> text of the special tokens, which `decode` leaves out.
    """

    def __init__(self, path: epath.PathLike):
        """Loads a SentencePiece model, local or gs://.

        Raises:
          InputError: the file is missing, is no SentencePiece model, or has other ids for its special tokens.
        """
        self.path = epath.Path(path)
        try:
            self.model = self.path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{path}: no such tokenizer") from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        if not self.model:  # SentencePiece would understand an empty model as none
            raise InputError(f"{path}: not a SentencePiece model (empty file)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except (RuntimeError, ValueError, OSError):
            raise InputError(f"{path}: not a SentencePiece model") from None
        special_ids = tuple(getattr(self._processor, f"{name}_id")() for name in ("pad", "eos", "unk", "bos"))
        if special_ids != (PAD_ID, EOS_ID, UNK_ID, BOS_ID):
            raise InputError(f"{path}: pad, eos, unk, bos are {special_ids}, not {(PAD_ID, EOS_ID, UNK_ID, BOS_ID)}; "
                             "train the tokenizer with data_mixtures.tokenizer")
        self.special_tokens = {token: self._processor.id_to_piece(token) for token in (PAD_ID, BOS_ID, EOS_ID)}

    @property
    def vocab_size(self) -> int:
        """Number of pieces, which bounds the ids."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text (valid Unicode: no lone surrogates), without bos and eos."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Returns the ids of each text, int32 `[tokens]` each, without bos and eos."""
        return self._processor.encode(list(texts), return_type="numpy", num_threads=num_threads)

    def wrap(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the ids between bos and eos, as encoders take them: int32 `[tokens + 2]`."""
        return np.concatenate([[BOS_ID], np.asarray(ids), [EOS_ID]]).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids below `vocab_size` without pad, bos and eos; invalid UTF-8 becomes U+FFFD."""
        return self._processor.decode([int(i) for i in ids if i not in self.special_tokens])


class SubwordTokenizer:
    """Hugging Face tokenizer with the interface of `Tokenizer`. Adds special tokens in `wrap` alone.

    A special token spelt out in a text ("</s>") becomes that token, as in transformers.

    Attributes:
      path: tokenizer.json.
      model: bytes of the file.
      sha256: fingerprint of these bytes, as manifests record it.
      prefix_ids, suffix_ids: int32 ids that the model's template puts around a text, e.g. <s> and </s>; may be empty.
      special_tokens: id -> text of the special tokens, which `decode` leaves out.
    """

    def __init__(self, path: epath.PathLike, model: bytes | None = None):
        """Loads a tokenizer.json, local or gs://, or uses `model` as its content.

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
        # The file's own limits, often shorter than the model's positions, would cut or pad texts unasked.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.prefix_ids, self.suffix_ids = self._template()
        self.special_tokens = {token: added.content
                               for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def _template(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids that the model's template puts before and after a text's ids."""
        text = self._tokenizer.encode("a", add_special_tokens=False)
        wrapped = self._tokenizer.post_process(text, None, True)
        inner = [index for index, special in enumerate(wrapped.special_tokens_mask) if not special]
        start, stop = (inner[0], inner[-1] + 1) if inner else (len(wrapped.ids), len(wrapped.ids))
        return np.asarray(wrapped.ids[:start], np.int32), np.asarray(wrapped.ids[stop:], np.int32)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, including tokens that were added to the model."""
        return max(self.vocabulary().values()) + 1

    def vocabulary(self) -> dict[str, int]:
        """Returns piece -> id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text (valid Unicode: no lone surrogates), without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Returns the ids of each text, int32 `[tokens]` each, without special tokens.

        With `num_threads` above 1 the library chooses the number (RAYON_NUM_THREADS in the environment).
        """
        if num_threads > 1:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        return [np.asarray(self.encode(text), np.int32) for text in texts]

    def wrap(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the ids between the model's special tokens, e.g. <s> ... </s>: int32 `[tokens + special]`."""
        return np.concatenate([self.prefix_ids, np.asarray(ids, np.int32), self.suffix_ids])

    def with_template(self, prefix_ids: Sequence[int]) -> bytes:
        """Returns the content of a tokenizer.json like this one whose template only puts `prefix_ids` before a text."""
        changed = tokenizers.Tokenizer.from_buffer(self.model)
        pieces = [(changed.id_to_token(token), token) for token in prefix_ids]
        changed.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*(piece for piece, _ in pieces), "$A"], pair=[*(piece for piece, _ in pieces), "$A", "$B"],
            special_tokens=pieces)
        return changed.to_str().encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids below `vocab_size`, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def check_vocabulary(path: epath.PathLike, tokenizer: Tokenizer | SubwordTokenizer, vocab_size: int) -> None:
    """Raises InputError when the tokenizer at `path` has ids beyond a model's vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{path}: {tokenizer.vocab_size} token ids, the model has vocab_size={vocab_size}")


def load_tokenizer(path: epath.PathLike) -> Tokenizer | SubwordTokenizer:
    """Loads a SentencePiece model of the framework's or, from a .json file, a Hugging Face tokenizer.

    Raises:
      InputError: the file is missing, or neither of them.
    """
    return SubwordTokenizer(path) if epath.Path(path).suffix == ".json" else Tokenizer(path)
