"""Measures the effect of the frames that a Video-LLM sees, and of Frame-Voyager's choice.

    python benchmarks/video_evidence.py --video_llm=RUN --voyager=RUN [RUN ...] --towers=RUN --frame_store=DIR
        --questions=runs/video/test.jsonl [--candidates=16] [--frames=4] [--limit=300] [--labels=DIR]

One frozen Video-LLM answers held-out questions with T of M frames chosen by each selector; its answer is the option
with the highest likelihood. `oracle` is the combination with the lowest loss on the right answer (with --labels, where
all combinations were computed): it knows the answer, and is a bound, not a rival. `random` is a combination at random,
`evidence` shows the spans of evidence. The table has the accuracy by type of question, and an exact McNemar test
against Frame-Voyager on the same questions. Several runs of Frame-Voyager count as seeds: mean and standard deviation
over them, the test on the first. The last line is JSON.
"""

import argparse
import collections
import json
import time

import numpy as np
import scipy.stats

from video.frame_choice.rules import RULES, even
from video.frame_choice.scorers import Similarity, Voyager
from video.frames.frame_store import FrameStore
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.llm.training_rows import evidence_frames
from video.questions import read_questions
from video.voyager.loss_labels import read_labels


def mcnemar(a, b) -> float:
    """Returns the two-sided exact p: as many questions are answered by a alone as by b alone."""
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("video_llm", "towers", "frame_store", "questions"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--voyager", nargs="+", required=True)
    parser.add_argument("--labels")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    store, llm = FrameStore(arguments.frame_store), load_video_llm(arguments.video_llm)
    questions = [q for q in read_questions(arguments.questions)[: arguments.limit] if q.video in store]
    count, num_frames = arguments.candidates, arguments.frames
    indices = even(store.candidates, count)
    frames = {q.video: store.frames([store.row(q.video)])[0][indices] for q in questions}
    rng = np.random.default_rng(0)

    similarity = Similarity(arguments.towers)
    similarities = [similarity(q.video, frames[q.video], q.question) for q in questions]
    choices = {
        "uniform": [even(count, num_frames) for _ in questions],
        "random": [np.sort(rng.choice(count, num_frames, replace=False)) for _ in questions],
        "similarity": [RULES["top"](scores, num_frames) for scores in similarities],
        "bolt": [RULES["bolt"](scores, num_frames) for scores in similarities],
        "aks": [RULES["aks"](scores, num_frames) for scores in similarities],
    }
    latency = collections.defaultdict(list)
    for number, run_dir in enumerate(arguments.voyager):
        voyager = Voyager(run_dir, arguments.video_llm)
        name = "voyager" if not number else f"voyager {number + 1}"
        choices[name] = []
        for question in questions:
            started = time.perf_counter()
            rewards = voyager(question.video, frames[question.video], question.question)
            latency[name].append(time.perf_counter() - started)
            choices[name].append(RULES["top"](rewards, num_frames))
    if any(q.evidence for q in questions):
        choices["evidence"] = []
        for question in questions:
            times = store.times[store.row(question.video)][indices]
            shown = [int(span[len(span) // 2]) for span in evidence_frames(question, times)]
            rest = [index for index in even(count, num_frames).tolist() if index not in shown]
            choices["evidence"].append(np.unique([*shown[:num_frames], *rest[: max(num_frames - len(set(shown)), 0)]]))
    if arguments.labels:
        labels = read_labels(arguments.labels, arguments.questions)
        best = {q.id: labels.combinations[n, labels.losses[n].argmin()] for n, q in enumerate(labels.questions)}
        if all(q.id in best for q in questions) and labels.combinations.shape[2] == num_frames:
            choices["oracle"] = [best[q.id].astype(int) for q in questions]

    answer_scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
    names = list(choices)
    combinations = [[choices[name][n] for name in names] for n in range(len(questions))]
    answers = list(answer_scorer(lambda video: answer_scorer.features(frames[video]), questions, combinations))
    right = {name: np.array([a.right[i] for a in answers]) for i, name in enumerate(names)}
    losses = {name: np.array([a.losses[i] for a in answers]) for i, name in enumerate(names)}
    types = np.array([q.type for q in questions])
    sorted_types = sorted(set(types.tolist()))
    print(f"{'':<12}{'all':>8}" + "".join(f"{type_:>9}" for type_ in sorted_types) + f"{'loss':>9}{'p':>9}")
    for name in names:
        p = mcnemar(right[name], right["voyager"]) if name != "voyager" else float("nan")
        print(f"{name:<12}{100 * right[name].mean():8.1f}"
              + "".join(f"{100 * right[name][types == type_].mean():9.1f}" for type_ in sorted_types)
              + f"{losses[name].mean():9.3f}{p:9.1e}")
    seeds = [right[name].mean() for name in names if name.startswith("voyager")]
    print(json.dumps({
        "accuracy": {name: round(float(right[name].mean()), 4) for name in names},
        "voyager_mean": float(np.mean(seeds)), "voyager_sd": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        "p": {name: mcnemar(right[name], right["voyager"]) for name in names if not name.startswith("voyager")},
        "questions": len(questions), "candidates": count, "frames": num_frames,
        "ms_per_question": round(1000 * float(np.median(latency["voyager"])), 2)}))


if __name__ == "__main__":
    main()
