"""Accuracies by the frames that were shown: means, intervals by video, differences and the report, by plain loops."""

import itertools

import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from video.frame_choice.evaluation_tables import Answered, Cost, _cost_figure, summarise, write_report

METHODS = ("uniform", "similarity", "Frame-Voyager", "Frame-Voyager", "frames that matter")
CHANCES = {"uniform": 0.2, "frames that matter": 0.95}
VIDEOS = ["a", "a", "a", "b", "c", "c", "d"]
TYPES = ["count", "same", "count", "same", "count", "count", "same"]


def lines(seed):
    rng = np.random.default_rng(seed)
    return [{"id": str(n), "video": video, "type": type_, "choices": [
        [16, 4, method, [0, 3], bool(rng.random() < CHANCES.get(method, 0.6)), 0.5] for method in METHODS]}
        for n, (video, type_) in enumerate(zip(VIDEOS, TYPES))]


@pytest.fixture(scope="module")
def trials():
    return [lines(0), lines(1)]


@pytest.fixture(scope="module")
def results(trials):
    cost = {(16, 4, method): Cost(0.002, 16.0 if method in ("similarity", "Frame-Voyager") else 0.0)
            for method in METHODS}
    return summarise([Answered.from_lines(trial) for trial in trials], [cost, cost], [(16, 4)], 400, 3)


def test_accuracies_are_means_over_questions_and_seeds(trials, results):
    rows = results["settings"][0]["methods"]
    assert (results["questions"], results["videos"], results["trials"]) == (7, 4, 2)
    for method in set(METHODS):
        for name in ("all", "count", "same"):
            right = [choice[4] for trial in trials for line in trial for choice in line["choices"]
                     if choice[2] == method and name in ("all", line["type"])]
            assert rows[method]["accuracy"][name]["value"] == pytest.approx(np.mean(right))
    ours, other = rows["Frame-Voyager"], rows["similarity"]
    assert len(ours["of_seeds"]) == 4 and np.mean(ours["of_seeds"]) == pytest.approx(ours["accuracy"]["all"]["value"])
    assert other["less"]["same"]["value"] == pytest.approx(
        ours["accuracy"]["same"]["value"] - other["accuracy"]["same"]["value"])
    assert "less" not in ours


def test_intervals_resample_videos(trials, results):
    """Each resample draws as many videos as there are, with all their questions."""
    values = np.mean([[np.mean([c[4] for c in line["choices"] if c[2] == "Frame-Voyager"]) for line in trial]
                      for trial in trials], axis=0)
    names = sorted(set(VIDEOS))
    drawn = []
    for counts in np.random.default_rng(3).multinomial(4, [0.25] * 4, 400):
        questions = [values[n] for name, count in zip(names, counts) for _ in range(count)
                     for n, video in enumerate(VIDEOS) if video == name]
        drawn.append(np.mean(questions))
    accuracy = results["settings"][0]["methods"]["Frame-Voyager"]["accuracy"]["all"]
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]


def test_way_from_even_spacing_to_the_frames_that_matter(results):
    rows = results["settings"][0]["methods"]
    low, ours, high = (rows[name]["accuracy"]["all"]["value"]
                       for name in ("uniform", "Frame-Voyager", "frames that matter"))
    assert results["settings"][0]["way"]["value"] == pytest.approx((ours - low) / (high - low))


def test_report_shows_every_method(tmp_path, results):
    write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert "## 4 of 16 frames" in text and "7 questions on 4 videos, 2 Video-LLMs" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert set(METHODS) < set(rows)
    accuracy = results["settings"][0]["methods"]["similarity"]["accuracy"]["all"]
    assert f"| {100 * accuracy['value']:.1f} [{100 * accuracy['low']:.1f}, " in rows["similarity"]
    assert rows["similarity"].rstrip().endswith("| 16 | 2.0 |") and rows["uniform"].rstrip().endswith("|  |  |")
    assert (tmp_path / "cost.svg").stat().st_size > 1000 and (tmp_path / "cost.png").stat().st_size > 1000


def test_no_label_of_the_figure_covers_another(results):
    methods = results["settings"][0]["methods"]
    crowded = {f"like {name} {i}": row for i in range(4) for name, row in methods.items()}
    figure = _cost_figure([{**results["settings"][0], "methods": methods | crowded}])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert len(boxes) > 8 and all(above.y0 > below.y1 - 0.5 for below, above in itertools.pairwise(boxes))


def test_trials_must_answer_the_same_questions(trials):
    with pytest.raises(InputError, match="different questions"):
        summarise([Answered.from_lines(trials[0]), Answered.from_lines(trials[1][1:])], [{}, {}], [(16, 4)], 10, 0)
