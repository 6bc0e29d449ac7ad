"""Questions and frames as the ids that a Video-LLM's decoder reads.

Token j of frame i of a video has the id vocab_size + i * frame_tokens + j: sequences that begin with the same question
and the same frames are equal as far as that, and `inference.scoring` finds what they share.
"""

from collections.abc import Sequence

import numpy as np

from mlx_pretrain.inference.language_model import LanguageModel
from video.model import VideoLLMConfig


class Prompts:
    """Builds sequences for a Video-LLM."""

    def __init__(self, config: VideoLLMConfig, before: Sequence[int], end: int, encode):
        """`before`: ids put before every sequence; `end`: put behind an answer; `encode`: texts -> ids of each."""
        self._config, self._before, self._end, self._encode = config, tuple(before), end, encode

    @classmethod
    def of(cls, config: VideoLLMConfig, model: LanguageModel) -> "Prompts":
        """Those of a Video-LLM with this language model's tokenizer."""
        return cls(config, model.before, model.end, model.tokenizer.encode_batch)

    def words(self, questions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What stands before and behind the frames: int32 `[tokens]` each, for every question."""
        texts = [self._config.prompt.replace("{question}", question).split("{frames}") for question in questions]
        ids = self._encode([text for pair in texts for text in pair])
        ids = [np.asarray(x, np.int32) for x in ids]
        return [(np.concatenate([self._before, first]).astype(np.int32), second)
                for first, second in zip(ids[::2], ids[1::2])]

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
