"""LLaMA and Qwen2 decoders from Hugging Face folders and back: config.json and safetensors."""

import contextlib
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.safetensors_files import write_file
from mlx_pretrain.convert.special_ids import CONFIG, GENERATION_CONFIG
from mlx_pretrain.convert.weights import (
    WEIGHTS,
    WEIGHTS_INDEX,
    Read,
    StoredParameter,
    get_number,
    open_weights,
    read_all,
    read_object,
)
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.models.decoder import DecoderConfig

# Tensors that follow from the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

MAX_SHARD_SIZE = 5_000_000_000  # bytes of weights in a file, as transformers 4 has it

# Numbers in config.json, with the defaults of transformers' LlamaConfig and Qwen2Config.
_LLAMA = {"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
          "intermediate_size": 11_008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
          "rope_theta": 10_000.0}  # fmt: skip
DEFAULTS = {"llama": _LLAMA, "qwen2": {**_LLAMA, "vocab_size": 151_936, "intermediate_size": 22_016,
                                       "max_position_embeddings": 32_768, "num_key_value_heads": 32}}  # fmt: skip
READ = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "rope_scaling")
# Fields that change the computation, with the values that describe `Decoder`.
NEEDED = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1,),
          "rope_interleaved": (False,), "use_sliding_window": (False,)}  # fmt: skip
# transformers' LLaMA has biases on the output projection too, and its Qwen2 has them whatever the field says.
_NEEDED_BY_TYPE = {"llama": {"attention_bias": (False,)}, "qwen2": {"attention_bias": (True,)}}
_HARMLESS = {"llama": "is_decoder", "qwen2": "is_decoder|sliding_window|max_window_layers|layer_types"}
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}  # dtypes of weights


def load_decoder(folder: epath.PathLike, dtype: str = "float32") -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a decoder with its weights.

    Args:
      folder: local or gs:// folder with config.json, and model.safetensors or model.safetensors.index.json with its
        files.
      dtype: compute dtype of the configuration.

    Returns:
      The configuration, and the parameters of `Decoder` as numpy float32 arrays.

    Raises:
      InputError: a file is missing or malformed; the model is of another type, or has parts that `Decoder` lacks
        (biases, scaled positions); a tensor is missing, has another shape than config.json says, or is not used.
    """
    config = read_config(folder, dtype)
    with open_decoder(folder, config) as params:
        return config, read_all(params)


@contextlib.contextmanager
def open_decoder(folder: epath.PathLike, config: DecoderConfig) -> Iterator[dict[str, Any]]:
    """Opens the weights of a decoder whose folder describes `config`; errors as in `load_decoder`.

    Yields:
      A tree like the parameters of `Decoder`, of `StoredParameter`.
    """
    # Some folders store a tied output projection as well.
    ignored = re.compile(rf"{IGNORED.pattern}|lm_head\.weight") if config.tie_embeddings else IGNORED
    with open_weights(folder, lambda stored: stored, ignored) as read:
        yield stored_params(config, read)


def read_config(folder: epath.PathLike, dtype: str = "float32") -> DecoderConfig:
    """Reads the configuration that a folder's config.json describes; errors as in `load_decoder`."""
    path = epath.Path(folder) / CONFIG
    return decoder_config(path, read_object(path), dtype)


def decoder_config(path: epath.Path, raw: Mapping[str, Any], dtype: str = "float32") -> DecoderConfig:
    """Returns the configuration that an object of the config.json at `path` describes; errors as in `load_decoder`."""
    model_type = str(raw.get("model_type"))
    needed = {"model_type": tuple(DEFAULTS), **NEEDED, **_NEEDED_BY_TYPE.get(model_type, {})}
    check_fields(path, raw, "a decoder", read=(*_LLAMA, *READ), needed=needed, harmless=_HARMLESS.get(model_type, ""))
    fields = {**DEFAULTS[model_type], **raw, "rope_theta": _rope_theta(path, raw)}
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
            attention_bias=model_type == "qwen2",
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
    return rope.get("rope_theta", raw.get("rope_theta", _LLAMA["rope_theta"]))


class _Weight(NamedTuple):
    """A parameter of `Decoder`, and the tensor that holds it in a Hugging Face folder.

    Attributes:
      path: its keys in the parameters; under "layers" the parameters of all layers are stacked.
      name: the tensor's name, with {} for the number of the layer.
      stored: the tensor's shape; PyTorch's matrices are `[out, in]`.
      shape: the parameter's shape, of one layer; the transposed tensor has the same elements in the same order.
      transposed: whether the tensor is transposed.
    """

    path: tuple[str, ...]
    name: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = True

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the tensor in the shape of the parameter."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_stored(self, parameter: np.ndarray) -> np.ndarray:
        """Returns a view of the parameter, of one layer, in the shape of the tensor."""
        return parameter.reshape(self.stored[::-1]).T if self.transposed else parameter.reshape(self.stored)


def _weights(config: DecoderConfig) -> list[_Weight]:
    """Returns the weights of a decoder, in the order of the model."""
    vocab, embed, mlp, size = config.vocab_size, config.embed_dim, config.mlp_dim, config.head_dim

    def plain(path: str, name: str, *shape: int) -> _Weight:
        return _Weight(tuple(path.split("/")), f"{name}.weight", shape, shape, transposed=False)

    def dense(path: str, name: str, into: tuple[int, ...], out: tuple[int, ...]) -> _Weight:
        return _Weight(tuple(path.split("/")), f"{name}.weight", (math.prod(out), math.prod(into)), into + out)

    def bias(path: str, name: str, heads: tuple[int, int]) -> _Weight:
        return _Weight(tuple(path.split("/")), f"{name}.bias", (math.prod(heads),), heads, transposed=False)

    layer, heads, kv_heads = "model.layers.{}", (config.n_heads, size), (config.n_kv_heads, size)
    weights = [
        plain("embedding", "model.embed_tokens", vocab, embed),
        plain("layers/attention_norm/scale", f"{layer}.input_layernorm", embed),
        dense("layers/attention/query", f"{layer}.self_attn.q_proj", (embed,), heads),
        dense("layers/attention/key", f"{layer}.self_attn.k_proj", (embed,), kv_heads),
        dense("layers/attention/value", f"{layer}.self_attn.v_proj", (embed,), kv_heads),
        dense("layers/attention/out", f"{layer}.self_attn.o_proj", heads, (embed,)),
        plain("layers/mlp_norm/scale", f"{layer}.post_attention_layernorm", embed),
        dense("layers/mlp/gate", f"{layer}.mlp.gate_proj", (embed,), (mlp,)),
        dense("layers/mlp/up", f"{layer}.mlp.up_proj", (embed,), (mlp,)),
        dense("layers/mlp/down", f"{layer}.mlp.down_proj", (mlp,), (embed,)),
        plain("final_norm/scale", "model.norm", embed),
    ]
    if config.attention_bias:
        weights += [bias(f"layers/attention/{name}_bias", f"{layer}.self_attn.{name[0]}_proj", of_heads)
                    for name, of_heads in (("query", heads), ("key", kv_heads), ("value", kv_heads))]
    return weights if config.tie_embeddings else [*weights, dense("output/kernel", "lm_head", (embed,), (vocab,))]


def stored_params(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Returns a tree like the parameters of `Decoder`, of parameters that are read when they are indexed."""
    tree: dict[str, Any] = {}
    for weight in _weights(config):
        part = tree
        for key in weight.path[:-1]:
            part = part.setdefault(key, {})
        part[weight.path[-1]] = StoredParameter(
            weight.shape, functools.partial(_read_weight, weight, read), config.n_layers if weight.stacked else None)
    return tree


def _read_weight(weight: _Weight, read: Read, layer: int | None) -> np.ndarray:
    return weight.from_stored(read(weight.name.format(layer), weight.stored))


def save_decoder(
    folder: epath.PathLike,
    config: DecoderConfig,
    params: Any,
    *,
    bos_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes a folder that `load_decoder` and transformers read, as Qwen2 where attention has biases, else as LLaMA.

    The folder gets config.json, generation_config.json, and model.safetensors, or for larger models
    model-00001-of-0000N.safetensors with model.safetensors.index.json. One tensor is in memory at a time.

    Args:
      folder: local or gs:// folder, created if needed; files of these names are replaced.
      config: configuration of the decoder.
      params: its parameters: a tree of arrays, or of what gives one layer, as an array, when it is indexed by its
        number (and the whole array by `...`): `StoredParameter`, `checkpoint_arrays.SavedArray`.
      bos_id, eos_id: ids that begin and end a document; several may end one.
      pad_id: id of padding.
      generation: further fields of generation_config.json.
      dtype: dtype of the stored weights, "float32" or "bfloat16".
      max_shard_size: bytes of weights from which several files are written. A larger tensor has a file for itself.

    Raises:
      InputError: another dtype; the disk is full.
    """
    if dtype not in STORED:
        raise InputError(f"save_decoder: dtype = {dtype!r}: not {' or '.join(STORED)}")
    folder, itemsize = epath.Path(folder), np.dtype(STORED[dtype]).itemsize
    readers = dict(_tensors(config, params))
    sizes = {name: math.prod(weight.stored) * itemsize for name, (weight, _) in readers.items()}
    shards = _shards(sizes, max_shard_size)
    for file, names in shards.items():
        write_file(folder / file, {name: readers[name][0].stored for name in names}, STORED[dtype],
                   lambda name: readers[name][1]())
    if len(shards) > 1:
        write_json(folder / WEIGHTS_INDEX, {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names}})
    # A single id is stored as a number, as most readers expect it.
    if isinstance(eos_id, Sequence):
        eos_id = list(eos_id) if len(eos_id) > 1 else next(iter(eos_id), None)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    write_json(folder / GENERATION_CONFIG, {**(generation or {}), **ids})
    qwen2 = config.attention_bias
    write_json(folder / CONFIG, {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen2 else "llama",
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
        **({"use_sliding_window": False} if qwen2 else {"attention_bias": False, "mlp_bias": False}),
        "torch_dtype": dtype,
    } | ids)


def _tensors(config: DecoderConfig, params: Any) -> Iterator[tuple[str, tuple[_Weight, Callable[[], np.ndarray]]]]:
    """Yields (name, (weight, function that reads the tensor)) of every tensor, a parameter's layers in a row."""
    def read(weight: _Weight, parameter: Any, index: Any) -> np.ndarray:
        return weight.to_stored(np.asarray(parameter[index]))

    for weight in _weights(config):
        parameter = functools.reduce(operator.getitem, weight.path, params)
        for index in range(config.n_layers) if weight.stacked else [...]:
            yield weight.name.format(index), (weight, functools.partial(read, weight, parameter, index))


def _shards(sizes: Mapping[str, int], max_size: int) -> dict[str, list[str]]:
    """Divides tensors (name -> bytes) among files in their order: file -> names."""
    groups, left = [[]], max_size
    for name, size in sizes.items():
        if groups[-1] and size > left:
            groups.append([])
            left = max_size
        groups[-1].append(name)
        left -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}
