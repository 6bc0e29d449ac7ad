"""A decoder as a Hugging Face folder, which transformers and our own commands read:

    python -m mlx_pretrain.convert.export --gin.export_model.model=runs/demo --gin.export_model.output=hf/demo
"""

import gin
from etils import epath

from mlx_pretrain.configuration import run
from mlx_pretrain.convert.decoders import CONFIG, STORED, WEIGHTS, save_decoder
from mlx_pretrain.convert.tokenizer import tokenizer_json
from mlx_pretrain.data.tokenizer import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic, write_json
from mlx_pretrain.inference.language_model import HF_TOKENIZER, load_language_model

TOKENIZER_CONFIG = "tokenizer_config.json"


@gin.configurable
def export_model(
    model: str = gin.REQUIRED, output: str = gin.REQUIRED, step: int | None = None, dtype: str = "float32"
) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and, for our own tokenizers, tokenizer_config.json.

    Args:
      model: folder of a training run, Hugging Face folder of a LLaMA, or GGUF file (its weights dequantised).
      output: a new or empty folder.
      step: which checkpoint of a run; None: the latest.
      dtype: of the stored weights, "float32" or "bfloat16".

    Raises:
      InputError: no model there, something in `output`, or another dtype.
    """
    if dtype not in STORED:
        raise InputError(f"export_model.dtype = {dtype!r}: not {' or '.join(STORED)}")
    folder = epath.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; export_model.output must be a new folder")
    found = load_language_model(model, step=step)
    # config.json, which makes the folder a model, is written last.
    if isinstance(found.tokenizer, Tokenizer):
        tokenizer, settings = tokenizer_json(found.tokenizer)
        write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": found.config.max_length})
        write_atomic(folder / HF_TOKENIZER, tokenizer)
    else:
        write_atomic(folder / HF_TOKENIZER, found.tokenizer.model)
    save_decoder(folder, found.config, found.params, bos_id=found.start, eos_id=found.end, dtype=dtype)
    where = f", step {found.step}" if found.step is not None else ""
    print(f"{folder}: {CONFIG}, {WEIGHTS}, {HF_TOKENIZER} of {model}{where}, {found.config.parameters():,} parameters "
          f"in {dtype}")


if __name__ == "__main__":
    run(export_model, "mlx_pretrain.convert.export")
