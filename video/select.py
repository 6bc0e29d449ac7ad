"""Chooses the frames that a Video-LLM should see: `python -m video.select --gin_file=gin/video/select.gin`.

For every question T of M candidates are chosen by Frame-Voyager or one of its rivals. There is no common file format
for chosen frames, so they are written in both forms that are in use:

    OUT/selected.json         BOLT's: {video: [{"question_id", "question", "frames": [seconds]}]}, and "numbers" of them
    OUT/selected_frames.json  AKS's: a list of frame numbers for each question of the file, in its order, and [] for
                              those that no frames were chosen for
    OUT/sheets/<id>.png       with `sheets`: the candidates with the chosen ones marked, and their scores
    OUT/rejects.jsonl         {"id", "reason"} of questions whose video cannot be decoded
    OUT/provenance.json       the settings and inputs that the frames were chosen by

Of several processes, process 0 alone chooses. In Python: `video.frame_choice.selector`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import statistics
import time
import urllib.parse
from collections.abc import Iterable

import gin
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_atomic, write_json
from mlx_pretrain.parallel import cluster, hardware
from mlx_pretrain.reports.figures import save_figure
from video.frame_choice.contact_sheet import contact_sheet
from video.frame_choice.selector import Selection, Selector
from video.frames.reading import reading_notes, try_read_frames
from video.questions import Question, by_video, draw_questions, read_questions

# Bytes of a file name without its suffix; file systems take 255, and writing adds some for a moment.
_MAX_NAME_BYTES = 180
PROVENANCE = "provenance.json"
_CONTENTS = (PROVENANCE, "selected.json", "selected_frames.json", "rejects.jsonl", "sheets", "config.gin")


@gin.configurable("select_frames")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectFramesConfig:
    """Settings of `video.select`.

    Attributes:
      questions: file of `video.questions`; answers are neither needed nor shown to the selector.
      videos: folder of the videos; None: that of the questions.
      output: folder; kept where it was made from the same questions, videos and settings.
      overwrite: replaces an output of other settings or inputs, which is an error otherwise.
      selector: @Selector(); its scorer is @Voyager(), @Similarity() or @Embeddings().
      limit: number of questions, drawn at random from the file, the same ones every time; None: all.
      sheets: number of these questions with a contact sheet, evenly spread.
      processes: number of processes that decode.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    questions: str = gin.REQUIRED
    videos: str | None = None
    output: str = gin.REQUIRED
    overwrite: bool = False
    selector: Selector = gin.REQUIRED
    limit: int | None = None
    sheets: int = 0
    processes: int = 2
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"


def main(config: SelectFramesConfig) -> None:
    """Chooses frames for all questions of a file.

    Raises:
      InputError: questions or models are wrong, no video can be decoded, or the output was made from other inputs.
    """
    hardware.keep_compiled(config.compilation_cache)
    if not cluster.is_main():  # the selector's models were loaded by all: reading checkpoints takes the whole job
        return
    questions = read_questions(config.questions, answers=False)
    folder = epath.Path(config.videos or epath.Path(config.questions).parent)
    drawn = by_video(draw_questions(questions, config.limit))
    made_from = provenance("video.select", config, {
        "questions": sha256(config.questions), "videos": _file_sizes(folder / video for video in drawn)})
    for name in ("processes", "compilation_cache"):  # they change no result
        del made_from["settings"][name]
    recorded = read_folder_record(config.output, PROVENANCE, key=None)
    if is_current(config.output, recorded, made_from, overwrite=config.overwrite, contents=_CONTENTS):
        return
    with new_folder(config.output, PROVENANCE) as output:
        _select(config, questions, drawn, folder, output)
        gin_files.save_effective(output / "config.gin")
        write_json(output / PROVENANCE, made_from)


def _file_sizes(paths: Iterable[epath.Path]) -> str:
    """Returns a digest of the files' sizes in bytes: videos are too large to be hashed for every selection."""
    sizes = [path.stat().length if path.exists() else None for path in paths]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def _select(config: SelectFramesConfig, questions: list[Question], groups: dict[str, list[Question]],
            folder: epath.Path, output: epath.Path) -> None:
    """Chooses frames of the videos below `folder`, and writes all but the record to `output`."""
    selector = config.selector
    drawn = [question for on_video in groups.values() for question in on_video]
    sheets = min(config.sheets, len(drawn))
    with_sheet = {drawn[n * len(drawn) // config.sheets].id for n in range(sheets)}
    read = functools.partial(try_read_frames, size=selector.size, count=selector.candidates,
                             resize_mode=selector.resize_mode, key_frames=selector.key_frames)
    selections: dict[str, Selection] = {}
    rejects, spent = [], []
    with Workers(read, config.processes) as workers:
        items = ((video, str(folder / video)) for video in groups)
        for video, candidates in tqdm(workers.map(items), "videos", len(groups), disable=None):
            if isinstance(candidates, str):
                rejects += [{"id": question.id, "reason": candidates} for question in groups[video]]
                continue
            for note in reading_notes(video, candidates, selector.num_frames):
                cluster.log(f"note: {note}")
            for question in groups[video]:
                started = time.perf_counter()
                selection = selector.choose(video, candidates, question.question)
                if selector.stretches:
                    selection = selector.choose_closely(folder / video, selection, question.question)
                spent.append(time.perf_counter() - started)
                selections[question.id] = dataclasses.replace(selection, candidates=None, scores=None)
                if question.id in with_sheet:
                    _draw(output / "sheets", question, selection)
    if not selections:
        raise InputError(f"{config.questions}: no video can be decoded; the first: {rejects[0]['reason']}")
    # Rounded up: the time of a key frame is its first moment, and just before it another frame is on screen.
    seconds = {video: [{"question_id": question.id, "question": question.question,
                        "frames": [math.ceil(float(t) * 1e4 - 0.01) / 1e4 for t in selections[question.id].seconds],
                        "numbers": selections[question.id].numbers.tolist()}
                       for question in on_video if question.id in selections] for video, on_video in groups.items()}
    write_json(output / "selected.json", {video: entries for video, entries in seconds.items() if entries})
    write_json(output / "selected_frames.json",
               [selections[question.id].numbers.tolist() if question.id in selections else []
                for question in questions])
    write_atomic(output / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
    cluster.log(
        f"{config.output}: {selector.num_frames} of {selector.candidates} frames for {len(selections):,} questions "
        f"on {len(groups):,} videos, {statistics.median(s.frames_encoded for s in selections.values()):g} "
        f"frames encoded and {1000 * statistics.median(spent):.1f} ms a question (medians, "
        f"{'with the second' if selector.stretches else 'without'} decoding); {len(rejects):,} rejected")


def _draw(folder: epath.Path, question: Question, selection: Selection) -> None:
    """Saves the contact sheet of a question."""
    curves = {} if selection.scores is None else {"score": selection.scores.values}
    count = f"{len(selection.indices)} of {len(selection.candidates.frames)} frames"
    answer = [f"answer: {question.answer}"] if question.answer else []
    figure = contact_sheet(selection.candidates.frames, selection.candidates.times, selection.indices,
                           question.question, " · ".join([*answer, question.video, count]), curves,
                           question.evidence)
    save_figure(figure, folder, sheet_name(question.id))


def sheet_name(id: str) -> str:
    """Returns the name of a question's contact sheet, different for every id.

    Characters that file names may not hold are written as %2F; long ids are cut and get a hash.
    """
    name = re.sub(r"[^\w.-]", lambda match: urllib.parse.quote(match[0], safe=""), id)
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    start = name.encode()[: _MAX_NAME_BYTES - 65].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(id.encode()).hexdigest()}"


if __name__ == "__main__":
    command_line.run(main, SelectFramesConfig, "video.select", joins=True)
