"""The tokenizer: a SentencePiece model whose special ids are the framework's (pad 0, eos 1, unk 2, bos 3)."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from etils import epath

from mlx_pretrain.data.store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
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
