"""Measures how well a Video-LLM answers with the frames that each way of choosing shows it.

    python -m video.evaluate --gin_file=gin/video/evaluate.gin

One frozen Video-LLM answers held-out questions with T of M candidate frames: spread evenly, drawn at random, chosen by
similarity and the rules that build on it, chosen by Frame-Voyager, and the frames that show the evidence where the
questions name it. Its answer is the option with the highest likelihood. Several runs of Frame-Voyager for one Video-LLM
count as seeds, and several Video-LLMs too.

    OUT/answers/<trial>.jsonl   every question: with which choice it was answered rightly, and the chosen frames
    OUT/results.json            accuracies, differences and intervals
    OUT/report.md               the tables
    OUT/cost.svg, cost.png      accuracy against seconds a question

Intervals are percentiles of a bootstrap over videos, as questions on one video share its frames. A question's value is
its mean over seeds, so intervals do not hold the spread between seeds; that is told beside them.
"""

import collections
import dataclasses
import itertools
import json
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gin
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl, sha256, write_atomic, write_json
from mlx_pretrain.parallel import cluster, hardware
from video.frame_choice.evaluation_tables import (
    COST,
    EVIDENCE,
    HYBRID,
    RANDOM,
    REPORT,
    UNIFORM,
    VOYAGER,
    Answered,
    Cost,
    summarise,
    write_report,
)
from video.frame_choice.rules import ASKING, RULES, even
from video.frame_choice.scorers import Scorer, Similarity, Voyager
from video.frame_choice.scores import Scores
from video.frame_choice.selector import Selector
from video.frames.frame_store import FrameStore
from video.frames.reading import Candidates
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.llm.training_rows import with_evidence
from video.questions import Question, by_video, draw_questions, read_questions

RESULTS, ANSWERS = "results.json", "answers"
_TIMED = 20  # videos on which choosing is timed
_CONTENTS = (RESULTS, ANSWERS, REPORT, f"{COST}.svg", f"{COST}.png", "config.gin")
# Rule on similarities -> its name in tables.
_NAMES = {"top": "similarity", "bolt": "BOLT", "aks": "AKS", "mmr": "MMR", "mdp3": "MDP3", "focus": "FOCUS"}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Trial:
    """A Video-LLM, and the runs that choose frames for it.

    Attributes:
      name: name of its file of answers, such as "seed0".
      video_llm: folder of the Video-LLM.
      voyagers: runs of `video.train_voyager` for it, which count as seeds.
      hybrids: runs that have the similarities of the towers as an input, which are another method.
      towers: run of `video.train_towers` for the rules on similarities; None: these are left out.
    """

    name: str = gin.REQUIRED
    video_llm: str = gin.REQUIRED
    voyagers: Sequence[str] = ()
    hybrids: Sequence[str] = ()
    towers: str | None = None


@gin.configurable("evaluate_frames")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `video.evaluate`.

    Attributes:
      trials: [@Trial()], or several with scopes: [@a/Trial(), @b/Trial()].
      questions: file of questions about videos that no run has seen.
      frame_store: folder that `video.decode` wrote.
      output: folder; kept where it was made from the same runs, questions and settings.
      overwrite: replaces an output of other settings or inputs, which is an error otherwise.
      settings: pairs (M, T): candidates, and frames that are shown.
      rules: rules on similarities, names in `video.frame_choice.rules.RULES`.
      choice: rule on Frame-Voyager's rewards.
      limit: number of questions, drawn at random from the file; None: all.
      resamples: bootstrap resamples of the videos.
      seed: seed of the drawn questions, of the random frames and of the bootstrap.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    trials: Sequence[Trial] = gin.REQUIRED
    questions: str = gin.REQUIRED
    frame_store: str = gin.REQUIRED
    output: str = gin.REQUIRED
    overwrite: bool = False
    settings: Sequence[Sequence[int]] = ((16, 4), (32, 4), (16, 2), (64, 4))
    rules: Sequence[str] = tuple(_NAMES)
    choice: str = "greedy"
    limit: int | None = None
    resamples: int = 2000
    seed: int = 0
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        if not self.trials or len({trial.name for trial in self.trials}) < len(self.trials):
            raise InputError("evaluate_frames.trials: at least one is needed, each of another name")
        for trial in self.trials:
            if not trial.name or "/" in trial.name or trial.name.startswith("."):
                raise InputError(f"Trial.name = {trial.name!r}: must be the name of a file")
        for rule in self.rules:
            if rule not in _NAMES:
                raise InputError(f"evaluate_frames.rules: {rule!r} is not one of {', '.join(_NAMES)}")
        if self.choice not in RULES or self.choice in ASKING:
            raise InputError(f"evaluate_frames.choice = {self.choice!r}: must be one of "
                             f"{', '.join(name for name in RULES if name not in ASKING)}")
        if not self.settings or any(len(pair) != 2 or not 1 <= pair[1] <= pair[0] for pair in self.settings):
            raise InputError("evaluate_frames.settings: must be pairs (M, T) with T from 1 to M")


class _KeepScores:
    """A scorer that keeps the scores of the last question on the very same array, for all rules and T."""

    def __init__(self, scorer: Scorer):
        self._scorer, self._last = scorer, (None, "", None)
        self.settings = scorer.settings
        if hasattr(scorer, "score_some"):
            self.score_some = scorer.score_some

    def __call__(self, video: str, frames: np.ndarray, times: np.ndarray, question: str) -> Scores:
        if self._last[0] is not frames or self._last[1] != question:
            self._last = frames, question, self._scorer(video, frames, times, question)
        return self._last[2]


class _Chooser(NamedTuple):
    """A way to choose frames; without a scorer and a rule the method says how."""

    method: str
    scorer: Any = None
    rule: str | None = None


def main(config: EvaluateConfig) -> None:
    """Answers all questions with the frames of all choosers, and writes the tables.

    Raises:
      InputError: runs, frames and questions do not fit each other, or the output was made from other inputs.
    """
    hardware.keep_compiled(config.compilation_cache)
    if not cluster.is_main():
        return
    store, questions = FrameStore(config.frame_store), read_questions(config.questions)
    questions = draw_questions(
        [q for q in questions if q.video not in store.rejected and q.options], config.limit, config.seed)
    if not questions:
        raise InputError(f"{config.questions}: no question with options is about a video of {config.frame_store}")
    most = max(candidates for candidates, _ in config.settings)
    if most > store.candidates:
        raise InputError(f"evaluate_frames.settings: {most} candidates, {config.frame_store} has {store.candidates}")
    loaded = {trial.name: _choosers(trial, config) for trial in config.trials}
    made_from = provenance("video.evaluate", {
        "settings": [list(pair) for pair in config.settings], "limit": config.limit, "seed": config.seed,
        "resamples": config.resamples}, {
        "questions": sha256(config.questions), "frames": store.fingerprint(),
        "trials": {name: {chooser.method: [other.scorer.settings for other in choosers
                                           if other.method == chooser.method and other.scorer] + [chooser.rule]
                          for chooser in choosers} | {"video_llm": llm.fingerprint()}
                   for name, (llm, choosers) in loaded.items()}})
    recorded = read_folder_record(config.output, RESULTS)
    if is_current(config.output, recorded, made_from, overwrite=config.overwrite, contents=_CONTENTS):
        return
    with new_folder(config.output, RESULTS) as output:
        answered, costs = [], []
        for trial in config.trials:
            path = output / ANSWERS / f"{trial.name}.jsonl"
            lines, cost = _answer(config, store, questions, *loaded[trial.name], trial.name)
            write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            answered.append(Answered.from_lines(line for _, line in read_jsonl(path)))
            costs.append(cost)
        results = summarise(answered, costs, [tuple(pair) for pair in config.settings], config.resamples, config.seed)
        write_report(output, results)
        gin_files.save_effective(output / "config.gin")
        write_json(output / RESULTS, {"provenance": made_from, **results})
    cluster.log((epath.Path(config.output) / REPORT).read_text())


def _choosers(trial: Trial, config: EvaluateConfig) -> tuple[Any, list[_Chooser]]:
    """Loads a trial's Video-LLM and all that chooses frames for it."""
    llm = load_video_llm(trial.video_llm)
    choosers = [_Chooser(UNIFORM), _Chooser(RANDOM)]
    if trial.towers is not None:
        similarity = _KeepScores(Similarity(trial.towers))
        choosers += [_Chooser(_NAMES[rule], similarity, rule) for rule in config.rules]
    choosers += [_Chooser(method, _KeepScores(Voyager(run, trial.video_llm, towers=trial.towers)), config.choice)
                 for method, runs in ((VOYAGER, trial.voyagers), (HYBRID, trial.hybrids)) for run in runs]
    return llm, [*choosers, _Chooser(EVIDENCE)]


def _answer(
    config: EvaluateConfig, store: FrameStore, questions: Sequence[Question], llm: Any, choosers: Sequence[_Chooser],
    name: str,
) -> tuple[Iterator[dict[str, Any]], dict[tuple[int, int, str], Cost]]:
    """Returns a line for every question with the answers of all choices, and the cost of choosing."""
    store.check_size(llm.config.vision.image_size)
    spent = collections.defaultdict(list)
    chosen: dict[str, list] = {question.id: [] for question in questions}
    for number, (video, group) in enumerate(tqdm(by_video(questions).items(), f"{name}: choose", disable=None)):
        row = store.row(video)
        frames, times = store.video(video)
        for candidates, settings in itertools.groupby(sorted(config.settings), operator.itemgetter(0)):
            grid = even(store.candidates, candidates)
            part = frames[grid]  # one array for all that follows: scorers keep what they encoded of the last one
            for question, (_, num_frames), chooser in itertools.product(group, list(settings), choosers):
                # On a copy, nothing is encoded yet.
                timed = question is group[0] and number < _TIMED
                shown = Candidates(part.copy() if timed else part, times[grid], store.durations[row], grid)
                started = time.perf_counter()
                indices, encoded = _choose(chooser, question, shown, num_frames, config.seed)
                if timed:
                    spent[candidates, num_frames, chooser.method].append((time.perf_counter() - started, encoded))
                chosen[question.id].append((candidates, num_frames, chooser.method, grid[indices]))
    scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
    answers = scorer(lambda video: scorer.features(*store.video(video)), questions,
                     [[indices.tolist() for *_, indices in of_question] for of_question in chosen.values()])
    # The first video is left out where there are others: its choices compile programs.
    costs = {key: Cost(float(np.median([seconds for seconds, _ in values[1:] or values])),
                       float(np.mean([encoded for _, encoded in values]))) for key, values in spent.items()}
    lines = ({"id": question.id, "video": question.video, "type": question.type,
              "choices": [[candidates, num_frames, method, indices.tolist(), bool(right), round(float(loss), 5)]
                          for (candidates, num_frames, method, indices), right, loss
                          in zip(of_question, answer.right, answer.losses)]}
             for question, of_question, answer
             in tqdm(zip(questions, chosen.values(), answers), f"{name}: answer", len(questions), disable=None))
    return lines, costs


def _choose(chooser: _Chooser, question: Question, candidates: Candidates, num_frames: int, seed: int
            ) -> tuple[np.ndarray, int]:
    """Returns the chosen candidates, int `[num_frames]`, ascending, and the number of frames that were encoded."""
    count = len(candidates.frames)
    if chooser.method == RANDOM:
        digest = np.frombuffer(question.id.encode(), np.uint8)
        rng = np.random.default_rng([seed, count, num_frames, *digest])
        return np.sort(rng.choice(count, num_frames, replace=False)), 0
    if chooser.method == EVIDENCE:
        return with_evidence(question, candidates.times, even(count, num_frames), num_frames), 0
    selector = Selector(chooser.scorer, chooser.rule or "top", count, num_frames)
    selection = selector.choose(question.video, candidates, question.question)
    return selection.indices, selection.frames_encoded


if __name__ == "__main__":
    command_line.run(main, EvaluateConfig, "video.evaluate", joins=True)
