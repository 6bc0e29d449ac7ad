"""Exports a decoder as a Hugging Face folder, which transformers and our own commands read:

    python -m mlx_pretrain.convert.export --gin.export_model.model=runs/demo/pretrain --gin.export_model.output=hf/demo
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gin
from etils import epath

from mlx_pretrain.artifacts import new_folder
from mlx_pretrain.command_line import run
from mlx_pretrain.convert.chat_template import template_files, template_setting
from mlx_pretrain.convert.decoders import CONFIG, STORED, WEIGHTS, save_decoder
from mlx_pretrain.convert.gguf import GGUF
from mlx_pretrain.convert.special_ids import TOKENIZER_CONFIG, read_tokenizer_settings
from mlx_pretrain.convert.tokenizer import tokenizer_json
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic, write_json
from mlx_pretrain.inference.language_model import HF_TOKENIZER, LanguageModel, load_language_model
from mlx_pretrain.parallel.cluster import log


@gin.configurable("export_model")
@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Parameters of an export.

    Attributes:
      model: folder of a training run, Hugging Face folder of a LLaMA, or GGUF file (its weights dequantised).
      output: new or empty folder to write.
      step: step of the checkpoint of a run; None: the latest.
      weights: "last", or "ema" for the average of the weights, which runs with `train.average` keep.
      dtype: dtype of the stored weights, "float32" or "bfloat16".
    """

    model: str = gin.REQUIRED
    output: str = gin.REQUIRED
    step: int | None = None
    weights: str = "last"
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in STORED:
            raise InputError(f"export_model.dtype = {self.dtype!r}: not {' or '.join(STORED)}")


def export_model(config: ExportConfig) -> None:
    """Writes a decoder as a Hugging Face folder, which transformers and our own commands read.

    The folder holds config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, and
    the chat templates of a Hugging Face tokenizer.

    Raises:
      InputError: `model` holds no model, or `output` is not empty.
    """
    output = epath.Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; export_model.output must be a new folder")
    model = load_language_model(config.model, step=config.step, weights=config.weights)
    with new_folder(output, CONFIG) as folder:
        _write(folder, model, config.dtype)
    of_step = "" if model.step is None else f", step {model.step}"
    log(f"{output}: {CONFIG}, {WEIGHTS}, {HF_TOKENIZER} of {config.model}{of_step}, "
        f"{model.config.parameters():,} parameters in {config.dtype}")


def _write(folder: epath.Path, model: LanguageModel, dtype: str) -> None:
    """Writes the files of a model."""
    if isinstance(model.tokenizer, Tokenizer):
        tokenizer, settings = tokenizer_json(model.tokenizer)
        templates = {}
    else:
        tokenizer, settings = _hf_tokenizer(model)
        templates = template_files(model.path) if epath.Path(model.path).is_dir() else {}
    write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": model.config.max_length})
    write_atomic(folder / HF_TOKENIZER, tokenizer)
    for name, content in templates.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, content)
    save_decoder(folder, model.config, model.params, bos_id=model.bos_id, eos_id=model.eos_ids, dtype=dtype)


def _hf_tokenizer(model: LanguageModel) -> tuple[bytes, dict[str, Any]]:
    """Returns the contents of tokenizer.json and tokenizer_config.json, which agree on the ids before a text.

    Special tokens keep their names, because chat templates use them.
    """
    vocabulary, path = model.tokenizer.vocabulary(), epath.Path(model.path)
    pieces = {token: piece for piece, token in vocabulary.items()}
    if path.suffix == ".gguf":
        named, template = {}, GGUF(path).chat_template()
    else:
        original = read_tokenizer_settings(path)
        named, template = _named_tokens(original, vocabulary), template_setting(path, original)
    prefix_ids = model.prefix_ids
    same = prefix_ids == tuple(model.tokenizer.prefix_ids.tolist())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "bos_token": pieces.get(model.bos_id), "eos_token": pieces.get(model.eos_ids[0]), **named, **template}
    if prefix_ids in ((), (vocabulary.get(settings["bos_token"]),)):
        settings["add_bos_token"] = bool(prefix_ids)
    return model.tokenizer.model if same else model.tokenizer.with_template(prefix_ids), settings


def _named_tokens(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, str]:
    """Returns the special tokens that settings name and the vocabulary holds: "pad_token" -> its text."""
    named = {name: token.get("content") if isinstance(token, dict) else token
             for name, token in settings.items() if name.endswith("_token")}
    return {name: token for name, token in named.items() if isinstance(token, str) and token in vocabulary}


if __name__ == "__main__":
    run(export_model, ExportConfig, "mlx_pretrain.convert.export")
