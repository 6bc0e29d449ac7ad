"""Questions and frames as the ids that a Video-LLM's decoder reads.

Token j of frame i of a video has the id vocab_size + i * frame_tokens + j: sequences that begin with the same question
and the same frames are equal as far as that, and `inference.scoring` finds what they share.
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
    """What stands before and behind the frames in a prompt: int32 `[tokens]` each, for every question."""
    texts = [prompt.replace("{question}", question).split("{frames}") for question in questions]
    ids = [np.asarray(x, np.int32) for x in encode([text for pair in texts for text in pair])]
    return [(with_prefix(prefix_ids, first), second) for first, second in zip(ids[::2], ids[1::2])]


class Prompts:
    """Builds sequences for a Video-LLM."""

    def __init__(self, config: VideoLLMConfig, before: Sequence[int], end: int, encode: Encode):
        """`before`: ids put before every sequence; `end`: put behind an answer; `encode`: texts -> ids of each."""
        self._config, self._before, self._end, self._encode = config, tuple(before), end, encode

    @classmethod
    def of(cls, config: VideoLLMConfig, model: LanguageModel) -> "Prompts":
        """Those of a Video-LLM with this language model's tokenizer."""
        return cls(config, model.prefix_ids, model.eos_ids[0], model.tokenizer.encode_batch)

    def words(self, questions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What stands before and behind the frames: int32 `[tokens]` each, for every question."""
        return split_words(self._config.prompt, questions, self._before, self._encode)

    def answers(self, answers: Sequence[str]) -> list[np.ndarray]:
        """Answers, ended: int32 `[tokens]` each."""
        return [np.concatenate([ids, [self._end]]).astype(np.int32) for ids in self._encode(list(answers))]

    def frames(self, frames: Sequence[int]) -> np.ndarray:
        """Ids of the tokens of these frames of a video, one frame after the other: int32 `[tokens]`."""
        size = self._config.frame_tokens
        places = np.asarray(frames, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)
        return self._config.decoder.vocab_size + places.ravel()

    def context(self, words: tuple[np.ndarray, np.ndarray], frames: Sequence[int]) -> np.ndarray:
        """All before the answer: int32 `[tokens]`."""
        return np.concatenate([words[0], self.frames(frames), words[1]])


class PaddedPrompts:
    """Questions with all candidates as rows of one length, for Frame-Voyager; causal layers need no padding mask."""

    def __init__(self, prompt: str, frame_tokens: int, model: LanguageModel, questions: Sequence[str]):
        """`questions`: whose longest sets the length."""
        self._prompt, self._frame_tokens, self._model = prompt, frame_tokens, model
        self._words = max((len(first) + len(second) for first, second in self._parts(questions)), default=0)

    def _parts(self, questions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return split_words(self._prompt, questions, self._model.prefix_ids, self._model.tokenizer.encode_batch)

    def length(self, candidates: int) -> int:
        """Tokens of a row, a multiple of 8."""
        return -(-(self._words + candidates * self._frame_tokens) // 8) * 8

    def __call__(self, questions: Sequence[str], candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[questions, length]`, and where the frames stand `[questions, candidates, frame_tokens]`."""
        count = candidates * self._frame_tokens
        frames = self._model.config.vocab_size + np.arange(count, dtype=np.int32)
        parts = self._parts(questions)
        longest = max(len(first) + len(second) for first, second in parts)
        tokens = np.full((len(parts), -(-(max(longest, self._words) + count) // 8) * 8), PAD_ID, np.int32)
        places = np.zeros((len(parts), count), np.int32)
        for row, where, (first, second) in zip(tokens, places, parts):
            row[: len(first) + count + len(second)] = np.concatenate([first, frames, second])
            where[:] = len(first) + np.arange(count)
        return tokens, places.reshape(len(parts), candidates, self._frame_tokens)
