"""A decoder as a Hugging Face folder, which transformers and our own commands read:

    python -m mlx_pretrain.convert.export --gin.export_model.model=runs/demo --gin.export_model.output=hf/demo
"""

from collections.abc import Mapping
from typing import Any

import gin
from etils import epath

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


@gin.configurable
def export_model(
    model: str = gin.REQUIRED,
    output: str = gin.REQUIRED,
    step: int | None = None,
    dtype: str = "float32",
    weights: str = "last",
) -> None:
    """Writes config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json, and the
    chat templates that come with somebody else's tokenizer.

    Args:
      model: folder of a training run, Hugging Face folder of a LLaMA, or GGUF file (its weights dequantised).
      output: a new or empty folder.
      step: which checkpoint of a run; None: the latest.
      dtype: of the stored weights, "float32" or "bfloat16".
      weights: weights of a run, "last" or "ema" for their moving average.

    Raises:
      InputError: no model there, something in `output`, or another dtype.
    """
    if dtype not in STORED:
        raise InputError(f"export_model.dtype = {dtype!r}: not {' or '.join(STORED)}")
    folder = epath.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; export_model.output must be a new folder")
    found = load_language_model(model, step=step, weights=weights)
    # config.json, which makes the folder a model, is written last.
    if isinstance(found.tokenizer, Tokenizer):
        tokenizer, settings = tokenizer_json(found.tokenizer)
        templates = {}
    else:
        tokenizer, settings = _foreign_tokenizer(found)
        templates = template_files(model) if epath.Path(model).is_dir() else {}
    write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": found.config.max_length})
    write_atomic(folder / HF_TOKENIZER, tokenizer)
    for name, content in templates.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, content)
    save_decoder(folder, found.config, found.params, bos_id=found.bos_id, eos_id=found.eos_ids, dtype=dtype)
    where = f", step {found.step}" if found.step is not None else ""
    print(f"{folder}: {CONFIG}, {WEIGHTS}, {HF_TOKENIZER} of {model}{where}, {found.config.parameters():,} parameters "
          f"in {dtype}")


def _foreign_tokenizer(model: LanguageModel) -> tuple[bytes, dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json, which agree on what stands before a text.

    Special tokens have the names that they had, for chat templates use these.
    """
    vocabulary, path = model.tokenizer.vocabulary(), epath.Path(model.path)
    pieces = {token: piece for piece, token in vocabulary.items()}
    if path.suffix == ".gguf":
        named, template = {}, GGUF(path).chat_template()
    else:
        found = read_tokenizer_settings(path)
        named, template = _named_tokens(found, vocabulary), template_setting(path, found)
    prefix_ids = model.prefix_ids
    same = prefix_ids == tuple(model.tokenizer.prefix_ids.tolist())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "bos_token": pieces.get(model.bos_id), "eos_token": pieces.get(model.eos_ids[0]), **named, **template}
    if prefix_ids in ((), (vocabulary.get(settings["bos_token"]),)):
        settings["add_bos_token"] = bool(prefix_ids)
    return model.tokenizer.model if same else model.tokenizer.with_template(prefix_ids), settings


def _named_tokens(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, str]:
    """The special tokens that settings name, as far as they are in the vocabulary: "pad_token" -> its text."""
    named = {name: token.get("content") if isinstance(token, dict) else token
             for name, token in settings.items() if name.endswith("_token")}
    return {name: token for name, token in named.items() if isinstance(token, str) and token in vocabulary}


if __name__ == "__main__":
    run(export_model, "mlx_pretrain.convert.export")
