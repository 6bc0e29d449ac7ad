"""LLaMA and Qwen2 from Hugging Face, LLaMA from GGUF: logits of transformers, round trips, and malformed files."""

import dataclasses
import json
import pathlib
import shutil

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlx_pretrain.convert.decoders import load_decoder, read_config, save_decoder
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.convert.gguf import GGUF
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.models.decoder import Decoder, logits
from mlx_pretrain.training.checkpoints import load_model

LLAMA, QWEN2 = (pathlib.Path(__file__).parents[1] / "goldens" / name for name in ("llama", "qwen2"))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def forward(config, params, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(logits(params, Decoder(config).apply({"params": params}, tokens, positions)[0]))


@pytest.mark.parametrize("folder", [LLAMA, QWEN2])
def test_logits_are_those_of_transformers(folder):
    config, params = load_decoder(folder)
    golden = load_file(folder / "golden.safetensors")
    assert config.attention_bias == (folder == QWEN2)
    np.testing.assert_allclose(forward(config, params, golden["tokens"]), golden["logits"], atol=2e-5)
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(params))


def transformers_logits(config, tensors, tokens):
    """transformers' LlamaForCausalLM in NumPy, from its tensors: what the golden logits were computed with."""
    heads, kv_heads, size, theta = (config[key] for key in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta"))
    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    angles = np.arange(len(tokens))[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def rotate(x):
        return x * cos[:, None] + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin[:, None]

    for n in range(config["num_hidden_layers"]):
        linear = lambda x, part, n=n: x @ tensors[f"model.layers.{n}.{part}.weight"].T  # noqa: E731
        h = norm(x, f"model.layers.{n}.input_layernorm")
        q, k, v = (linear(h, f"self_attn.{part}_proj").reshape(len(tokens), -1, size) for part in "qkv")
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(size)
        scores = np.where(np.tri(len(tokens)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        x = x + linear(mixed.reshape(len(tokens), -1), "self_attn.o_proj")
        h = norm(x, f"model.layers.{n}.post_attention_layernorm")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm") @ tensors["lm_head.weight"].T


def test_heads_of_another_size_than_the_width_says(tmp_path):
    """head_dim 6 where 16 / 4 would be 4."""
    raw, tensors = json.loads((LLAMA / "config.json").read_text()), load_file(LLAMA / "model.safetensors")
    raw |= {"rope_theta": raw["rope_parameters"]["rope_theta"]}
    golden = load_file(LLAMA / "golden.safetensors")
    np.testing.assert_allclose(transformers_logits(raw, tensors, golden["tokens"][0]), golden["logits"][0], atol=2e-5)
    rng = np.random.default_rng(5)
    for n in range(2):
        for part, heads in {"q": 4, "k": 2, "v": 2}.items():
            shape = (heads * 6, 16)
            tensors[f"model.layers.{n}.self_attn.{part}_proj.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
        tensors[f"model.layers.{n}.self_attn.o_proj.weight"] = rng.normal(0, 0.3, (16, 24)).astype(np.float32)
    raw["head_dim"] = 6
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "model.safetensors")
    config, params = load_decoder(tmp_path)
    expected = transformers_logits(raw, tensors, golden["tokens"][1])
    np.testing.assert_allclose(forward(config, params, golden["tokens"][1:])[0], expected, atol=2e-5)
    save_decoder(tmp_path / "again", config, params)
    assert_same(load_file(tmp_path / "again/model.safetensors"), tensors)
    raw.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"q_proj\.weight has shape \[24, 16\], config\.json says \[16, 16\]"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("folder", [LLAMA, QWEN2])
def test_what_is_written_is_read_again(tmp_path, folder, tied):
    config, params = load_decoder(folder)
    if tied:
        config = dataclasses.replace(config, tie_embeddings=True)
        params = {name: value for name, value in params.items() if name != "output"}
    save_decoder(tmp_path, config, params, bos_id=1, eos_id=2)
    again, same = load_decoder(tmp_path)
    assert again == config
    assert_same(same, params)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["tie_word_embeddings"]) == (1, 2, tied)


@pytest.mark.parametrize("folder", [LLAMA, QWEN2])
def test_the_same_tensors_as_transformers_wrote(tmp_path, folder):
    save_decoder(tmp_path, *load_decoder(folder))
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    written, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert all(written[key] == original[key] for key in ("model_type", "architectures"))


def test_bfloat16_is_rounded_once(tmp_path):
    config, params = load_decoder(LLAMA)
    save_decoder(tmp_path, config, params, dtype="bfloat16")
    _, rounded = load_decoder(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), rounded, params)
    save_decoder(tmp_path / "again", config, rounded, dtype="bfloat16")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="not float32 or bfloat16"):
        save_decoder(tmp_path, config, params, dtype="float16")


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen3"}, "model_type is 'qwen3'; a decoder here has 'llama' (or 'qwen2')"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; a decoder here has 1"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
     "partial_rotary_factor is 0.25"),
    ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "factor is 2.0; a decoder here has no such rotary"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is {'rope_theta'"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None, not a number"),
    ({"rope_interleaved": True}, "rope_interleaved is True; a decoder here has False"),
    ({"sliding_window": 16}, "sliding_window is 16; a decoder here has no such setting"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"embedding_multiplier": 12}, "embedding_multiplier is 12"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
    ({"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config is"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None, not a number"),
    ({"vocab_size": "many"}, "vocab_size is 'many', not a number"),
    ({"num_key_value_heads": 3}, "n_kv_heads=3 does not divide"),
    ({"intermediate_size": 32}, "has shape [24, 16], config.json says [32, 16]"),
    ({"tie_word_embeddings": True, "num_hidden_layers": 1}, "has no place in this model"),
])
def test_other_models_are_refused(tmp_path, change, message):
    shutil.copytree(LLAMA, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        load_decoder(tmp_path / "model")
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window is True; a decoder here has False"),
    ({"attention_bias": False}, "attention_bias is False; a decoder here has True"),
])
def test_settings_of_qwen2_that_are_refused(tmp_path, change, message):
    shutil.copytree(QWEN2, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        load_decoder(tmp_path / "model")
    assert message in str(error.value)


def test_defaults_of_qwen2(tmp_path):
    """As transformers 4 stores a Qwen2 inside another model: only what differs from its defaults."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "max_window_layers": 21, "sliding_window": 32_768,
        "rope_theta": 1e6, "tie_word_embeddings": True, "vocab_size": 152_000}))
    config = read_config(tmp_path)
    assert (config.head_dim, config.max_length, config.norm_epsilon, config.rope_theta) == (64, 32_768, 1e-6, 1e6)
    assert config.attention_bias and config.tie_embeddings
    assert config.parameters() == 494_032_768 + 64 * 896  # Qwen2-0.5B, with more tokens


def test_old_configurations_are_read(tmp_path):
    """As transformers 4 wrote them: theta at the top, heads and sizes by default."""
    raw = json.loads((LLAMA / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    raw.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": theta, "rope_scaling": None}))
    assert read_config(tmp_path) == read_config(LLAMA)
    raw.pop("num_key_value_heads")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert (read_config(tmp_path).n_kv_heads, read_config(tmp_path).rope_theta) == (4, 10_000.0)


@pytest.mark.parametrize("change, expected", [
    ({"rope_theta": None}, {"rope_theta": 500.0}),  # beside rope_parameters
    ({"rope_theta": 9e3}, {"rope_theta": 500.0}),  # which come first
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 9e3}, {"rope_theta": 9e3}),
    ({"rope_parameters": None}, {"rope_theta": 10_000.0}),
    ({"rms_norm_eps": ...}, {"norm_epsilon": 1e-6}),
    ({"num_key_value_heads": None, "head_dim": None}, {"n_kv_heads": 4, "head_dim": 4}),
    ({"max_position_embeddings": ...}, {"max_length": 2048}),
    ({"hidden_act": "swish", "partial_rotary_factor": 1.0, "sliding_window": None, "transformers_version": "4.0",
      "pad_token_id": 3, "torch_dtype": "float16", "temperature": 0.6, "rope_interleaved": False}, {}),
])
def test_fields_that_are_left_out_or_change_nothing(tmp_path, change, expected):
    raw = json.loads((LLAMA / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    assert read_config(tmp_path) == dataclasses.replace(read_config(LLAMA), **expected)


def test_quantised_tensors_are_named(tmp_path):
    tensors = load_file(LLAMA / "model.safetensors")
    shutil.copy(LLAMA / "config.json", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype, stored in ((ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2"), (np.int8, "I8")):
        save_file(tensors | {name: tensors[name].astype(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=rf"model\.safetensors: tensor {name} is stored as {stored}"):
            load_decoder(tmp_path)


def test_missing_and_superfluous_tensors_are_named(tmp_path):
    tensors = load_file(LLAMA / "model.safetensors")
    shutil.copy(LLAMA / "config.json", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"no tensor {name}"):
        load_decoder(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)},
              tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.bias has no place in this model"):
        load_decoder(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and 20 merges, cut as SmolLM's: digits alone."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["the cat sat on the mat, the dog ran"] * 3, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return made


def write_gguf(path, config, params, tokenizer, **metadata):
    """A file as llama.cpp's converter writes it: q and k with their rows permuted, one matrix quantised."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_context_length(config.max_length)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    content = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for field in ("eot", "eom"):
        if field in metadata:
            getattr(writer, f"add_{field}_token_id")(metadata[field])
    for name, value in metadata.get("llama", {}).items():
        writer.add_uint32(f"llama.{name}", value)
    if "chat_template" in metadata:
        writer.add_chat_template(metadata["chat_template"])
    if "rope_freqs" in metadata:
        writer.add_tensor("rope_freqs.weight", metadata["rope_freqs"])
    if metadata.get("add_bos"):
        writer.add_add_bos_token(True)

    def permute(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    writer.add_tensor("token_embd.weight", params["embedding"])
    writer.add_tensor("output_norm.weight", params["final_norm"]["scale"])
    embed = config.embed_dim
    for n in range(config.n_layers):
        layer = jax.tree.map(lambda x, n=n: np.asarray(x[n]), params["layers"])
        attention, mlp = layer["attention"], layer["mlp"]
        q, k, v = (attention[name].reshape(embed, -1).T for name in ("query", "key", "value"))
        for name, weight in {
            "attn_q": permute(q, config.n_heads), "attn_k": permute(k, config.n_kv_heads), "attn_v": v,
            "attn_output": attention["out"].reshape(-1, embed).T, "attn_norm": layer["attention_norm"]["scale"],
            "ffn_norm": layer["mlp_norm"]["scale"], "ffn_gate": mlp["gate"].T, "ffn_down": mlp["down"].T,
        }.items():
            writer.add_tensor(f"blk.{n}.{name}.weight", np.ascontiguousarray(weight))
        quantised = gguf.quantize(np.ascontiguousarray(mlp["up"].T), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{n}.ffn_up.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory, tokenizer):
    """(file, configuration, parameters)."""
    import flax.linen as nn

    from mlx_pretrain.models.decoder import DecoderConfig

    config = DecoderConfig(vocab_size=tokenizer.get_vocab_size(), embed_dim=32, n_layers=2, n_heads=4, n_kv_heads=2,
                           head_dim=8, mlp_dim=32, max_length=48, rope_theta=700.0, tie_embeddings=True)
    params = jax.tree.map(np.asarray, nn.unbox(config.init(jax.random.key(3))))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, config, params, tokenizer)
    return path, config, params


def test_gguf_gives_the_weights_and_the_tokenizer(gguf_model, tokenizer):
    path, config, params = gguf_model
    file = GGUF(path)
    loaded, weights = file.load_decoder()
    assert loaded == config
    np.testing.assert_allclose(weights["layers"]["mlp"].pop("up"), params["layers"]["mlp"]["up"], atol=3e-3)
    expected = {**params, "layers": {**params["layers"], "mlp": {
        name: value for name, value in params["layers"]["mlp"].items() if name != "up"}}}
    assert_same(weights, expected)
    read = tokenizers.Tokenizer.from_buffer(file.tokenizer())
    for text in ("the cat ran 1998 dogs</s> on", "Ünïcode\n\n  über"):
        assert read.encode(text).ids == tokenizer.encode(text).ids
        assert read.decode(read.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)


def test_models_from_gguf_and_hugging_face_are_used_alike(gguf_model, tmp_path):
    path, config, _ = gguf_model
    model = load_language_model(path)
    save_decoder(tmp_path, config, model.params, bos_id=model.bos_id, eos_id=model.eos_ids)
    (tmp_path / "tokenizer.json").write_bytes(model.tokenizer.model)
    same = load_language_model(tmp_path)
    assert same.fingerprint() == model.fingerprint()
    ids = [(each.bos_id, each.eos_ids, each.prefix_ids) for each in (same, model)]
    assert ids == [(0, (1,), ())] * 2
    prompts = ["the cat", "", "1998 dogs ran"]
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    assert same.generate(prompts, **settings) == model.generate(prompts, **settings)


def test_chat_templates_of_gguf_are_exported(gguf_model, tmp_path, tokenizer):
    _, config, params = gguf_model
    named = [{"name": "default", "template": "{{ bos_token }}é\n"}, {"name": "tools", "template": "t"}]
    for number, template in enumerate(("{{ messages }}\n", named)):
        write_gguf(tmp_path / f"{number}.gguf", config, params, tokenizer, chat_template=template)
        export_model(ExportConfig(str(tmp_path / f"{number}.gguf"), str(tmp_path / f"{number}")))
        settings = json.loads((tmp_path / f"{number}/tokenizer_config.json").read_text())
        assert settings["chat_template"] == template and settings["bos_token"] == "<s>"


def test_gguf_files_that_are_none(gguf_model, tmp_path, tokenizer):
    _, config, params = gguf_model
    with pytest.raises(InputError, match="no such file"):
        GGUF(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model " * 9)
    with pytest.raises(InputError, match="not a GGUF file"):
        GGUF(tmp_path / "text.gguf")
    write_gguf(tmp_path / "other.gguf", config, params, tokenizer, pre="qwen2", add_bos=True)
    with pytest.raises(InputError, match="pre-tokenizer 'qwen2'"):
        GGUF(tmp_path / "other.gguf").tokenizer()
    write_gguf(tmp_path / "bos.gguf", config, params, tokenizer, add_bos=True)
    assert load_language_model(tmp_path / "bos.gguf").prefix_ids == (0,)


@pytest.mark.parametrize("metadata, message", [
    ({"rope_freqs": np.array([1, 1, 8, 8], np.float32)}, "rope_freqs.weight scales the rotary positions"),
    ({"llama": {"rope.dimension_count": 4, "attention.key_length": 8}}, "llama.rope.dimension_count is 4"),
    ({"llama": {"attention.sliding_window": 16}}, "llama.attention.sliding_window is 16"),
    ({"llama": {"expert_count": 8}}, "llama.expert_count is 8"),
])
def test_gguf_files_that_ask_for_more(gguf_model, tmp_path, tokenizer, metadata, message):
    _, config, params = gguf_model
    write_gguf(tmp_path / "other.gguf", config, params, tokenizer, **metadata)
    with pytest.raises(InputError) as error:
        GGUF(tmp_path / "other.gguf").load_decoder()
    assert message in str(error.value)


def test_gguf_settings_that_change_nothing(gguf_model, tmp_path, tokenizer):
    _, config, params = gguf_model
    write_gguf(tmp_path / "same.gguf", config, params, tokenizer, rope_freqs=np.ones(4, np.float32), eot=5, eom=1,
               llama={"expert_count": 0, "vocab_size": 280, "rope.dimension_count": 8})
    assert GGUF(tmp_path / "same.gguf").load_decoder()[0] == config
    assert load_language_model(tmp_path / "same.gguf").eos_ids == (1, 5)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(InputError, match="not the folder of a training run"):
        load_language_model(tmp_path)
    (tmp_path / "rater/run").mkdir(parents=True)
    (tmp_path / "rater/run/model.json").write_text("{}")
    with pytest.raises(InputError, match=r"not the folder of a training run; there is .*rater/run$"):
        load_model(tmp_path / "rater")
    shutil.copytree(LLAMA, tmp_path / "model")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such tokenizer"):
        load_language_model(tmp_path / "model")
    with pytest.raises(InputError, match="this is no training run"):
        load_language_model(tmp_path / "model", step=3)
