"""Generates text with a checkpoint:

    python -m mlx_pretrain.generate --gin.generate.run_dir=RUN --gin.generate.prompts='["Once upon a time"]'
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain import command_line
from mlx_pretrain.artifacts import is_current_file, provenance, settings_of, write_with_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import LanguageModel, load_language_model
from mlx_pretrain.parallel import cluster


@gin.configurable("generate")
@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Parameters of the generation.

    Attributes:
      run_dir: folder of a training run, Hugging Face folder of a LLaMA or Qwen2, or GGUF file.
      prompts: texts to continue; "" starts from nothing.
      languages: languages of the prompts, noted in the output file.
      step: step of the checkpoint of a run; None: the latest.
      weights: weights of a run, "last" or "ema" for their moving average.
      max_new_tokens: limit of the tokens generated after each prompt.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: least probability mass of the most likely tokens to sample from.
      seed: seed of the sampling.
      output: JSONL file to write ({language, prompt, completion, temperature, top_p, step} a line); None: prints.
        made_from.<name>.json beside it records what it was made from.
      overwrite: replaces a file that was made with another model or other settings.
    """

    run_dir: str = gin.REQUIRED
    prompts: Sequence[str] = ("",)
    languages: Sequence[str] | None = None
    step: int | None = None
    weights: str = "last"
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    output: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        if self.languages is not None and len(self.languages) != len(self.prompts):
            raise InputError(f"generate: {len(self.languages)} languages for {len(self.prompts)} prompts")


def generate(config: GenerateConfig) -> None:
    """Continues prompts with a trained model; prints the completions, or writes them to a file.

    Raises:
      InputError: there is no such run or checkpoint, a parameter is out of range, or a file made from others is in the
        way.
    """
    model = load_language_model(config.run_dir, step=config.step, weights=config.weights)
    if config.output is not None:
        made_from, output = _made_from(config, model), epath.Path(config.output)
        record = output.parent / f"made_from.{output.name}.json"
        kept = cluster.is_main() and is_current_file(output, record, made_from, overwrite=config.overwrite)
        if cluster.share(kept):
            return
    completions = model.generate(config.prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                                 top_p=config.top_p, seed=config.seed)
    if not cluster.is_main():
        return
    if config.output is None:
        for prompt, completion in zip(config.prompts, completions):
            print(f"{prompt}\033[1m{completion}\033[0m" if sys.stdout.isatty() else f"{prompt}{completion}")
            print("---")
    else:
        settings = {"temperature": config.temperature, "top_p": config.top_p, "step": model.step}
        languages = config.languages or [None] * len(config.prompts)
        samples = [{"language": language, "prompt": prompt, "completion": completion, **settings}
                   for language, prompt, completion in zip(languages, config.prompts, completions)]
        content = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_with_record(output, content.encode(), record, made_from)


def _made_from(config: GenerateConfig, model: LanguageModel) -> dict[str, Any]:
    settings = settings_of(config) | {"step": model.step, "dtype": model.config.dtype}
    del settings["run_dir"]  # the fingerprint tells models apart, wherever they are
    return provenance("mlx_pretrain.generate", settings, {"model": model.fingerprint()})


if __name__ == "__main__":
    command_line.run(generate, GenerateConfig, "mlx_pretrain.generate", joins=True)
