"""Exports a decoder as a Hugging Face folder, which transformers and our own commands read:

    python -m mlx_pretrain.convert.export --gin.export_model.model=runs/demo/pretrain --gin.export_model.output=hf/demo
"""

import contextlib
import ctypes
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.convert.chat_template import template_files, template_setting
from mlx_pretrain.convert.decoders import CONFIG, STORED, save_decoder
from mlx_pretrain.convert.gguf import GGUF
from mlx_pretrain.convert.special_ids import GENERATION_CONFIG, TOKENIZER_CONFIG, read_tokenizer_settings
from mlx_pretrain.convert.tokenizer import tokenizer_json
from mlx_pretrain.convert.weights import WEIGHTS_INDEX, read_object
from mlx_pretrain.data.token_store import TOKENIZER
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import file_sizes, sha256, write_atomic, write_json
from mlx_pretrain.inference.language_model import (
    HF_TOKENIZER,
    LanguageModel,
    from_pretrained,
    from_run,
    is_run,
    open_pretrained,
)
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.checksums import DIGESTS, changed_files, write_digests
from mlx_pretrain.training.saved_arrays import open_params
from mlx_pretrain.training.train_state import abstract_params

_RECORD = "export.json"
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# What an export may hold.
_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|chat_template\.jinja|additional_chat_templates|" + "|".join(
    map(re.escape, (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, HF_TOKENIZER, WEIGHTS_INDEX, DIGESTS, _RECORD))))
_SMALL = 1 << 20  # larger objects on gs:// are compared by their sizes alone
_READ = re.compile(r"(additional_chat_templates/)?[^/]+\.(json|safetensors|jinja)")  # files of a Hugging Face folder


@gin.configurable("export_model")
@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Parameters of an export.

    Attributes:
      model: folder of a training run, Hugging Face folder of a LLaMA or Qwen2, or GGUF file (its weights dequantised).
      output: folder to write, local or gs://.
      step: step of the checkpoint of a run; None: the latest.
      weights: "last", or "ema" for the average of the weights, which runs with `train.average` keep.
      dtype: dtype of the stored weights, "float32" or "bfloat16".
      max_shard_size: size from which the weights are divided among several files, in bytes or as "5GB" or "500MiB".
      overwrite: replaces an export of another model or with other settings.
    """

    model: str = gin.REQUIRED
    output: str = gin.REQUIRED
    step: int | None = None
    weights: str = "last"
    dtype: str = "float32"
    max_shard_size: int | str = "5GB"
    overwrite: bool = False

    def __post_init__(self):
        if self.dtype not in STORED:
            raise InputError(f"export_model.dtype = {self.dtype!r}: not {' or '.join(STORED)}")
        _bytes(self.max_shard_size)


def _bytes(size: int | str) -> int:
    """Returns a number of bytes, e.g. 5 * 10**9 of "5GB"."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B|[KMG]IB)?", str(size).strip().upper())
    number = int(float(parts[1]) * _UNITS[parts[2] or ""]) if parts else 0
    if not number:
        raise InputError(f"export_model.max_shard_size = {size!r}: neither a number of bytes nor a size like '5GB' or "
                         "'500MiB'")
    return number


def export_model(config: ExportConfig) -> None:
    """Writes a decoder as a Hugging Face folder, which transformers and our own commands read.

    The folder holds config.json, generation_config.json, the weights in one or several safetensors files,
    tokenizer.json, tokenizer_config.json and the chat templates of a Hugging Face tokenizer; export.json and files.json
    say what it was made from. One tensor is in memory at a time.

    Raises:
      InputError: `model` holds no model, or is damaged; the output has another origin; the disk is full.
    """
    output, step = epath.Path(config.output), None
    if is_run(config.model, config.step, config.weights):
        checkpoints.load_model(config.model)
        step = checkpoints.find_step(config.model, config.step)
    settings = {"step": step, "weights": config.weights, "dtype": config.dtype,
                "max_shard_size": _bytes(config.max_shard_size)}
    made_from = provenance("mlx_pretrain.convert.export", settings,
                           {name: sha256(path) for name, path in _inputs(epath.Path(config.model), step).items()})
    recorded = read_folder_record(output, _RECORD)
    present = [path.name for path in output.iterdir()] if output.is_dir() else []
    if is_current(output, recorded, made_from, overwrite=config.overwrite, damage=lambda: changed_files(output),
                  contents=list(filter(_FILES.fullmatch, present))):
        return
    _return_freed_memory()
    with new_folder(output, _RECORD) as folder:
        with _open(config, step) as model:
            _write(folder, model, config)
        write_digests(folder, whole=_SMALL if gcs.is_gs(folder) else None)
        write_json(folder / _RECORD, {"provenance": made_from})
    of_step = "" if step is None else f", step {step}"
    log(f"{output}: Hugging Face folder of {config.model}{of_step}, {model.config.parameters():,} parameters in "
        f"{config.dtype}")


def _return_freed_memory() -> None:
    """Makes the C library return freed tensors to the system at once; glibc would keep some in each thread's arena."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _inputs(model: epath.Path, step: int | None) -> dict[str, epath.Path]:
    """Returns the files that an export is made from: name -> path."""
    if step is not None:  # a checkpoint's meta holds the checksums of its arrays
        names = (checkpoints.MODEL, TOKENIZER, f"checkpoints/{step}/meta/metadata")
    elif model.suffix == ".gguf":
        return {"model": model}
    else:
        names = filter(_READ.fullmatch, sorted(file_sizes(model)))
    return {name: model / name for name in names}


@contextlib.contextmanager
def _open(config: ExportConfig, step: int | None) -> Iterator[LanguageModel]:
    """Opens the model; its parameters are read when they are indexed."""
    path = config.model
    if step is None:
        with open_pretrained(path) as (decoder, params, tokenizer, ids):
            yield from_pretrained(path, decoder, params, None, tokenizer, ids)
    else:
        decoder = checkpoints.load_model(path)
        abstract = abstract_params(decoder, partitioning.make_mesh())
        with open_params(path, abstract, step, config.weights) as params:
            yield from_run(path, step, decoder, params, None, Tokenizer(epath.Path(path) / TOKENIZER))


def _write(folder: epath.Path, model: LanguageModel, config: ExportConfig) -> None:
    """Writes the files of a model."""
    path, generation, templates = epath.Path(model.path), {}, {}
    if isinstance(model.tokenizer, Tokenizer):
        tokenizer, settings = tokenizer_json(model.tokenizer)
    else:
        tokenizer, settings = _hf_tokenizer(model)
        if path.is_dir():
            templates = template_files(path)
            generation = read_object(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).exists() else {}
    write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": model.config.max_length})
    write_atomic(folder / HF_TOKENIZER, tokenizer)
    for name, content in templates.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, content)
    save_decoder(folder, model.config, model.params, bos_id=model.bos_id, eos_id=model.eos_ids, pad_id=model.pad_id,
                 generation=generation, dtype=config.dtype, max_shard_size=_bytes(config.max_shard_size))


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
