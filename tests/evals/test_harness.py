"""Our decoders behind lm-evaluation-harness's interface: its settings, and requests that are refused."""

import flax.linen as nn
import jax
import pytest
import tokenizers
from lm_eval.api.instance import Instance
from tokenizers import decoders, models, pre_tokenizers

from evals import harness
from evals.harness import MLXPretrain
from mlx_pretrain.convert.decoders import save_decoder
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({"<|end|>": 0} | {x: i for i, x in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    config = DecoderConfig(vocab_size=257, embed_dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, mlp_dim=16,
                           max_length=64)
    save_decoder(folder, config, nn.unbox(config.init(jax.random.key(0))), bos_id=0, eos_id=0)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return MLXPretrain(str(folder), max_gen_toks=7)


def generated(model, settings, prompt="a b c"):
    """Returns the settings of a generation, e.g. its number of tokens; the text itself is random bytes."""
    seen = {}
    original = model._model.generate_tokens

    def record(prompts, until=(), **given):
        seen.update(given, until=until)
        return original(prompts, until, **given)

    object.__setattr__(model._model, "generate_tokens", record)
    try:
        model.generate_until([Instance("generate_until", {}, (prompt, settings), 0, ("task", 0, 1))])
    finally:
        object.__delattr__(model._model, "generate_tokens")
    return seen


@pytest.mark.parametrize("settings, tokens, temperature, until", [
    ({}, 7, 0.0, []),
    ({"max_gen_toks": 3, "until": "x"}, 3, 0.0, ["x"]),
    ({"max_new_tokens": 4, "until": ["x", "", "y"]}, 4, 0.0, ["x", "y"]),
    ({"max_tokens": "5", "until": None}, 5, 0.0, []),
    ({"max_completion_tokens": 6, "temperature": 0.5}, 6, 0.5, []),
    ({"max_tokens": 5, "max_gen_toks": 3, "do_sample": False, "temperature": 0.5}, 3, 0.0, []),
])
def test_all_names_of_the_settings(model, settings, tokens, temperature, until):
    seen = generated(model, settings)
    assert (seen["max_new_tokens"], seen["temperature"], seen["until"]) == (tokens, temperature, until)


@pytest.mark.parametrize("settings, message", [
    ({"max_gen_toks": 64}, "64 new tokens leave no room for a prompt"),
    ({"max_tokens": 10**6}, "1000000 new tokens leave no room"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 >= 1"),
    ({"max_new_tokens": "many"}, "task: generation_kwargs: invalid literal"),
])
def test_impossible_settings_are_named(model, settings, message):
    with pytest.raises(InputError) as error:
        generated(model, settings)
    assert message in str(error.value)


@pytest.mark.parametrize("context, continuation", [("one", ""), ("one ", ""), ("", "")])
def test_an_option_without_tokens_is_refused(model, context, continuation):
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in (("one", " two"), (context, continuation))]
    with pytest.raises(InputError, match="has no tokens that could be scored"):
        model.loglikelihood(requests)


def test_a_text_that_spells_out_its_beginning_is_scored_once(model):
    texts = ["a cat", "<|end|>a cat"]
    plain, spelt = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (x,), 0) for x in texts])
    assert plain == pytest.approx(spelt)


@pytest.mark.parametrize("arguments, message", [
    ("path=absent", "absent/model.json: no such model description"),
    ("path=7", "7/model.json: no such model description"),
    ("path={folder}/config.json", "config.json/model.json"),
    ("path={broken}", "model.safetensors: not a safetensors file"),
    ("path={garbled}", "config.json: not a valid JSON"),
    ("path={shut}", "config.json: "),
    ("pretrained={folder}", "model_args: unknown pretrained; known are path"),
    ("step=3", "model_args: no path"),
    ("path={folder},max_length=long", "max_length = 'long'"),
    ("path={folder},dtype=float8", "dtype"),
])
def test_a_mistake_ends_with_one_line(tmp_path, folder, monkeypatch, capsys, arguments, message):
    places = {"folder": folder}
    for name in ("broken", "garbled", "shut"):
        places[name] = tmp_path / name
        places[name].mkdir()
        for file in folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken/model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "garbled/config.json").write_text("{")
    (tmp_path / "shut/config.json").unlink()
    (tmp_path / "shut/config.json").mkdir()
    monkeypatch.chdir(tmp_path)
    # lm_eval itself takes ten seconds to look for its tasks.
    monkeypatch.setattr(harness, "cli_evaluate", lambda: MLXPretrain.create_from_arg_string(arguments.format(**places)))
    with pytest.raises(SystemExit) as ended:
        harness.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith("error: ") and message in line
