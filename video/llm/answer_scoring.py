"""A Video-LLM's losses on answers, and what it answers, given combinations of a video's frames.

Every frame is encoded once. The combinations of a question are sequences that begin alike: `inference.scoring`
computes the question and each beginning of a combination once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.scoring import Request, Scorer
from mlx_pretrain.parallel import partitioning
from video.llm.model import VideoLLMConfig, encode_frames
from video.llm.prompts import Prompts
from video.questions import Question


class Answers(NamedTuple):
    """Of one question, for each combination of frames.

    Attributes:
      losses: float32 `[combinations]`, mean negative log-likelihood of a token of the right answer, its end included,
        nats.
      right: bool `[combinations]`, whether the right option is the most likely one; all False without options.
    """

    losses: np.ndarray
    right: np.ndarray


class AnswerScorer:
    """Scores answers. `features` encodes the frames of a video."""

    def __init__(self, config: VideoLLMConfig, params: Any, mesh: Mesh, prompts: Prompts, **settings: Any):
        """`params`: of the Video-LLM, on `mesh`; `settings`: of `Scorer`."""
        self.config, self._params, self._mesh, self.prompts = config, params, mesh, prompts
        self.scorer = Scorer(config.decoder, params["decoder"], mesh, **settings)
        self._encode = jax.jit(functools.partial(encode_frames, config), out_shardings=partitioning.replicated(mesh))
        self._shards = partitioning.shards(mesh, "batch")

    def update(self, params: Any) -> None:
        """Goes on with other parameters, laid out as the first ones."""
        self._params = params
        self.scorer.update(params["decoder"])

    def features(self, frames: np.ndarray) -> jax.Array:
        """Embeddings `[frames, frame_tokens, embed]` of frames uint8 `[frames, size, size, 3]`."""
        count = len(frames)
        padding = -count % self._shards
        if padding:
            frames = np.concatenate([frames, np.zeros((padding, *frames.shape[1:]), frames.dtype)])
        with partitioning.use(self._mesh):
            given = partitioning.put(frames, partitioning.batch_sharding(self._mesh))
            return self._encode(self._params, given)[:count]

    def __call__(
        self,
        features: Callable[[str], np.ndarray | jax.Array],
        questions: Sequence[Question],
        combinations: Iterable[Sequence[Sequence[int]]],
        options: bool = True,
    ) -> Iterator[Answers]:
        """Answers of questions, in order.

        Args:
          features: video -> embeddings of its frames, `[frames, frame_tokens, embed]`; asked for once for the questions
            on one video that follow each other.
          questions: to answer.
          combinations: for each question, combinations of its video's frames, each ascending.
          options: whether to score the options too.

        Raises:
          InputError: a question that is too long for the model.
        """
        words = self.prompts.words([question.question for question in questions])
        texts = [question.options if options and question.options else (question.answer,) for question in questions]
        flat = iter(self.prompts.answers([text for some in texts for text in some]))
        answers = [[next(flat) for _ in some] for some in texts]
        longest = self.config.decoder.max_length

        def windows():
            video, found = None, None
            for number, (question, chosen) in enumerate(zip(questions, combinations)):
                if question.video != video:
                    video, found = question.video, features(question.video)
                requests = [Request(self.prompts.context(words[number], places), answer)
                            for places in chosen for answer in answers[number]]
                length = max((len(request.context) + len(request.continuation) - 1 for request in requests), default=0)
                if length > longest:
                    raise InputError(f"question {question.id}: {length} tokens with its frames, the decoder has "
                                     f"max_length={longest}")
                yield number, requests, found.reshape(-1, found.shape[-1])

        for number, scores in self.scorer(windows()):
            question = questions[number]
            table = np.array([score.log_likelihood for score in scores]).reshape(-1, len(answers[number]))
            right = texts[number].index(question.answer)
            yield Answers((-table[:, right] / len(answers[number][right])).astype(np.float32),
                          (table.argmax(axis=1) == right) & (len(texts[number]) > 1))
