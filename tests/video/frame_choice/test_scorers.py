"""Scores from a file of embeddings."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_pretrain.errors import InputError
from video.frame_choice.scorers import Embeddings, _KeepLast


def test_cosines_of_a_file(tmp_path):
    rng = np.random.default_rng(0)
    frames, question = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    save_file({"video:a.mp4": frames, "question:Who?": question}, tmp_path / "e.safetensors")
    scores = Embeddings(tmp_path / "e.safetensors")
    expected = [f @ question / np.sqrt((f @ f) * (question @ question)) for f in frames]
    np.testing.assert_allclose(scores("a.mp4", np.zeros((5, 64, 64, 3)), "Who?"), expected, rtol=1e-5)
    with pytest.raises(InputError, match=r"e\.safetensors: no tensor 'question:What\?'"):
        scores("a.mp4", np.zeros((5, 64, 64, 3)), "What?")
    with pytest.raises(InputError, match=r"shape \[5, 8\].*with 4 candidates"):
        scores("a.mp4", np.zeros((4, 64, 64, 3)), "Who?")


def test_missing_files_and_other_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Embeddings(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a safetensors file"):
        Embeddings(tmp_path / "text")


def test_features_are_kept_for_the_same_frames_alone():
    encoded = []
    features = _KeepLast(lambda frames: encoded.append(len(frames)) or frames.sum(axis=1))
    few, many = np.ones((4, 2)), np.full((9, 2), 2.0)
    for frames, expected in ((few, [2] * 4), (few, [2] * 4), (many, [4] * 9), (few, [2] * 4), (many[:4], [4] * 4)):
        assert features(frames).tolist() == expected
    assert encoded == [4, 9, 4, 4]
