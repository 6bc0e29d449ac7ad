"""Renders videos with questions on them: `python -m video.synthetic --gin_file=gin/video/synthetic.gin`.

Grey shapes drift over a shaded ground all the time; now and then a coloured shape is there for about a second. Every
question is about such moments: on one of them (what colour, where), on two and their order (which came first), on
several that have to be told apart (how often), on two that have to be compared (the same colour). So a frame is worth
what the question makes of it, and for half of the questions one frame is worth little without another.

    FOLDER/videos/v00000.mp4 ...
    FOLDER/train.jsonl, FOLDER/test.jsonl     see `video.questions`; no video is in both
    FOLDER/train_captions.jsonl, ...          what is to be seen in parts of the videos
    FOLDER/tokenizer.model                    SentencePiece, trained on the training questions and answers
"""

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
from video.frames.rendering import make_video
from video.questions import write_questions


@gin.configurable("synthetic")
def synthesize(
    output: epath.PathLike = gin.REQUIRED,
    train_videos: int = 600,
    test_videos: int = 100,
    seconds: float = 16.0,
    fps: int = 8,
    size: int = 64,
    shown: float = 1.0,
    seed: int = 0,
    processes: int = 2,
) -> None:
    """Renders the videos of both splits and writes their questions; videos that are there are kept.

    Args:
      output: folder.
      train_videos, test_videos: how many.
      seconds, fps: of a video.
      size: pixels of a side.
      shown: shortest time that a coloured shape is there, seconds.
      seed: a video follows from it and its number alone.
      processes: that render.

    Raises:
      InputError: a number that is not positive, or a video that is too short for what happens in it.
    """
    if min(train_videos, test_videos, seconds, fps, size, shown, processes) <= 0:
        raise InputError("synthetic: all numbers must be positive")
    if seconds < 12 * shown:
        raise InputError(f"synthetic.seconds = {seconds}: must be at least 12 times synthetic.shown")
    output, total = epath.Path(output), train_videos + test_videos
    (output / "videos").mkdir(parents=True, exist_ok=True)
    settings = {"folder": str(output), "seed": seed, "seconds": seconds, "fps": fps, "size": size, "shown": shown}
    with Workers(functools.partial(make_video, **settings), processes) as workers:
        made = workers.map((number, number) for number in range(total))
        questions = [found for _, found in tqdm(made, "videos", total, disable=None)]
    for split, part in (("train", questions[:train_videos]), ("test", questions[train_videos:])):
        everything = [question for found in part for question in found]
        for name, captions in ((split, False), (f"{split}_captions", True)):
            kept = [question for question in everything if (question.clip is not None) == captions]
            write_questions(output / f"{name}.jsonl", kept)
            print(f"{output / name}.jsonl: {len(kept):,} questions on {len(part):,} videos")
    asked = [question for found in questions[:train_videos] for question in found]
    tokenizer = train_tokenizer([text for question in asked for text in (question.question, question.answer)])
    write_atomic(output / "tokenizer.model", tokenizer)


def train_tokenizer(texts: list[str]) -> bytes:
    """A small SentencePiece model: the words of the texts, and all bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=512, hard_vocab_limit=False,
        byte_fallback=True, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=BOS_ID, minloglevel=2)  # fmt: skip
    return model.getvalue()


def main() -> None:
    """Renders a set of videos with questions. Parameters: synthetic.* (see video/synthetic.py)."""
    synthesize()


if __name__ == "__main__":
    command_line.run(main, "video.synthetic")
