"""Renders videos with questions on them: `python -m video.synthetic --gin_file=gin/video/synthetic.gin`.

Grey shapes drift over a shaded ground all the time; now and then a coloured shape appears for about a second. Every
question is about such appearances: one of them (which colour, which side), the order of two (which came first), several
that have to be counted (how often), or two that have to be compared (the same colour or not). So the value of a frame
depends on the question, and for half of the questions one frame is worth little without another.

    FOLDER/videos/v00000.mp4 ...
    FOLDER/train.jsonl, FOLDER/test.jsonl     questions, see `video.questions`; no video is in both
    FOLDER/train_captions.jsonl, ...          captions of parts of the videos
    FOLDER/tokenizer.model                    SentencePiece, trained on the training questions and answers
    FOLDER/settings.json                      settings of the videos; videos of other settings are refused
"""

import dataclasses
import functools
import io

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
from video.frames.rendering import make_video
from video.frames.row_store import claim_folder
from video.questions import write_questions


@gin.configurable("synthetic")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Settings of `video.synthetic`.

    Attributes:
      output: folder of videos and questions.
      train_videos: number of videos that training questions are about.
      test_videos: number of videos that test questions are about.
      seconds: length of a video.
      fps: frames per second.
      size: pixels of a side.
      shown: shortest time that a coloured shape is on screen, seconds.
      seed: a video depends on this seed and its own number alone.
      processes: number of worker processes.
    """

    output: str = gin.REQUIRED
    train_videos: int = 600
    test_videos: int = 100
    seconds: float = 16.0
    fps: int = 8
    size: int = 64
    shown: float = 1.0
    seed: int = 0
    processes: int = 2

    def __post_init__(self):
        """Raises InputError where a number is not positive, or videos are too short for their events."""
        if min(self.train_videos, self.test_videos, self.seconds, self.fps, self.size, self.shown, self.processes) <= 0:
            raise InputError("synthetic: all numbers must be positive")
        if self.seconds < 12 * self.shown:
            raise InputError(f"synthetic.seconds = {self.seconds}: must be at least 12 times synthetic.shown")


def main(config: SyntheticConfig) -> None:
    """Renders the videos of both splits and writes their questions; videos that exist are kept.

    Raises:
      InputError: the folder holds videos of other settings.
    """
    output, total = epath.Path(config.output), config.train_videos + config.test_videos
    settings = {name: getattr(config, name) for name in ("seed", "seconds", "fps", "size", "shown")}
    claim_folder(output, settings)
    (output / "videos").mkdir(exist_ok=True)
    with Workers(functools.partial(make_video, folder=str(output), **settings), config.processes) as workers:
        made = workers.map((number, number) for number in range(total))
        by_video = [questions for _, questions in tqdm(made, "videos", total, disable=None)]
    train, test = by_video[: config.train_videos], by_video[config.train_videos :]
    for split, part in (("train", train), ("test", test)):
        for name, captions in ((split, False), (f"{split}_captions", True)):
            kept = [question for questions in part for question in questions
                    if (question.clip is not None) == captions]
            write_questions(output / f"{name}.jsonl", kept)
            log(f"{output / name}.jsonl: {len(kept):,} questions on {len(part):,} videos")
    texts = [text for questions in train for question in questions for text in (question.question, question.answer)]
    write_atomic(output / "tokenizer.model", train_tokenizer(texts))


def train_tokenizer(texts: list[str]) -> bytes:
    """Trains a small SentencePiece model that knows the words of the texts, and all bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=512, hard_vocab_limit=False,
        byte_fallback=True, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=BOS_ID, minloglevel=2)  # fmt: skip
    return model.getvalue()


if __name__ == "__main__":
    command_line.run(main, SyntheticConfig, "video.synthetic")
