"""lmms-eval itself, with its tasks of Video-MME and MLVU on two small videos, shows a model the chosen frames alone.

Skipped where lmms-eval is not installed: it is no requirement, and needs PyTorch.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_pretrain.errors import InputError
from tests.video.conftest import write_grey
from video.export_frames import ExportFramesConfig
from video.export_frames import main as export_frames
from video.frame_choice.scores import Scores
from video.frame_choice.selector import Selector
from video.select import SelectFramesConfig
from video.select import main as select_frames

lmms_eval = pytest.importorskip("lmms_eval.tasks")
from video.lmms_eval_plugin import ChosenFrames, ShortVideos  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]

# Rows as lmms-lab/Video-MME and sy1998/MLVU_dev have them.
VIDEO_MME = [
    {"video_id": f"00{n}", "duration": "short", "domain": "Knowledge", "sub_category": "Geography", "url": "",
     "videoID": f"video{n}", "question_id": f"00{n}-1", "task_type": "Counting Problem", "question": "How many?",
     "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "BC"[n]} for n in range(2)]
MLVU = [
    {"video_name": f"video{n}.mp4", "duration": 8.0, "question": f"Which {n}? \n(A) one\n(B) two",
     "candidates": ["one", "two"], "answer": "B", "task_type": "count", "question_id": f"Q{n}"} for n in range(2)]

# A model that answers with the brightness of the frames it is shown, as a model that takes visuals and one that takes
# messages. The letter before it is the answer that the tasks read.
MODEL = '''
import json, os
import av
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

MANIFESTS = [ModelManifest("seer", simple_class_path="seer.Seer"),
             ModelManifest("talker", chat_class_path="seer.Talker")]

class Seer(lmms):
    def __init__(self, letter="B", **kwargs):
        super().__init__()
        self.letter = letter

    def media(self, request):
        context, kwargs, doc_to_visual, doc_id, task, split = request.args
        return doc_to_visual(self.task_dict[task][split][doc_id])

    def generate_until(self, requests):
        answers = []
        with open(os.environ["SEEN"], "a") as file:
            for request in requests:
                (path,) = self.media(request)
                with av.open(path) as container:
                    levels = [float(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
                record = {"task": request.task_name, "document": request.doc_id, "levels": levels}
                file.write(json.dumps(record) + "\\n")
                answers.append(self.letter)
        return answers

    generate_until_multi_round = loglikelihood = None

class Talker(Seer):
    is_simple = False

    def media(self, request):
        context, doc_to_messages, kwargs, doc_id, task, split = request.args
        (message,) = doc_to_messages(self.task_dict[task][split][doc_id])
        assert message["content"][-1]["type"] == "text" and "A" in message["content"][-1]["text"]
        return [part["url"] for part in message["content"] if part["type"] == "video"]
'''


class Brightest:
    """Scores frames by their brightness."""

    size, resize_mode, settings = 16, "stretch", "brightest"

    def __call__(self, video, frames, times, question):
        return Scores(frames[:, 8, 8, 0].astype(np.float32))


def entry_points(folder, name, lines):
    """Makes a folder look like an installed package with entry points."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\n" + lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos where lmms-eval looks for them, its tasks with local files of questions, and chosen frames."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    videos = folder / "home/videomme/data"
    videos.mkdir(parents=True)
    (folder / "home/mlvu").symlink_to(videos)
    for n in range(2):
        write_grey(videos / f"video{n}.mp4", "libx264", np.arange(40 - 10 * n) / 5, 5, 5)
    (folder / "questions.json").write_text(json.dumps(VIDEO_MME + MLVU))
    select_frames(SelectFramesConfig(
        questions=folder / "questions.json", videos=videos, output=folder / "selected", processes=1,
        selector=Selector(Brightest(), candidates=10, num_frames=3), compilation_cache=None))
    export_frames(ExportFramesConfig(selected=folder / "selected", videos=videos, output=folder / "exported"))
    (folder / "tasks").mkdir()
    for task, rows in (("videomme", VIDEO_MME), ("mlvu_dev", MLVU)):
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), folder / f"{task}.parquet")
        (shipped,) = pathlib.Path(lmms_eval.__file__).parent.glob(f"*/{task}.yaml")
        (folder / f"tasks/{task}_local.yaml").write_text(
            f"include: {shipped}\ntask: {task}_local\ndataset_path: parquet\n"
            f"dataset_kwargs:\n  data_files:\n    test: {folder}/{task}.parquet\n")
    (folder / "seer.py").write_text(MODEL)
    entry_points(folder, "seer", "models = seer:MANIFESTS\n")
    entry_points(folder, "chosen", "chosen_frames = video.lmms_eval_plugin:MANIFEST\n")
    return folder


# Evaluates models on both tasks in one process, as importing lmms-eval takes seconds.
EVALUATE = '''
import json, os, pathlib, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

ended = {}
for name, model, arguments in json.loads(sys.argv[1]):
    seen = pathlib.Path(os.environ["SEEN"])
    seen.write_text("")
    error = results = None
    try:
        tasks = TaskManager(include_path="tasks", include_defaults=False, model_name=model)
        results = simple_evaluate(
            model=model, model_args=arguments, tasks=["videomme_local", "mlvu_dev_local"], task_manager=tasks,
            batch_size=1, bootstrap_iters=0)["results"]
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    ended[name] = error, results, [json.loads(line) for line in seen.read_text().splitlines()]
pathlib.Path("ended.json").write_text(json.dumps(ended, default=str))
'''


@pytest.fixture(scope="module")
def ended(folder):
    """Returns case -> the error, the tasks' metrics, and (task, document, levels of frames) of all that a model saw."""
    index = json.loads((folder / "exported/index.json").read_text())
    del index["videos"]["video1.mp4"][-1]
    (folder / "fewer").mkdir()
    (folder / "fewer/index.json").write_text(json.dumps(index))
    cases = [
        ("seer", "chosen_frames", "frames=exported,model=seer,letter=C"),
        ("talker", "chosen_frames", "frames=exported,model=talker,letter=C"),
        ("whole", "seer", "letter=C"),
        ("fewer", "chosen_frames", "frames=fewer,model=seer"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(cases)], capture_output=True, text=True, cwd=folder, env={
            "PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HOME": str(folder / "home"), "SEEN": str(folder / "seen"),
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": ":".join([str(folder), str(ROOT), *sys.path[1:]])})
    assert (folder / "ended.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "ended.json").read_text())


@pytest.mark.parametrize("model", ["seer", "talker"])
def test_a_model_sees_the_chosen_frames(ended, model):
    error, results, seen = ended[model]
    assert not error and len(seen) == 4
    for record in seen:
        # The last three of ten candidates, evenly spread, are the brightest.
        expected = [20 + 4 * int((k + 0.5) * (40 - 10 * record["document"]) / 10) for k in (7, 8, 9)]
        np.testing.assert_allclose(record["levels"], expected, atol=2)
    # One of the two answers to Video-MME's questions is C, none of those to MLVU's.
    scores = {task: [value for name, value in metrics.items() if "score" in name and isinstance(value, float)]
              for task, metrics in results.items()}
    assert 50.0 in scores["videomme_local"] and set(scores["mlvu_dev_local"]) == {0.0}, results


def test_the_same_model_sees_whole_videos_without_the_plugin(ended):
    error, _, seen = ended["whole"]
    assert not error and sorted(len(record["levels"]) for record in seen) == [30, 30, 40, 40]


def test_a_question_without_frames_ends_the_evaluation_before_the_model_answers(ended):
    error, results, seen = ended["fewer"]
    assert error.startswith("InputError: fewer: no frames were chosen from ") and "'Which 1? \\n(A) one" in error
    assert not results and not seen


def test_short_videos_are_found_by_name_and_question(tmp_path):
    def write(videos):
        (tmp_path / "index.json").write_text(json.dumps({"videos": {
            video: [{"question_id": asked, "question": asked, "file": f"{asked}.mp4"} for asked in questions]
            for video, questions in videos.items()}}))
        return ShortVideos(str(tmp_path))

    short = write({"a/v.mp4": ["Which?", "Which?\nNow?"], "b/w.mp4": ["Which?"]})
    assert short.find("/other/v.mkv", "Which?\n(A) one") == str(tmp_path / "Which?.mp4")
    assert short.find("v.mp4", "Which?\nNow?\n(A) one") == str(tmp_path / "Which?\nNow?.mp4")
    for video, question in (("x.mp4", "Which?"), ("v.mp4", "Which?A"), ("v.mp4", "Which")):
        with pytest.raises(InputError, match=f"no frames were chosen from {video} for "):
            short.find(video, question)
    with pytest.raises(InputError, match=r"b/v\.mp4 and a/v\.mp4 have the same name and question"):
        write({"a/v.mp4": ["Which?"], "b/v.mp4": ["Which?"]})
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(InputError, match=r"no folder of video\.export_frames"):
        ShortVideos(str(tmp_path))


def test_arguments_that_are_missing():
    for arguments in ("model=seer", "frames=x", "", "frames=x,models=seer"):
        with pytest.raises(InputError, match="--model_args needs frames=FOLDER and model=NAME"):
            ChosenFrames.create_from_arg_string(arguments)


def test_setup_declares_the_entry_point():
    declared = 'entry_points={"lmms_eval.models": ["chosen_frames = video.lmms_eval_plugin:MANIFEST"]}'
    assert declared in (ROOT / "setup.py").read_text()
