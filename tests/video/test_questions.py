"""Files of multiple-choice questions as other collections write them."""

import dataclasses
import json
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from video.questions import Question, read_questions


def read(tmp_path, **fields):
    line = {"id": "a", "video": "v.mp4", "question": "Which colour?", **fields}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    (question,) = read_questions(tmp_path / "q.jsonl")
    return question.options, question.answer


@pytest.mark.parametrize("options, answer", [
    (["A. red", "B. green", "C. U.S. blue"], "B"),  # Video-MME
    (["A. red", "B. green", "C. U.S. blue"], "B."),
    (["A. red", "B. green", "C. U.S. blue"], "green"),
    (["(A) red", "(B) green", "(C) U.S. blue"], "(B)"),  # MVBench
    (["A) red", "B) green", "C) U.S. blue"], "b"),
    (["A: red", "B: green", "C: U.S. blue"], "B"),
    (["A.red", "B.green", "C.U.S. blue"], "B"),
    (["red", "green", "U.S. blue"], "B"),
    (["red", "green", "U.S. blue"], "green"),
])
def test_letters_of_multiple_choice(tmp_path, options, answer):
    assert read(tmp_path, options=options, answer=answer) == (("red", "green", "U.S. blue"), "green")


def test_letters_that_are_the_options_themselves(tmp_path):
    assert read(tmp_path, options=["B", "A"], answer="A") == (("B", "A"), "A")
    assert read(tmp_path, options=["A. Smith", "B. Jones"], answer="B. Jones") == (("A. Smith", "B. Jones"), "B. Jones")
    assert read(tmp_path, options=["U.S.A.", "France"], answer="B") == (("U.S.A.", "France"), "France")


@pytest.mark.parametrize("options, answer, message", [
    (["A. red", "B. green"], "C", "the answer 'C' is not among the options"),
    (["A. red", "B. green"], "blue", "the answer 'blue' is not among the options"),
    (["B. red", "A. green"], "A", "letters are not A, B, C"),
    ("AB", "A", "options must be a list"),
])
def test_wrong_options_are_named(tmp_path, options, answer, message):
    with pytest.raises(InputError, match=rf"q\.jsonl:1: .*{message}"):
        read(tmp_path, options=options, answer=answer)


# A row of lmms-lab/Video-MME as it is published; the question's words are others.
VIDEO_MME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "How many are red?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
}


def question(tmp_path, record):
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    (only,) = read_questions(tmp_path / "q.jsonl")
    return only


def test_video_mme_is_read_as_it_is_published(tmp_path):
    expected = Question("001-1", "fFjv93ACGo8.mp4", "How many are red?", "Three.", "Counting Problem",
                        ("One.", "Two.", "Three.", "Four."))
    assert question(tmp_path, VIDEO_MME) == expected
    assert question(tmp_path, {**VIDEO_MME, "videoID": "fFjv93ACGo8.mkv"}).video == "fFjv93ACGo8.mkv"
    assert question(tmp_path, {**VIDEO_MME, "videoID": None}).video == "001.mp4"
    # Our own fields beside theirs, where they agree; the path gives the folder.
    ours = {"id": "001-1", "video": "data/fFjv93ACGo8.mp4", "type": "Counting Problem"}
    assert question(tmp_path, {**VIDEO_MME, **ours}) == dataclasses.replace(expected, video="data/fFjv93ACGo8.mp4")


@pytest.mark.parametrize("fields, message", [
    ({"id": "7"}, "id = '7' and question_id = '001-1' name different ids; leave one"),
    ({"video": "v.mp4"}, "video = 'v.mp4' and videoID = 'fFjv93ACGo8.mp4' name different videos"),
    ({"type": "order"}, "type = 'order' and task_type = 'Counting Problem' name different types"),
    ({"question_id": 1.5}, "question_id is 1.5, not a text"),
    ({"question_id": ""}, "no id or question_id in this record"),
    ({"videoID": None, "video_id": None}, "no video or video_path or video_name or videoID or video_id in"),
    ({"videoID": "../x"}, "video '../x.mp4' is not a path inside"),
])
def test_fields_that_contradict_or_are_missing_are_named(tmp_path, fields, message):
    with pytest.raises(InputError, match=rf"q\.jsonl:1: {message}"):
        question(tmp_path, {**VIDEO_MME, **fields})


# Records with the fields of the other collections as they are published; the words are ours.
MLVU = {"video": "count_7.mp4", "duration": 572.86, "question": "How often does the dog jump ",
        "candidates": ["2", "1"], "answer": "1", "question_type": "count"}
MLVU_SUMMARY = {"video": "217.mp4", "duration": 480, "question": "What happens?", "answer": "A dog jumps.",
                "question_type": "summary"}
MLVU_TEST = {"video": "test_surveil_3.mp4", "duration": 297.57, "question": "Is there anything unusual?",
             "candidates": [3, "Shooting", "Shooting", ""], "question_type": "anomaly_reco", "question_id": "AR_0"}
MLVU_DEV = {"video_name": "count_7", "duration": 572.86, "question": "How often does the dog jump \n(A) 2\n(B) 1\n",
            "candidates": ["2", "1"], "answer": "B", "task_type": "count", "question_id": "Q1"}
LONG_VIDEO_BENCH = {
    "video_id": "@someone-86Cxy", "question": "What colour is it?", "question_wo_referring_query": "What colour?",
    "candidates": ["red", "blue", "pink"], "correct_choice": 1, "position": [854, 948], "topic_category": "NP-News",
    "question_category": "TOS", "level": "L2-Relation", "id": "86Cxy_0", "video_path": "86Cxy.mp4",
    "subtitle_path": "86Cxy_en.json", "duration_group": 600, "starting_timestamp_for_subtitles": 0,
    "duration": 190.16, "view_count": 259852, "type": "local",
}
LONG_VIDEO_BENCH_PARQUET = {
    **{name: value for name, value in LONG_VIDEO_BENCH.items() if name not in ("candidates", "type")},
    **dict(zip([f"option{n}" for n in range(5)], ["red", "blue", "pink", "N/A", "N/A"]))}
VIDEO_MME_BY_VIDEO = {
    "video_id": "001", "duration_category": "short", "video_category": "Knowledge", "url": "https://y.com/watch?v=fFj",
    "questions": [{"question_id": f"001-{n}", "task_type": "Counting Problem", "question": f"How many in {n}?",
                   "choices": ["A. One.", "B. Two."], "answer": "B", "response": "A"} for n in (1, 2)]}

EXPECTED = [
    ([VIDEO_MME], Question("001-1", "fFjv93ACGo8.mp4", "How many are red?", "Three.", "Counting Problem",
                           ("One.", "Two.", "Three.", "Four."))),
    ([VIDEO_MME_BY_VIDEO], Question("001-2", "001.mp4", "How many in 2?", "Two.", "Counting Problem",
                                    ("One.", "Two."))),
    ([MLVU_SUMMARY, MLVU], Question("q-1", "count_7.mp4", "How often does the dog jump ", "1", "count", ("2", "1"))),
    ([MLVU_SUMMARY], Question("q-0", "217.mp4", "What happens?", "A dog jumps.", "summary")),
    ([MLVU_TEST], Question("AR_0", "test_surveil_3.mp4", "Is there anything unusual?", "", "anomaly_reco",
                           ("3", "Shooting"))),
    ([MLVU_DEV], Question("Q1", "count_7.mp4", "How often does the dog jump ", "1", "count", ("2", "1"))),
    ([LONG_VIDEO_BENCH], Question("86Cxy_0", "86Cxy.mp4", "What colour is it?", "blue", "TOS",
                                  ("red", "blue", "pink"))),
    ([LONG_VIDEO_BENCH_PARQUET], Question("86Cxy_0", "86Cxy.mp4", "What colour is it?", "blue", "TOS",
                                          ("red", "blue", "pink"))),
]


def write(path, container, records):
    if container == "parquet":
        names = dict.fromkeys(name for record in records for name in record)
        pq.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), path)
    elif container == "list":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("container", ["lines", "list", "parquet"])
@pytest.mark.parametrize("records, expected", EXPECTED)
def test_collections_are_read_as_they_are_published(tmp_path, container, records, expected):
    if container == "parquet" and records == [MLVU_TEST]:
        records = [MLVU_TEST | {"candidates": ["3", "Shooting", ""]}]  # a column has one type
    questions = read_questions(write(tmp_path / "q.any", container, records), answers=bool(expected.answer))
    assert questions[-1] == expected
    assert len(questions) == sum(len(record.get("questions", [0])) for record in records)


@given(st.lists(st.text("abxyz0", min_size=2), min_size=1, max_size=5, unique=True), st.data())
def test_every_form_of_an_answer_says_the_same(tmp_path_factory, options, data):
    """By text, by letter with and without letters before the options, by number; below the question or not."""
    right = data.draw(st.integers(0, len(options) - 1))
    letters = string.ascii_uppercase[: len(options)]
    listed = "".join(f"\n({letter}) {option}" for letter, option in zip(letters, options))
    text = {"id": "q", "video": "v.mp4", "question": "Which?"}
    forms = [
        text | {"options": options, "answer": options[right]},
        text | {"candidates": options, "answer": letters[right]},
        text | {"choices": [f"{letter}. {option}" for letter, option in zip(letters, options)],
                "answer": letters[right]},
        text | {"candidates": options, "correct_choice": right},
        text | {f"option{n}": (options + ["N/A"] * 5)[n] for n in range(5)} | {"correct_choice": right},
        text | {"candidates": options, "answer": letters[right], "question": f"Which?{listed}"},
    ]
    path = tmp_path_factory.mktemp("forms") / "q.json"
    for form in forms:
        (question,) = read_questions(write(path, "list", [form]))
        assert question == Question("q", "v.mp4", "Which?", options[right], options=tuple(options)), form


@pytest.mark.parametrize("record, fields, message", [
    (LONG_VIDEO_BENCH, {"correct_choice": 3}, "correct_choice = 3 is no number from 0 below that of the options, 3"),
    (LONG_VIDEO_BENCH, {"correct_choice": -1}, "correct_choice = -1 is no number"),
    (LONG_VIDEO_BENCH, {"correct_choice": "1"}, "correct_choice = '1' is no number"),
    (LONG_VIDEO_BENCH, {"correct_choice": True}, "correct_choice = True is no number"),
    (LONG_VIDEO_BENCH, {"correct_choice": None}, "no answer or correct_choice in this record"),
    (LONG_VIDEO_BENCH, {"candidates": None}, "correct_choice = 1 is no number from 0 below that of the options, 0"),
    (LONG_VIDEO_BENCH, {"answer": "red"}, "answer = 'red' and correct_choice = 1 name different answers; leave one"),
    (LONG_VIDEO_BENCH, {"options": ["red", "blue"]}, "name different options; leave one"),
    (LONG_VIDEO_BENCH, {"video_path": "../86Cxy.mp4"}, "video '../86Cxy.mp4' is not a path inside"),
    (LONG_VIDEO_BENCH, {"video_path": "/data/86Cxy.mp4"}, "is not a path inside"),
    (LONG_VIDEO_BENCH_PARQUET, {"option1": 7.5}, "option0, option1, ... must be a list of texts"),
    (LONG_VIDEO_BENCH_PARQUET, {"option1": "N/A"}, "only option0, option2 of option0, option1, ...; one before them"),
    (MLVU, {"candidates": ["2", "3"]}, "the answer '1' is not among the options"),
    (MLVU, {"candidates": "12"}, "candidates must be a list of texts"),
    (MLVU, {"candidates": ["2", None]}, "candidates must be a list of texts"),
    (MLVU, {"answer": 1.5}, "answer is 1.5, not a text"),
    (MLVU, {"question": ""}, "no question in this record"),
    (MLVU, {"candidates": ["2", ""], "answer": ""}, "no answer or correct_choice in this record"),
    (MLVU, {"video": r"..\v.mp4"}, "is not a path inside"),
    (MLVU, {"question_id": ""}, "no id or question_id in this record"),
    (MLVU_DEV, {"answer": "C"}, "the answer 'C' is not among the options"),
    (MLVU_DEV, {"video_name": ""}, "no video or "),
    (MLVU_TEST, {}, "no answer or correct_choice in this record"),
    (VIDEO_MME, {"options": ["B. One.", "A. Two.", "C. Three.", "D. Four."], "answer": "A"}, "letters are not A, B, C"),
])
def test_malformed_records_are_named(tmp_path, record, fields, message):
    path = write(tmp_path / "q.json", "list", [LONG_VIDEO_BENCH | {"id": "first"}, record | fields])
    with pytest.raises(InputError, match=r"q\.json: record 2: ") as error:
        read_questions(path)
    assert message in str(error.value)


@pytest.mark.parametrize("content, message", [
    ("[1]", "q: record 1: not a record with fields"),
    ('[{"questions": {}}]', "q: record 1: not a record with fields, or with a list of such records in questions"),
    ('[{"video_id": "1", "questions": [{"question_id": "a"}]}]', "q: record 1, question 1: no question in this record"),
    ("[{]", "q: not a valid JSON list of questions"),
    ("[]", "q: no questions in it"),
    ("PAR1", "q: cannot be read \\(truncated or damaged\\?\\)"),
])
def test_files_that_are_no_lists_of_questions(tmp_path, content, message):
    (tmp_path / "q").write_text(content)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q")


@pytest.mark.parametrize("fields", [
    {"correct_choice": 3}, {"correct_choice": "@"}, {"correct_choice": None}, {"answer": "grey"},
    {"correct_choice": None, "answer": "grey"}, {"correct_choice": None, "answer": "D"},
])
def test_wrong_answers_do_not_matter_where_none_is_needed(tmp_path, fields):
    path = write(tmp_path / "q.json", "list", [LONG_VIDEO_BENCH | fields])
    (question,) = read_questions(path, answers=False)
    assert question == dataclasses.replace(EXPECTED[-1][1], answer="")
    with pytest.raises(InputError, match=r"q\.json: record 1: "):
        read_questions(path)


def test_the_same_id_twice(tmp_path):
    path = write(tmp_path / "q.json", "list", [LONG_VIDEO_BENCH, LONG_VIDEO_BENCH])
    with pytest.raises(InputError, match=r"q\.json: record 2: id '86Cxy_0' appears twice"):
        read_questions(path)
