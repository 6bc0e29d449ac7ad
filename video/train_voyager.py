"""Trains Frame-Voyager on stored losses: `python -m video.train_voyager --gin_file=gin/video/train_voyager.gin`.

`mlx_pretrain.training.trainer` trains it, on the two stores that `video.label` made. The Video-LLM gives the parameters
to start from, and is not needed otherwise.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain import command_line
from mlx_pretrain.data.loader import Batch, Mixture, MixtureSource
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator
from mlx_pretrain.training.train_module import TrainModule
from mlx_pretrain.training.train_state import abstract_params
from mlx_pretrain.training.train_step import LossParts
from mlx_pretrain.training.trainer import Trainer
from mlx_pretrain.training.trainer_config import TrainerConfig
from video.frame_choice.scorers import Similarity
from video.frames.frame_store import FrameStore
from video.llm.loading import load_video_llm
from video.llm.prompts import QuestionWords
from video.questions import by_video
from video.voyager.frame_voyager import (
    OBJECTIVES,
    VoyagerConfig,
    bottom_layers,
    combination_rewards,
    ranking_loss,
    rewards,
)
from video.voyager.loss_labels import Labels, combination_sizes, read_labels
from video.voyager.ranking_metrics import ranking_metrics


@gin.configurable("train_voyager")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVoyagerConfig(TrainerConfig):
    """Settings of the training of Frame-Voyager; a sequence is a question.

    Attributes:
      labels: folder that `video.label` made.
      questions: file of `video.questions` that was labelled.
      validation: folder of labels for other videos, from the same Video-LLM.
      validation_questions: file of `video.questions` that was labelled there.
      video_llm: the Video-LLM whose bottom layers are reused.
      layers: number of these layers.
      frame_tokens: tokens of a frame, 1 or, for None, as many as the labels store, see `video.label`.
      head_dim, frame_layers, frame_heads, rank: see `VoyagerConfig`.
      towers: run of `video.train_towers`: makes a hybrid, which also reads the similarity of frame and question in
        their space; None: Frame-Voyager.
      frame_store: folder of the frames that were labelled, of use for a hybrid alone.
      objective, temperature: see `ranking_loss`.
      strides: in training, one of these is drawn for each question, and only every so many candidates see each other,
        so that rewards are learnt for several M from labels of one.
      combinations: combinations of a question in a batch, drawn from those that were labelled; None: all.
      max_mean_loss: greatest mean loss of a question in training, see `read_labels`; None: any.
      min_deviation: least standard deviation of a question's losses in training, see `read_labels`; None: any.
      eval_batch_size: questions per evaluation step.
    """

    name: ClassVar[str] = "train_voyager"
    module: ClassVar[str] = "video.train_voyager"

    labels: str = gin.REQUIRED
    questions: str = gin.REQUIRED
    validation: str = gin.REQUIRED
    validation_questions: str = gin.REQUIRED
    video_llm: str = gin.REQUIRED
    layers: int = 2
    frame_tokens: int | None = 1
    head_dim: int = 128
    frame_layers: int = 2
    frame_heads: int = 4
    rank: int = 16
    towers: str | None = None
    frame_store: str | None = None
    objective: str = "pairs"
    temperature: float = 0.1
    strides: Sequence[int] = (1, 2)
    combinations: int | None = 64
    max_mean_loss: float | None = None
    min_deviation: float | None = None
    eval_batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        optional = [name for name in ("combinations", "frame_tokens") if getattr(self, name) is not None]
        self.check_counts("layers", "head_dim", "eval_batch_size", *optional)
        if self.objective not in OBJECTIVES:
            raise self.config_error("objective", f"must be one of {', '.join(OBJECTIVES)}")
        if not self.strides or any(not isinstance(n, int) or n < 1 for n in self.strides):
            raise self.config_error("strides", "must be a list of positive integers")
        if (self.towers is None) != (self.frame_store is None):
            raise self.config_error("towers", "needs frame_store, and frame_store needs towers")
        if not self.temperature > 0:
            raise self.config_error("temperature", "must be above 0 nats")


class VoyagerTraining(TrainModule):
    """Trains Frame-Voyager on stored losses."""

    def __init__(self, config: TrainVoyagerConfig):
        """Reads all losses and features without writing a file.

        Raises:
          InputError: losses, questions and Video-LLM do not fit each other, or a file is damaged.
        """
        self._config = config
        mesh = partitioning.make_mesh(devices=jax.local_devices()[:1])
        llm = load_video_llm(config.video_llm, mesh, layers=config.layers, frames=False)
        self._train = read_labels(config.labels, config.questions, config.max_mean_loss, config.min_deviation)
        self._validation = read_labels(config.validation, config.validation_questions)
        data = f"{sha256(config.questions)} {hashlib.sha256(self._train.losses.tobytes()).hexdigest()}"
        self.mixture = Mixture.of_one("questions", len(self._train), data, config.seed, config.batch_size)
        fingerprint = llm.fingerprint()
        for labels in (self._train, self._validation):
            if labels.settings["model"] != fingerprint:
                raise InputError(f"{labels.path}: losses of another Video-LLM than {config.video_llm}")
        candidates, stored_tokens, _ = self._train.features.shape
        tokens = config.frame_tokens or stored_tokens
        for labels in (self._train, self._validation):
            if tokens not in (1, labels.features.shape[1]):
                raise config.config_error("frame_tokens", f"must be 1 or the {labels.features.shape[1]} that "
                                          f"{labels.path} stores of a frame")
        decoder, params = bottom_layers(llm.config, llm.params, config.layers)
        self._bottom = jax.device_get(params)
        self.model = VoyagerConfig(decoder, tokens, config.head_dim, config.frame_layers, config.frame_heads,
                                   config.rank, config.towers is not None)
        self.tokenizer_path = llm.tokenizer_path
        similarity = None if config.towers is None else Similarity(config.towers)
        self._similarity = similarity and similarity.settings
        self._train_inputs, self._validation_inputs = (
            QuestionInputs(labels, QuestionWords(self.model.prompt, llm.language_model, [
                question.question for question in labels.questions]), similarity, config.frame_store)
            for labels in (self._train, self._validation))
        self._row_combinations = min(config.combinations or self._train.losses.shape[1], self._train.losses.shape[1])
        words = self._train_inputs.words.length
        if (longest := max(words, self._validation_inputs.words.length) + tokens) > decoder.max_length:
            raise InputError(f"{config.labels}: {longest} tokens of a question and a frame, the decoder has "
                             f"max_length={decoder.max_length}")
        self.batch_row = {
            **{name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
               for name, x in self._train_inputs[np.arange(1)].items()},
            "combinations": jax.ShapeDtypeStruct((self._row_combinations, self._train.combinations.shape[2]), np.int32),
            "losses": jax.ShapeDtypeStruct((self._row_combinations,), np.float32),
        }
        self.tokens_per_sequence = words + candidates * tokens

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        frame_rewards = rewards(self.model, params, *(batch[name] for name in self._train_inputs.names))
        combinations = batch["combinations"]
        losses, right, usable = ranking_loss(
            combination_rewards(frame_rewards, combinations), batch["losses"],
            (combinations < frame_rewards.values.shape[1]).sum(axis=-1), self._config.objective,
            self._config.temperature)
        total, weight = (losses * usable).sum(), usable.sum()
        means = {"loss": (total, weight), "ranking_accuracy": ((right * usable).sum(), weight)}
        return total, LossParts(weight, means)

    def source(self, mixture: Mixture, rows: np.ndarray) -> "LabelSource":
        return LabelSource(self._train_inputs, self._row_combinations, self._config.strides, mixture, rows)

    def tokens(self, batch: Batch) -> collections.Counter[str]:
        return collections.Counter({"questions": len(batch["losses"])})

    def evaluators(self, mesh: Mesh) -> list[Evaluator]:
        predict = RewardPredictor(self.model, mesh, self._config.eval_batch_size)

        def evaluate(params: Any, check: Callable[[], None]) -> dict[str, float]:
            check()
            return ranking_metrics(predict(params, self._validation_inputs), self._validation)

        return [Evaluator(HELD_OUT, self._config.eval_every, evaluate, format_ranking)]

    def initial_params(self, mesh: Mesh) -> Any:
        drawn = jax.tree.map(lambda _: None, abstract_params(self.model, mesh))
        return {**drawn, "decoder": self._bottom}

    def describe_data(self) -> str:
        labels, config, candidates = self._train, self._config, self._train.features.shape[0]
        dropped = ", ".join(f"{count:,} {name}" for name, count in labels.dropped.items() if count)
        sizes = " or ".join(map(str, np.unique(combination_sizes(labels.combinations[:1], candidates))))
        return (f"{len(labels):,} questions with {labels.losses.shape[1]:,} combinations of {sizes} out of "
                f"{candidates} frames{f' (left out: {dropped})' if dropped else ''}, "
                f"{config.batch_size} a step")

    def metadata(self) -> dict[str, Any]:
        config = self._config
        return {
            "labels": {"path": str(config.labels), **self._train.settings, "left_out": self._train.dropped},
            "validation": {"path": str(config.validation), **self._validation.settings},
            "similarity": self._similarity,
            "questions_sha256": [sha256(config.questions), sha256(config.validation_questions)],
        }


class QuestionInputs:
    """What `rewards` reads of labelled questions.

    Attributes:
      labels: the questions with their labels.
      words: the questions' words.
      names: names of the arguments of `rewards`, in order.
    """

    def __init__(self, labels: Labels, words: QuestionWords, similarity: Similarity | None = None,
                 frame_store: epath.PathLike | None = None):
        """Computes similarities with the frames of the store, for a hybrid.

        Raises:
          InputError: other frames than those of the store were labelled, or the towers take frames of another size.
        """
        self.labels, self.words = labels, words
        self.names = ["features", "words", "lengths", "times", "segments"]
        if similarity is not None:
            self.names.append("similarities")
            store = FrameStore(frame_store)
            if store.fingerprint() != labels.settings["frame_store"]:
                raise InputError(f"{frame_store}: not the frames that were labelled in {labels.path}")
            store.check_size(similarity.size)
            self._similarities = np.zeros((len(labels), labels.features.shape[0]), np.float32)
            rows = {question.id: row for row, question in enumerate(labels.questions)}
            for video, group in by_video(labels.questions).items():
                frames, times = (x[labels.settings["candidates"]] for x in store.video(video))
                for question in group:
                    self._similarities[rows[question.id]] = similarity(video, frames, times, question.question).values

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arguments for some questions, name -> `[rows, ...]`; all candidates see each other."""
        labels = self.labels
        videos, candidates = labels.video[rows], labels.features.shape[0]
        words, lengths = self.words[rows]
        inputs = {"features": labels.features.features_of(videos), "words": words, "lengths": lengths,
                  "times": labels.features.times[videos].astype(np.float32),
                  "segments": np.ones((len(rows), candidates), np.int32)}
        if "similarities" in self.names:
            inputs["similarities"] = self._similarities[rows]
        return inputs


@dataclasses.dataclass(frozen=True)
class LabelProvenance:
    """The question and the epoch that a row comes from."""

    question: str
    epoch: int


class LabelSource(MixtureSource):
    """Batches of questions with some of their labels."""

    def __init__(self, inputs: QuestionInputs, combinations: int, strides: Sequence[int], mixture: Mixture,
                 rows: np.ndarray | None = None):
        """Opens the source; `combinations` counts those of a row. See `MixtureSource` for the rest."""
        self._inputs, self._row_combinations, self._strides = inputs, combinations, strides
        super().__init__(mixture, rows)

    def __getitem__(self, batch: int) -> Batch:
        """Returns this host's rows of a batch, see `VoyagerTraining.batch_row`."""
        labels = self._inputs.labels
        _, rows, epochs = self.sampler.locate(batch, self.rows)
        drawn, segments = [], []
        for row, epoch in zip(rows, epochs):
            rng = np.random.default_rng([self.mixture.seed, int(row), int(epoch)])
            drawn.append(rng.permutation(labels.losses.shape[1])[: self._row_combinations])
            segments.append(np.arange(labels.features.shape[0], dtype=np.int32) % rng.choice(self._strides) + 1)
        drawn = np.stack(drawn)
        return {
            **self._inputs[rows],
            "segments": np.stack(segments).astype(np.int32),
            "combinations": np.take_along_axis(labels.combinations[rows], drawn[..., None], 1).astype(np.int32),
            "losses": np.take_along_axis(labels.losses[rows], drawn, 1),
        }

    def provenance(self, batch: int) -> list[LabelProvenance]:
        """Returns where every row of the global batch comes from, for error reports."""
        _, rows, epochs = self.sampler.locate(batch)
        return [LabelProvenance(self._inputs.labels.questions[row].id, int(epoch)) for row, epoch in zip(rows, epochs)]


class RewardPredictor:
    """Computes the rewards of the labelled combinations of many questions, a batch at a time."""

    def __init__(self, config: VoyagerConfig, mesh: Mesh, batch_size: int):
        """Stores the model; `batch_size` counts questions, over all devices."""
        self._batch_size = batch_size
        self._sharding = partitioning.batch_sharding(mesh)
        self._step = jax.jit(
            lambda params, combinations, *inputs: combination_rewards(rewards(config, params, *inputs), combinations),
            out_shardings=partitioning.replicated(mesh))

    def __call__(self, params: Any, questions: QuestionInputs) -> np.ndarray:
        """Returns rewards of combinations, float32 `[questions, combinations]`."""
        labels = questions.labels
        batches = []
        for start in range(0, len(labels), self._batch_size):
            # The last batch repeats a question to keep its shape.
            rows = np.minimum(np.arange(start, start + self._batch_size), len(labels) - 1)
            inputs = questions[rows]
            arrays = labels.combinations[rows].astype(np.int32), *(inputs[name] for name in questions.names)
            batches.append(self._step(params, *(partitioning.put(x, self._sharding) for x in arrays)))
        return np.concatenate(jax.device_get(batches))[: len(labels)]


def format_ranking(metrics: Mapping[str, float]) -> str:
    """Returns the scalars of `ranking` in a few words."""
    return (f"validation loss {metrics['loss']:.4f}, pairs in order {metrics['ranking_accuracy']:.1%}, "
            f"Kendall {metrics['kendall']:.3f}, loss above the best {metrics['regret']:.3f} "
            f"(at random {metrics['random_regret']:.3f})")


def train(config: TrainVoyagerConfig) -> dict[str, float]:
    """Trains Frame-Voyager on stored losses.

    Returns and raises what `Trainer.run` does.
    """
    return Trainer(config, VoyagerTraining(config)).run()


if __name__ == "__main__":
    command_line.run(train, TrainVoyagerConfig, "video.train_voyager", joins=True)
