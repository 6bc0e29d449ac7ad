"""Chooses the frames that a Video-LLM should see: `python -m video.select --gin_file=gin/video/select.gin`.

For every question T of M candidates are chosen by Frame-Voyager or one of its rivals, and written in the two forms that
are in use, for there is no common interface of selectors:

    OUT/selected.json         BOLT's: {video: [{"question_id", "question", "frames": [seconds]}]}
    OUT/selected_frames.json  AKS's: a list of frame numbers for each question, in the order of the questions
    OUT/sheets/<id>.png       with `sheets`: the candidates with the chosen ones marked, and the rewards
    OUT/rejects.jsonl         {"id", "reason"} of questions whose video cannot be decoded

Of several processes, process 0 alone chooses. Python: `Selector(...).select(video, question)` returns the numbers of
the frames.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import re
import statistics
import time
import urllib.parse
import warnings

import gin
import numpy as np
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic, write_json
from mlx_pretrain.parallel import cluster, hardware
from mlx_pretrain.reports.figures import save_figure
from video.frame_choice import rules
from video.frame_choice.contact_sheet import contact_sheet
from video.frame_choice.scorers import Scorer
from video.frames.reading import Candidates, notes, read_frames, try_frames
from video.questions import Question, read_questions

# Bytes of a file name without its suffix; file systems take 255, and writing adds some for a moment.
_LONGEST_NAME = 180
CHOICES = {"top": rules.top, "bolt": rules.bolt, "aks": rules.aks}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was chosen for a question.

    Attributes:
      places: among the candidates, ascending: int64 `[chosen]`; fewer than were asked for where the video has no more
        frames.
      numbers: of the frames in the video, each one once.
      seconds: their times.
      scores: of all candidates, or None.
      candidates: the frames it was chosen from.
    """

    places: np.ndarray
    numbers: np.ndarray
    seconds: np.ndarray
    scores: np.ndarray | None
    candidates: Candidates


@gin.configurable
class Selector:
    """Chooses frames."""

    def __init__(self, scorer: Scorer | None = None, choice: str = "top", candidates: int = 128, frames: int = 8):
        """`scorer`: None: evenly; `choice`: how by the scores, "top", "bolt" or "aks"; `candidates`: M; `frames`: T."""
        if choice not in CHOICES or not 1 <= frames <= candidates:
            raise InputError(f"Selector: choice must be one of {', '.join(CHOICES)}; frames, from 1 to candidates")
        self.scorer, self.choice, self.candidates, self.frames = scorer, choice, candidates, frames

    @property
    def size(self) -> int:
        """Pixels of a side of the frames it looks at."""
        return self.scorer.size if self.scorer else 64

    @property
    def fit(self) -> str:
        """See `read_frames`."""
        return self.scorer.fit if self.scorer else "stretch"

    def choose(self, video: str, candidates: Candidates, question: str) -> Selection:
        """From frames that were decoded before."""
        scores = None if self.scorer is None else self.scorer(video, candidates.frames, question)
        _, distinct = np.unique(candidates.numbers, return_index=True)
        places = distinct[rules.even(len(distinct), self.frames) if scores is None
                          else CHOICES[self.choice](scores[distinct], self.frames)]
        return Selection(places, candidates.numbers[places], candidates.times[places], scores, candidates)

    def select(self, video: epath.PathLike, question: str) -> list[int]:
        """Numbers of the frames of a video file to be seen for a question; warns of damage and of too few frames.

        Raises:
          InputError: as `read_frames`.
        """
        found = read_frames(video, self.size, count=self.candidates, fit=self.fit)
        for note in notes(str(video), found, self.frames):
            warnings.warn(note, stacklevel=2)
        return self.choose(str(video), found, question).numbers.tolist()


@gin.configurable("select")
def select_all(
    questions: epath.PathLike = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    selector: Selector = gin.REQUIRED,
    limit: int | None = None,
    sheets: int = 0,
    processes: int = 2,
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla",
) -> None:
    """Chooses frames for all questions of a file.

    Args:
      questions: file of `video.questions`.
      output: folder; files in it are replaced.
      selector: @Selector().
      limit: of the questions, the first so many; None: all.
      sheets: so many questions get a picture, spread evenly.
      processes: that decode.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.

    Raises:
      InputError: questions or models are wrong, or no video can be decoded.
    """
    hardware.keep_compiled(compilation_cache)
    if not cluster.is_main():  # the models are loaded by all, for reading checkpoints takes all processes of a job
        return
    asked, folder, output = read_questions(questions)[:limit], epath.Path(questions).parent, epath.Path(output)
    by_video: dict[str, list[Question]] = collections.defaultdict(list)
    for question in asked:
        by_video[question.video].append(question)
    pictured = {asked[n * len(asked) // sheets].id for n in range(min(sheets, len(asked)))} if sheets else set()
    read = functools.partial(try_frames, size=selector.size, count=selector.candidates, fit=selector.fit)
    found: dict[str, Selection] = {}
    rejects, spent = [], []
    with Workers(read, processes) as workers:
        items = ((video, str(folder / video)) for video in by_video)
        for video, candidates in tqdm(workers.map(items), "videos", len(by_video), disable=None):
            if not isinstance(candidates, str):
                for note in notes(video, candidates, selector.frames):
                    print(f"note: {note}")
            for question in by_video[video]:
                if isinstance(candidates, str):
                    rejects.append({"id": question.id, "reason": candidates})
                    continue
                started = time.perf_counter()
                selection = selector.choose(video, candidates, question.question)
                spent.append(time.perf_counter() - started)
                found[question.id] = dataclasses.replace(selection, candidates=None)
                if question.id in pictured:
                    _draw(output / "sheets", question, selection)
    if not found:
        raise InputError(f"{questions}: no video can be decoded; the first: {rejects[0]['reason']}")
    shaped = {video: [{"question_id": question.id, "question": question.question,
                       "frames": [round(float(t), 4) for t in found[question.id].seconds]}
                      for question in members if question.id in found] for video, members in by_video.items()}
    write_json(output / "selected.json", {video: members for video, members in shaped.items() if members})
    write_json(output / "selected_frames.json",
               [found[question.id].numbers.tolist() if question.id in found else [] for question in asked])
    write_atomic(output / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
    gin_files.save_effective(output / "config.gin")
    print(f"{output}: {selector.frames} of {selector.candidates} frames for {len(found):,} questions on "
          f"{len(by_video):,} videos, {1000 * statistics.median(spent):.1f} ms a question (median, without decoding); "
          f"{len(rejects):,} rejected")


def _draw(folder: epath.Path, question: Question, selection: Selection) -> None:
    scores = {} if selection.scores is None else {"reward": selection.scores}
    said = [f"answer: {question.answer}", question.video, f"{len(selection.places)} of {len(selection.scores)} frames"
            if selection.scores is not None else f"{len(selection.places)} frames"]
    figure = contact_sheet(selection.candidates.frames, selection.candidates.times, selection.places,
                           question.question, " · ".join(said), scores, question.evidence)
    save_figure(figure, folder, sheet_name(question.id))


def sheet_name(id: str) -> str:
    """Name of a question's contact sheet, its own: what no file name may hold is written as %2F, long ids are cut."""
    name = re.sub(r"[^\w.-]", lambda match: urllib.parse.quote(match[0], safe=""), id)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    start = name.encode()[: _LONGEST_NAME - 65].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(id.encode()).hexdigest()}"


def main() -> None:
    """Chooses frames for questions. Parameters: select.* and Selector.* (see video/select.py), Voyager.*,
    Similarity.*, Embeddings.* (see video/frame_choice/scorers.py)."""
    select_all()


if __name__ == "__main__":
    command_line.run(main, "video.select", joins=True)
