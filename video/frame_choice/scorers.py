"""Scores candidate frames for a question: by Frame-Voyager's rewards, or by the similarity of frame and question."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import gin
import jax
import numpy as np
import safetensors
from etils import epath

from mlx_pretrain.data.token_store import PAD_ID, TOKENIZER
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256
from mlx_pretrain.inference.language_model import fingerprint
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_params
from video.frame_choice.scores import Scores
from video.frame_choice.towers import TowersConfig, embed_frames, embed_texts
from video.llm.loading import load_video_llm
from video.llm.model import encode_frames
from video.llm.prompts import QuestionWords
from video.voyager.frame_voyager import VoyagerConfig, rewards


class Scorer(Protocol):
    """Scores the candidate frames of a video for a question.

    Attributes:
      size: pixels of a side of the frames it takes.
      resize_mode: see `read_frames`.
      settings: JSON that identifies the scorer, for the record of a selection.
    """

    size: int
    resize_mode: str
    settings: Any

    def __call__(self, video: str, frames: np.ndarray, times: np.ndarray, question: str) -> Scores:
        """Returns the scores of all candidates.

        Args:
          video: path of the video, for messages and stored embeddings.
          frames: candidates uint8 `[candidates, size, size, 3]`.
          times: float `[candidates]`, seconds.
          question: text.
        """


class AskableScorer(Scorer, Protocol):
    """A scorer that can be asked about some of the candidates, as rules of `rules.ASKING` do."""

    def score_some(self, video: str, frames: np.ndarray, question: str, indices: np.ndarray) -> np.ndarray:
        """Returns the values of the candidates int `[asked]` alone, float32 `[asked]`; other arguments as above."""


class _KeepLast:
    """Encodes frames, and keeps the result for the next question on the very same array."""

    def __init__(self, encode: Callable[..., jax.Array]):
        self._encode = encode
        self._frames: np.ndarray | None = None

    def __call__(self, frames: np.ndarray, *times: np.ndarray) -> jax.Array:
        if self._frames is not frames:
            self._features, self._frames = self._encode(frames, *times), frames
        return self._features


@gin.configurable
class Voyager:
    """Frame-Voyager's rewards as scores.

        voyager = Voyager("runs/video/voyager", "runs/video/llm")
        candidates = read_frames("clip.mp4", voyager.size, count=128)
        scores = voyager("clip.mp4", candidates.frames, candidates.times, "What colour was the star?")
        scores.values, scores.pairs   # float32 [128], [128, 128]
    """

    resize_mode = "stretch"

    def __init__(self, run_dir: epath.PathLike = gin.REQUIRED, video_llm: epath.PathLike = gin.REQUIRED,
                 step: int | Literal["best"] | None = "best", towers: epath.PathLike | None = None):
        """Loads a run of `video.train_voyager` and the Video-LLM it was trained for.

        Args:
          run_dir: folder of the run.
          video_llm: folder of the Video-LLM, see `load_video_llm`.
          step: checkpoint of the run, see `checkpoints.find_step`.
          towers: run of `video.train_towers` that a hybrid was trained with; of no use for others.

        Raises:
          InputError: one of them is missing, or the run was trained for another Video-LLM or with other towers.
        """
        mesh = partitioning.make_mesh(devices=jax.local_devices()[:1])
        llm, self._config = load_video_llm(video_llm, mesh, layers=0), checkpoints.load_model(run_dir, VoyagerConfig)
        record = read_json(epath.Path(run_dir) / "run.json", "run")
        self._trained_for = record["labels"]["model"]
        if self._trained_for != llm.fingerprint():
            raise InputError(f"{run_dir}: trained for another Video-LLM than {video_llm}")
        self._similarity = None
        if self._config.hybrid:
            if towers is None:
                raise InputError(f"{run_dir}: a hybrid, which needs Voyager.towers, the run it was trained with")
            self._similarity = Similarity(towers)
            if self._similarity.settings != record["similarity"]:
                raise InputError(f"{run_dir}: trained with other towers than {towers}")
        self.size = llm.config.vision.image_size
        self._params, _ = checkpoints.restore_params(run_dir, abstract_params(self._config, mesh), step)
        self._encode = _KeepLast(functools.partial(jax.jit(functools.partial(encode_frames, llm.config)), llm.params))
        self._words = functools.partial(QuestionWords, self._config.prompt, llm.language_model)
        self._rewards = jax.jit(functools.partial(rewards, self._config))

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """Fingerprints of Frame-Voyager and the Video-LLM."""
        return {"scorer": "Voyager", "video_llm": self._trained_for,
                "fingerprint": fingerprint(self._params, dataclasses.asdict(self._config))}

    def __call__(self, video: str, frames: np.ndarray, times: np.ndarray, question: str) -> Scores:
        words, lengths = self._words([question])[[0]]
        own = lengths[0] + self._config.frame_tokens  # the question and one frame
        if own > self._config.decoder.max_length:
            raise InputError(f"{video}: the question has {own} tokens with a frame, Frame-Voyager takes "
                             f"{self._config.decoder.max_length}")
        times, segments = times.astype(np.float32), np.ones((1, len(frames)), np.int32)
        features = self._encode(frames, times)[None]
        similarities = self._similarity and self._similarity(video, frames, times, question).values[None]
        scores = self._rewards(self._params, features, words, lengths, times[None], segments, similarities)
        return Scores(np.asarray(scores.values)[0], np.asarray(scores.pairs)[0] if self._config.rank else None)


@gin.configurable
class Similarity:
    """Cosines of frames and question in the space of our own towers, as CLIP scores."""

    resize_mode = "stretch"

    def __init__(self, run_dir: epath.PathLike = gin.REQUIRED, step: int | None = None):
        """Loads a run of `video.train_towers`; raises InputError without one.

        Args:
          run_dir: folder of the run.
          step: checkpoint of the run; None: the latest.
        """
        mesh = partitioning.make_mesh(devices=jax.local_devices()[:1])
        self._config = config = checkpoints.load_model(run_dir, TowersConfig)
        self._params, _ = checkpoints.restore_params(run_dir, abstract_params(config, mesh), step)
        self.size, self._length = config.vision.image_size, config.max_length
        self._tokenizer = Tokenizer(epath.Path(run_dir) / TOKENIZER)
        self._embed_frames = functools.partial(jax.jit(functools.partial(embed_frames, config)), self._params)
        self._frames = _KeepLast(self._embed_frames)
        self._texts = functools.partial(jax.jit(functools.partial(embed_texts, config)), self._params)

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """Fingerprint of the towers and their tokenizer."""
        return {"scorer": "Similarity", "fingerprint": fingerprint(
            self._params, dataclasses.asdict(self._config), self._tokenizer.sha256)}

    def __call__(self, video: str, frames: np.ndarray, times: np.ndarray, question: str) -> Scores:
        vectors = np.asarray(self._frames(frames))
        return Scores(vectors @ self._text(question), cosines=vectors @ vectors.T)

    def score_some(self, video: str, frames: np.ndarray, question: str, indices: np.ndarray) -> np.ndarray:
        # Whole multiples of 8 frames, so that few shapes are compiled.
        padded = np.resize(indices, -(-len(indices) // 8) * 8)
        vectors = np.asarray(self._embed_frames(frames[padded]))[: len(indices)]
        return vectors @ self._text(question)

    def _text(self, question: str) -> np.ndarray:
        """Returns the unit vector of a question, float32 `[shared_dim]`."""
        tokens = np.full((1, self._length), PAD_ID, np.int32)
        ids = self._tokenizer.encode(question)[: self._length]
        tokens[0, : len(ids)] = ids
        return np.asarray(self._texts(tokens))[0]


@gin.configurable
class Embeddings:
    """Cosines of frames and question in any model's space, read from a safetensors file.

    The file holds `video:<path>` `[candidates, dim]` for every video, with `Selector.candidates` rows, and
    `question:<text>` `[dim]` for every question.
    """

    size, resize_mode = 64, "stretch"  # of the frames on contact sheets

    def __init__(self, path: epath.PathLike = gin.REQUIRED):
        """Opens the file; raises InputError when it is missing or malformed."""
        self._path = epath.Path(path)
        try:
            self._file = safetensors.safe_open(str(path), framework="numpy")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file ({error})") from None
        self._names = set(self._file.keys())

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """Hash of the file."""
        return {"scorer": "Embeddings", "file": sha256(self._path)}

    def __call__(self, video: str, frames: np.ndarray, times: np.ndarray, question: str) -> Scores:
        frame_vectors, question_vector = self._read(f"video:{video}"), self._read(f"question:{question}")
        if frame_vectors.shape != (len(frames), *question_vector.shape) or question_vector.ndim != 1:
            raise InputError(f"{self._path}: video:{video} has shape {list(frame_vectors.shape)}, its question "
                             f"{list(question_vector.shape)}; with {len(frames)} candidates [{len(frames)}, dim] and "
                             "[dim] are needed")
        frame_vectors, question_vector = _unit(frame_vectors), _unit(question_vector)
        return Scores(frame_vectors @ question_vector, cosines=frame_vectors @ frame_vectors.T)

    def score_some(self, video: str, frames: np.ndarray, question: str, indices: np.ndarray) -> np.ndarray:
        return self(video, frames, np.zeros(len(frames)), question).values[indices]

    def _read(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise InputError(f"{self._path}: no tensor {name!r}")
        return np.asarray(self._file.get_tensor(name), np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors float32 `[..., dim]` to length 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
