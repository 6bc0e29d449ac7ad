"""Scores from a file of embeddings and by towers, of all frames and of some."""

import jax
import numpy as np
import optax
import pytest
import sentencepiece
from safetensors.numpy import save_file

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_state, initial_state
from video.frame_choice.scorers import Embeddings, Similarity, _KeepLast
from video.frame_choice.selector import Selector
from video.frame_choice.towers import TowersConfig
from video.frames.reading import Candidates


def test_cosines_of_a_file(tmp_path):
    rng = np.random.default_rng(0)
    frames, question = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    save_file({"video:a.mp4": frames, "question:Who?": question}, tmp_path / "e.safetensors")
    scorer = Embeddings(tmp_path / "e.safetensors")
    expected = [f @ question / np.sqrt((f @ f) * (question @ question)) for f in frames]
    scores = scorer("a.mp4", np.zeros((5, 64, 64, 3)), np.arange(5.0), "Who?")
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5)
    for i, j in ((0, 1), (3, 2), (4, 4)):
        cosine = frames[i] @ frames[j] / np.sqrt((frames[i] @ frames[i]) * (frames[j] @ frames[j]))
        assert scores.cosines[i, j] == pytest.approx(cosine, rel=1e-5)
    some = scorer.score_some("a.mp4", np.zeros((5, 64, 64, 3)), "Who?", np.array([4, 1]))
    assert some.tolist() == scores.values[[4, 1]].tolist()
    with pytest.raises(InputError, match=r"e\.safetensors: no tensor 'question:What\?'"):
        scorer("a.mp4", np.zeros((5, 64, 64, 3)), np.arange(5.0), "What?")
    with pytest.raises(InputError, match=r"shape \[5, 8\].*with 4 candidates"):
        scorer("a.mp4", np.zeros((4, 64, 64, 3)), np.arange(4.0), "Who?")


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


@pytest.fixture(scope="module")
def similarity(tmp_path_factory) -> Similarity:
    """Towers with drawn parameters, saved as a run's only checkpoint."""
    folder = tmp_path_factory.mktemp("towers")
    words = ["red", "star", "square", "which", "colour", "came", "first"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i:] + words[:i]) for i in range(7)), model_prefix=str(folder / "tokenizer"),
        vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=3, hard_vocab_limit=False, minloglevel=2)
    config = TowersConfig(VisionConfig(image_size=16, patch_size=8, embed_dim=16, n_layers=1, n_heads=2, mlp_dim=24),
                          vocab_size=40, max_length=8, shared_dim=4)
    checkpoints.save_model(folder / "run", config, folder / "tokenizer.model")
    abstract = abstract_state(config, optax.sgd(0.1), partitioning.make_mesh(devices=jax.devices()[:1]))
    keeper = checkpoints.Checkpoints(folder / "run")
    keeper.save(1, initial_state(config, optax.sgd(0.1), 0, abstract), checkpoints.DataState(0, {}), {})
    keeper.wait()
    keeper.close()
    return Similarity(folder / "run")


def test_similarity_of_some_frames_is_that_of_all(similarity):
    frames = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    scores = similarity("a.mp4", frames, np.arange(float(len(frames))), "which star came first")
    some = np.array([3, 17, 4, 5, 6, 7, 8, 9, 0])
    np.testing.assert_allclose(similarity.score_some("a.mp4", frames, "which star came first", some),
                               scores.values[some], atol=1e-5)
    assert np.ptp(scores.values) > 0.01
    np.testing.assert_allclose(np.diag(scores.cosines), 1, atol=1e-5)
    np.testing.assert_array_equal(scores.cosines, scores.cosines.T)


def test_a_rule_that_asks_encodes_few_frames(similarity):
    rng = np.random.default_rng(1)
    frames, numbers = rng.integers(0, 256, (64, 16, 16, 3), np.uint8), np.arange(64)
    numbers[1] = 0  # a frame that occurs twice is asked about once
    candidates = Candidates(frames, np.arange(64) / 4, 16.0, numbers)
    encoded, embed = [], similarity._embed_frames
    similarity._embed_frames = lambda frames: encoded.append(len(frames)) or embed(frames)
    try:
        few = Selector(similarity, "focus", 64, 4).choose("a.mp4", candidates, "which colour")
    finally:
        similarity._embed_frames = embed
    everything = Selector(similarity, "mdp3", 64, 4).choose("a.mp4", candidates, "which colour")
    assert everything.frames_encoded == 64 and not np.isnan(everything.scores.values).any()
    assert sum(n - 7 for n in encoded) <= few.frames_encoded <= sum(encoded) and few.frames_encoded < 40
    scored = ~np.isnan(few.scores.values)
    assert scored.sum() - (scored[0] and scored[1]) == few.frames_encoded and scored[few.indices].all()
    np.testing.assert_allclose(few.scores.values[scored], everything.scores.values[scored], atol=1e-5)
    assert Selector(None, "focus", 64, 4).choose("a.mp4", candidates, "which colour").frames_encoded == 0


def test_scorers_of_whole_videos_cannot_be_asked():
    with pytest.raises(InputError, match=r"choice = 'focus' asks for the scores of some candidates, and object "
                                         r"scores all of them together"):
        Selector(object(), "focus")
