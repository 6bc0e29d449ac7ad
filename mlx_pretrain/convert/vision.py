"""Vision towers of SigLIP from Hugging Face folders: their config.json and tensors."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.weights import Read, StoredParameter, get_number
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
    """Returns a tree like the parameters of `VisionTransformer`, of `StoredParameter`.

    Args:
      config: configuration of the tower.
      read: see `open_weights`.
      prefix: put before Hugging Face's names of the tensors.
    """
    embed, patch, mlp = config.embed_dim, config.patch_size, config.mlp_dim
    heads = (config.n_heads, embed // config.n_heads)

    def plain(name: str, *shape: int) -> StoredParameter:
        return StoredParameter(shape, lambda _: read(prefix + name, shape))

    def layers(shape: tuple[int, ...], parameter: Callable[[Read], np.ndarray]) -> StoredParameter:
        def of_layer(number: int | None) -> np.ndarray:
            return parameter(lambda name, stored: read(f"{prefix}encoder.layers.{number}.{name}", stored))

        return StoredParameter(shape, of_layer, config.n_layers)

    def norm(name: str) -> dict[str, StoredParameter]:
        return {"scale": layers((embed,), lambda tensor: tensor(f"{name}.weight", (embed,))),
                "bias": layers((embed,), lambda tensor: tensor(f"{name}.bias", (embed,)))}

    def dense(name: str, into: int, out: int) -> StoredParameter:
        return layers((into, out), lambda tensor: tensor(f"{name}.weight", (out, into)).T)

    def bias(name: str, size: int) -> StoredParameter:
        return layers((size,), lambda tensor: tensor(f"{name}.bias", (size,)))

    def qkv(tensor: Read) -> np.ndarray:
        parts = [tensor(f"self_attn.{part}_proj.weight", (embed, embed)).T.reshape(embed, *heads) for part in "qkv"]
        return np.stack(parts, axis=1)

    def qkv_bias(tensor: Read) -> np.ndarray:
        return np.stack([tensor(f"self_attn.{part}_proj.bias", (embed,)).reshape(heads) for part in "qkv"])

    def out(tensor: Read) -> np.ndarray:
        return tensor("self_attn.out_proj.weight", (embed, embed)).T.reshape(*heads, embed)

    def patches(_: None) -> np.ndarray:
        kernel = read(f"{prefix}embeddings.patch_embedding.weight", (embed, 3, patch, patch))
        return kernel.transpose(2, 3, 1, 0).reshape(-1, embed)

    params = {
        "patch": StoredParameter((3 * patch**2, embed), patches),
        "patch_bias": plain("embeddings.patch_embedding.bias", embed),
        "positions": plain("embeddings.position_embedding.weight", config.side**2, embed),
        "layers": {
            "attention_norm": norm("layer_norm1"),
            "attention": {"qkv": layers((embed, 3, *heads), qkv), "qkv_bias": layers((3, *heads), qkv_bias),
                          "out": layers((*heads, embed), out)},
            "attention_bias": bias("self_attn.out_proj", embed),
            "mlp_norm": norm("layer_norm2"),
            "up": dense("mlp.fc1", embed, mlp),
            "up_bias": bias("mlp.fc1", mlp),
            "down": dense("mlp.fc2", mlp, embed),
            "mlp_bias": bias("mlp.fc2", embed),
        },
    }  # fmt: skip
    if config.final_norm:
        params["final_norm"] = {"scale": plain("post_layernorm.weight", embed),
                                "bias": plain("post_layernorm.bias", embed)}
    return params
