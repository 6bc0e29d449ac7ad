"""Encodes questions and frames as the ids that a Video-LLM's decoder reads.

Token j of frame i of a video has the id vocab_size + i * frame_tokens + j. So sequences with the same question and the
same first frames have equal first ids, which `mlx_pretrain.inference.scoring` finds and computes once. In a model with
a newline behind the frames, that has id vocab_size, and the ids of frames begin one later: it is the same for every
combination, and belongs to the words behind the frames.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mlx_pretrain.data.token_store import PAD_ID
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


class PaddedPrompts:
    """Builds rows of one length, a question with all candidates each, for Frame-Voyager.

    Padding is at the end, so causal layers need no mask for it.
    """

    def __init__(self, prompt: str, frame_tokens: int, model: LanguageModel, questions: Sequence[str]):
        """Takes the prompt and the number of a frame's tokens; rows are as long as the longest question needs."""
        self._prompt, self._frame_tokens, self._model = prompt, frame_tokens, model
        self._word_tokens = max((len(first) + len(second) for first, second in self._parts(questions)), default=0)

    def _parts(self, questions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return split_words(self._prompt, questions, self._model.prefix_ids, self._model.tokenizer.encode_batch)

    def length(self, candidates: int) -> int:
        """Returns the number of tokens of a row, a multiple of 8."""
        return -(-(self._word_tokens + candidates * self._frame_tokens) // 8) * 8

    def __call__(self, questions: Sequence[str], candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 `[questions, length]`, and positions of frames `[questions, candidates, frame_tokens]`."""
        count = candidates * self._frame_tokens
        frames = self._model.config.vocab_size + np.arange(count, dtype=np.int32)
        parts = self._parts(questions)
        longest = max(len(first) + len(second) for first, second in parts)
        tokens = np.full((len(parts), -(-(max(longest, self._word_tokens) + count) // 8) * 8), PAD_ID, np.int32)
        frame_positions = np.zeros((len(parts), count), np.int32)
        for row, positions, (first, second) in zip(tokens, frame_positions, parts):
            row[: len(first) + count + len(second)] = np.concatenate([first, frames, second])
            positions[:] = len(first) + np.arange(count)
        return tokens, frame_positions.reshape(len(parts), candidates, self._frame_tokens)
