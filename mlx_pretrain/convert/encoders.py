"""Encoders from Hugging Face folders: config.json and model.safetensors of BERT, RoBERTa, XLM-R and their kin."""

import functools
import re
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.weights import Read, as_float32, get_number, open_weights, read_object, stack_layers
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.encoder import EncoderConfig

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
PREFIXES = ("bert.", "roberta.")

# Fields of config.json: numbers that are read, and fields that change the computation, with the values that describe
# `Encoder`.
READ = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")  # fmt: skip
NEEDED = {"model_type": MODEL_TYPES, "hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",),
          "is_decoder": (False,)}  # fmt: skip
# Fields of heads, which are not read.
HARMLESS = r"tie_word_embeddings|pooler_\w+|directionality"

# Tensors that are not the encoder's: heads for other purposes, and tables of the numbers 0, 1, 2, ...
IGNORED = re.compile(r"(pooler|lm_head|cls|classifier|qa_outputs)\..*|embeddings\.(position_ids|token_type_ids)")


def load_encoder(folder: epath.PathLike, dtype: str = "float32") -> tuple[EncoderConfig, dict[str, Any]]:
    """Reads an encoder with its weights.

    Pooling is read from sentence-transformers' `1_Pooling/config.json` where it exists, and is "first" elsewhere;
    `dataclasses.replace` changes it, like all fields.

    Args:
      folder: local, with config.json and model.safetensors or model.safetensors.index.json with its files.
      dtype: compute dtype of the configuration.

    Returns:
      The configuration, and the parameters of `Encoder` as numpy float32 arrays.

    Raises:
      InputError: a file is missing or malformed; the model is of another type; a tensor is missing, has another shape
        than config.json says, or is neither used nor among IGNORED.
    """
    config = read_config(folder, dtype)
    with open_weights(folder, _rename, IGNORED) as stored:
        read = as_float32(stored)
        return config, {"embeddings": _embeddings(config, read), "layers": _layers(config, read)}


def _rename(stored: str) -> str:
    """Returns a tensor's name without the model's prefix."""
    name = next((stored.removeprefix(prefix) for prefix in PREFIXES if stored.startswith(prefix)), stored)
    # The first BERT checkpoints, from TensorFlow, call a norm's scale and bias gamma and beta.
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORM[m[1]]}", name)


_NORM = {"gamma": "weight", "beta": "bias"}


def read_config(folder: epath.PathLike, dtype: str = "float32") -> EncoderConfig:
    """Reads the configuration that a folder's config.json describes; errors as in `load_encoder`."""
    path = epath.Path(folder) / "config.json"
    raw = read_object(path)
    check_fields(path, raw, "an encoder", read=READ, needed=NEEDED, harmless=HARMLESS)
    get = functools.partial(get_number, path, raw)
    pad_id = get("pad_token_id")
    # RoBERTa numbers positions from pad_id + 1, and its table has that many rows more than positions.
    offset = 0 if raw["model_type"] == "bert" else pad_id + 1
    try:
        return EncoderConfig(
            vocab_size=get("vocab_size"),
            embed_dim=get("hidden_size"),
            n_layers=get("num_hidden_layers"),
            n_heads=get("num_attention_heads"),
            mlp_dim=get("intermediate_size"),
            max_length=get("max_position_embeddings") - offset,
            position_offset=offset,
            token_types=get("type_vocab_size"),
            norm_epsilon=float(get("layer_norm_eps", (int, float))),
            pad_id=pad_id,
            pooling=_pooling(epath.Path(folder)),
            dtype=dtype,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _pooling(folder: epath.Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return "first"
    raw = read_object(path)
    modes = {key.removeprefix("pooling_mode_") for key, on in raw.items() if key.startswith("pooling_mode_") and on}
    names = {"cls_token": "first", "mean_tokens": "mean"}
    if len(modes) != 1 or not modes <= set(names):
        raise InputError(f"{path}: pooling modes {sorted(modes)}; known is one of {', '.join(names)}")
    return names[modes.pop()]


def _embeddings(config: EncoderConfig, read: Read) -> dict[str, Any]:
    embed = config.embed_dim
    params = {
        "token": read("embeddings.word_embeddings.weight", (config.vocab_size, embed)),
        "position": read(
            "embeddings.position_embeddings.weight", (config.max_length + config.position_offset, embed)
        ),
        "norm": _norm(config, read, "embeddings.LayerNorm"),
    }
    if config.token_types:
        params["type"] = read("embeddings.token_type_embeddings.weight", (config.token_types, embed))
    return params


def _norm(config: EncoderConfig, read: Read, name: str) -> dict[str, np.ndarray]:
    return {"scale": read(f"{name}.weight", (config.embed_dim,)), "bias": read(f"{name}.bias", (config.embed_dim,))}


def _layers(config: EncoderConfig, read: Read) -> dict[str, Any]:
    """Reads the layers' parameters, each stacked to `[layers, ...]`."""
    return stack_layers([_layer(config, read, f"encoder.layer.{n}") for n in range(config.n_layers)])


def _layer(config: EncoderConfig, read: Read, name: str) -> dict[str, Any]:
    """Reads the parameters of one layer; PyTorch's weights are `[out, in]`."""
    embed, mlp, heads = config.embed_dim, config.mlp_dim, (config.n_heads, config.embed_dim // config.n_heads)
    parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    qkv = np.stack([read(f"{part}.weight", (embed, embed)).T for part in parts], axis=1)
    out, up, down = f"{name}.attention.output", f"{name}.intermediate", f"{name}.output"
    return {
        "attention": {
            "qkv": qkv.reshape(embed, 3, *heads),
            "qkv_bias": np.stack([read(f"{part}.bias", (embed,)) for part in parts]).reshape(3, *heads),
            "out": read(f"{out}.dense.weight", (embed, embed)).T.reshape(*heads, embed),
        },
        "attention_bias": read(f"{out}.dense.bias", (embed,)),
        "attention_norm": _norm(config, read, f"{out}.LayerNorm"),
        "up": read(f"{up}.dense.weight", (mlp, embed)).T,
        "up_bias": read(f"{up}.dense.bias", (mlp,)),
        "down": read(f"{down}.dense.weight", (embed, mlp)).T,
        "mlp_bias": read(f"{down}.dense.bias", (embed,)),
        "mlp_norm": _norm(config, read, f"{down}.LayerNorm"),
    }
