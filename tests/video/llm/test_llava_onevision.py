"""LLaVA-OneVision folders: logits, prompts and losses are those of transformers; folders that are refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_pretrain.convert.weights import read_all
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import logits
from mlx_pretrain.parallel import partitioning
from video.llm.answer_scoring import AnswerScorer
from video.llm.llava import open_llava
from video.llm.loading import load_video_llm
from video.llm.model import bilinear_pooling, encode_frames, hidden_states
from video.llm.prompts import QuestionWords
from video.questions import Question

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "llava_onevision"
QUESTION = "What moved?"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def mesh():
    return partitioning.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def llm(mesh):
    return load_video_llm(GOLDEN, mesh)


@pytest.fixture
def folder(tmp_path):
    """A copy to spoil."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(llm, frames, tokens):
    def compute(params, frames, tokens):
        features = encode_frames(llm.config, params, frames, np.zeros(frames.shape[:-3]))
        hidden = hidden_states(llm.config, params, features.reshape(1, -1, features.shape[-1]), tokens)
        return logits(params["decoder"], hidden)

    return np.asarray(jax.jit(compute)(llm.params, frames, tokens))


def test_the_prompt_is_that_of_the_processor(llm, golden):
    (words,) = llm.prompts.words([QUESTION])
    tokens, video = golden["tokens"][0], json.loads((GOLDEN / "config.json").read_text())["video_token_index"]
    ours, vocab_size = llm.prompts.context(words, range(3)), llm.config.decoder.vocab_size
    np.testing.assert_array_equal(np.where(ours >= vocab_size, video, ours), tokens)
    # The frames in order, and then the newline, which has the first of these ids.
    np.testing.assert_array_equal(ours[tokens == video] - vocab_size, [*range(1, 28), 0])


def test_logits_of_a_video_are_those_of_transformers(llm, golden):
    (words,) = llm.prompts.words([QUESTION])
    computed = run(llm, golden["frames"], llm.prompts.context(words, range(3))[None])
    np.testing.assert_allclose(computed, golden["logits"], atol=2e-5)


def test_logits_of_text_are_those_of_transformers(llm, golden):
    assert llm.language_model.tokenizer.decode(golden["text_tokens"][0]) == f"user\n{QUESTION}\nassistant\n"
    np.testing.assert_allclose(run(llm, golden["frames"], golden["text_tokens"]), golden["text_logits"], atol=2e-5)


def test_losses_with_shared_beginnings_are_those_of_each_combination(llm, golden):
    """All frames: transformers' logits. Two of three: the newline follows the last of them."""
    question = Question("a", "clip.mp4", QUESTION, "B", options=("A", "B"))
    scorer, combinations = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts), [(0, 1, 2), (0, 1), (0, 2)]
    features = scorer.features(golden["frames"], np.zeros(3))
    (answers,) = scorer(lambda video: features, [question], [combinations], options=False)
    (words,), (answer,) = llm.prompts.words([QUESTION]), llm.prompts.answers(["B"])
    assert answer[-1] == llm.language_model.tokenizer.vocabulary()["<|im_end|>"]
    first = golden["logits"][0, -1].astype(np.float64)
    for loss, frames in zip(answers.losses, combinations):
        context = llm.prompts.context(words, range(len(frames)))
        scores = run(llm, golden["frames"][list(frames)], np.concatenate([context, answer])[None])[0].astype(np.float64)
        if len(frames) == 3:
            np.testing.assert_allclose(scores[len(context) - 1], first, atol=2e-5)
        scores = scores[len(context) - 1 : -1]
        expected = np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(2), answer])
        assert loss == pytest.approx(expected, abs=2e-5)
    assert np.ptp(answers.losses) > 1e-3
    assert scorer.scorer.fed_tokens < 0.8 * scorer.scorer.naive_tokens


def test_frame_voyager_reads_the_embeddings_of_the_video_llm(llm):
    words, (count,) = QuestionWords("{question}{frames}", llm.language_model, ["Why?", QUESTION])[[1]]
    ids = llm.language_model.tokenizer.encode(QUESTION)
    assert count == len(ids) and words.shape[1] % 8 == 0
    np.testing.assert_array_equal(words[0, :count], llm.params["decoder"]["embedding"][np.asarray(ids)])


@pytest.mark.parametrize("layers, frames", [(0, True), (1, False), (None, False)])
def test_parts_of_it_are_those_of_the_whole(llm, mesh, layers, frames):
    part = load_video_llm(GOLDEN, mesh, layers=layers, frames=frames)
    assert part.fingerprint() == llm.fingerprint()
    assert set(part.params) == ({"frames", "decoder"} if frames else {"decoder"})
    if layers == 0:
        assert set(part.params["decoder"]) == {"embedding"}
    whole = llm.params["decoder"]["layers"]["mlp"]["up"]
    if layers != 0:
        up = part.params["decoder"]["layers"]["mlp"]["up"]
        np.testing.assert_array_equal(up, whole[:layers])
        assert len(up) == (layers or len(whole))


def test_matrices_are_kept_in_the_compute_dtype(llm, mesh, golden):
    """As if they were cast where they are used; scales and biases stay float32."""
    half = load_video_llm(GOLDEN, mesh, dtype="bfloat16")
    assert half.params["decoder"]["embedding"].dtype == ml_dtypes.bfloat16
    assert half.params["frames"]["vision"]["layers"]["attention"]["qkv"].dtype == ml_dtypes.bfloat16
    assert half.params["decoder"]["layers"]["attention"]["key_bias"].dtype == np.float32
    (words,) = llm.prompts.words([QUESTION])
    tokens = llm.prompts.context(words, range(3))[None]
    cast = dataclasses.replace(llm, config=half.config)
    np.testing.assert_array_equal(run(half, golden["frames"], tokens), run(cast, golden["frames"], tokens))
    np.testing.assert_allclose(run(half, golden["frames"], tokens), golden["logits"], atol=0.5)


def test_parameters_have_the_shapes_of_the_module(llm):
    boxed = jax.eval_shape(llm.config.init, jax.random.key(0))
    expected = jax.tree.map(lambda box: box.value.shape, boxed, is_leaf=lambda node: hasattr(node, "value"))
    assert jax.tree.map(lambda leaf: leaf.shape, llm.params) == expected
    assert llm.config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(llm.params))


def test_bilinear_pooling_is_pytorch_s():
    """torch.nn.functional.interpolate(torch.arange(27.)[None, None], size=14, mode="linear") and of 5 to 3."""
    np.testing.assert_allclose(bilinear_pooling(27, 14) @ np.arange(27.0), np.arange(14) * 27 / 14 + 13 / 28, rtol=1e-5)
    np.testing.assert_allclose(bilinear_pooling(5, 3) @ np.array([0, 1, 4, 9, 16]), [1 / 3, 4, 41 / 3], rtol=1e-5)
    np.testing.assert_array_equal(bilinear_pooling(4, 4), np.eye(4))


@pytest.mark.parametrize("files, message", [
    ({"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}, None),
    ({"size": {"height": 384, "width": 384}}, "size is {'height': 384, 'width': 384}; the tower takes 35 x 35 pixels"),
    ({"size": {"shortest_edge": 35}}, "size is {'shortest_edge': 35}"),
    ({"do_center_crop": True}, "do_center_crop is True; frames here are prepared with False"),
    ({"do_normalize": False}, "do_normalize is False; frames here are prepared with True"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
    ({"image_mean": None}, "image_mean is None, not three numbers"),
    ({"image_std": [0.5, 0.5, 0]}, "VisionConfig.std = (0.5, 0.5, 0.0)"),
])
def test_frames_are_prepared_as_the_processor_says(folder, files, message):
    settings = json.loads((folder / "processor_config.json").read_text())["video_processor"]
    (folder / "processor_config.json").unlink()
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings | files))
    if message is None:
        with open_llava(folder) as (config, stored):
            read_all(stored)
            assert config.vision.mean == (0.48, 0.46, 0.41) and config.vision.std == (0.27, 0.26, 0.28)
        return
    with pytest.raises(InputError) as error, open_llava(folder):
        pass
    assert message in str(error.value) and "video_preprocessor_config.json" in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'; a Video-LLM here"),
    ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer is [-1, -2]"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ({"spatial_pool_stride": 2}, "spatial_pool_stride is 2; a Video-LLM here has no such setting"),
    ({"model_type": "llava_next_video"}, "model_type is 'llava_next_video'; a Video-LLM here has 'llava' (or 'llava_o"),
    ({"text_config": {"model_type": "mistral"}}, "model_type is 'mistral'; a decoder here has 'llama' (or 'qwen2')"),
    ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type of the vision tower is 'clip_vision_model'"),
])
def test_other_models_are_refused(folder, changes, message):
    change(folder / "config.json", **changes)
    with pytest.raises(InputError, match=r"config\.json: ") as error, open_llava(folder):
        pass
    assert message in str(error.value)


def test_a_missing_newline_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "newline" not in name}, folder / "model.safetensors")
    with pytest.raises(InputError, match="no tensor image_newline"):
        load_video_llm(folder)


def test_names_and_files_of_transformers_4(folder, llm):
    """Fields that are left out, names with `vision_model`, the tower's last norm, and the processor's older file."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in name else name: x
               for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        del raw[key]
    raw |= {"use_image_newline_parameter": True, "ignore_index": -100, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(raw))
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": settings.get("chat_template", "")}))
    (folder / "video_processor").mkdir()
    (folder / "video_processor/preprocessor_config.json").write_text(json.dumps(settings["video_processor"]))
    assert load_video_llm(folder, llm.mesh).fingerprint() == llm.fingerprint()
