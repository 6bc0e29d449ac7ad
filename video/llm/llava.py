"""Reads Video-LLMs from LLaVA and LLaVA-OneVision folders of Hugging Face.

A SigLIP tower, a projector of two layers, and a LLaMA or Qwen2 decoder. LLaVA-OneVision (arXiv 2408.03326) is read as
it sees videos: each frame's embeddings are interpolated to half the side, and its newline follows the last frame.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from mlx_pretrain.convert.decoders import CONFIG, decoder_config, stored_params
from mlx_pretrain.convert.decoders import IGNORED as ROTARY
from mlx_pretrain.convert.fields import check_fields
from mlx_pretrain.convert.vision import vision_config, vision_params
from mlx_pretrain.convert.weights import Read, StoredParameter, get_number, open_weights, read_object
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.vision import VisionConfig
from video.llm.model import VideoLLMConfig


class _Family(NamedTuple):
    """Properties of the models of one `model_type`.

    Attributes:
      variant: see `VideoLLMConfig`.
      prompt: the chat template for a question on frames, written out; templates are never run here.
      decoder: `model_type` of a text_config that names none.
      defaults: values of fields that a configuration leaves out.
      harmless: pattern of fields that change nothing for videos.
    """

    variant: str
    prompt: str
    decoder: str
    defaults: Mapping[str, Any]
    harmless: str


_DEFAULTS = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
# A field that the decoder's own configuration repeats, and others.
_HARMLESS = "image_seq_length|ignore_index|vocab_size|tie_word_embeddings"
_FAMILIES = {
    "llava": _Family(
        "llava", "USER: {frames}\n{question} ASSISTANT:", "llama",
        _DEFAULTS | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, _HARMLESS),
    "llava_onevision": _Family(
        "onevision", "<|im_start|>user\n{frames}\n{question}<|im_end|>\n<|im_start|>assistant\n", "qwen2",
        _DEFAULTS | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        _HARMLESS + "|image_grid_pinpoints|vision_aspect_ratio|use_image_newline_parameter"),
}  # fmt: skip
# Fields that are read, and fields that change the computation, with the values supported here.
_READ = ("vision_config", "text_config", "vision_feature_layer")
_NEEDED = {"model_type": tuple(_FAMILIES), "vision_feature_select_strategy": ("full",),
           "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)}  # fmt: skip
# Tensors of layers behind the one that is used, of the pooling head and of its norm.
_UNUSED = r"vision\.(encoder\.layers\.\d+|head|post_layernorm)\..*"
# Files and keys in them that describe how frames are prepared, the first that exists counts: names of transformers 5,
# 4.52 and before, of videos and then of images.
_PROCESSORS = (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None),
               ("video_processor/preprocessor_config.json", None), ("processor_config.json", "image_processor"),
               ("preprocessor_config.json", None))  # fmt: skip
_PREPARED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}


@contextlib.contextmanager
def open_llava(
    folder: epath.PathLike, dtype: str = "float32", pooled_side: int | None = None, prompt: str | None = None
) -> Iterator[tuple[VideoLLMConfig, dict[str, Any]]]:
    """Opens a LLaVA or LLaVA-OneVision.

    Args:
      folder: local folder with config.json, and model.safetensors or model.safetensors.index.json with its files. The
        frames' normalisation is that of the processor's file; without one, SigLIP's.
      dtype: compute dtype.
      pooled_side, prompt: see `VideoLLMConfig`; None: those of the model. LLaVA itself keeps all patches,
        LLaVA-OneVision ceil(side / 2) on a side, 14 of 27.

    Yields:
      The configuration, and a tree like its parameters, of `StoredParameter`, to be read within the block.

    Raises:
      InputError: a file is missing or malformed; tower, projector or decoder are of another type (CLIP's towers have a
        class token, which is not supported); frames are prepared in another way than `video.decode` does; a tensor is
        missing, has another shape than config.json says, or, at the end of the block, is not used.
    """
    path = epath.Path(folder) / CONFIG
    raw = read_object(path)
    family = _FAMILIES.get(str(raw.get("model_type")), _FAMILIES["llava"])
    raw = {**family.defaults, **{key: value for key, value in raw.items() if value is not None}}
    check_fields(path, raw, "a Video-LLM", read=_READ, needed=_NEEDED, harmless=family.harmless)
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
    vision = _with_normalisation(vision, epath.Path(folder))
    text = {"model_type": family.decoder, **parts["text_config"]}
    if family.variant == "onevision":
        # Set in either place, since transformers 5.
        text["tie_word_embeddings"] = text.get("tie_word_embeddings") or raw.get("tie_word_embeddings")
        pooled_side = pooled_side or (vision.side + 1) // 2
    decoder = decoder_config(path, text, dtype)
    config = VideoLLMConfig(vision, decoder, pooled_side, prompt or family.prompt, family.variant)
    ignored = [ROTARY.pattern, _UNUSED] + (["lm_head\\.weight"] if decoder.tie_embeddings else [])
    with open_weights(folder, _rename, re.compile("|".join(ignored))) as read:
        yield config, _stored_params(config, read)


def _with_normalisation(vision: VisionConfig, folder: epath.Path) -> VisionConfig:
    """Returns the tower with the normalisation of the folder's processor, where there is one."""
    for name, key in _PROCESSORS:
        path = folder / name
        settings = read_object(path) if path.exists() else None
        if settings is not None and key is not None:
            settings = settings.get(key)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise InputError(f"{path}: {key} is {settings!r}, not an object")
        for field, value in _PREPARED.items():
            if settings.get(field) not in (None, value):
                raise InputError(f"{path}: {field} is {settings[field]!r}; frames here are prepared with {value}")
        if (size := settings.get("size")) not in (None, {"height": vision.image_size, "width": vision.image_size}):
            raise InputError(f"{path}: size is {size!r}; the tower takes {vision.image_size} x {vision.image_size} "
                             "pixels")
        if not math.isclose(factor := settings.get("rescale_factor") or 1 / 255, 1 / 255):
            raise InputError(f"{path}: rescale_factor is {factor!r}; frames here are prepared with 1 / 255")
        scales = []
        for field in ("image_mean", "image_std"):
            value = settings.get(field)
            if not isinstance(value, list) or not all(isinstance(number, (int, float)) for number in value):
                raise InputError(f"{path}: {field} is {value!r}, not three numbers")
            scales.append([float(number) for number in value])
        try:
            return dataclasses.replace(vision, mean=scales[0], std=scales[1])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return vision


def _stored_params(config: VideoLLMConfig, read: Read) -> dict[str, Any]:
    """Returns a tree like the model's parameters, of `StoredParameter`."""
    into, embed = config.vision.embed_dim, config.decoder.embed_dim

    def plain(name: str, *shape: int) -> StoredParameter:
        return StoredParameter(shape, lambda _: read(name, shape))

    def kernel(name: str, into: int) -> StoredParameter:
        return StoredParameter((into, embed), lambda _: read(name, (embed, into)).T)

    frames = {
        "vision": vision_params(config.vision, read, "vision."),
        "projector": {"first": kernel("projector.linear_1.weight", into),
                      "first_bias": plain("projector.linear_1.bias", embed),
                      "second": kernel("projector.linear_2.weight", embed),
                      "second_bias": plain("projector.linear_2.bias", embed)},
    }  # fmt: skip
    if config.has_newline:
        frames["newline"] = plain("image_newline", embed)
    return {"frames": frames, "decoder": stored_params(config.decoder, read)}


def _rename(stored: str) -> str:
    """Maps a tensor's names in several versions of transformers to one name."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model|image_newline)", "", stored)
    name = re.sub(r"^vision_tower\.(vision_model\.)?", "vision.", name)
    name = re.sub(r"^multi_modal_projector\.", "projector.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.(model\.)?", "model.", name)
