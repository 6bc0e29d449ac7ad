"""Models from elsewhere: ids that begin and end their texts, texts they write, and fingerprints."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from evals.scoring.requests import encode_pairs
from mlx_pretrain.convert.decoders import save_decoder
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.data.tokenizers import SubwordTokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import continuation, load_language_model, with_prefix
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning

PIECES = ["<unk>", "<s>", "</s>", "<|im_end|>", "▁Hello", "▁world", "▁again", "▁and"]
BOS, EOS, IM_END, HELLO, WORLD, AGAIN, AND = range(1, 8)


def llama_tokenizer(template: bool) -> tokenizers.Tokenizer:
    """Whole words, spaces as LLaMA-2 has them: the decoder drops the one at the beginning of a text."""
    made = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([tokenizers.AddedToken(piece, special=True) for piece in PIECES[:4]])
    if template:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


def chain(following: dict[int, int]) -> tuple[DecoderConfig, dict]:
    """A decoder that continues token i with following[i], by its embedding and output projection alone."""
    n = len(PIECES)
    config = DecoderConfig(vocab_size=n, embed_dim=n, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, mlp_dim=8,
                           max_length=64)
    kernel = np.zeros((n, n), np.float32)
    for token, then in following.items():
        kernel[token, then] = 1
    zeros = lambda *shape: np.zeros((1, *shape), np.float32)  # noqa: E731
    norm = {"scale": np.ones((1, n), np.float32)}
    return config, {
        "embedding": np.eye(n, dtype=np.float32), "final_norm": {"scale": np.ones(n, np.float32)},
        "output": {"kernel": kernel},
        "layers": {
            "attention_norm": norm, "mlp_norm": norm,
            "attention": {"query": zeros(n, 2, 4), "key": zeros(n, 1, 4), "value": zeros(n, 1, 4),
                          "out": zeros(2, 4, n)},
            "mlp": {"gate": zeros(n, 8), "up": zeros(n, 8), "down": zeros(8, n)},
        },
    }


CHAIN = {HELLO: WORLD, WORLD: IM_END, IM_END: AGAIN, AGAIN: EOS, EOS: AND, AND: AND}


@pytest.fixture
def folder(tmp_path):
    """Hello world <|im_end|> again </s> and and ..."""
    return write_model(tmp_path / "model", CHAIN)


def write_model(path, following, template=True):
    save_decoder(path, *chain(following), bos_id=BOS, eos_id=EOS)
    (path / "generation_config.json").unlink()
    (path / "tokenizer.json").write_text(llama_tokenizer(template).to_str())
    return path


def say(path, name, **fields):
    old = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps(old | fields))


def written(model, prompt="Hello", **settings):
    return model.generate([prompt], max_new_tokens=5, temperature=0.0, **settings)[0]


@pytest.mark.parametrize("config, generation, named, ends, text", [
    (EOS, None, None, (EOS,), " world again"),
    ([IM_END, EOS], None, None, (IM_END, EOS), " world"),
    ([EOS, IM_END, EOS], None, None, (EOS, IM_END), " world"),
    (EOS, {"eos_token_id": [AGAIN, IM_END]}, None, (AGAIN, IM_END), " world"),
    (EOS, {"eos_token_id": IM_END}, None, (IM_END,), " world"),
    ([EOS, IM_END], {}, None, (EOS, IM_END), " world"),
    (None, None, "<|im_end|>", (IM_END,), " world"),
    (None, None, {"content": "</s>"}, (EOS,), " world again"),
    (EOS, None, "<|im_end|>", (EOS,), " world again"),
    (None, None, None, (BOS,), " world again and"),
])
def test_all_ids_that_end_a_text_are_read_and_exported(tmp_path, folder, config, generation, named, ends, text):
    say(folder, "config.json", eos_token_id=config)
    if generation is not None:
        say(folder, "generation_config.json", **generation)
    if named is not None:
        say(folder, "tokenizer_config.json", eos_token=named)
    model = load_language_model(folder)
    assert model.eos_ids == ends and written(model) == text
    export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    again = load_language_model(tmp_path / "out")
    assert again.eos_ids == ends and written(again) == text
    raw = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert raw["eos_token_id"] == (list(ends) if len(ends) > 1 else ends[0])


@pytest.mark.parametrize("name, fields, message", [
    ("config.json", {"eos_token_id": [2, "3"]}, "config.json: eos_token_id is [2, '3'], neither a number"),
    ("config.json", {"eos_token_id": 8}, "eos_token_id 8 is not one of the model's 8 ids"),
    ("config.json", {"bos_token_id": -1}, "bos_token_id -1 is not one of the model's 8 ids"),
    ("config.json", {"bos_token_id": None, "eos_token_id": None}, "neither a bos_token_id nor an eos_token_id"),
    ("generation_config.json", {"eos_token_id": True}, "generation_config.json: eos_token_id is True"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "tokenizer_config.json: add_bos_token is 'yes'"),
    ("tokenizer_config.json", {"add_bos_token": True, "bos_token": "<bos>"}, "bos_token is '<bos>', which is no token"),
])
def test_ids_that_are_none_are_refused(folder, name, fields, message):
    say(folder, name, **fields)
    with pytest.raises(InputError) as error:
        load_language_model(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("template, settings, prefix", [
    (True, None, (BOS,)),
    (False, None, ()),
    (True, {"add_bos_token": False}, ()),
    (False, {"add_bos_token": True, "bos_token": "<s>"}, (BOS,)),
    (False, {"add_bos_token": True, "bos_token": {"content": "<|im_end|>", "special": True}}, (IM_END,)),
    (False, {"add_bos_token": True}, (BOS,)),  # by config.json
    (True, {"add_bos_token": True, "bos_token": None}, ()),
    (True, {"bos_token": "<s>"}, (BOS,)),
])
def test_add_bos_token_has_the_last_word(tmp_path, template, settings, prefix):
    folder = write_model(tmp_path / "model", CHAIN, template)
    if settings is not None:
        say(folder, "tokenizer_config.json", **settings)
    model = load_language_model(folder)
    assert model.prefix_ids == prefix
    (request,) = encode_pairs(model, [("Hello", " world")])
    assert request.context.tolist() == [*prefix, HELLO] and request.continuation.tolist() == [WORLD]
    export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    again = load_language_model(tmp_path / "out")
    assert again.prefix_ids == prefix
    # Readers of tokenizer.json alone do the same.
    assert tuple(SubwordTokenizer(tmp_path / "out/tokenizer.json").prefix_ids.tolist()) == prefix


CHAT = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}é 日本{{ pad_token }}{% endif %}\n")
NAMED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "tools: {{ tools }}"}]


@pytest.mark.parametrize("setting, files", [
    (CHAT, {}), (NAMED, {}), (None, {"chat_template.jinja": CHAT}), (None, {}),
    ("old", {"chat_template.jinja": CHAT, "additional_chat_templates/tool_use.jinja": "tools: {{ tools }}"}),
])
def test_a_chat_template_and_the_tokens_it_names_are_exported(tmp_path, folder, setting, files):
    """The end of a turn is another token than the end of a text: the template must not get that."""
    say(folder, "config.json", eos_token_id=[EOS, IM_END])
    say(folder, "tokenizer_config.json", bos_token="<s>", eos_token={"content": "<|im_end|>"}, pad_token="<unk>",
        mask_token="<mask>", **({} if setting is None else {"chat_template": setting}))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    settings_written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings_written.get("chat_template") == setting
    assert {name: (tmp_path / "out" / name).read_bytes().decode() for name in files} == files
    assert len(list((tmp_path / "out").rglob("*.jinja"))) == len(files)
    tokens = {name: settings_written.get(name) for name in ("bos_token", "eos_token", "pad_token", "mask_token")}
    assert tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "mask_token": None}
    again, model = load_language_model(tmp_path / "out"), load_language_model(folder)
    assert (again.eos_ids, again.prefix_ids, again.bos_id) == (model.eos_ids, model.prefix_ids, model.bos_id)


@pytest.mark.parametrize("setting", [CHAT, NAMED])
def test_transformers_has_the_same_chat_template_after_an_export(tmp_path, folder, setting):
    transformers = pytest.importorskip("transformers")
    say(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>",
        eos_token="<|im_end|>", pad_token="<unk>", chat_template=setting)
    export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert after.chat_template == before.chat_template
    messages = [{"role": "user", "content": "Hello"}]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
             for tokenizer in (before, after)]
    assert texts[0] == texts[1] and "<|im_end|>" in texts[1] and "é 日本<unk>" in texts[1]


@pytest.mark.parametrize("template", [3, {"default": CHAT}, [CHAT], [{"name": "default"}]])
def test_a_chat_template_that_is_none_is_named(tmp_path, folder, template):
    say(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template is neither a text nor a list"):
        export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_text_that_begins_with_its_bos_gets_no_second_one(folder):
    model = load_language_model(folder)
    for context in ("Hello", "<s>Hello"):
        (request,) = encode_pairs(model, [(context, " world")])
        assert request.context.tolist() == [BOS, HELLO] and request.continuation.tolist() == [WORLD]
    (request,) = encode_pairs(model, [("", "<s>Hello")])
    assert request.context.tolist() == [BOS] and request.continuation.tolist() == [HELLO]
    assert with_prefix((1, 2), [1, 3]).tolist() == [1, 2, 1, 3] and with_prefix((), []).tolist() == []
    # The prompt of five new tokens has 59 of 64 positions.
    full = "Hello" + " and" * 57
    assert written(model, full) == written(model, f"<s>{full}")


def test_a_continuation_keeps_its_first_space(folder):
    model = load_language_model(folder)
    assert written(model) == " world again" and written(model, "") == written(model, "<s>")
    # At the beginning of a text the space is dropped, as transformers drops it.
    say(folder, "config.json", eos_token_id=IM_END)
    params = chain({BOS: HELLO, **CHAIN})
    save_decoder(folder, *params, bos_id=BOS, eos_id=IM_END)
    assert written(load_language_model(folder), "") == "Hello world"


@pytest.mark.parametrize("until, text", [
    ((), " world again"),
    (("<|im_end|>",), " world"),
    (("<|im_end|> again",), " world"),
    (("again",), " world "),
    (("d<|im_",), " worl"),
    (("gain", "", "<|im_end|>"), " world"),
    (("never",), " world again"),
])
def test_stop_strings_see_special_tokens(folder, until, text):
    assert written(load_language_model(folder), until=until) == text


def test_half_a_character_at_the_border(tmp_path):
    """A text that ends in the middle of a character: the text before it is not written again."""
    made = tokenizers.Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = SubwordTokenizer(tmp_path / "tokenizer.json", made.to_str().encode())
    first, second = "ß".encode()
    assert continuation(tokenizer, [97], [first, second, 98]) == "ßb"
    assert tokenizer.decode([97, first]) == "\ufffd\ufffd" and continuation(tokenizer, [97], [first]) == "\ufffd"


@pytest.mark.parametrize("change", ["layers", "heads", "one bit", "tokenizer", "add_bos_token", "eos", "config"])
def test_another_model_has_another_fingerprint(tmp_path, change):
    rng = np.random.default_rng(0)
    config, params = chain(CHAIN)
    config = dataclasses.replace(config, n_layers=2)
    params["layers"] = jax.tree.map(lambda x: rng.normal(size=(2, *x.shape[1:])).astype(np.float32), params["layers"])
    folders = [tmp_path / "a", tmp_path / "b"]
    for path in folders:
        save_decoder(path, config, params, bos_id=BOS, eos_id=EOS)
        (path / "tokenizer.json").write_text(llama_tokenizer(True).to_str())
    first = load_language_model(folders[0])
    assert load_language_model(folders[1]).fingerprint() == first.fingerprint()
    if change == "layers":
        params["layers"] = jax.tree.map(lambda x: x[::-1], params["layers"])
    elif change == "heads":
        attention = params["layers"]["attention"]
        attention["query"], attention["out"] = attention["query"][:, :, ::-1], attention["out"][:, ::-1]
    elif change == "one bit":
        params["embedding"][3, 3] = np.nextafter(np.float32(1), np.float32(2))
    elif change == "config":
        config = dataclasses.replace(config, rope_theta=9999.0)
    save_decoder(folders[1], config, params, bos_id=BOS, eos_id=[EOS, IM_END] if change == "eos" else EOS)
    if change == "tokenizer":
        made = llama_tokenizer(True)
        made.decoder = decoders.Fuse()
        (folders[1] / "tokenizer.json").write_text(made.to_str())
    if change == "add_bos_token":
        say(folders[1], "tokenizer_config.json", add_bos_token=False)
    assert load_language_model(folders[1]).fingerprint() != first.fingerprint()


def test_a_fingerprint_is_the_same_on_any_mesh(folder):
    alone = load_language_model(folder)
    spread = load_language_model(folder, partitioning.make_mesh(fsdp=4))
    assert len(spread.params["embedding"].sharding.device_set) == 8
    assert spread.params["embedding"].addressable_shards[0].data.shape != spread.params["embedding"].shape
    assert spread.fingerprint() == alone.fingerprint()
