"""Trains frame and text towers on captions: `python -m video.train_towers --gin_file=gin/video/train_towers.gin`.

`mlx_pretrain.training.trainer` trains them. A pair is a frame of a captioned part of a video and the caption. Where
captions are few, a random part of the caption's words is mixed with words of questions, so that the text tower learns
which words matter.
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
from mlx_pretrain.data.loader import Batch, Mixture, MixtureSource
from mlx_pretrain.data.token_store import PAD_ID
from mlx_pretrain.data.tokenizers import Tokenizer, check_vocabulary
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator
from mlx_pretrain.training.train_module import TrainModule
from mlx_pretrain.training.train_step import LossParts
from mlx_pretrain.training.trainer import Trainer
from mlx_pretrain.training.trainer_config import TrainerConfig
from video.frame_choice.towers import TowersConfig, embed_frames, embed_texts, sigmoid_loss
from video.frames.frame_store import FrameStore
from video.llm.training_rows import ClipProvenance, evidence_frames
from video.questions import Question, read_questions


@gin.configurable("train_towers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTowersConfig(TrainerConfig):
    """Settings of the training of towers; a sequence is a pair.

    Attributes:
      model: @TowersConfig().
      tokenizer: tokenizer.model, a SentencePiece model of this framework.
      frame_store: folder that `video.decode` made.
      captions: file of `video.questions` with clips; the answers are the captions.
      validation: file of captions of other videos.
      questions: file of `video.questions` whose words, but for those of captions, are mixed with the captions'; None:
        captions are used unchanged.
    """

    name: ClassVar[str] = "train_towers"
    module: ClassVar[str] = "video.train_towers"

    model: TowersConfig = gin.REQUIRED
    tokenizer: str = gin.REQUIRED
    frame_store: str = gin.REQUIRED
    captions: str = gin.REQUIRED
    validation: str = gin.REQUIRED
    questions: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.model, TowersConfig):
            raise self.config_error("model", "must be a model, e.g. @TowersConfig()")


class TowersTraining(TrainModule):
    """Trains towers on captions."""

    def __init__(self, config: TrainTowersConfig):
        """Opens and checks all inputs without writing a file.

        Raises:
          InputError: frames, captions, tokenizer and model do not fit each other, or a file is damaged.
        """
        self._config, self.model, self.tokenizer_path = config, config.model, config.tokenizer
        self._tokenizer = Tokenizer(config.tokenizer)
        check_vocabulary(config.tokenizer, self._tokenizer, config.model.vocab_size)
        self._store = FrameStore(config.frame_store)
        self._store.check_size(config.model.vision.image_size)
        self._captions, self._validation = (
            [caption for caption in read_questions(path) if caption.clip and caption.video in self._store]
            for path in (config.captions, config.validation))
        for path, captions in ((config.captions, self._captions), (config.validation, self._validation)):
            if not captions:
                raise InputError(f"{path}: no captions: answers with a clip, of a video in {config.frame_store}")
        data = f"{sha256(config.captions)} {self._store.fingerprint()}"
        self.mixture = Mixture.of_one("captions", len(self._captions), data, config.seed, config.batch_size)
        caption_words = {word for caption in self._captions for word in caption.answer.split()}
        questions = read_questions(config.questions) if config.questions else []
        self._other_words = sorted({word for question in questions for word in question.question.split()}
                                   - caption_words)
        size, length = self._store.size, config.model.max_length
        self.batch_row = {
            "frame": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "tokens": jax.ShapeDtypeStruct((length,), np.int32),
            "caption": jax.ShapeDtypeStruct((), np.int32),
        }
        self.tokens_per_sequence = length
        self.flops_per_token = 3 * config.model.vision.flops_per_image() / length  # of the vision tower

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        frames = embed_frames(self.model, params, batch["frame"])
        texts = embed_texts(self.model, params, batch["tokens"])
        same = batch["caption"][:, None] == batch["caption"][None]
        loss, weight = sigmoid_loss(params, frames, texts, same), jnp.float32(len(frames))
        right = jnp.take_along_axis(same, jnp.argmax(frames @ texts.T, axis=1)[:, None], axis=1).mean()
        return loss * weight, LossParts(weight, {"loss": (loss * weight, weight),
                                                 "retrieval_accuracy": (right * weight, weight)})

    def source(self, mixture: Mixture, rows: np.ndarray) -> "CaptionSource":
        return CaptionSource(self._store, self._captions, self._tokenizer, self._other_words, self.model.max_length,
                             mixture, rows)

    def tokens(self, batch: Batch) -> collections.Counter[str]:
        return collections.Counter({"captions": int((batch["tokens"] != PAD_ID).sum())})

    def evaluators(self, mesh: Mesh) -> list[Evaluator]:
        mixture = Mixture.of_one("captions", len(self._validation), "", 0, self._config.batch_size)
        source = CaptionSource(self._store, self._validation, self._tokenizer, [], self.model.max_length, mixture)
        batches = [source[number] for number in range(max(len(self._validation) // self._config.batch_size, 1))]
        step = jax.jit(self.loss)
        sharding = partitioning.batch_sharding(mesh)

        def evaluate(params: Any, check: Callable[[], None]) -> dict[str, float]:
            parts = []
            for batch in batches:
                check()
                arrays = {name: partitioning.put(rows, sharding) for name, rows in batch.items()}
                parts.append(step(params, arrays)[1].means)
            return {name: float(np.mean([part[name][0] / part[name][1] for part in parts])) for name in parts[0]}

        return [Evaluator(HELD_OUT, self._config.eval_every, evaluate, self._format_metrics)]

    def _format_metrics(self, metrics: Mapping[str, float]) -> str:
        return (f"validation loss {metrics['loss']:.4f}, right caption of {self._config.batch_size} "
                f"{metrics['retrieval_accuracy']:.1%}")

    def describe_data(self) -> str:
        return f"{len(self._captions):,} captions, {self._config.batch_size} pairs a step"

    def metadata(self) -> dict[str, Any]:
        config = self._config
        return {
            "captions": {"path": str(config.captions), "sha256": sha256(config.captions)},
            "validation": {"path": str(config.validation), "sha256": sha256(config.validation)},
            "frame_store": str(config.frame_store),
            "tokenizer_sha256": self._tokenizer.sha256,
        }


class CaptionSource(MixtureSource):
    """Batches of pairs of a frame and a caption."""

    def __init__(self, store: FrameStore, captions: Sequence[Question], tokenizer: Tokenizer,
                 other_words: Sequence[str], length: int, mixture: Mixture, rows: np.ndarray | None = None):
        """Opens the source; `other_words` are mixed with those of captions. See `MixtureSource` for the rest."""
        self._store, self._captions, self._tokenizer = store, list(captions), tokenizer
        self._other_words, self._length = list(other_words), length
        numbers = {answer: n for n, answer in enumerate(dict.fromkeys(caption.answer for caption in captions))}
        self._numbers = [numbers[caption.answer] for caption in captions]
        super().__init__(mixture, rows)

    def __getitem__(self, batch: int) -> Batch:
        """Returns this host's rows of a batch, see `TowersTraining.batch_row`; equal captions have one number."""
        _, rows, epochs = self.sampler.locate(batch, self.rows)
        videos, indices, texts = [], [], []
        for row, epoch in zip(rows, epochs):
            caption, rng = self._captions[row], np.random.default_rng([self.mixture.seed, int(row), int(epoch)])
            video = self._store.row(caption.video)
            (inside,) = evidence_frames(dataclasses.replace(caption, evidence=()), self._store.times[video])
            videos.append(video)
            indices.append(int(rng.choice(inside)))
            texts.append(self._text(caption.answer, rng))
        frames = self._store.frames(videos)[np.arange(len(rows)), indices]
        tokens = np.full((len(rows), self._length), PAD_ID, np.int32)
        for row, ids in zip(tokens, self._tokenizer.encode_batch(texts)):
            row[: min(len(ids), self._length)] = ids[: self._length]
        return {"frame": frames, "tokens": tokens, "caption": np.array([self._numbers[row] for row in rows], np.int32)}

    def _text(self, caption: str, rng: np.random.Generator) -> str:
        words = caption.split()
        if not self._other_words:
            return caption
        kept = rng.permutation(words)[: rng.integers(1, len(words) + 1)].tolist()
        return " ".join(rng.permutation(kept + rng.choice(self._other_words, rng.integers(0, 7)).tolist()))

    def provenance(self, batch: int) -> list[ClipProvenance]:
        """Returns where every row of the global batch comes from, for error reports."""
        _, rows, epochs = self.sampler.locate(batch)
        return [ClipProvenance(self._captions[row].id, int(epoch)) for row, epoch in zip(rows, epochs)]


def train(config: TrainTowersConfig) -> dict[str, float]:
    """Trains frame and text towers on captions.

    Returns and raises what `Trainer.run` does.
    """
    return Trainer(config, TowersTraining(config)).run()


if __name__ == "__main__":
    command_line.run(train, TrainTowersConfig, "video.train_towers", joins=True)
