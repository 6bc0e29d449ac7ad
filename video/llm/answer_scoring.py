"""Computes a Video-LLM's losses on answers, and its own answers, given combinations of a video's frames.

Every frame is encoded once. The combinations of a question are sequences that begin alike, and
`mlx_pretrain.inference.scoring` computes the question and each beginning of a combination once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from jax.sharding import Mesh

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.scoring import Request, Scorer
from mlx_pretrain.parallel import partitioning
from video.llm.model import VideoLLMConfig, encode_frames, with_newline
from video.llm.prompts import Prompts
from video.questions import Question


class Answers(NamedTuple):
    """Losses and answers on one question, for each combination of frames.

    Attributes:
      losses: float32 `[combinations]`, mean negative log-likelihood of the right answer's tokens, its end included,
        nats.
      right: bool `[combinations]`, True where the right option is the most likely one; all False without options.
      option_losses: float32 `[combinations]`, negative logarithm of the right option's share of the options'
        likelihoods, nats; all 0 without options.
    """

    losses: np.ndarray
    right: np.ndarray
    option_losses: np.ndarray


class AnswerScorer:
    """Scores answers to questions on videos.

        scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
        features = scorer.features(frames, times)                   # uint8 [16, size, size, 3] of one video, seconds
        combinations_of_each = [[(0, 5), (3, 9)]] * len(questions)  # two combinations for every question
        for answers in scorer(lambda video: features, questions, combinations_of_each):
            answers.losses, answers.right                           # [2] each
    """

    def __init__(self, config: VideoLLMConfig, params: Any, mesh: Mesh, prompts: Prompts, **settings: Any):
        """Stores the settings; programs are compiled when they are first needed.

        Args:
          config, params: the Video-LLM, on the devices of `mesh`.
          mesh: frames and sequences are sharded over its data axes.
          prompts: see `VideoLLM.prompts`.
          settings: see `Scorer`.
        """
        self.config, self._params, self._mesh, self.prompts = config, params, mesh, prompts
        self.scorer = Scorer(config.decoder, params["decoder"], mesh, **settings)
        self._encode = jax.jit(functools.partial(encode_frames, config), out_shardings=partitioning.replicated(mesh))
        self._shards = partitioning.shards(mesh, "batch")

    def update(self, params: Any) -> None:
        """Replaces the parameters by others of the same layout."""
        self._params = params
        self.scorer.update(params["decoder"])

    def features(self, frames: np.ndarray, times: np.ndarray) -> jax.Array:
        """Encodes frames uint8 `[frames, size, size, 3]` with their times as `[frames, frame_tokens, embed]`."""
        count = len(frames)
        padded = np.minimum(np.arange(count + -count % self._shards), count - 1)
        sharding = partitioning.batch_sharding(self._mesh)
        with partitioning.use(self._mesh):
            arrays = (partitioning.put(x[padded], sharding) for x in (frames, np.asarray(times, np.float32)))
            return self._encode(self._params, *arrays)[:count]

    def __call__(
        self,
        features: Callable[[str], np.ndarray | jax.Array],
        questions: Sequence[Question],
        combinations: Iterable[Sequence[Sequence[int]]],
        options: bool = True,
    ) -> Iterator[Answers]:
        """Yields the answers to the questions, in order.

        Args:
          features: video -> embeddings of its frames, `[frames, frame_tokens, embed]`; called once for successive
            questions on the same video.
          questions: questions to answer.
          combinations: for each question, combinations of its video's frames, each ascending.
          options: True to score all options, False for the right answer alone.

        Raises:
          InputError: a question is too long for the model.
        """
        words = self.prompts.words([question.question for question in questions])
        texts = [question.options if options and question.options else (question.answer,) for question in questions]
        flat = iter(self.prompts.answers([text for some in texts for text in some]))
        answers = [[next(flat) for _ in some] for some in texts]
        max_length = self.config.decoder.max_length

        def windows():
            video, embeddings = None, None
            for number, (question, question_combinations) in enumerate(zip(questions, combinations)):
                if question.video != video:
                    video, embeddings = question.video, features(question.video)
                requests = [Request(self.prompts.context(words[number], indices), answer)
                            for indices in question_combinations for answer in answers[number]]
                length = max((len(request.context) + len(request.continuation) - 1 for request in requests), default=0)
                if length > max_length:
                    raise InputError(f"question {question.id}: {length} tokens with its frames, the decoder has "
                                     f"max_length={max_length}")
                rows = embeddings.reshape(1, -1, embeddings.shape[-1])
                yield number, requests, with_newline(self.config, self._params, rows)[0]

        for number, scores in self.scorer(windows()):
            question = questions[number]
            table = np.array([score.log_likelihood for score in scores]).reshape(-1, len(answers[number]))
            right = texts[number].index(question.answer)
            own = table[:, right]
            total = scipy.special.logsumexp(table, axis=1)
            yield Answers((-own / len(answers[number][right])).astype(np.float32),
                          (table.argmax(axis=1) == right) & (len(texts[number]) > 1), (total - own).astype(np.float32))
