"""A Video-LLM's losses on answers, and what it answers, given combinations of a video's frames.

Every frame is encoded once. The combinations of a question are sequences that begin alike: `inference.scoring`
computes the question and each beginning of a combination once.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlx_pretrain import partitioning
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.scoring import Request, Scorer
from video.decode import FrameStore
from video.model import VideoLLMConfig, encode_frames
from video.prompts import Prompts
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


class Answering:
    """Scores answers. `features` encodes the frames of a video."""

    def __init__(self, config: VideoLLMConfig, params: Any, mesh: Mesh, prompts: Prompts, **settings: Any):
        """`params`: of the Video-LLM, on `mesh`; `settings`: of `Scorer`."""
        self.config, self._params, self._mesh, self.prompts = config, params, mesh, prompts
        self.scorer = Scorer(config.decoder, params["decoder"], mesh, **settings)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._encode = jax.jit(functools.partial(encode_frames, config), out_shardings=everywhere)
        self._shards = int(np.prod([mesh.shape[axis] for axis in partitioning.BATCH_AXES]))

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
            given = jax.device_put(frames, partitioning.batch_sharding(self._mesh))
            return self._encode(self._params, given)[:count]

    def __call__(
        self,
        store: FrameStore,
        questions: Sequence[Question],
        combinations: Iterable[Sequence[Sequence[int]]],
        options: bool = True,
    ) -> Iterator[Answers]:
        """Answers of questions, in order.

        Args:
          store: frames of their videos.
          questions: those of one video together are computed faster.
          combinations: for each question, combinations of its video's frames, each ascending.
          options: whether to score the options too.

        Raises:
          InputError: a question that is too long for the model.
        """
        words = self.prompts.words([question.question for question in questions])
        texts = [[question.answer, *(question.options if options else ())] for question in questions]
        flat = iter(self.prompts.answers([text for some in texts for text in some]))
        answers = [[next(flat) for _ in some] for some in texts]

        def windows():
            video, features = None, None
            for number, (question, chosen) in enumerate(zip(questions, combinations)):
                if question.video != video:
                    video = question.video
                    found = self.features(store.frames([store.row(video)])[0])
                    features = found.reshape(-1, found.shape[-1])
                requests = [Request(self.prompts.context(words[number], places), answer)
                            for places in chosen for answer in self._distinct(questions[number], answers[number])]
                longest = max((len(r.context) + len(r.continuation) - 1 for r in requests), default=0)
                if longest > self.config.decoder.max_length:
                    raise InputError(f"question {question.id}: {longest} tokens with its frames, the decoder has "
                                     f"max_length={self.config.decoder.max_length}")
                yield number, requests, features

        for number, scores in self.scorer(windows()):
            question, of_answers = questions[number], self._distinct(questions[number], answers[number])
            table = np.array([score.log_likelihood for score in scores]).reshape(-1, len(of_answers))
            right = question.options.index(question.answer) if options and question.options else 0
            lengths = np.array([len(answer) for answer in of_answers])
            best = table.argmax(axis=1) == right if options and question.options else np.zeros(len(table), bool)
            yield Answers((-table[:, right] / lengths[right]).astype(np.float32), best)

    @staticmethod
    def _distinct(question: Question, answers: list[np.ndarray]) -> list[np.ndarray]:
        """The options where they are scored, else the answer."""
        return answers[1:] or answers[:1]
