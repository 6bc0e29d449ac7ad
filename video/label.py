"""Losses of combinations of frames under a Video-LLM: `python -m video.label --gin_file=gin/video/label.gin`.

The data of Frame-Voyager (arXiv 2410.03226): for every question, the loss that a frozen Video-LLM has on the right
answer given T of M candidate frames, for all combinations or a sample. Each frame goes through the vision tower once;
question and beginnings of combinations are computed once (`video.llm.answer_scoring`). Two stores
(`video.frames.row_store`) result:

    OUT/losses      a row for every question: "losses" float32 [K], "combinations" uint16 [K, T], ascending frames
    OUT/features    a row for every video: "features" float32 [M, frame_tokens, embed], what the decoder reads of them

so whoever learns from them needs no Video-LLM. A run that was killed goes on with the first question that has no row.
Several processes are one mesh of all their devices, which share the frames of a video and a question's combinations.
"""

import time

import gin
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import cluster, hardware
from video.decode import FrameStore
from video.frame_choice.rules import even
from video.frames.row_store import RowWriter
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.questions import read_questions
from video.voyager.combinations import combinations
from video.voyager.loss_labels import FEATURES, LOSSES, FeatureStore


@gin.configurable
def label(
    model: epath.PathLike = gin.REQUIRED,
    questions: epath.PathLike = gin.REQUIRED,
    frame_store: epath.PathLike = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    candidates: int = 16,
    frames: int = 4,
    most: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla",
) -> None:
    """Computes and stores the losses.

    Args:
      model: Video-LLM, see `load_video_llm`, which has more settings.
      questions: file of `video.questions`.
      frame_store: folder that `video.decode` made.
      output: folder of both stores.
      candidates: M; spread evenly over those of the frame store.
      frames: T.
      most: K, a sample of so many combinations for each question; None: all.
      limit: of the questions, the first so many; None: all.
      seed: of the samples.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.

    Raises:
      InputError: the inputs do not fit each other, or the folder holds losses of other inputs.
    """
    store, asked = FrameStore(frame_store), read_questions(questions)[:limit]
    if not 1 <= frames <= candidates <= store.candidates:
        raise InputError(f"label: frames = {frames} out of candidates = {candidates} out of the store's "
                         f"{store.candidates}: each must be at most the next")
    hardware.keep_compiled(compilation_cache)
    llm = load_video_llm(model)
    store.check_size(llm.config.vision.image_size)
    usable = [question for question in asked if question.video not in store.rejected]
    videos = list(dict.fromkeys(question.video for question in usable))
    places = even(store.candidates, candidates)
    settings = {"model": llm.fingerprint(), "frame_store": store.fingerprint(), "candidates": places.tolist(),
                "prompt": llm.config.prompt}
    size = len(combinations(candidates, frames, most, seed))
    tokens, embed = llm.config.frame_tokens, llm.config.decoder.embed_dim
    features = RowWriter(epath.Path(output) / FEATURES, FEATURES, settings, len(videos), {
        "features": ((candidates, tokens, embed), np.dtype(np.float32)),
        "times": ((candidates,), np.dtype(np.float64))})
    losses = RowWriter(
        epath.Path(output) / LOSSES, LOSSES,
        {**settings, "questions": sha256(questions), "frames": frames, "most": most, "seed": seed}, len(asked), {
            "losses": ((size,), np.dtype(np.float32)), "combinations": ((size, frames), np.dtype(np.uint16))})
    for question in asked:
        if question.video in store.rejected and question.id not in losses.done:
            losses.reject(question.id, store.rejected[question.video])
    todo = [question for question in usable if question.id not in losses.done]
    if len(todo) < len(usable):
        _say(f"{len(usable) - len(todo):,} of {len(usable):,} questions were done before")
    answering, started = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts), time.monotonic()
    quiet = None if cluster.is_main() else True  # None: without a terminal
    for video in tqdm([video for video in videos if video not in features.done], "frames", disable=quiet):
        row = store.row(video)
        found = np.asarray(answering.features(store.frames([row])[0][places]), np.float32)
        features.add(video, {"features": found, "times": store.times[row][places]})
    features.complete()
    encoded = FeatureStore(features.path)
    drawn = [combinations(candidates, frames, most, seed, question.id) for question in todo]
    answered = answering(encoded.features, todo, drawn, options=False)
    for question, chosen, answers in tqdm(zip(todo, drawn, answered), "questions", len(todo), disable=quiet):
        losses.add(question.id, {"losses": answers.losses, "combinations": chosen.astype(np.uint16)},
                   video=question.video)
    losses.complete()
    if todo:
        seconds, scorer, devices = time.monotonic() - started, answering.scorer, llm.mesh.size
        _say(f"{len(todo):,} questions, {len(todo) * size:,} combinations of {frames} out of {candidates} frames in "
             f"{seconds:.0f} s; fed {scorer.fed_tokens:,} tokens on {devices} devices ({scorer.naive_tokens:,} if "
             "nothing were shared)")


def _say(line: str) -> None:
    if cluster.is_main():
        print(line)


def main() -> None:
    """Computes losses of combinations of frames. Parameters: label.* (see video/label.py) and load_video_llm.*."""
    label()


if __name__ == "__main__":
    command_line.run(main, "video.label", joins=True)
