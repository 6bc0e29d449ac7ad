"""Renders videos with questions on them: `python -m video.synthetic --gin_file=gin/video/synthetic.gin`.

`synthetic.world` says what happens in them and what is asked (`video.frames.worlds`). There are four sets of videos,
and no video is in two: a Video-LLM is trained on the first, its losses on the second are the labels that Frame-Voyager
learns from, and both are validated on the third and tested on the fourth. So labels are no memorised answers, and
nothing is chosen on the test set.

    FOLDER/videos/v00000.mp4 ...
    FOLDER/llm.jsonl, labels.jsonl, validation.jsonl, test.jsonl     questions, see `video.questions`
    FOLDER/llm_captions.jsonl, validation_captions.jsonl             captions of parts of the videos
    FOLDER/tokenizer.model                    SentencePiece, trained on the questions and answers of the first set
    FOLDER/settings.json                      settings of the videos; videos of other settings are refused
"""

import dataclasses
import functools
import io
from collections.abc import Iterable
from typing import Any

import gin
import sentencepiece
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic
from mlx_pretrain.parallel.cluster import log
from video.frames.row_store import claim_folder
from video.frames.worlds import WORLDS, make_video
from video.questions import Question, write_questions


@gin.configurable("synthetic")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Settings of `video.synthetic`.

    Attributes:
      output: folder of videos and questions.
      world: name in `video.frames.worlds.WORLDS`: "moments" or "stories".
      llm_videos: number of videos to train a Video-LLM on.
      label_videos: number of videos to label.
      validation_videos: number of videos for validation.
      test_videos: number of videos for the test.
      seconds: length of a video; None: the world's.
      fps: frames per second; None: the world's.
      size: pixels of a side.
      shown: shortest time that a coloured shape is on screen, seconds.
      seed: a video depends on this seed and its own number alone.
      processes: number of worker processes.
    """

    output: str = gin.REQUIRED
    world: str = "moments"
    llm_videos: int = 3000
    label_videos: int = 3000
    validation_videos: int = 250
    test_videos: int = 600
    seconds: float | None = None
    fps: int | None = None
    size: int = 64
    shown: float = 1.0
    seed: int = 0
    processes: int = 2

    def __post_init__(self):
        """Raises InputError where there is no such world, a number is not positive, or videos are too short."""
        if self.world not in WORLDS:
            raise InputError(f"synthetic.world = {self.world!r}: not one of {', '.join(WORLDS)}")
        made_by, videos = self.video_settings, self.videos.values()
        if min(*videos, *(made_by[name] for name in ("seconds", "fps", "size", "shown")), self.processes) <= 0:
            raise InputError("synthetic: all numbers must be positive")
        shortest = WORLDS[self.world].shortest
        if made_by["seconds"] < shortest * self.shown:
            raise InputError(f"synthetic.seconds = {made_by['seconds']}: must be at least {shortest:g} times "
                             "synthetic.shown")

    @property
    def videos(self) -> dict[str, int]:
        """Number of videos of every set; the name is that of its file of questions."""
        return {"llm": self.llm_videos, "labels": self.label_videos, "validation": self.validation_videos,
                "test": self.test_videos}

    @property
    def video_settings(self) -> dict[str, Any]:
        """Settings that a video depends on."""
        world = WORLDS[self.world]
        return {"world": self.world, "seed": self.seed, "size": self.size, "shown": self.shown,
                "seconds": world.seconds if self.seconds is None else self.seconds,
                "fps": world.fps if self.fps is None else self.fps}


def main(config: SyntheticConfig) -> None:
    """Renders the videos of all sets and writes their questions; videos that exist are kept.

    Raises:
      InputError: the folder holds videos of other settings.
    """
    output, total = epath.Path(config.output), sum(config.videos.values())
    claim_folder(output, config.video_settings)
    (output / "videos").mkdir(exist_ok=True)
    make = functools.partial(make_video, folder=str(output), **config.video_settings)
    with Workers(make, config.processes) as workers:
        made = workers.map((number, number) for number in range(total))
        by_video = iter([questions for _, questions in tqdm(made, "videos", total, disable=None)])
    for name, count in config.videos.items():
        texts = [question for _, questions in zip(range(count), by_video) for question in questions]
        questions = [text for text in texts if text.clip is None]
        write_questions(output / f"{name}.jsonl", questions)
        log(f"{output / name}.jsonl: {len(questions):,} questions on {count:,} videos")
        if name in ("llm", "validation"):
            write_questions(output / f"{name}_captions.jsonl", (text for text in texts if text.clip is not None))
        if name == "llm":
            write_atomic(output / "tokenizer.model", train_tokenizer(texts))


def train_tokenizer(questions: Iterable[Question]) -> bytes:
    """Trains a small SentencePiece model that knows the words of questions and answers, and all bytes."""
    model, texts = io.BytesIO(), (text for question in questions for text in (question.question, question.answer))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=512, hard_vocab_limit=False,
        byte_fallback=True, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=BOS_ID, minloglevel=2)  # fmt: skip
    return model.getvalue()


if __name__ == "__main__":
    command_line.run(main, SyntheticConfig, "video.synthetic")
