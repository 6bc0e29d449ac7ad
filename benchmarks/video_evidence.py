"""Does it matter which frames a Video-LLM sees, and does Frame-Voyager find them?

    python benchmarks/video_evidence.py --video_llm=RUN --voyager=RUN [RUN ...] --towers=RUN --frame_store=DIR
        --questions=FILE [--candidates=16] [--frames=4] [--limit=300] [--labels=DIR]

One frozen Video-LLM answers held-out questions with T of M frames chosen by each selector; its answer is the option
with the highest likelihood. `oracle` is the combination with the lowest loss on the right answer (with --labels, where
all combinations were computed): it knows the answer, and is a bound, not a rival. `random` is a combination at random,
`evidence` has frames from the moments that matter. Accuracy by type of question; against Frame-Voyager an exact McNemar
test on the same questions. Several runs of Frame-Voyager are seeds: mean and standard deviation over them, the test on
the first. The last line is JSON.
"""

import argparse
import collections
import json
import time

import numpy as np
import scipy.stats

from video.decode import FrameStore
from video.frame_choice import rules
from video.frame_choice.scorers import Similarity, Voyager
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.llm.training_rows import showing
from video.questions import read_questions
from video.voyager.loss_labels import read_labels


def mcnemar(a, b) -> float:
    """Two-sided exact p of equally many questions that only one answers."""
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
    count, chosen = arguments.candidates, arguments.frames
    places = rules.even(store.candidates, count)
    frames = {q.video: store.frames([store.row(q.video)])[0][places] for q in questions}
    rng = np.random.default_rng(0)

    similarity = Similarity(arguments.towers)
    close = [similarity(q.video, frames[q.video], q.question) for q in questions]
    choices = {
        "uniform": [rules.even(count, chosen) for _ in questions],
        "random": [np.sort(rng.choice(count, chosen, replace=False)) for _ in questions],
        "similarity": [rules.top(scores, chosen) for scores in close],
        "bolt": [rules.bolt(scores, chosen) for scores in close],
        "aks": [rules.aks(scores, chosen) for scores in close],
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
            choices[name].append(rules.top(rewards, chosen))
    if any(q.evidence for q in questions):
        choices["evidence"] = []
        for question in questions:
            shown = [int(p[len(p) // 2]) for p in showing(question, store.times[store.row(question.video)][places])]
            rest = [p for p in rules.even(count, chosen).tolist() if p not in shown]
            choices["evidence"].append(np.unique([*shown[:chosen], *rest[: max(chosen - len(set(shown)), 0)]]))
    if arguments.labels:
        labels = read_labels(arguments.labels, arguments.questions)
        best = {q.id: labels.combinations[n, labels.losses[n].argmin()] for n, q in enumerate(labels.questions)}
        questions_known = [q for q in questions if q.id in best]
        if len(questions_known) == len(questions) and labels.combinations.shape[2] == chosen:
            choices["oracle"] = [best[q.id].astype(int) for q in questions]

    answering = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
    names = list(choices)
    combos = [[choices[name][n] for name in names] for n in range(len(questions))]
    answers = list(answering(lambda video: answering.features(frames[video]), questions, combos))
    right = {name: np.array([a.right[i] for a in answers]) for i, name in enumerate(names)}
    losses = {name: np.array([a.losses[i] for a in answers]) for i, name in enumerate(names)}
    kinds = sorted({q.type for q in questions})
    of = np.array([q.type for q in questions])
    print(f"{'':<12}{'all':>8}" + "".join(f"{kind:>9}" for kind in kinds) + f"{'loss':>9}{'p':>9}")
    for name in names:
        p = mcnemar(right[name], right["voyager"]) if name != "voyager" else float("nan")
        print(f"{name:<12}{100 * right[name].mean():8.1f}"
              + "".join(f"{100 * right[name][of == kind].mean():9.1f}" for kind in kinds)
              + f"{losses[name].mean():9.3f}{p:9.1e}")
    seeds = [right[name].mean() for name in names if name.startswith("voyager")]
    print(json.dumps({
        "accuracy": {name: round(float(right[name].mean()), 4) for name in names},
        "voyager_mean": float(np.mean(seeds)), "voyager_sd": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        "p": {name: mcnemar(right[name], right["voyager"]) for name in names if not name.startswith("voyager")},
        "questions": len(questions), "candidates": count, "frames": chosen,
        "ms_per_question": round(1000 * float(np.median(latency["voyager"])), 2)}))


if __name__ == "__main__":
    main()
