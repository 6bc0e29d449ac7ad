"""LLaVA folders: parity with transformers, and folders that are refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_pretrain.convert.weights import read_all
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import logits
from video.llm.llava import open_llava
from video.llm.model import encode_frames, hidden_states

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "llava"
IMAGE = 47


def load_llava(folder, **settings):
    with open_llava(folder, **settings) as (config, stored):
        return config, read_all(stored)


def sequence(config, tokens):
    """Replaces Hugging Face's image tokens by numbered tokens of frames."""
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
        features = encode_frames(config, params, images, np.zeros(images.shape[:-3]))
        hidden = hidden_states(config, params, features.reshape(1, -1, features.shape[-1]), tokens)
        return logits(params["decoder"], hidden)

    computed = run(params, golden["images"], sequence(config, golden["tokens"]))
    np.testing.assert_allclose(computed, golden["logits"], atol=2e-5)


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
    ({"vision_config": {"hidden_size": 24}}, "model_type of the vision tower is None; a tower here has 'siglip_vision"),
    ({"vision_feature_select_strategy": None}, "vision_feature_select_strategy is 'default'"),
    ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False; a Video-LLM here has True"),
    ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints is [[336, 672]]; a Video-LLM here has no such"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"text_config": None}, "no text_config"),
])
def test_other_models_are_refused(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        load_llava(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"hidden_act": "quick_gelu"}, "hidden_act of the vision tower is 'quick_gelu'; a tower here has 'gelu_pytorch_ta"),
    ({"hidden_act": "gelu"}, "hidden_act of the vision tower is 'gelu'"),
    ({"num_channels": 1}, "num_channels of the vision tower is 1; a tower here has 3"),
    ({"num_patches": 256}, "num_patches of the vision tower is 256; a tower here has no such setting"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads of the vision tower is {'0': [1]}"),
    ({"add_cross_attention": True}, "add_cross_attention of the vision tower is True"),
    ({"is_decoder": True}, "is_decoder of the vision tower is True"),
])
def test_towers_that_ask_for_more_are_refused(folder, change, message):
    configure(folder, vision_config=json.loads((folder / "config.json").read_text())["vision_config"] | change)
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        load_llava(folder)
    assert message in str(error.value)


def test_fields_that_change_nothing(folder):
    """As transformers 5.23 and 4.57 write them."""
    everything = {
        "transformers_version": "5.23.0", "architectures": None, "output_hidden_states": False, "return_dict": True,
        "dtype": None, "torch_dtype": None, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None, "attention_dropout": 0.0,
        "_name_or_path": "", "output_attentions": False, "pruned_heads": {}, "add_cross_attention": False,
        "is_decoder": False, "tie_word_embeddings": True, "bos_token_id": None,
    }  # fmt: skip
    raw = json.loads((folder / "config.json").read_text())
    tower = {**raw["vision_config"], **everything, "vision_use_head": False, "projection_dim": 768,
             "vocab_size": 32000, "initializer_factor": 1.0, "hidden_act": "gelu_new"}  # fmt: skip
    del everything["is_decoder"]
    configure(folder, **everything, vision_config=tower, ignore_index=-100, vocab_size=48)
    (config, params), (expected, same) = load_llava(folder), load_llava(GOLDEN)
    assert config == expected
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no tensor projector\.linear_2\.bias"):
        load_llava(folder)
