"""Encodes questions and frames as the ids that a Video-LLM's decoder reads.

Token j of frame i of a video has the id vocab_size + i * frame_tokens + j. So sequences with the same question and the
same first frames have equal first ids, which `mlx_pretrain.inference.scoring` finds and computes once. In a model with
a newline behind the frames, that has id vocab_size, and the ids of frames begin one later: it is the same for every
combination, and belongs to the words behind the frames.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mlx_pretrain.inference.language_model import LanguageModel, with_prefix
from video.llm.model import VideoLLMConfig

Encode = Callable[[list[str]], list[np.ndarray]]


def split_words(
    prompt: str, questions: Sequence[str], prefix_ids: Sequence[int], encode: Encode
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for every question the ids before and behind the frames in the prompt: int32 `[tokens]` each."""
    texts = [prompt.replace("{question}", question).split("{frames}") for question in questions]
    ids = [np.asarray(x, np.int32) for x in encode([text for pair in texts for text in pair])]
    return [(with_prefix(prefix_ids, first), second) for first, second in zip(ids[::2], ids[1::2])]


class Prompts:
    """Builds sequences for a Video-LLM."""

    def __init__(self, config: VideoLLMConfig, prefix_ids: Sequence[int], eos_id: int, encode: Encode):
        """Takes ids before every sequence, the id behind every answer, and a function from texts to ids."""
        self._config, self._prefix_ids, self._eos_id, self._encode = config, tuple(prefix_ids), eos_id, encode

    @classmethod
    def from_language_model(cls, config: VideoLLMConfig, model: LanguageModel) -> "Prompts":
        """Returns the prompts of a Video-LLM whose decoder and tokenizer are those of `model`."""
        return cls(config, model.prefix_ids, model.eos_ids[0], model.tokenizer.encode_batch)

    def words(self, questions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for every question the ids before the frames, and behind, with the newline: int32 `[tokens]` each."""
        parts = split_words(self._config.prompt, questions, self._prefix_ids, self._encode)
        newline = np.array([self._config.decoder.vocab_size] * self._config.has_newline, np.int32)
        return [(first, np.concatenate([newline, second])) for first, second in parts]

    def answers(self, answers: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of answers, with the end: int32 `[tokens]` each."""
        return [np.concatenate([ids, [self._eos_id]]).astype(np.int32) for ids in self._encode(list(answers))]

    def frames(self, frames: Sequence[int]) -> np.ndarray:
        """Returns the ids of these frames' tokens, frame by frame: int32 `[tokens]`."""
        size = self._config.frame_tokens
        indices = np.asarray(frames, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)
        return self._config.decoder.vocab_size + self._config.has_newline + indices.ravel()

    def context(self, words: tuple[np.ndarray, np.ndarray], frames: Sequence[int]) -> np.ndarray:
        """Returns the ids before the answer: int32 `[tokens]`; `words` as `words()` returns them."""
        return np.concatenate([words[0], self.frames(frames), words[1]])


class QuestionWords:
    """The words of questions as Frame-Voyager reads them: embeddings that are the Video-LLM's, and stay so.

        questions = QuestionWords(PROMPT, llm.language_model, ["What colour was the star?"])
        words, lengths = questions[[0]]      # float32 [1, 16, embed], int32 [1]

    Only the embeddings of these words are held, not those of the whole vocabulary.

    Attributes:
      length: tokens of a row: those of the longest question, rounded up to a multiple of 8.
    """

    def __init__(self, prompt: str, model: LanguageModel, questions: Sequence[str]):
        """Encodes the questions.

        Args:
          prompt: {question}, and {frames} at the end.
          model: the Video-LLM's decoder; of its parameters only the embedding is used.
          questions: texts.
        """
        ids = [first for first, _ in split_words(prompt, questions, model.prefix_ids, model.tokenizer.encode_batch)]
        self._lengths = np.array([len(row) for row in ids], np.int32)
        self.length = -(-int(self._lengths.max(initial=1)) // 8) * 8
        used, rows = np.unique(np.concatenate(ids), return_inverse=True)
        self._table = np.asarray(jnp.take(model.params["embedding"], used, axis=0)).astype(np.float32)
        self._rows = np.zeros((len(ids), self.length), np.int32)  # of the table; padding is never read
        self._rows[np.arange(self.length) < self._lengths[:, None]] = rows

    def __getitem__(self, questions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns embeddings float32 `[questions, length, embed]` and numbers of words int32 `[questions]`."""
        return self._table[self._rows[questions]], self._lengths[questions]
