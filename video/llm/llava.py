"""Reads Video-LLMs from LLaVA folders of Hugging Face: a SigLIP tower, a projector of two layers, a LLaMA decoder."""

import functools
import re
from typing import Any

from etils import epath

from mlx_pretrain.convert.decoders import CONFIG, decoder_config, decoder_params
from mlx_pretrain.convert.decoders import IGNORED as ROTARY
from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.vision import vision_config, vision_params
from mlx_pretrain.convert.weights import as_float32, get_number, open_weights, read_object
from mlx_pretrain.errors import InputError
from video.llm.model import VideoLLMConfig

# Values of fields that a configuration leaves out.
_LLAVA = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
          "multimodal_projector_bias": True}  # fmt: skip
# Fields that are read; fields that change the computation, with the values supported here; fields that the
# decoder's own configuration repeats.
_READ = ("vision_config", "text_config", "vision_feature_layer")
_NEEDED = {"model_type": ("llava",), "vision_feature_select_strategy": ("full",), "projector_hidden_act": ("gelu",),
           "multimodal_projector_bias": (True,)}  # fmt: skip
_HARMLESS = "image_seq_length|ignore_index|tie_word_embeddings|vocab_size"
# Tensors of layers behind the one that is used, of the pooling head and of its norm.
_UNUSED = r"vision\.(encoder\.layers\.\d+|head|post_layernorm)\..*"


def load_llava(
    folder: epath.PathLike, dtype: str = "float32", pooled_side: int | None = None,
    prompt: str = "USER: {frames}\n{question} ASSISTANT:",
) -> tuple[VideoLLMConfig, dict[str, Any]]:
    """Reads a LLaVA with its weights.

    Args:
      folder: local folder with config.json, and model.safetensors or model.safetensors.index.json with its files.
      dtype: compute dtype.
      pooled_side, prompt: see `VideoLLMConfig`; LLaVA itself keeps all patches.

    Returns:
      The configuration, and the parameters as numpy float32 arrays.

    Raises:
      InputError: a file is missing or malformed; tower, projector or decoder are of another type (CLIP's towers have a
        class token, which is not supported); a tensor is missing, has another shape than config.json says, or is not
        used.
    """
    path = epath.Path(folder) / CONFIG
    raw = _LLAVA | {key: value for key, value in read_object(path).items() if value is not None}
    check_fields(path, raw, "a Video-LLM", read=_READ, needed=_NEEDED, harmless=_HARMLESS)
    parts = {}
    for key in ("vision_config", "text_config"):
        parts[key] = raw.get(key)
        if not isinstance(parts[key], dict):
            raise InputError(f"{path}: no {key}")
    layers, last = get_number(path, {"num_hidden_layers": 12, **parts["vision_config"]}, "num_hidden_layers"), raw[
        "vision_feature_layer"]
    if isinstance(last, bool) or not isinstance(last, int) or not -layers <= last < layers + 1 or last == 0:
        raise InputError(f"{path}: vision_feature_layer is {last!r}; one layer of the tower's {layers} is needed")
    used = last if last > 0 else layers + 1 + last
    vision = vision_config(path, parts["vision_config"], used, final_norm=False, dtype=dtype)
    decoder = decoder_config(path, {"model_type": "llama", **parts["text_config"]}, dtype)
    config = VideoLLMConfig(vision, decoder, pooled_side, prompt)
    ignored = [ROTARY.pattern, _UNUSED] + (["lm_head\\.weight"] if decoder.tie_embeddings else [])
    with open_weights(folder, _rename, re.compile("|".join(ignored))) as stored:
        read, embed = as_float32(stored), decoder.embed_dim
        linear = functools.partial(_linear, read)
        first, first_bias = linear("projector.linear_1", vision.embed_dim, embed)
        second, second_bias = linear("projector.linear_2", embed, embed)
        projector = {"first": first, "first_bias": first_bias, "second": second, "second_bias": second_bias}
        params = {"frames": {"vision": vision_params(vision, read, "vision."), "projector": projector},
                  "decoder": decoder_params(decoder, stored)}
    return config, params


def _linear(read, name: str, into: int, out: int):
    """Reads kernel `[into, out]` and bias `[out]` of a linear layer."""
    return read(f"{name}.weight", (out, into)).T, read(f"{name}.bias", (out,))


def _rename(stored: str) -> str:
    """Maps a tensor's names in several versions of transformers to one name."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model)", "", stored)
    name = re.sub(r"^vision_tower\.(vision_model\.)?", "vision.", name)
    name = re.sub(r"^multi_modal_projector\.", "projector.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.(model\.)?", "model.", name)
