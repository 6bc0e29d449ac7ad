"""Weights to start from: a real run, and a real Hugging Face folder written by our exporter."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from data_mixtures.tokenizer import train_model
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints, optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.initial_weights import InitialWeights
from mlx_pretrain.training.train_state import abstract_params, abstract_state, make_initial_state

OPTIMIZER = optimizers.adamw(optimizers.constant(1e-3))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two SentencePiece models."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, text in (("one", "the cat sat on the mat"), ("two", "der hund lief um das haus")):
        (folder / f"{name}.model").write_bytes(train_model(iter([text] * 20), {
            "model_type": "bpe", "vocab_size": 284, "character_coverage": 1.0, "max_sentence_bytes": 4096,
            "num_threads": 1}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizers):
    """A run with two checkpoints, its export, its configuration and the parameters of each step."""
    config = DecoderConfig(vocab_size=Tokenizer(tokenizers / "one.model").vocab_size + 4, embed_dim=32, n_layers=2,
                           n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48, max_length=64)
    folder, mesh = tmp_path_factory.mktemp("folders"), partitioning.make_mesh(devices=jax.devices()[:1])
    checkpoints.save_model(folder / "run", config, tokenizers / "one.model")
    saver, params = Checkpoints(folder / "run"), {}
    with partitioning.use(mesh):
        initial_state = make_initial_state(config, OPTIMIZER, abstract_state(config, OPTIMIZER, mesh))
        for step in (1, 2):
            state = initial_state(step)
            saver.save(step, state, DataState(step, {}), {})
            params[step] = jax.device_get(state.params)
    saver.close()
    export_model(ExportConfig(str(folder / "run"), str(folder / "hf")))
    return folder, config, params


@pytest.mark.parametrize("name, step, kind", [
    ("run", 2, "run"), ("run/checkpoints/1", 1, "run"), ("hf", None, "hugging_face")])
def test_weights_are_those_of_the_folder_on_any_mesh(folders, tokenizers, name, step, kind):
    folder, config, params = folders
    # Another compute dtype, remat and length are another way to compute the same model.
    config = dataclasses.replace(config, dtype="bfloat16", remat="full", max_length=128)
    mesh = partitioning.make_mesh(2, 2, 2)
    weights = InitialWeights(folder / name, config, tokenizers / "one.model")
    with partitioning.use(mesh):
        loaded, abstract = weights.load(mesh), abstract_params(config, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params[step or 2])
    jax.tree.map(lambda x, like: (x.sharding, x.dtype) == (like.sharding, like.dtype) or pytest.fail(str(like)),
                 loaded, abstract)
    metadata = weights.metadata()
    path = folder / name.split("/")[0]
    assert metadata == {"path": str(path), "kind": kind, "step": step, "checksum": metadata["checksum"]}
    latest = InitialWeights(folder / "run", config, tokenizers / "one.model")
    with partitioning.use(mesh):
        latest.load(mesh)
    assert (latest.metadata()["checksum"] == metadata["checksum"]) is (step != 1)  # says which weights they are
    json.dumps(metadata)


@pytest.mark.parametrize("name", ["run", "hf"])
@pytest.mark.parametrize("change", [{"mlp_dim": 64}, {"n_kv_heads": 4}, {"rope_theta": 1e6}, {"vocab_size": 512}])
def test_another_architecture_is_refused(folders, tokenizers, name, change):
    folder, config, _ = folders
    (field, value), = change.items()
    with pytest.raises(InputError, match=rf"(model|config)\.json: .* with {field}=.*the configuration has {value}"):
        InitialWeights(folder / name, dataclasses.replace(config, **change), tokenizers / "one.model")


@pytest.mark.parametrize("name", ["run", "hf"])
def test_another_tokenizer_is_refused(folders, tokenizers, name):
    folder, config, _ = folders
    with pytest.raises(InputError, match=r"another tokenizer .*token store"):
        InitialWeights(folder / name, config, tokenizers / "two.model")


def test_folders_without_a_tokenizer(folders, tokenizers, tmp_path):
    folder, config, _ = folders
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"hf: no tokenizer\.json, and no tokenizer\.model that is the token store's"):
        InitialWeights(tmp_path / "hf", config, tokenizers / "one.model")
    shutil.copy(tokenizers / "one.model", tmp_path / "hf/tokenizer.model")
    InitialWeights(tmp_path / "hf", config, tokenizers / "one.model")


def test_what_is_neither_or_not_whole(folders, tokenizers, tmp_path):
    folder, config, _ = folders
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"neither a training run \(no model\.json\) nor a Hugging Face folder"):
            InitialWeights(path, config, tokenizers / "one.model")
    with pytest.raises(InputError, match=r"no checkpoint 7; there is \[1, 2\]"):
        InitialWeights(folder / "run/checkpoints/7", config, tokenizers / "one.model")
    shutil.copytree(folder / "hf", tmp_path / "hf")
    content = (tmp_path / "hf/model.safetensors").read_bytes()
    (tmp_path / "hf/model.safetensors").write_bytes(content[:-1000])
    weights = InitialWeights(tmp_path / "hf", config, tokenizers / "one.model")
    with pytest.raises(InputError, match="not a safetensors file"):
        weights.load(mesh)
    shutil.copytree(folder / "run", tmp_path / "run")
    file = max((tmp_path / "run/checkpoints/2").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"checkpoints/2: damaged: state/.* does not hold"):
        InitialWeights(tmp_path / "run", config, tokenizers / "one.model").load(mesh)
