"""Vision towers of SigLIP from Hugging Face folders: their config.json and tensors."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.weights import Read, get_number, stack_layers
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.vision import VisionConfig

# Numbers in a `vision_config`, with the defaults of google/siglip-base-patch16-224.
DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}  # fmt: skip
# Fields that change the computation, with the values that describe `VisionTransformer`.
NEEDED = {"model_type": ("siglip_vision_model",), "hidden_act": ("gelu_pytorch_tanh", "gelu_new"),
          "num_channels": (3,), "is_decoder": (False,)}  # fmt: skip
# Fields of the pooling head and of the text tower.
HARMLESS = r"vision_use_head|projection_(dim|size)|vocab_size|tie_word_embeddings"


def vision_config(path: epath.Path, raw: Mapping[str, Any], n_layers: int | None = None, **more: Any) -> VisionConfig:
    """Returns the configuration that the `vision_config` of a config.json describes.

    Args:
      path: path of config.json, for errors.
      raw: the object in it; fields left out have the values of google/siglip-base-patch16-224.
      n_layers: number of layers to use, from the first; None: all.
      more: further fields of `VisionConfig`.

    Raises:
      InputError: it is no SigLIP tower, has a setting that `VisionTransformer` lacks, or a field is no number.
    """
    check_fields(path, raw, "a tower", read=DEFAULTS, needed=NEEDED, harmless=HARMLESS, part=" of the vision tower")
    get = functools.partial(get_number, path, {**DEFAULTS, **raw})
    try:
        return VisionConfig(
            image_size=get("image_size"), patch_size=get("patch_size"), embed_dim=get("hidden_size"),
            n_layers=get("num_hidden_layers") if n_layers is None else n_layers, n_heads=get("num_attention_heads"),
            mlp_dim=get("intermediate_size"), norm_epsilon=float(get("layer_norm_eps", (int, float))), **more)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def vision_params(config: VisionConfig, read: Read, prefix: str) -> dict[str, Any]:
    """Reads the parameters of `VisionTransformer` from tensors by Hugging Face's names, each after `prefix`."""
    embed, patch = config.embed_dim, config.patch_size
    kernel = read(f"{prefix}embeddings.patch_embedding.weight", (embed, 3, patch, patch))
    params = {
        "patch": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)).reshape(-1, embed),
        "patch_bias": read(f"{prefix}embeddings.patch_embedding.bias", (embed,)),
        "positions": read(f"{prefix}embeddings.position_embedding.weight", (config.side**2, embed)),
        "layers": stack_layers([_layer(config, read, f"{prefix}encoder.layers.{n}") for n in range(config.n_layers)]),
    }
    if config.final_norm:
        params["final_norm"] = _norm(read, f"{prefix}post_layernorm", embed)
    return params


def _norm(read: Read, name: str, size: int) -> dict[str, np.ndarray]:
    return {"scale": read(f"{name}.weight", (size,)), "bias": read(f"{name}.bias", (size,))}


def _layer(config: VisionConfig, read: Read, name: str) -> dict[str, Any]:
    embed, mlp, heads = config.embed_dim, config.mlp_dim, (config.n_heads, config.embed_dim // config.n_heads)
    parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
    return {
        "attention_norm": _norm(read, f"{name}.layer_norm1", embed),
        "attention": {
            "qkv": np.stack([read(f"{p}.weight", (embed, embed)).T.reshape(embed, *heads) for p in parts], axis=1),
            "qkv_bias": np.stack([read(f"{p}.bias", (embed,)).reshape(heads) for p in parts]),
            "out": read(f"{name}.self_attn.out_proj.weight", (embed, embed)).T.reshape(*heads, embed),
        },
        "attention_bias": read(f"{name}.self_attn.out_proj.bias", (embed,)),
        "mlp_norm": _norm(read, f"{name}.layer_norm2", embed),
        "up": read(f"{name}.mlp.fc1.weight", (mlp, embed)).T,
        "up_bias": read(f"{name}.mlp.fc1.bias", (mlp,)),
        "down": read(f"{name}.mlp.fc2.weight", (embed, mlp)).T,
        "mlp_bias": read(f"{name}.mlp.fc2.bias", (embed,)),
    }
