"""Text from a checkpoint:

    python -m mlx_pretrain.generate --gin.generate.run_dir=RUN --gin.generate.prompts='["Once upon a time"]'
"""

import json
import sys
from collections.abc import Sequence

import gin

from mlx_pretrain import command_line
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.parallel import cluster


@gin.configurable("generate")
def generate(
    run_dir: str = gin.REQUIRED,
    prompts: Sequence[str] = ("",),
    languages: Sequence[str] | None = None,
    step: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    output: str | None = None,
) -> list[str]:
    """Continues prompts with a trained model; prints them, or writes them to a file.

    Args:
      run_dir: folder of a training run, Hugging Face folder of a LLaMA, or GGUF file.
      prompts: texts to continue; "" starts from nothing.
      languages: of the prompts, noted in the output file.
      step: which checkpoint of a run; None: the latest.
      max_new_tokens, temperature, top_p, seed: see `inference.generation.generate`.
      output: JSONL file to write ({language, prompt, completion, temperature, top_p, step} a line).

    Returns:
      The completions.

    Raises:
      InputError: no run or checkpoint there, or parameters out of range.
    """
    if languages is not None and len(languages) != len(prompts):
        raise InputError(f"generate: {len(languages)} languages for {len(prompts)} prompts")
    model = load_language_model(run_dir, step=step)
    completions = model.generate(
        prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if not cluster.is_main():
        return completions
    if output is None:
        for prompt, completion in zip(prompts, completions):
            print(f"{prompt}\033[1m{completion}\033[0m" if sys.stdout.isatty() else f"{prompt}{completion}")
            print("---")
    else:
        settings = {"temperature": temperature, "top_p": top_p, "step": model.step}
        records = [
            {"language": language, "prompt": prompt, "completion": completion, **settings}
            for language, prompt, completion in zip(languages or [None] * len(prompts), prompts, completions)
        ]
        write_atomic(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return completions


if __name__ == "__main__":
    command_line.run(generate, "mlx_pretrain.generate", joins=True)
