"""LLaVA folders: parity with transformers, and what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import logits
from video.llava import load_llava
from video.model import encode_frames, hidden_states

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "llava"
IMAGE = 47


def sequence(config, tokens):
    """Hugging Face's image tokens as numbered tokens of frames."""
    image = tokens == IMAGE
    return np.where(image, config.decoder.vocab_size + np.cumsum(image, axis=1) - 1, tokens).astype(np.int32)


@pytest.fixture
def folder(tmp_path):
    """A copy to spoil."""
    shutil.copytree(GOLDEN, tmp_path / "llava")
    return tmp_path / "llava"


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_logits_are_those_of_transformers():
    config, params = load_llava(GOLDEN)
    golden = load_file(GOLDEN / "golden.safetensors")
    assert (config.frame_tokens, config.vision.n_layers) == (16, 2)

    @jax.jit
    def run(params, images, tokens):
        features = encode_frames(config, params, images)
        hidden = hidden_states(config, params, features.reshape(1, -1, features.shape[-1]), tokens)
        return logits(params["decoder"], hidden)

    found = run(params, golden["images"], sequence(config, golden["tokens"]))
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5)


def test_parameters_have_the_shapes_of_the_module():
    config, params = load_llava(GOLDEN)
    boxed = jax.eval_shape(config.init, jax.random.key(0))
    expected = jax.tree.map(lambda box: (box.value.shape, np.dtype(box.value.dtype)), boxed,
                            is_leaf=lambda node: hasattr(node, "value"))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == expected
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("rename", [
    lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    lambda name: "lm_head.weight" if name.startswith("language_model.lm_head")
    else "model." + name.replace("language_model.model.", "language_model."),
])
def test_other_versions_names(folder, rename):
    save_file({rename(name): x for name, x in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_llava(folder)[1], load_llava(GOLDEN)[1])


@pytest.mark.parametrize("changes, message", [
    ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
    ({"model_type": "llava_next"}, "model_type is 'llava_next'"),
    ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer is"),
    ({"vision_feature_layer": 9}, "vision_feature_layer is 9"),
    ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type of the vision tower is 'clip_vision_model'"),
    ({"text_config": None}, "no text_config"),
])
def test_other_models_are_refused(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        load_llava(folder)
    assert message in str(error.value)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no tensor projector\.linear_2\.bias"):
        load_llava(folder)
