"""Trains a Video-LLM on questions about videos: `python -m video.train --gin_file=gin/video/train.gin`.

`mlx_pretrain.training.trainer` trains it, with the checkpoints, restarts, meshes and metrics of pretraining. Parameters
start from random values, those of the vision tower, where `train_video.towers` is set, from contrastive training.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlx_pretrain import command_line
from mlx_pretrain.data.loader import Batch, Mixture
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID
from mlx_pretrain.data.tokenizers import Tokenizer, check_vocabulary
from mlx_pretrain.files import sha256
from mlx_pretrain.models.decoder import output_kernel
from mlx_pretrain.training import checkpoints, losses
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator, checked
from mlx_pretrain.training.train_module import TrainModule
from mlx_pretrain.training.train_state import abstract_params
from mlx_pretrain.training.train_step import LossParts
from mlx_pretrain.training.trainer import Trainer
from mlx_pretrain.training.trainer_config import TrainerConfig
from video.frame_choice.towers import TowersConfig
from video.frames.frame_store import FrameStore
from video.frames.reading import even_timestamps
from video.llm.answer_scoring import AnswerScorer
from video.llm.model import VideoLLMConfig, encode_frames, hidden_states
from video.llm.prompts import Prompts
from video.llm.training_rows import ClipSource, with_evidence
from video.questions import Question, draw_questions, read_questions


@gin.configurable("train_video")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVideoConfig(TrainerConfig):
    """Settings of the training of a Video-LLM; a sequence is a video.

    Attributes:
      model: @VideoLLMConfig().
      tokenizer: tokenizer.model, a SentencePiece model of this framework.
      frame_store: folder that `video.decode` made.
      questions: files of questions to learn from, see `video.questions`.
      validation: file of questions about other videos.
      frames: frames of each video in a batch.
      questions_per_video: questions about each video in a batch, each with a random subset of the frames.
      evidence_prob: probability that such a subset contains the evidence of its question.
      length: tokens of a sequence: question, frames and answer.
      eval_frames: frames, evenly spread, that validation questions are answered with.
      eval_questions: validation questions to use, drawn at random from the file; None: all.
      towers: run of `video.train_towers` with the same vision tower, whose weights the tower starts from; None: random
        values.
    """

    name: ClassVar[str] = "train_video"
    module: ClassVar[str] = "video.train"

    model: VideoLLMConfig = gin.REQUIRED
    tokenizer: str = gin.REQUIRED
    frame_store: str = gin.REQUIRED
    questions: Sequence[str] = gin.REQUIRED
    validation: str = gin.REQUIRED
    frames: int = 8
    questions_per_video: int = 4
    evidence_prob: float = 0.5
    length: int = 64
    eval_frames: int = 4
    eval_questions: int | None = 200
    towers: str | None = None

    def __post_init__(self):
        super().__post_init__()
        optional = [] if self.eval_questions is None else ["eval_questions"]
        if isinstance(self.questions, str):
            raise self.config_error("questions", "must be a list of files")
        self.check_counts("frames", "questions_per_video", "length", "eval_frames", *optional)
        if not isinstance(self.model, VideoLLMConfig):
            raise self.config_error("model", "must be a model, e.g. @VideoLLMConfig()")
        if not 0 <= self.evidence_prob <= 1:
            raise self.config_error("evidence_prob", "must be a probability, 0 to 1")


class VideoTraining(TrainModule):
    """Trains a Video-LLM on questions."""

    def __init__(self, config: TrainVideoConfig):
        """Opens and checks all inputs without writing a file.

        Raises:
          InputError: frames, questions, tokenizer and model do not fit each other, or a file is damaged.
        """
        self._config, self.model, self.tokenizer_path = config, config.model, config.tokenizer
        self._tokenizer = Tokenizer(config.tokenizer)
        decoder = config.model.decoder
        check_vocabulary(config.tokenizer, self._tokenizer, decoder.vocab_size)
        if config.length > decoder.max_length:
            raise config.config_error("length", f"the decoder has max_length={decoder.max_length}")
        self._store = FrameStore(config.frame_store)
        self._store.check_size(config.model.vision.image_size)
        self._questions = [question for path in config.questions for question in read_questions(path)]
        self._validation = read_questions(config.validation)
        self._prompts = Prompts(config.model, (BOS_ID,), EOS_ID, self._tokenizer.encode_batch)
        videos = {question.video for question in self._questions if question.video not in self._store.rejected}
        data = [*(sha256(path) for path in config.questions), self._store.fingerprint()]
        self.mixture = Mixture.of_one("videos", len(videos), " ".join(data), config.seed, config.batch_size)
        self.source(self.mixture, np.arange(1))  # checks lengths and frames
        if config.towers is not None and (different := checkpoints.different_field(
                checkpoints.load_model(config.towers, TowersConfig).vision, config.model.vision)):
            name, old, new = different
            raise config.config_error("towers", f"the vision tower of {config.towers} has {name}={old}, this one {new}")
        size, per_row = self._store.size, config.questions_per_video
        self.batch_row = {
            "frames": jax.ShapeDtypeStruct((config.frames, size, size, 3), np.uint8),
            "times": jax.ShapeDtypeStruct((config.frames,), np.float32),
            "tokens": jax.ShapeDtypeStruct((per_row, config.length + 1), np.int32),
            "answers": jax.ShapeDtypeStruct((per_row, 2), np.int32),
        }
        self.tokens_per_sequence = per_row * config.length
        vision = 3 * config.frames * config.model.vision.flops_per_image() / self.tokens_per_sequence
        self.flops_per_token = decoder.flops_per_token(config.length) + vision

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        rows, per_row, _ = batch["tokens"].shape
        features = encode_frames(self.model, params, batch["frames"], batch["times"])
        features = features.reshape(rows, -1, features.shape[-1])
        features = jnp.repeat(features, per_row, axis=0)
        tokens = batch["tokens"].reshape(rows * per_row, -1)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        first, stop = jnp.split(batch["answers"].reshape(-1, 2), 2, axis=1)
        indices = jnp.arange(1, tokens.shape[1])
        weights = ((indices >= first) & (indices < stop)).astype(jnp.float32)
        # Frames, whose ids are beyond the vocabulary, are never predicted.
        targets = jnp.where(weights > 0, targets, 0)
        hidden = hidden_states(self.model, params, features, inputs)
        total, sums = losses.cross_entropy(hidden, output_kernel(params["decoder"]), targets, weights)
        return total, LossParts(sums.weight, {"loss": (sums.nll, sums.weight)})

    def source(self, mixture: Mixture, rows: np.ndarray) -> ClipSource:
        config = self._config
        return ClipSource(self._store, self._questions, self._prompts, frames=config.frames,
                          questions_per_row=config.questions_per_video, evidence_prob=config.evidence_prob,
                          length=config.length, mixture=mixture, rows=rows)

    def tokens(self, batch: Batch) -> collections.Counter[str]:
        return collections.Counter({"answers": int((batch["answers"][..., 1] - batch["answers"][..., 0]).sum())})

    def evaluators(self, mesh: Mesh) -> list[Evaluator]:
        config = self._config
        usable = [question for question in self._validation if question.video not in self._store.rejected]
        questions = draw_questions(usable, config.eval_questions)
        evaluate = QuestionEvaluator(self.model, mesh, self._store, self._prompts, questions, config.eval_frames)
        return [Evaluator(HELD_OUT, config.eval_every, evaluate, self._format_metrics)]

    def _format_metrics(self, metrics: Mapping[str, float]) -> str:
        accuracy = f", accuracy {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        clips = (f"; {metrics['informed_accuracy']:.1%} with the frames that matter"
                 if "informed_accuracy" in metrics else "")
        return f"validation loss {metrics['loss']:.4f}{accuracy} with {self._config.eval_frames} even frames{clips}"

    def initial_params(self, mesh: Mesh) -> Any | None:
        if self._config.towers is None:
            return None
        towers = checkpoints.load_model(self._config.towers, TowersConfig)
        trained, _ = checkpoints.restore_params(self._config.towers, abstract_params(towers, mesh))
        drawn = jax.tree.map(lambda _: None, abstract_params(self.model, mesh))
        return {**drawn, "frames": {**drawn["frames"], "vision": trained["frames"]["vision"]}}

    def describe_data(self) -> str:
        config = self._config
        return (f"{len(self._questions):,} questions on {self.mixture.rows['videos']:,} videos, "
                f"{config.batch_size} x {config.frames} frames and "
                f"{config.batch_size * config.questions_per_video} questions a step")

    def metadata(self) -> dict[str, Any]:
        config = self._config
        return {
            "questions": [{"path": str(path), "sha256": sha256(path)} for path in config.questions],
            "validation": {"path": str(config.validation), "sha256": sha256(config.validation)},
            "frame_store": str(config.frame_store),
            "towers": config.towers,
            "tokenizer_sha256": self._tokenizer.sha256,
        }


class QuestionEvaluator:
    """Answers validation questions with evenly spread frames and, where evidence is known, with frames of it."""

    def __init__(self, model, mesh, store: FrameStore, prompts: Prompts, questions: list[Question], frames: int):
        self._scorer: AnswerScorer | None = None
        self._make_scorer = lambda params: AnswerScorer(model, params, mesh, prompts)
        self._store, self._questions = store, questions
        rows = [store.row(question.video) for question in questions]
        self._even, self._informed = [], []
        for question, row in zip(questions, rows):
            times = store.times[row]
            even = np.unique([np.argmin(np.abs(times - t)) for t in even_timestamps(store.durations[row], frames)])
            self._even.append(even)
            self._informed.append(with_evidence(question, times, even, frames))
        self._has_evidence = any(question.evidence for question in questions)

    def _features(self, video: str) -> jax.Array:
        return self._scorer.features(*self._store.video(video))

    def __call__(self, params: Any, check: Callable[[], None]) -> dict[str, float]:
        if self._scorer is None:
            self._scorer = self._make_scorer(params)
        self._scorer.update(params)
        metrics = {}
        for name, choice in {"": self._even, "informed_": self._informed if self._has_evidence else None}.items():
            if choice is None:
                continue
            choices = [[frames] for frames in choice]
            answers = list(checked(self._scorer(self._features, self._questions, choices), check))
            metrics[f"{name}loss"] = float(np.mean([answer.losses[0] for answer in answers]))
            right = {}
            for question, answer in zip(self._questions, answers):
                if question.options:
                    right.setdefault(question.type, []).append(answer.right[0])
            if right:
                metrics[f"{name}accuracy"] = float(np.mean(np.concatenate(list(right.values()))))
                metrics |= {f"{name}accuracy/{question_type}": float(np.mean(x))
                            for question_type, x in sorted(right.items()) if question_type}
        return metrics


def train(config: TrainVideoConfig) -> dict[str, float]:
    """Trains a Video-LLM on questions about videos.

    Returns and raises what `Trainer.run` does.
    """
    return Trainer(config, VideoTraining(config)).run()


if __name__ == "__main__":
    command_line.run(train, TrainVideoConfig, "video.train", joins=True)
