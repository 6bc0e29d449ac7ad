"""LLaMA decoders, as SmolLM and TinyLlama, from Hugging Face folders and back: config.json and safetensors."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.special_ids import CONFIG, GENERATION_CONFIG
from mlx_pretrain.convert.weights import Read, get_number, open_weights, read_object
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import atomic_writer, write_json
from mlx_pretrain.models.decoder import DecoderConfig

# Tensors that follow from the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

WEIGHTS = "model.safetensors"

# Numbers in config.json, with the defaults of transformers' LlamaConfig.
DEFAULTS = {"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "intermediate_size": 11_008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0}  # fmt: skip
READ = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "rope_scaling")
# Fields that change the computation, with the values that describe `Decoder`.
NEEDED = {"model_type": ("llama",), "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
          "partial_rotary_factor": (1,), "rope_interleaved": (False,), "use_sliding_window": (False,)}  # fmt: skip
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}  # dtypes of weights


def load_decoder(folder: epath.PathLike, dtype: str = "float32") -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a decoder with its weights.

    Args:
      folder: local, with config.json and model.safetensors or model.safetensors.index.json with its files.
      dtype: compute dtype of the configuration.

    Returns:
      The configuration, and the parameters of `Decoder` as numpy float32 arrays.

    Raises:
      InputError: a file is missing or malformed; the model is of another type, or has parts that `Decoder` lacks
        (biases, scaled positions); a tensor is missing, has another shape than config.json says, or is not used.
    """
    config = read_config(folder, dtype)
    with open_decoder(folder, config) as readers:
        return config, _map(lambda reader: reader(), readers)


@contextlib.contextmanager
def open_decoder(folder: epath.PathLike, config: DecoderConfig) -> Iterator[dict[str, Any]]:
    """Opens the weights of a decoder whose folder describes `config`; errors as in `load_decoder`.

    Yields:
      A tree like the parameters of `Decoder`, of functions that each read one parameter as a numpy float32 array.
    """
    # Some folders store a tied output projection as well.
    ignored = re.compile(rf"{IGNORED.pattern}|lm_head\.weight") if config.tie_embeddings else IGNORED
    with open_weights(folder, lambda stored: stored, ignored) as read:
        yield decoder_readers(config, read)


def read_config(folder: epath.PathLike, dtype: str = "float32") -> DecoderConfig:
    """Reads the configuration that a folder's config.json describes; errors as in `load_decoder`."""
    path = epath.Path(folder) / CONFIG
    return decoder_config(path, read_object(path), dtype)


def decoder_config(path: epath.Path, raw: Mapping[str, Any], dtype: str = "float32") -> DecoderConfig:
    """Returns the configuration that an object of the config.json at `path` describes; errors as in `load_decoder`."""
    check_fields(path, raw, "a decoder", read=(*DEFAULTS, *READ), needed=NEEDED, harmless="is_decoder")
    fields = {**DEFAULTS, **raw, "rope_theta": _rope_theta(path, raw)}
    get = functools.partial(get_number, path, fields)
    heads, embed = get("num_attention_heads"), get("hidden_size")
    try:
        tied = raw.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise InputError(f"tie_word_embeddings is {tied!r}, neither true nor false")
        return DecoderConfig(
            vocab_size=get("vocab_size"),
            embed_dim=embed,
            n_layers=get("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=get("num_key_value_heads") if fields.get("num_key_value_heads") is not None else heads,
            head_dim=get("head_dim") if fields.get("head_dim") is not None else embed // heads,
            mlp_dim=get("intermediate_size"),
            max_length=get("max_position_embeddings"),
            rope_theta=float(get("rope_theta", (int, float))),
            norm_epsilon=float(get("rms_norm_eps", (int, float))),
            tie_embeddings=tied,
            dtype=dtype,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _rope_theta(path: epath.Path, raw: Mapping[str, Any]) -> Any:
    """Returns the base of the rotary frequencies; raises InputError for other settings than those of `Decoder`."""
    # Since transformers 5 the settings are an object, which takes precedence over the older field.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters or rope_scaling is {rope!r}, not an object")
    rest = {key: value for key, value in rope.items() if value is not None and key != "rope_theta"}
    # The type comes first: it decides which other fields are read.
    needed = {"rope_type": "default", "partial_rotary_factor": 1}
    settings = {"rope_type": rest.pop("rope_type", rest.pop("type", "default")), **rest}
    for key, value in settings.items():
        if key not in needed or value != needed[key]:
            known = repr(needed[key]) if key in needed else "no such rotary setting"
            raise InputError(f"{path}: {key} is {value!r}; a decoder here has {known}")
    return rope.get("rope_theta", raw.get("rope_theta", DEFAULTS["rope_theta"]))


def decoder_params(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Reads the parameters of `Decoder` from tensors by Hugging Face's names; PyTorch's weights are `[out, in]`."""
    return _map(lambda reader: reader(), decoder_readers(config, read))


def decoder_readers(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Returns a tree like the parameters of `Decoder`, of functions that read one parameter each."""
    embed, vocab = config.embed_dim, config.vocab_size
    names = [f"model.layers.{n}" for n in range(config.n_layers)]
    stack = lambda part: lambda: np.stack([part(name) for name in names])  # noqa: E731
    readers = {
        "embedding": lambda: read("model.embed_tokens.weight", (vocab, embed)),
        "layers": _map(stack, _layer_readers(config, read)),
        "final_norm": {"scale": lambda: read("model.norm.weight", (embed,))},
    }
    if not config.tie_embeddings:
        readers["output"] = {"kernel": lambda: read("lm_head.weight", (vocab, embed)).T}
    return readers


def _layer_readers(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Returns such a tree for one layer; the functions take the layer's name."""
    embed, mlp, head_dim = config.embed_dim, config.mlp_dim, config.head_dim

    def norm(part: str) -> Callable[[str], np.ndarray]:
        return lambda layer: read(f"{layer}.{part}_layernorm.weight", (embed,))

    def heads(part: str, count: int) -> Callable[[str], np.ndarray]:
        shape = (count * head_dim, embed)
        return lambda layer: read(f"{layer}.self_attn.{part}_proj.weight", shape).T.reshape(embed, count, head_dim)

    def out(layer: str) -> np.ndarray:
        weight = read(f"{layer}.self_attn.o_proj.weight", (embed, config.n_heads * head_dim))
        return weight.T.reshape(config.n_heads, head_dim, embed)

    def dense(part: str, shape: tuple[int, int]) -> Callable[[str], np.ndarray]:
        return lambda layer: read(f"{layer}.mlp.{part}_proj.weight", shape).T

    return {
        "attention_norm": {"scale": norm("input")},
        "attention": {
            "query": heads("q", config.n_heads),
            "key": heads("k", config.n_kv_heads),
            "value": heads("v", config.n_kv_heads),
            "out": out,
        },
        "mlp_norm": {"scale": norm("post_attention")},
        "mlp": {"gate": dense("gate", (mlp, embed)), "up": dense("up", (mlp, embed)),
                "down": dense("down", (embed, mlp))},
    }


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Maps a function over a tree like `jax.tree.map`, but in the order of the dictionaries, which is the model's."""
    if isinstance(tree, dict):
        return {name: _map(function, part) for name, part in tree.items()}
    return function(tree)


def save_decoder(
    folder: epath.PathLike,
    config: DecoderConfig,
    params: Any,
    *,
    bos_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a folder that `load_decoder` and transformers' LlamaForCausalLM read: config.json, generation_config.json,
    model.safetensors.

    Args:
      folder: folder, created if needed; files of these names are replaced.
      config, params: configuration and parameters of the decoder; numpy arrays or arrays of one process.
      bos_id, eos_id: ids that begin and end a document; several may end one.
      dtype: dtype of the stored weights, "float32" or "bfloat16".

    Raises:
      InputError: another dtype.
    """
    if dtype not in STORED:
        raise InputError(f"save_decoder: dtype = {dtype!r}: not {' or '.join(STORED)}")
    folder = epath.Path(folder)
    tensors = {name: np.ascontiguousarray(value, STORED[dtype]) for name, value in _tensors(config, params)}
    with atomic_writer(folder / WEIGHTS) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    # A single id is stored as a number, as most readers expect it.
    if isinstance(eos_id, Sequence):
        eos_id = list(eos_id) if len(eos_id) > 1 else next(iter(eos_id), None)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    write_json(folder / GENERATION_CONFIG, ids)
    write_json(folder / CONFIG, {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    } | ids)


def _tensors(config: DecoderConfig, params: Any):
    """Yields (Hugging Face's name, array) of every weight: the inverse of `decoder_params`."""
    def array(x: Any) -> np.ndarray:
        return np.asarray(x, np.float32)

    yield "model.embed_tokens.weight", array(params["embedding"])
    yield "model.norm.weight", array(params["final_norm"]["scale"])
    if not config.tie_embeddings:
        yield "lm_head.weight", array(params["output"]["kernel"]).T
    layers, embed = params["layers"], config.embed_dim
    for n in range(config.n_layers):
        name, attention, mlp = f"model.layers.{n}", layers["attention"], layers["mlp"]
        yield f"{name}.input_layernorm.weight", array(layers["attention_norm"]["scale"][n])
        yield f"{name}.post_attention_layernorm.weight", array(layers["mlp_norm"]["scale"][n])
        for part, key in {"q": "query", "k": "key", "v": "value"}.items():
            yield f"{name}.self_attn.{part}_proj.weight", array(attention[key][n]).reshape(embed, -1).T
        yield f"{name}.self_attn.o_proj.weight", array(attention["out"][n]).reshape(-1, embed).T
        for part in ("gate", "up", "down"):
            yield f"{name}.mlp.{part}_proj.weight", array(mlp[part][n]).T
