"""LLaMA decoders, as SmolLM and TinyLlama, from Hugging Face folders and back: config.json and safetensors."""

import contextlib
import functools
import itertools
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
from mlx_pretrain.convert.weights import WEIGHTS, WEIGHTS_INDEX, Read, get_number, open_weights, read_object
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.models.decoder import DecoderConfig

# Tensors that follow from the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

MAX_SHARD_SIZE = 5_000_000_000  # bytes of weights in a file, as transformers 4 has it

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
        return parameter.reshape(self.stored[::-1]).T if self.transposed else parameter


def _weights(config: DecoderConfig) -> list[_Weight]:
    """Returns the weights of a decoder, in the order of the model."""
    vocab, embed, mlp, size = config.vocab_size, config.embed_dim, config.mlp_dim, config.head_dim

    def plain(path: str, name: str, *shape: int) -> _Weight:
        return _Weight(tuple(path.split("/")), f"{name}.weight", shape, shape, transposed=False)

    def dense(path: str, name: str, into: tuple[int, ...], out: tuple[int, ...]) -> _Weight:
        return _Weight(tuple(path.split("/")), f"{name}.weight", (math.prod(out), math.prod(into)), into + out)

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
    return weights if config.tie_embeddings else [*weights, dense("output/kernel", "lm_head", (embed,), (vocab,))]


class StoredParameter:
    """A parameter of `Decoder` that is read from a file when it is indexed, and then only the parts that are asked for.

        parameter[...]                # float32 array of all of it
        parameter[2:4, :, :512]       # only the tensors of layers 2 and 3 are read

    Attributes:
      shape: its shape; `[layers, ...]` where it is stacked.
    """

    def __init__(self, weight: _Weight, n_layers: int, read: Read):
        self._weight, self._read = weight, read
        self.shape = (n_layers, *weight.shape) if weight.stacked else weight.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a part as a float32 array; the index has an int or a slice for each axis, or is `...`."""
        index = (index if isinstance(index, tuple) else (index,)) if index is not ... else ()
        if not self._weight.stacked:
            return self._part("", index)
        numbers = range(self.shape[0])[index[0]] if index else range(self.shape[0])
        if isinstance(numbers, int):
            return self._part(numbers, index[1:])
        parts = (self._part(number, index[1:]) for number in numbers)
        first = next(parts)
        stacked = np.empty((len(numbers), *first.shape), np.float32)
        for place, part in zip(stacked, itertools.chain([first], parts)):
            place[...] = part
        return stacked

    def _part(self, number: int | str, index: tuple[Any, ...]) -> np.ndarray:
        tensor = self._read(self._weight.name.format(number), self._weight.stored)
        return np.array(self._weight.from_stored(tensor)[index], np.float32)


def stored_params(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Returns a tree like the parameters of `Decoder`, of parameters that are read when they are indexed."""
    tree: dict[str, Any] = {}
    for weight in _weights(config):
        part = tree
        for key in weight.path[:-1]:
            part = part.setdefault(key, {})
        part[weight.path[-1]] = StoredParameter(weight, config.n_layers, read)
    return tree


def decoder_params(config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Reads the parameters of `Decoder`, float32 arrays, from tensors by Hugging Face's names."""
    return read_all(stored_params(config, read))


def read_all(params: Any) -> Any:
    """Reads a tree of `StoredParameter`, in the order of the model, to a tree of float32 arrays."""
    if isinstance(params, dict):
        return {name: read_all(part) for name, part in params.items()}
    return params[...]


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
    """Writes a folder that `load_decoder` and transformers' LlamaForCausalLM read.

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
