"""The command that renders the four sets of videos."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from video.frames.reading import read_frames
from video.frames.worlds import WORLDS
from video.questions import read_questions
from video.synthetic import SyntheticConfig, main

SETS = ("llm", "labels", "validation", "test")


def small(folder, **changes):
    return SyntheticConfig(output=str(folder), llm_videos=3, label_videos=2, validation_videos=1, test_videos=2,
                           size=32, processes=1, **changes)


@pytest.mark.parametrize("world, seconds", [("moments", 16.0), ("stories", 64.0)])
def test_four_sets_without_a_common_video(tmp_path, world, seconds):
    main(small(tmp_path, world=world, fps=2))
    questions = {name: read_questions(tmp_path / f"{name}.jsonl") for name in SETS}
    videos = {name: sorted({question.video for question in questions[name]}) for name in SETS}
    assert [len(videos[name]) for name in SETS] == [3, 2, 1, 2]
    assert sorted(itertools.chain(*videos.values())) == [f"videos/v{n:05d}.mp4" for n in range(8)]
    assert {question.type for of_set in questions.values() for question in of_set} == set(WORLDS[world].types)
    for name in ("llm", "validation"):
        captions = read_questions(tmp_path / f"{name}_captions.jsonl")
        assert sorted({caption.video for caption in captions}) == videos[name]
        assert all(caption.clip and not caption.evidence for caption in captions)
    assert not (tmp_path / "test_captions.jsonl").exists()
    clip = read_frames(tmp_path / videos["test"][0], 16, count=4)
    assert clip.duration == seconds and np.ptp(clip.frames) > 20
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    texts = {text for question in questions["llm"] for text in (question.question, question.answer)}
    encoded = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    # A word is a token, and so is the question mark.
    assert all(len(ids) <= len(re.findall(r"[\w]+|[?,]", text)) + 2 for text, ids in encoded.items()), encoded


def test_a_video_depends_on_seed_and_number_alone(tmp_path):
    for folder, changes in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        main(small(tmp_path / folder, world="stories", fps=2, **changes))
    main(dataclasses.replace(small(tmp_path / "d", world="stories", fps=2), llm_videos=1))
    a, b, c, d = ([path.read_bytes() for path in sorted((tmp_path / folder / "videos").glob("*.mp4"))]
                  for folder in "abcd")
    assert a == b and d == a[:6] and not set(a) & set(c)
    # The sets begin at other numbers, but together they hold the same questions.
    text = {folder: [question for name in SETS for question in read_questions(tmp_path / folder / f"{name}.jsonl")]
            for folder in "ad"}
    assert text["d"] == text["a"][: len(text["d"])]
    before = (tmp_path / "a/videos/v00000.mp4").stat().st_mtime_ns
    main(small(tmp_path / "a", world="stories", fps=2))
    assert (tmp_path / "a/videos/v00000.mp4").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r'world = "stories" \(now "moments"\)'):
        main(small(tmp_path / "a", fps=2))


@pytest.mark.parametrize("changes, message", [
    ({"world": "fables"}, "synthetic.world = 'fables': not one of moments, stories"),
    ({"label_videos": 0}, "all numbers must be positive"),
    ({"seconds": 0}, "all numbers must be positive"),
    ({"seconds": 11}, "synthetic.seconds = 11: must be at least 12 times synthetic.shown"),
    ({"world": "stories", "seconds": 40}, "synthetic.seconds = 40: must be at least 48 times synthetic.shown"),
])
def test_wrong_settings(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        SyntheticConfig(output="out", **changes)
