"""Computes the labels that Frame-Voyager learns from: `python -m video.label --gin_file=gin/video/label.gin`.

A label is the loss that a frozen Video-LLM has on a question's right answer, given one combination of T of M candidate
frames (arXiv 2410.03226); every question gets one for each combination, or for a sample of them. Each frame goes
through the vision tower once; question and beginnings of combinations are computed once (`video.llm.answer_scoring`).
The results are two stores (`video.frames.row_store`):

    OUT/losses      a row for every question: "losses" float32 [K], "combinations" uint16 [K, T], ascending frames
    OUT/features    a row for every video: "features" float32 [M, frame_tokens, embed], its frames as the decoder reads
                    them, and their "times" float64 [M]

so learning from them needs no Video-LLM. A killed run resumes at the first question without a row. Several
processes are one mesh of all their devices, which share the frames of a video and a question's combinations.
"""

import dataclasses
import time

import gin
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import cluster, hardware
from video.frame_choice.rules import even
from video.frames.frame_store import FrameStore
from video.frames.row_store import RowWriter
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.questions import read_questions
from video.voyager.combinations import combinations
from video.voyager.loss_labels import FEATURES, LOSSES, FeatureStore


@gin.configurable("label")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of `video.label`; more of the Video-LLM's are those of `load_video_llm`.

    Attributes:
      model: folder of the Video-LLM, see `load_video_llm`.
      questions: file of `video.questions`.
      frame_store: folder that `video.decode` wrote.
      output: folder of both stores.
      candidates: M; evenly spread over those of the frame store.
      num_frames: T, frames of a combination.
      max_combinations: K, number of combinations drawn for each question where there are more; None: all.
      limit: number of questions, the first of the file; None: all.
      seed: seed of the drawn combinations.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    model: str = gin.REQUIRED
    questions: str = gin.REQUIRED
    frame_store: str = gin.REQUIRED
    output: str = gin.REQUIRED
    candidates: int = 16
    num_frames: int = 4
    max_combinations: int | None = None
    limit: int | None = None
    seed: int = 0
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"


def main(config: LabelConfig) -> None:
    """Computes the losses of a Video-LLM on combinations of frames, and stores them.

    Raises:
      InputError: the inputs do not fit each other, or the folder holds losses of other inputs.
    """
    candidates, num_frames = config.candidates, config.num_frames
    store, questions = FrameStore(config.frame_store), read_questions(config.questions)[: config.limit]
    if not 1 <= num_frames <= candidates <= store.candidates:
        raise InputError(f"label: num_frames = {num_frames} out of candidates = {candidates} out of the store's "
                         f"{store.candidates}: each must be at most the next")
    hardware.keep_compiled(config.compilation_cache)
    llm = load_video_llm(config.model)
    store.check_size(llm.config.vision.image_size)
    usable = [question for question in questions if question.video not in store.rejected]
    videos = list(dict.fromkeys(question.video for question in usable))
    indices = even(store.candidates, candidates)
    settings = {"model": llm.fingerprint(), "frame_store": store.fingerprint(), "candidates": indices.tolist(),
                "prompt": llm.config.prompt}
    count = len(combinations(candidates, num_frames, config.max_combinations, config.seed))
    tokens, embed = llm.config.frame_tokens, llm.config.decoder.embed_dim
    features = RowWriter(epath.Path(config.output) / FEATURES, FEATURES, settings, len(videos), {
        "features": ((candidates, tokens, embed), np.dtype(np.float32)),
        "times": ((candidates,), np.dtype(np.float64))})
    settings |= {"questions": sha256(config.questions), "frames": num_frames, "most": config.max_combinations,
                 "seed": config.seed}
    losses = RowWriter(epath.Path(config.output) / LOSSES, LOSSES, settings, len(questions), {
        "losses": ((count,), np.dtype(np.float32)), "combinations": ((count, num_frames), np.dtype(np.uint16))})
    for question in questions:
        if question.video in store.rejected and question.id not in losses.done:
            losses.reject(question.id, store.rejected[question.video])
    remaining = [question for question in usable if question.id not in losses.done]
    if 0 < len(remaining) < len(usable):
        cluster.log(f"{len(usable) - len(remaining):,} of {len(usable):,} questions were done before")
    answer_scorer, started = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts), time.monotonic()
    disable = None if cluster.is_main() else True  # tqdm's None: no bar where there is no terminal
    for video in tqdm([video for video in videos if video not in features.done], "frames", disable=disable):
        row = store.row(video)
        embeddings = np.asarray(answer_scorer.features(store.frames([row])[0][indices]), np.float32)
        features.add(video, {"features": embeddings, "times": store.times[row][indices]})
    features.complete()
    stored = FeatureStore(features.path)
    drawn = [combinations(candidates, num_frames, config.max_combinations, config.seed, question.id)
             for question in remaining]
    answered = answer_scorer(stored.features, remaining, drawn, options=False)
    for question, rows, answers in tqdm(zip(remaining, drawn, answered), "questions", len(remaining), disable=disable):
        losses.add(question.id, {"losses": answers.losses, "combinations": rows.astype(np.uint16)},
                   video=question.video)
    losses.complete()
    if remaining:
        seconds, scorer = time.monotonic() - started, answer_scorer.scorer
        cluster.log(
            f"{len(remaining):,} questions, {len(remaining) * count:,} combinations of {num_frames} out of "
            f"{candidates} frames in {seconds:.0f} s; fed {scorer.fed_tokens:,} tokens on {llm.mesh.size} devices "
            f"({scorer.naive_tokens:,} if nothing were shared)")


if __name__ == "__main__":
    command_line.run(main, LabelConfig, "video.label", joins=True)
