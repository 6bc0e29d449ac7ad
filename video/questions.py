"""Reads and writes files of questions on videos, our own and those of published collections.

    {"id": "v0003-order", "video": "videos/v0003.mp4", "question": "Which appeared first, the star or the cross?",
     "answer": "star", "options": ["star", "cross"], "type": "order", "evidence": [[3.2, 4.3], [9.0, 10.1]]}

`video` is relative to the folder of the videos: the file's own, or another one. `type` groups the questions in tables;
`options` are the answers to choose from; `evidence`, where it is known, lists the spans of seconds that show what the
answer depends on; with "clip": [2.0, 3.1] the question is about this part of the video alone, as captions are.

A file is JSON lines, a JSON list or parquet. Records may also have the fields of

    Video-MME (arXiv 2405.21075; lmms-lab/Video-MME)
        {"question_id": "001-1", "videoID": "fFjv93ACGo8", "task_type": "Counting Problem", "question": ...,
         "options": ["A. One.", "B. Two."], "answer": "B"}
        or, in its authors' JSON, a record for each video: {"video_id": "001", "questions": [{..., "choices": ...}]}
    MLVU (arXiv 2406.04264; MLVU/MVLU and MLVU/MLVU_Test)
        {"video": "count_1.mp4", "question_type": "count", "question": ..., "candidates": ["1", "2"], "answer": "2"}
        or, in sy1998/MLVU_dev, "video_name": "count_1", "task_type", "answer": "B", and the options below the question
    LongVideoBench (arXiv 2407.15754; longvideobench/LongVideoBench)
        {"id": "x_0", "video_path": "x.mp4", "question_category": "T2A", "question": ..., "candidates": ["red", "blue"],
         "correct_choice": 1}
        or, in its parquet files, "option0" to "option4" with "N/A" for those that a question has not

An answer may be an option's text or letter or, in `correct_choice`, its number from 0. Letters before options are
dropped. Names of videos without a suffix get .mp4. Without an id, a record gets the file's name and its number:
"4_count-0".
"""

import dataclasses
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl, write_atomic

# Field -> its names here and in other collections. A record may have several, which then say the same.
_NAMES = {
    "id": ("id", "question_id"),
    "video": ("video", "video_path", "video_name", "videoID", "video_id"),
    "question": ("question",),
    "answer": ("answer",),
    "type": ("type", "task_type", "question_type", "question_category"),
}
_OPTIONS = ("options", "candidates", "choices")
_NUMBERED_OPTIONS = tuple(f"option{number}" for number in range(5))
_OTHERS = ("correct_choice", "questions", "evidence", "clip")
# Field -> another one that means something else beside it: Video-MME's video_id is a running number, LongVideoBench's
# names no file where it has an account before it, and its type is where the video was found.
_REPLACES = {"videoID": "video_id", "video_path": "video_id", "question_category": "type"}
_IDS_OF_VIDEOS = ("video_name", "videoID", "video_id")  # may be names of files without their suffix

# "A. red", "A) red", "A: red", "(A) red".
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])\s*(\S.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a video; the fields are explained in the module's docstring.

    Attributes:
      id: unique in its file.
      video: path relative to the folder of the videos.
      question, answer: texts; the answer is "" where it is not published.
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


def read_questions(path: epath.PathLike, *, answers: bool = True) -> list[Question]:
    """Reads a file of questions.

    Args:
      path: the file.
      answers: True where answers are needed: a question without one, or whose answer is none of its options, is an
        error. Else its answer is "". Test sets are published without answers.

    Raises:
      InputError: the file is missing or malformed, names a video outside its folder, or has an id twice.
    """
    by_id: dict[str, Question] = {}
    for number, (where, raw) in enumerate(_records(path)):
        question = _question(where, raw, f"{epath.Path(path).stem}-{number}", answers)
        if question.id in by_id:
            raise InputError(f"{where}: id {question.id!r} appears twice")
        by_id[question.id] = question
    if not by_id:
        raise InputError(f"{path}: no questions in it")
    return list(by_id.values())


def _records(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of each question, from JSON lines, a JSON list or parquet, which the first bytes tell."""
    try:
        with gcs.named_errors(path), epath.Path(path).open("rb") as file:
            start = file.read(100).lstrip()
            rows = _parquet_rows(file) if start.startswith(b"PAR1") else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read (truncated or damaged?): {str(error).splitlines()[0]}") from None
    if rows is None and not start.startswith(b"["):
        places = ((f"{path}:{number}", raw) for number, raw in read_jsonl(path))
    else:
        rows = read_json(path, "list of questions") if rows is None else rows
        places = ((f"{path}: record {number}", raw) for number, raw in enumerate(rows, 1))
    for where, raw in places:
        parts = raw["questions"] if isinstance(raw, dict) and "questions" in raw else [{}]
        if not isinstance(parts, list) or not all(isinstance(record, dict) for record in (raw, *parts)):
            raise InputError(f"{where}: not a record with fields, or with a list of such records in questions")
        for number, part in enumerate(parts, 1):
            yield f"{where}, question {number}" if "questions" in raw else where, {**raw, **part}


def _parquet_rows(file: Any) -> list[dict[str, Any]]:
    """Reads the known columns of a parquet file; others may hold whole pictures."""
    table = pa.parquet.ParquetFile(file)
    known = {*sum(_NAMES.values(), ()), *_OPTIONS, *_NUMBERED_OPTIONS, *_OTHERS}
    return table.read([name for name in table.schema_arrow.names if name in known]).to_pylist()


def _answer(options: Sequence[str], answer: str, choice: Any) -> tuple[Sequence[str], str, str]:
    """Finds the option that a record calls the answer.

    Args:
      options: the options, which may begin with letters. These are dropped, unless the answer has one too, because an
        option's likelihood would be mostly that of its letter.
      answer: the option's text or letter, or "".
      choice: the option's number from 0, or None.

    Returns:
      The options, the answer, and what is wrong with the answer, or "".
    """
    if not options or (answer and answer in options):
        problem = ""
    else:
        parts = [_LETTER.fullmatch(option) for option in options]
        letters = [part and (part[1] or part[2]) for part in parts]
        if letters == list(string.ascii_uppercase[: len(options)]):
            options = [part[3] for part in parts]
        problem = f"the answer {answer!r} is not among the options" if answer and answer not in options else ""
        if letter := re.fullmatch(r"\(?([A-Za-z])[.:)]?", answer.strip()):
            index = string.ascii_uppercase.index(letter[1].upper())
            if letter[1].upper() in letters and letters.index(letter[1].upper()) != index:
                problem = "the options' letters are not A, B, C, ... in this order"
            elif index < len(options):
                answer, problem = options[index], ""
    if choice is not None:
        if type(choice) is not int or not 0 <= choice < len(options):
            return options, "", (f"correct_choice = {choice!r} is no number from 0 below that of the options, "
                                 f"{len(options)}")
        if answer not in ("", options[choice]):
            return options, "", f"answer = {answer!r} and correct_choice = {choice} name different answers; leave one"
        answer = options[choice]
    return options, answer, problem or ("" if answer else "no answer or correct_choice in this record")


def _same(where: str, field: str, values: Mapping[str, Any], compared: Iterable[Any]) -> None:
    """Raises InputError where several fields of a record say different things."""
    if len(set(compared)) > 1:
        raise InputError(f"{where}: {' and '.join(f'{name} = {value!r}' for name, value in values.items())} name "
                         f"different {field}s; leave one")


def _texts(where: str, raw: Mapping[str, Any], default_id: str) -> dict[str, str]:
    """Returns the text fields of a record under our names."""
    texts = {}
    for field, names in _NAMES.items():
        values = {name: _text(raw[name]) for name in names if raw.get(name) not in (None, "")}
        for name, value in values.items():
            if not isinstance(value, str):
                raise InputError(f"{where}: {name} is {value!r}, not a text")
            if name in _IDS_OF_VIDEOS and not re.search(r"\.\w{2,4}$", value):
                values[name] = f"{value}.mp4"
        _same(where, field, values, (re.split(r"[/\\]", value)[-1] if field == "video" else value
                                     for value in values.values()))
        texts[field] = next(iter(values.values()), "")
        if field == "id" and not any(name in raw for name in names):
            texts[field] = default_id
        if not texts[field] and field not in ("answer", "type"):
            raise InputError(f"{where}: no {' or '.join(names)} in this record")
    return texts


def _options(where: str, raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the options of a record; none where it has no such field."""
    lists = {name: raw[name] for name in _OPTIONS if raw.get(name) is not None}
    numbered = {name: raw[name] for name in _NUMBERED_OPTIONS if raw.get(name) not in (None, "N/A")}
    if tuple(numbered) != _NUMBERED_OPTIONS[: len(numbered)]:
        raise InputError(f"{where}: only {', '.join(numbered)} of option0, option1, ...; one before them is missing")
    if numbered:
        lists["option0, option1, ..."] = list(numbered.values())
    for name, options in lists.items():
        if not isinstance(options, (list, tuple)) or not all(isinstance(_text(option), str) for option in options):
            raise InputError(f"{where}: {name} must be a list of texts")
    _same(where, "option", lists, map(tuple, lists.values()))
    return tuple(map(_text, next(iter(lists.values()), ())))


def _text(value: Any) -> Any:
    """Returns an integer as a text, and all else unchanged: MLVU's test set has counts as numbers."""
    return str(value) if type(value) is int else value


def _question(where: str, raw: dict[str, Any], default_id: str, answers: bool) -> Question:
    """Makes a question of a record; raises InputError that begins with `where`."""
    raw = raw | {other: None for field, other in _REPLACES.items() if raw.get(field)}
    texts, options = _texts(where, raw, default_id), _options(where, raw)
    if re.search(r"^([/\\]|[A-Za-z]:)|(^|[/\\])\.\.([/\\]|$)|://", texts["video"]):
        raise InputError(f"{where}: video {texts['video']!r} is not a path inside the folder of the videos")
    # sy1998/MLVU_dev repeats the options below the question; nothing but the question is for the selector.
    listed = "".join(f"\n({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options))
    question, found, rest = texts["question"].rpartition(listed or "\n")
    if listed and found and not rest.strip():
        texts["question"] = question
    options, texts["answer"], problem = _answer(options, texts["answer"], raw.get("correct_choice"))
    if problem and answers:
        raise InputError(f"{where}: {problem}")
    if problem:
        texts["answer"] = ""
    try:
        spans = [(float(start), float(end)) for start, end in (*(raw.get("evidence") or ()), raw.get("clip") or (0, 0))]
    except (TypeError, ValueError):
        raise InputError(f"{where}: evidence and clip must be pairs of seconds") from None
    clip = spans[-1] if raw.get("clip") else None
    # Video-MME and MLVU have some options twice, and MLVU empty ones.
    options = tuple(dict.fromkeys(option for option in options if option))
    return Question(**texts, options=options, evidence=tuple(spans[:-1]), clip=clip)


def draw_questions(questions: Sequence[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """Draws `limit` of the questions (None: all) at random; their order stays.

    The first ones of a file would be on few videos, and every n-th perhaps of one type.
    """
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[number] for number in np.sort(order[:limit])]


def by_video(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Returns video -> questions on it, both in the order of the questions."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.video, []).append(question)
    return groups
