"""Computes the labels that Frame-Voyager learns from: `python -m video.label --gin_file=gin/video/label.gin`.

A label is the loss that a frozen Video-LLM has on a question's right answer, given one combination of T of M candidate
frames (arXiv 2410.03226); every question gets one for each combination, or for a sample of them. Each frame goes
through the vision tower once; question and beginnings of combinations are computed once (`video.llm.answer_scoring`).
The results are two stores (`video.frames.row_store`):

    OUT/losses      a row for every question: "losses" float32 [K], "combinations" uint16 [K, T], ascending frames,
                    unused places M
    OUT/features    a row for every video, see `video.voyager.frame_features`: what Frame-Voyager reads of its frames

so learning from them needs no Video-LLM. All embeddings of a frame are in memory only, those of one video at a time. A
killed run resumes at the first question without a row, and encodes the frames of its video again. Several processes
are one mesh of all their devices, which share the frames of a video and a question's combinations. With `label.guided`
a part of a question's combinations is drawn by the losses on the others.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel import cluster, hardware, partitioning
from video.frame_choice.rules import even
from video.frames.frame_store import FrameStore
from video.frames.row_store import RowWriter
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import VideoLLM, load_video_llm
from video.questions import Question, by_video, draw_questions, read_questions
from video.voyager.combinations import around_the_best, combinations, sample_sizes
from video.voyager.frame_features import FEATURES, open_feature_writer, pool_tokens
from video.voyager.loss_labels import LOSSES, combination_sizes

# Questions that are scored as one stream, whose last batch is not full; with a second round it begins when the first is
# done with all of them, so a killed run loses that many.
_GROUP, _GROUP_OF_ONE_ROUND = 64, 4096


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
      num_frames: T, frames of a combination; several, e.g. (2, 4, 8), for combinations of several sizes.
      max_combinations: K, number of combinations drawn for each question where there are more; None: all.
      nested: True: drawn combinations share their first frames, which the Video-LLM then reads once for all of them;
        False: they are drawn one by one, see `voyager.combinations`.
      guided: share of them that is drawn in a second round, around those that had low losses in the first, see
        `voyager.combinations.around_the_best`; 0: all are drawn at random (the paper's).
      compare_options: True: the loss of a question with options is the negative logarithm of the right option's share
        of the options' likelihoods (our own: it decides which option is chosen); False: the mean over the tokens of the
        right answer, as without options (the paper's).
      feature_tokens: vectors that are stored of a frame for Frame-Voyager, averages over equal parts of the frame; 1,
        or a square up to the Video-LLM's own number.
      limit: number of questions, drawn at random from the file; None: all.
      seed: seed of the drawn questions and combinations.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    model: str = gin.REQUIRED
    questions: str = gin.REQUIRED
    frame_store: str = gin.REQUIRED
    output: str = gin.REQUIRED
    candidates: int = 16
    num_frames: int | Sequence[int] = 4
    max_combinations: int | None = None
    nested: bool = True
    guided: float = 0.0
    compare_options: bool = True
    feature_tokens: int = 1
    limit: int | None = None
    seed: int = 0
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        if not 0 <= self.guided < 1:
            raise InputError(f"label.guided = {self.guided!r}: must be a share, from 0 to below 1")


def main(config: LabelConfig) -> None:
    """Computes the losses of a Video-LLM on combinations of frames, and stores them.

    Raises:
      InputError: the inputs do not fit each other, or the folder holds losses of other inputs.
    """
    store = FrameStore(config.frame_store)
    questions = draw_questions(read_questions(config.questions), config.limit, config.seed)
    if config.candidates > store.candidates:
        raise InputError(f"label: candidates = {config.candidates}, but the frame store has {store.candidates}")
    sizes = sample_sizes(config.candidates, config.num_frames, config.max_combinations, config.guided)
    hardware.keep_compiled(config.compilation_cache)
    llm = load_video_llm(config.model)
    store.check_size(llm.config.vision.image_size)
    labelling = _Labelling(config, store, llm, questions, *sizes)
    started = time.monotonic()
    done = labelling.run()
    if done:
        seconds, scorer = time.monotonic() - started, labelling.scorer.scorer
        cluster.log(
            f"{done:,} questions, {done * labelling.count:,} combinations of {' or '.join(map(str, sizes[0]))} out of "
            f"{config.candidates} frames in {seconds:.0f} s; fed {scorer.fed_tokens:,} tokens on {llm.mesh.size} "
            f"devices ({scorer.naive_tokens:,} if nothing were shared)")


class _Labelling:
    """The two stores that are filled, and what fills them.

    Attributes:
      scorer: computes the losses.
      count: number of a question's combinations.
    """

    def __init__(self, config: LabelConfig, store: FrameStore, llm: VideoLLM, questions: Sequence[Question],
                 first: Mapping[int, int], around: Mapping[int, int]):
        """Opens both stores; `first`, `around`: see `sample_sizes`. Raises InputError as `main`."""
        self._config, self._store, self._around = config, store, around
        self.count, sizes = sum(first.values()) + sum(around.values()), list(first)
        shape = self.count, max(sizes)
        groups = by_video(questions)
        # A video's questions in a row, so that its frames are encoded once.
        self._usable = [question for video, group in groups.items() if video not in store.rejected
                        for question in group]
        self._videos = [video for video in groups if video not in store.rejected]
        self._indices = even(store.candidates, config.candidates)
        settings = {"model": llm.fingerprint(), "frame_store": store.fingerprint(),
                    "candidates": self._indices.tolist(), "prompt": llm.config.prompt}
        tokens, embed, output = config.feature_tokens, llm.config.decoder.embed_dim, epath.Path(config.output)
        pool = lambda features: pool_tokens(features, tokens).astype(jnp.bfloat16)  # noqa: E731
        jax.eval_shape(pool, jax.ShapeDtypeStruct((1, llm.config.frame_tokens, embed), np.float32))
        self._pool = jax.jit(pool, out_shardings=partitioning.replicated(llm.mesh))
        self._pooled: dict[str, jax.Array] = {}  # features still to be written
        self._features = open_feature_writer(output / FEATURES, settings, len(self._videos),
                                             (config.candidates, tokens, embed))
        settings |= {"questions": sha256(config.questions), "frames": sizes if len(sizes) > 1 else sizes[0],
                     "most": config.max_combinations, "nested": config.nested, "guided": config.guided,
                     "seed": config.seed, "compare_options": config.compare_options}
        self._losses = RowWriter(output / LOSSES, LOSSES, settings, len(questions), {
            "losses": (shape[:1], np.dtype(np.float32)), "combinations": (shape, np.dtype(np.uint16))})
        for question in questions:
            if question.video in store.rejected and question.id not in self._losses.done:
                self._losses.reject(question.id, store.rejected[question.video])
        self.scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)

    def run(self) -> int:
        """Fills both stores; returns the number of questions that were left to do."""
        remaining = [question for question in self._usable if question.id not in self._losses.done]
        if 0 < len(remaining) < len(self._usable):
            cluster.log(f"{len(self._usable) - len(remaining):,} of {len(self._usable):,} questions were done before")
        config, around = self._config, self._around
        disable = None if cluster.is_main() else True  # tqdm's None: no bar where there is no terminal
        size = _GROUP if any(around.values()) else _GROUP_OF_ONE_ROUND
        with tqdm(total=len(remaining), desc="questions", disable=disable) as progress:
            for start in range(0, len(remaining), size):
                group = remaining[start : start + size]
                drawn = [combinations(config.candidates, config.num_frames, config.max_combinations, config.seed,
                                      question.id, config.nested, config.guided) for question in group]
                losses = self._losses_on(group, drawn)
                if any(around.values()):
                    first = list(losses)
                    further = [around_the_best(*labels, around, config.candidates, config.seed, question.id)
                               for question, *labels in zip(group, drawn, first)]
                    losses = map(np.concatenate, zip(first, self._losses_on(group, further)))
                    drawn = list(map(np.concatenate, zip(drawn, further)))
                for question, rows, values in zip(group, drawn, losses):
                    self._write_features(question.video)
                    self._losses.add(question.id, {"losses": values, "combinations": rows.astype(np.uint16)},
                                     video=question.video)
                    progress.update()
        for video in self._videos:
            if video not in self._features.done:  # its questions were done before, its features are gone
                self._encode(video)
                self._write_features(video)
        self._features.complete()
        self._losses.complete()
        return len(remaining)

    def _losses_on(self, questions: Sequence[Question], drawn: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the losses on each question's combinations, float32 `[combinations]`."""
        candidates, compares = self._config.candidates, self._config.compare_options
        used = ([row[:size] for row, size in zip(rows, combination_sizes(rows, candidates))] for rows in drawn)
        for question, answers in zip(questions, self.scorer(self._encode, questions, used, options=compares)):
            yield answers.option_losses if compares and question.options else answers.losses

    def _encode(self, video: str) -> jax.Array:
        """Returns all embeddings of a video's candidates; averages those that are still to be written."""
        embeddings = self.scorer.features(*(x[self._indices] for x in self._store.video(video)))
        if video not in self._features.done:
            self._pooled[video] = self._pool(embeddings)
        return embeddings

    def _write_features(self, video: str) -> None:
        """Writes the features of a video, before the losses of its first question; nothing if they are there."""
        if video in self._pooled:
            row = self._store.row(video)
            self._features.add(video, {"features": np.asarray(self._pooled.pop(video)),
                                       "times": self._store.times[row][self._indices]},
                               duration=self._store.durations[row])


if __name__ == "__main__":
    command_line.run(main, LabelConfig, "video.label", joins=True)
