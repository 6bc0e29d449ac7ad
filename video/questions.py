"""Reads and writes files of questions on videos, one JSON object a line:

    {"id": "v0003-order", "video": "videos/v0003.mp4", "question": "Which appeared first, the star or the cross?",
     "answer": "star", "options": ["star", "cross"], "type": "order", "evidence": [[3.2, 4.3], [9.0, 10.1]]}

`video` is relative to the file's folder. `type` groups the questions in tables; `options` are the answers to choose
from; `evidence`, where it is known, lists the spans of seconds that show what the answer depends on; with "clip":
[2.0, 3.1] the question is about this part of the video alone, as captions are. As in Video-MME, the answer may be a
letter, and the options may begin with theirs: "options": ["A. star", "B. cross"], "answer": "A" is read as the above.
Video-MME's names of the fields are read too:

    {"question_id": "001-1", "videoID": "fFjv93ACGo8", "task_type": "Counting Problem", "question": ...}

A `videoID` is the file's name without .mp4.
"""

import dataclasses
import json
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl, write_atomic

# Field -> its names here and in other collections; where a record has several, the first is taken.
_NAMES = {
    "id": ("id", "question_id"),
    "video": ("video", "videoID", "video_id"),
    "question": ("question",),
    "answer": ("answer",),
    "type": ("type", "task_type"),
}

# "A. red", "A) red", "A: red", "(A) red".
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])\s*(\S.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a video; the fields are explained in the module's docstring.

    Attributes:
      id: unique in its file.
      video: path relative to the file's folder.
      question, answer: texts.
      type: type of question, "" where it has none.
      options: the answers to choose from, or none.
      evidence: (start, end) of each span in seconds.
      clip: (start, end) in seconds, or None for the whole video.
    """

    id: str
    video: str
    question: str
    answer: str
    type: str = ""
    options: tuple[str, ...] = ()
    evidence: tuple[tuple[float, float], ...] = ()
    clip: tuple[float, float] | None = None


def write_questions(path: epath.PathLike, questions: Iterable[Question]) -> None:
    """Writes a file of questions, atomically."""
    lines = (json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in questions)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: epath.PathLike) -> list[Question]:
    """Reads a file of questions.

    Raises:
      InputError: the file is missing or malformed, names a video outside its folder, or has an id twice.
    """
    by_id: dict[str, Question] = {}
    for number, raw in read_jsonl(path):
        question = _question(f"{path}:{number}", raw)
        if question.id in by_id:
            raise InputError(f"{path}:{number}: id {question.id!r} appears twice")
        by_id[question.id] = question
    if not by_id:
        raise InputError(f"{path}: no questions in it")
    return list(by_id.values())


def _lettered(where: str, options: Sequence[str], answer: str) -> tuple[Sequence[str], str]:
    """Returns the options without their letters, and the option that the answer names by letter or text.

    Letters are dropped because an option's likelihood would be mostly that of its letter.
    """
    parts = [_LETTER.fullmatch(option) for option in options]
    letters = [part and (part[1] or part[2]) for part in parts]
    if letters == list(string.ascii_uppercase[: len(options)]):
        options = [part[3] for part in parts]
    if letter := re.fullmatch(r"\(?([A-Za-z])[.:)]?", answer.strip()):
        letter = letter[1].upper()
        index = string.ascii_uppercase.index(letter)
        if letter in letters and letters.index(letter) != index:
            raise InputError(f"{where}: the options' letters are not A, B, C, ... in this order")
        if index < len(options):
            answer = options[index]
    if answer not in options:
        raise InputError(f"{where}: the answer {answer!r} is not among the options")
    if len(set(options)) < len(options):
        raise InputError(f"{where}: an option appears twice")
    return options, answer


def _texts(where: str, raw: dict[str, Any]) -> dict[str, str]:
    """Returns the text fields of a record under our names."""
    if raw.get("videoID"):
        raw = {**raw, "video_id": None}  # Video-MME has both, and its video_id is a running number that names no file
    texts = {}
    for field, names in _NAMES.items():
        values = {name: raw[name] for name in names if raw.get(name) not in (None, "")}
        for name, value in values.items():
            if not isinstance(value, str):
                raise InputError(f"{where}: {name} is {value!r}, not a text")
        if field == "video":
            values = {name: value if name == "video" or re.search(r"\.\w{2,4}$", value) else f"{value}.mp4"
                      for name, value in values.items()}
            same = {re.split(r"[/\\]", value)[-1] for value in values.values()}
        else:
            same = set(values.values())
        if len(same) > 1:
            raise InputError(f"{where}: {' and '.join(f'{n} = {v!r}' for n, v in values.items())} name different "
                             f"{field}s; leave one")
        texts[field] = next(iter(values.values()), "")
        if not texts[field] and field != "type":
            raise InputError(f"{where}: no {' or '.join(names)} in this record")
    return texts


def _question(where: str, raw: dict[str, Any]) -> Question:
    """Makes a question of a record; raises InputError that begins with `where`."""
    texts = _texts(where, raw)
    if re.search(r"^([/\\]|[A-Za-z]:)|(^|[/\\])\.\.([/\\]|$)|://", texts["video"]):
        raise InputError(f"{where}: video {texts['video']!r} is not a path inside the file's folder")
    options = raw.get("options") or ()
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) and option for option in options):
        raise InputError(f"{where}: options must be a list of texts")
    if options and texts["answer"] not in options:
        options, texts["answer"] = _lettered(where, options, texts["answer"])
    try:
        spans = [(float(start), float(end)) for start, end in (*(raw.get("evidence") or ()), raw.get("clip") or (0, 0))]
    except (TypeError, ValueError):
        raise InputError(f"{where}: evidence and clip must be pairs of seconds") from None
    clip = spans[-1] if raw.get("clip") else None
    return Question(**texts, options=tuple(options), evidence=tuple(spans[:-1]), clip=clip)
