"""Frame-Voyager from rendering to selection, as a user runs it: a broken video, kill -9, wrong inputs."""

import itertools
import json

import jax
import numpy as np
import pytest

from tests.e2e.conftest import REPOSITORY, lines, run, started
from tests.e2e.hosts import run_job
from video.frame_choice.selector import Selector
from video.frames.frame_store import FrameStore
from video.frames.row_store import RowStore
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.questions import read_questions
from video.voyager.frame_features import FeatureStore
from video.voyager.frame_voyager import bottom_layers
from video.voyager.loss_labels import read_labels

# Over the files in gin/video: paths, and sizes for seconds instead of minutes.
PATHS = """
WORLD = 'moments'
CANDIDATES = 12
VIDEOS = 'videos'
LLM_QUESTIONS = 'videos/llm.jsonl'
LLM_CAPTIONS = 'videos/llm_captions.jsonl'
LABEL_QUESTIONS = 'videos/labels.jsonl'
VALIDATION = 'videos/validation.jsonl'
VALIDATION_CAPTIONS = 'videos/validation_captions.jsonl'
TEST = 'videos/test.jsonl'
TOKENIZER = 'videos/tokenizer.model'
FRAMES = 'frames'
VIDEO_LLM = 'llm'
LABELS = 'labels'
VALIDATION_LABELS = 'validation_labels'
VOYAGER = 'voyager'
TOWERS = 'towers'
SELECTED = 'selected'
EVALUATION = 'evaluation'
"""
SMALL = {
    "synthetic": """
synthetic.llm_videos = 4
synthetic.label_videos = 5
synthetic.validation_videos = 3
synthetic.test_videos = 2
synthetic.seconds = 6
synthetic.shown = 0.5
synthetic.fps = 6
synthetic.size = 32
""",
    "decode": "decode.size = 24\n",
    "train": """
STEPS = 6
train_video.batch_size = 2
train_video.frames = 4
train_video.eval_questions = 6
train_video.eval_every = 3
train_video.checkpoint_every = 3
train_video.compilation_cache = None
train_video.towers = None
warmup_cosine.warmup_steps = 2
VisionConfig.image_size = 24
VisionConfig.embed_dim = 24
VisionConfig.n_layers = 1
VisionConfig.mlp_dim = 48
DecoderConfig.embed_dim = 32
DecoderConfig.n_layers = 3
DecoderConfig.n_heads = 2
DecoderConfig.n_kv_heads = 2
DecoderConfig.head_dim = 16
DecoderConfig.mlp_dim = 48
DecoderConfig.unroll = 1
VisionConfig.unroll = 1
""",
    "label": "label.candidates = 6\nlabel.num_frames = 2\nlabel.feature_tokens = 1\nlabel.compilation_cache = None\n",
    "train_voyager": """
STEPS = 6
train_voyager.batch_size = 4
train_voyager.eval_every = 3
train_voyager.checkpoint_every = 3
train_voyager.compilation_cache = None
warmup_cosine.warmup_steps = 2
""",
    "train_towers": """
STEPS = 4
train_towers.batch_size = 8
train_towers.eval_every = 2
train_towers.checkpoint_every = 2
train_towers.compilation_cache = None
warmup_cosine.warmup_steps = 2
VisionConfig.image_size = 24
VisionConfig.embed_dim = 24
VisionConfig.n_layers = 1
VisionConfig.mlp_dim = 48
VisionConfig.unroll = 1
""",
    "evaluate": """
evaluate_frames.settings = [(6, 2), (12, 3)]
evaluate_frames.resamples = 50
evaluate_frames.compilation_cache = None
""",
    "select": """
Selector.candidates = 10
Selector.num_frames = 3
select_frames.sheets = 1
select_frames.compilation_cache = None
""",
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a stage in the folder of this module's runs."""
    folder = tmp_path_factory.mktemp("video")
    for name, text in SMALL.items():
        (folder / f"{name}.gin").write_text(
            f"include 'gin/video/{name}.gin'\n{PATHS}{text}")

    def stage(name, *flags):
        return run(f"video.{name}", f"--gin_file={name}.gin", *flags, folder=folder)

    stage.folder = folder
    return stage


def good(ended, kept=""):
    """Returns both outputs of a command that ended without errors; `kept`: path of a store that it found complete."""
    assert ended.code == 0 and "Warning" not in ended.err, ended
    assert not kept or f"{kept}: made before from the same inputs and settings, kept\n" in ended.err, ended
    return ended.out + ended.err


@pytest.fixture(scope="module")
def trained(command):
    """Videos, two of them broken (one to train the Video-LLM on, one to label), their frames, and a Video-LLM."""
    good(command("synthetic"))
    for path in (command.folder / "videos/videos/v00002.mp4", command.folder / "videos/videos/v00006.mp4"):
        path.write_bytes(path.read_bytes()[:500])
    said = good(command("decode"))
    assert said.count("rejected: ") == 2 and "of 12 videos, 2 rejected" in said
    assert "12 of 14 videos" not in said
    good(command("decode"), kept="frames")
    assert "done: 6 steps" in good(command("train"))
    return command.folder


@pytest.fixture(scope="module")
def labelled(command, trained):
    validation = ("--gin.LABELS=validation_labels", "--gin.LABEL_QUESTIONS=videos/validation.jsonl")
    assert "combinations of 2 out of 6 frames" in good(command("label"))
    good(command("label", *validation))
    return trained


def test_labels_are_whole(labelled):
    found = read_labels(labelled / "labels", labelled / "videos/labels.jsonl")
    assert found.losses.shape == (len(found), 15) and found.combinations.shape == (len(found), 15, 2)
    assert found.features.shape == (6, 1, 32) and len(found.features.row) == 4
    store = FrameStore(labelled / "frames")
    for video, row in found.features.row.items():
        assert found.features.durations[row] == store.durations[store.row(video)] > 5
        np.testing.assert_array_equal(found.features.times[row], store.times[store.row(video)][1::2])
    assert found.dropped["rejected"] > 0 and np.isfinite(found.losses).all()
    strict = read_labels(labelled / "labels", labelled / "videos/labels.jsonl",
                         max_mean_loss=float(np.median(found.losses.mean(axis=1))))
    assert strict.dropped["mean loss too high"] == len(found) - len(strict) > 0


def test_labelling_killed_and_on_other_devices_gives_the_same(command, labelled):
    flags = ("--gin_file=label.gin", "--gin.LABELS=killed")
    rows = labelled / "killed/losses/rows.jsonl"
    with started("video.label", *flags, folder=labelled, devices=2) as process:
        process.wait_for(lambda: rows.exists() and rows.read_text().count('"row"') >= 3)
    kept = rows.read_text().count('"row"')
    assert f"{kept} of " in good(run("video.label", *flags, folder=labelled))
    whole, killed = (RowStore(labelled / name / "losses", "losses") for name in ("labels", "killed"))
    assert whole.rows == killed.rows
    np.testing.assert_allclose(killed.read("losses"), whole.read("losses"), atol=1e-4)
    np.testing.assert_array_equal(killed.read("combinations"), whole.read("combinations"))
    whole, killed = (FeatureStore(labelled / name / "features") for name in ("labels", "killed"))
    assert whole.row == killed.row
    rows = list(whole.row.values())
    np.testing.assert_allclose(killed.features_of(rows), whole.features_of(rows), atol=0.02)  # bfloat16


@pytest.mark.slow
def test_shuffled_questions_several_sizes_and_a_second_round(command, labelled):
    questions = (labelled / "videos/labels.jsonl").read_text().splitlines()
    np.random.default_rng(0).shuffle(questions)
    (labelled / "videos/shuffled.jsonl").write_text("\n".join(questions) + "\n")
    flags = ("--gin.LABELS=shuffled", "--gin.LABEL_QUESTIONS=videos/shuffled.jsonl")
    said = good(command("label", *flags, "--gin.label.num_frames=(1, 2)", "--gin.label.feature_tokens=4",
                        "--gin.label.limit=14", "--gin.label.max_combinations=12", "--gin.label.guided=0.5"))
    assert "combinations of 1 or 2 out of 6 frames" in said
    one = read_labels(labelled / "labels", labelled / "videos/labels.jsonl")
    both = read_labels(labelled / "shuffled", labelled / "videos/shuffled.jsonl")
    assert len(both) + both.dropped["rejected"] == 14 and len({question.video for question in both.questions}) > 2
    np.testing.assert_array_equal(both.combinations[0, :6], [[frame, 6] for frame in range(6)])
    row = {question.id: row for row, question in enumerate(one.questions)}
    rows = [row[question.id] for question in both.questions]
    pairs = list(itertools.combinations(range(6), 2))
    assert one.combinations[0].tolist() == [list(pair) for pair in pairs]
    for found, losses, of_all in zip(both.combinations[:, 6:].tolist(), both.losses[:, 6:], one.losses[rows]):
        assert len({tuple(pair) for pair in found}) == 6  # 3 drawn at random, 3 around the best
        np.testing.assert_allclose(losses, of_all[[pairs.index(tuple(pair)) for pair in found]], atol=1e-4)
    assert both.features.shape == (6, 4, 32)
    np.testing.assert_allclose(both.features.features_of(both.video).mean(axis=2, keepdims=True),
                               one.features.features_of(one.video[rows]), atol=0.02)  # bfloat16
    said = good(command("train_voyager", *flags, "--gin.VOYAGER=mixed", "--gin.train_voyager.frame_tokens=1"))
    assert "12 combinations of 1 or 2 out of 6 frames" in said and "pairs in order" in said
    ended = command("train_voyager", *flags, "--gin.VOYAGER=other", "--gin.train_voyager.frame_tokens=None")
    assert ended.code == 1 and "must be 1 or the 1 that validation_labels stores" in ended.err


@pytest.mark.slow
def test_two_processes_label_the_same_and_share_the_work(labelled):
    ended = run_job("video.label", "--gin_file=label.gin", "--gin.LABELS=two", folder=labelled)
    assert [process.code for process in ended] == [0, 0], ended
    assert "tokens on 2 devices" in ended[0].err and "questions" not in ended[1].err
    whole, two = (RowStore(labelled / name / "losses", "losses") for name in ("labels", "two"))
    assert whole.rows == two.rows and whole.rejected == two.rejected
    np.testing.assert_allclose(two.read("losses"), whole.read("losses"), atol=1e-5)
    np.testing.assert_array_equal(two.read("combinations"), whole.read("combinations"))
    whole, two = (FeatureStore(labelled / name / "features") for name in ("labels", "two"))
    assert whole.row == two.row
    rows = list(whole.row.values())
    np.testing.assert_allclose(two.features_of(rows), whole.features_of(rows), atol=0.02)  # bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name, configurable, macro", [
    ("train", "train_video", "VIDEO_LLM"), ("train_voyager", "train_voyager", "VOYAGER"),
    ("train_towers", "train_towers", "TOWERS"),
])
def test_two_processes_train_the_same(labelled, name, configurable, macro):
    flags = (f"--gin_file={name}.gin", "--gin.STEPS=4", f"--gin.{configurable}.log_every=1")
    alone = run(f"video.{name}", *flags, f"--gin.{macro}=alone_{name}", folder=labelled)
    both = run_job(f"video.{name}", *flags, f"--gin.{macro}=both_{name}", folder=labelled)
    assert [alone.code, *(process.code for process in both)] == [0, 0, 0], both
    for kind in ("train", "eval"):
        one, two = (lines(labelled / f"{folder}_{name}", kind) for folder in ("alone", "both"))
        assert len(one) == len(two) > 1
        for a, b in zip(one, two):
            for key in ("loss", "grad_norm", "accuracy", "retrieval_accuracy", "kendall", "regret"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-4), (kind, a["step"], key)


def test_parts_of_a_video_llm_are_those_of_the_whole(trained):
    whole, tower = load_video_llm(trained / "llm"), load_video_llm(trained / "llm", layers=0)
    bottom = load_video_llm(trained / "llm", layers=2, frames=False)
    assert set(bottom.params) == {"decoder"} and set(tower.params) == {"frames", "decoder"}
    assert set(tower.params["decoder"]) == {"embedding"}
    assert bottom.fingerprint() == tower.fingerprint() == whole.fingerprint()
    jax.tree.map(np.testing.assert_array_equal, tower.params["frames"], whole.params["frames"])
    decoder, params = bottom_layers(bottom.config, bottom.params, 2)
    expected, expected_params = bottom_layers(whole.config, whole.params, 2)
    assert decoder == expected and decoder.n_layers == 2
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    assert bottom.params["decoder"]["layers"]["mlp"]["up"].shape[0] == 2  # of 3


def test_other_inputs_into_the_same_folder_are_refused(command, labelled):
    ended = command("label", "--gin.label.num_frames=3")
    kept, error = ended.err.splitlines()
    assert ended.code == 1 and kept.startswith("labels/features: made before"), ended
    assert "labels/losses: exists, made with " in error and "frames = 2 (now 3)" in error


@pytest.fixture(scope="module")
def voyager(command, labelled):
    """What the training of Frame-Voyager says."""
    return good(command("train_voyager"))


def test_from_losses_to_selected_frames(command, labelled, voyager):
    assert "combinations of 2 out of 6 frames" in voyager and "pairs in order" in voyager
    assert "selected: 3 of 10 frames for " in good(command("select"))
    selected = json.loads((labelled / "selected/selected.json").read_text())
    numbers = json.loads((labelled / "selected/selected_frames.json").read_text())
    asked = [json.loads(line) for line in (labelled / "videos/test.jsonl").read_text().splitlines()]
    assert len(numbers) == len(asked)
    for question, own in zip(asked, numbers):
        (entry,) = [entry for entry in selected[question["video"]] if entry["question_id"] == question["id"]]
        assert entry["question"] == question["question"]
        assert len(own) == 3 and own == sorted(set(own)) and own[0] >= 0 and own[-1] < 36
        np.testing.assert_array_equal(np.floor(np.array(entry["frames"]) * 6 + 1e-3), own)
    (sheet,) = (labelled / "selected/sheets").glob("*.png")
    assert sheet.stat().st_size > 10_000
    even = Selector(None, candidates=10, num_frames=3).select(labelled / "videos" / asked[0]["video"], "Which?")
    assert even == [5, 19, 30]


@pytest.mark.slow
def test_similarity_of_own_towers(command, labelled):
    assert "right caption of 8" in good(command("train_towers"))
    good(command("select", "--gin.Selector.scorer=@Similarity()", "--gin.Similarity.run_dir=towers",
                 "--gin.Selector.choice=aks", "--gin.SELECTED=aks", "--gin.select_frames.limit=4",
                 "--gin.select_frames.sheets=0"))
    found = json.loads((labelled / "aks/selected_frames.json").read_text())
    questions = (labelled / "videos/test.jsonl").read_text().splitlines()
    assert sorted(map(len, found)) == [0] * (len(questions) - 4) + [3] * 4
    # They start a Video-LLM of the same shape, however its tower is computed.
    flags = ("--gin.VIDEO_LLM=from_towers", "--gin.train_video.towers=towers", "--gin.STEPS=2")
    refused = command("train", *flags, "--gin.VisionConfig.embed_dim=48")
    assert (refused.code, refused.err) == (1, "error: train_video.towers = 'towers': the vision tower of towers has "
                                              "embed_dim=24, this one 48\n")
    assert "done: 2 steps" in good(command("train", *flags, "--gin.VisionConfig.attention=blockwise",
                                           "--gin.warmup_cosine.warmup_steps=1"))


def test_accuracy_with_the_frames_of_every_chooser(command, labelled, voyager):
    """The answers in the table are those that the Video-LLM gives to the frames that are listed beside them."""
    good(command("train_towers", "--gin.TOWERS=rivals"))
    said = good(command("evaluate", "--gin.TOWERS=rivals"))
    report = (labelled / "evaluation/report.md").read_text()
    assert report in said and "## 2 of 6 frames" in report and "## 3 of 12 frames" in report
    results = json.loads((labelled / "evaluation/results.json").read_text())
    answers = [json.loads(line) for line in (labelled / "evaluation/answers/seed0.jsonl").read_text().splitlines()]
    questions = {question.id: question for question in read_questions(labelled / "videos/test.jsonl")}
    assert results["questions"] == len(answers) == len(questions)
    llm, store = load_video_llm(labelled / "llm"), FrameStore(labelled / "frames")
    scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
    methods = {"uniform", "random", "similarity", "BOLT", "AKS", "MMR", "MDP3", "FOCUS", "Frame-Voyager",
               "frames that matter"}
    right = {}
    for line in answers[:3]:
        assert {(choice[0], choice[1]) for choice in line["choices"]} == {(6, 2), (12, 3)}
        assert {choice[2] for choice in line["choices"]} == methods
        features = scorer.features(*store.video(line["video"]))
        for candidates, count, _, frames, is_right, loss in line["choices"]:
            assert len(set(frames)) == count and set(frames) <= set(range(1, 12, 2) if candidates == 6 else range(12))
            (alone,) = scorer(lambda video, features=features: features, [questions[line["id"]]], [[frames]])
            assert alone.right[0] == is_right and alone.losses[0] == pytest.approx(loss, abs=1e-3)
    for line in answers:
        for candidates, _, method, _, is_right, _ in line["choices"]:
            right.setdefault((candidates, method), []).append(is_right)
    for setting in results["settings"]:
        for method, row in setting["methods"].items():
            assert row["accuracy"]["all"]["value"] == pytest.approx(np.mean(right[setting["candidates"], method]))
    assert (labelled / "evaluation/cost.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_hybrid_is_trained_evaluated_and_needs_its_towers(command, labelled):
    good(command("train_towers", "--gin.TOWERS=hybrid_towers"))
    trained = good(command("train_voyager", "--gin.VOYAGER=hybrid", "--gin.train_voyager.towers=hybrid_towers",
                           "--gin.train_voyager.frame_store=frames"))
    assert "pairs in order" in trained
    good(command("evaluate", "--gin.TOWERS=hybrid_towers", "--gin.EVALUATION=with_hybrid", "--gin.Trial.voyagers=[]",
                 "--gin.Trial.hybrids=['hybrid']"))
    results = json.loads((labelled / "with_hybrid/results.json").read_text())
    assert "hybrid of Frame-Voyager and similarity" in results["settings"][0]["methods"]
    selected = good(command("select", "--gin.VOYAGER=hybrid", "--gin.Voyager.towers=hybrid_towers",
                            "--gin.SELECTED=by_hybrid"))
    assert "selected: 3 of 10 frames for " in selected.replace("by_hybrid", "selected")
    ended = command("select", "--gin.VOYAGER=hybrid", "--gin.SELECTED=other")
    assert ended.code == 1 and "hybrid: a hybrid, which needs Voyager.towers" in ended.err


@pytest.mark.parametrize("stage, flags, message", [
    ("train", ["--gin.VisionConfig.image_size=32", "--gin.VIDEO_LLM=other"], "frames of 24 pixels"),
    ("train", ["--gin.train_video.length=20", "--gin.VIDEO_LLM=other"], "sequences have 20"),
    ("label", ["--gin.label.candidates=40"], "candidates = 40, but the frame store has 12"),
    ("select", ["--gin.VIDEO_LLM=nowhere"], "nowhere/model.json: no such"),
    ("decode", ["--gin.TEST=nowhere.jsonl"], "files in one folder"),
])
def test_wrong_inputs_are_one_line(command, labelled, stage, flags, message):
    ended = command(stage, *flags)
    assert ended.code == 1 and message in ended.err and ended.err.count("\n") == 1
    assert not (labelled / "other").exists()


def test_the_gin_files_name_the_same_paths():
    """A path that gin/video/paths.gin gained has to be redirected here and for the other world too."""
    texts = [PATHS, *((REPOSITORY / f"gin/video/{name}.gin").read_text() for name in ("paths", "stories"))]
    here, paths, stories = ([line.split(" =")[0] for line in text.splitlines() if " = " in line] for text in texts)
    assert sorted(here) == sorted(paths) == sorted(stories)
