"""Compares ways to draw K combinations of T of M frames: tokens, fairness, and what they tell of single frames.

    python benchmarks/video_combinations.py [--settings 16,4,64 64,8,64 128,8,64] [--questions=2000] [--quick]

For every setting and way (one by one; nested, see `combinations.group_sizes`; deeper, a binary tree; as few: one by
one, but so few that a Video-LLM reads about as many tokens as for the nested ones) over many questions:

    tokens       tokens of frames that a Video-LLM reads when common beginnings are read once, in % of those without
    frame        largest deviation of a candidate's inclusion from T / M, in %, with its standard error
    pair         the same for pairs of candidates; the largest of many, so it is compared with that of the first way
    within       standard deviation of a candidate's count within a question, in % of its mean: first and last quarter
    never        share of candidates that a question never sees, in %
    known        share of the variance of single frames' effects that the losses of a question explain, if effects are
                 independent, add up, and the noise of a loss is as large as the effects together: all, first, last
                 quarter of the candidates

The last line is JSON.
"""

import argparse
import json

import numpy as np

from video.voyager import combinations as drawing
from video.voyager.combinations import combinations


def deeper(num_frames: int) -> list[int]:
    """Returns the sizes of groups in a binary tree, see `combinations.group_sizes`."""
    return [2 ** (num_frames - length) for length in range(1, num_frames + 1)]


def measure(candidates: int, num_frames: int, count: int, questions: int, nested: bool) -> dict:
    counts, pairs = np.zeros((questions, candidates)), np.zeros((candidates, candidates))
    prefixes, known = 0, np.zeros(candidates)
    for question in range(questions):
        sample = combinations(candidates, num_frames, count, name=str(question), nested=nested)
        prefixes += sum(len(np.unique(sample[:, :length], axis=0)) for length in range(1, num_frames + 1))
        shown = np.zeros((len(sample), candidates))
        np.put_along_axis(shown, sample, 1.0, axis=1)
        counts[question] = shown.sum(axis=0)
        pairs += shown.T @ shown
        # Effects N(0, 1); a loss is their mean over the combination, and noise of the variance 1 / T; losses are
        # compared within a question only, so their mean is unknown.
        design = (shown - shown.mean(axis=0)) / num_frames
        known += 1 - np.diag(np.linalg.inv(np.eye(candidates) + num_frames * design.T @ design))
    mean = count * num_frames / candidates
    share, quarter = counts.mean(axis=0) / mean, candidates // 4
    worst = np.abs(share - 1).argmax()
    upper = pairs[np.triu_indices(candidates, 1)] / questions
    expected = count * num_frames * (num_frames - 1) / candidates / (candidates - 1)
    known /= questions
    within = counts.std(axis=0) / mean
    percent = lambda *values: [round(100 * float(value), 1) for value in values]  # noqa: E731
    return {
        "tokens": percent(prefixes / questions / count / num_frames)[0],
        "frame": percent(share[worst] - 1, counts[:, worst].std() / mean / questions**0.5),
        "pair": percent(np.abs(upper / expected - 1).max(), (upper / expected - 1).std()),
        "within": percent(within[:quarter].mean(), within[-quarter:].mean()),
        "never": percent((counts == 0).mean())[0],
        "known": percent(known.mean(), known[:quarter].mean(), known[-quarter:].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["16,4,64", "64,8,64", "128,8,64"], help="M,T,K")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="one setting, few questions: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.settings, arguments.questions = ["16,4,64"], 40
    results, tokens, usual = {}, {}, drawing.group_sizes
    for setting in arguments.settings:
        candidates, num_frames, count = map(int, setting.split(","))
        for way in ("one by one", "nested", "deeper", "as few"):
            if way == "as few":
                count = round(count * tokens["nested"] / tokens["one by one"])
            drawing.group_sizes = deeper if way == "deeper" else usual
            result = measure(candidates, num_frames, count, arguments.questions, way in ("nested", "deeper"))
            results[f"{setting} {way}"], tokens[way] = result, result["tokens"]
            print(f"{setting:10} {way:11}", *(f"{name} {value}" for name, value in result.items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
