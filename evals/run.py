"""Evaluates a decoder on tasks in MuBench's form: `python -m evals.run --gin_file=gin/evals/run.gin`.

Options are scored, or answers generated, task by task and language by language; finished tables are not computed again
(`scoring.item_tables`). Several processes form one mesh of all their devices (`scoring.measure`).
"""

import dataclasses
from collections.abc import Sequence

import gin
from etils import epath
from jax.sharding import Mesh

from evals.report import write_report
from evals.scoring.measure import measure
from evals.scoring.results import TaskResults, compute_results, format_results, write_results
from evals.tasks.alignment import align_items, read_examples
from evals.tasks.task_files import find_tasks
from mlx_pretrain.command_line import run
from mlx_pretrain.compilation import programs
from mlx_pretrain.configuration.gin_files import save_effective
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model, read_model_config
from mlx_pretrain.inference.scoring import Scorer
from mlx_pretrain.parallel import cluster, hardware
from mlx_pretrain.training.train_state import abstract_params


@gin.configurable("evaluate")
@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
      model: folder of a training run, Hugging Face folder of a LLaMA or Qwen2, or GGUF file.
      tasks: globs of files named as MuBench's, e.g. ["mubench/*/lighteval_*_test.jsonl"].
      output: folder of the results; the same command resumes.
      languages: languages to evaluate; None: all.
      few_shot: number of solved examples before every prompt: the first items of the split "dev" beside the test file.
      limit: number of items of each task, evenly spaced; None: all.
      mutual_information: also scores every option without its prompt, for acc_mutual_info.
      generate: generates answers greedily and compares the first line of each with the options (exact match), in place
        of scoring the options: for chat models.
      template: text around a prompt whose answer is generated, with {prompt} once: a chat model's turns with its
        special tokens.
      max_new_tokens: greatest length of a generated answer.
      step: checkpoint of a run; None: the latest.
      weights: "last", or "ema" for the average of the weights, which runs with `train.average` keep.
      dtype: compute dtype; None: that of the run, float32 for other models.
      max_length: tokens of prompt and option; None: the model's positions. Longer prompts are cut at their beginning.
      compilation_cache: folder of compiled programs, kept between runs; None: none.
      overwrite: replaces item tables that were made from another model, other items or settings.
    """

    model: str = gin.REQUIRED
    tasks: Sequence[str] = gin.REQUIRED
    output: str = gin.REQUIRED
    languages: Sequence[str] | None = None
    few_shot: int = 0
    limit: int | None = None
    mutual_information: bool = False
    generate: bool = False
    template: str = "{prompt}"
    max_new_tokens: int = 32
    step: int | None = None
    weights: str = "last"
    dtype: str | None = None
    max_length: int | None = None
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"
    overwrite: bool = False

    def __post_init__(self):
        if self.few_shot < 0 or (self.limit is not None and self.limit < 1):
            raise InputError(f"evaluate: few_shot = {self.few_shot} must not be negative, limit = {self.limit} must be "
                             "positive")
        if self.template.count("{prompt}") != 1:
            raise InputError(f"evaluate.template = {self.template!r}: must have {{prompt}} in it once")


def main(config: EvaluateConfig) -> list[TaskResults]:
    """Evaluates a decoder and writes item tables, results, samples and the report.

    Returns:
      The results by task in process 0, [] in other processes.

    Raises:
      InputError: no model or files there, no item left to evaluate, an option that is longer than the model, or tables
        made from other inputs.
    """
    files = find_tasks(config.tasks, config.languages)
    aligned = {task: align_items(by_language, config.limit) for task, by_language in files.items()}
    examples = {task: read_examples(by_language, config.few_shot) for task, by_language in files.items()}
    hardware.keep_compiled(config.compilation_cache)
    model = load_language_model(config.model, step=config.step, weights=config.weights, dtype=config.dtype)
    scorer = Scorer(model.config, model.params, model.mesh, max_length=config.max_length)
    folder = epath.Path(config.output)
    if cluster.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_effective(folder / "config.gin")
    model_args = {"path": str(config.model), "step": model.step}
    if config.weights != "last":  # tables of earlier versions have no such key
        model_args["weights"] = config.weights
    settings = {
        "model": "mlx_pretrain", "model_args": model_args,
        "fingerprint": model.fingerprint(), "dtype": model.config.dtype,
        "max_length": scorer.max_length, "few_shot": config.few_shot, "limit": config.limit,
    }
    if config.generate:
        settings |= {"template": config.template, "max_new_tokens": config.max_new_tokens}
    else:
        settings |= {"mutual_information": config.mutual_information}
    tables = measure(folder, model, scorer, aligned, examples, settings, overwrite=config.overwrite)
    if not cluster.is_main():
        return []
    results = [compute_results(task, aligned[task], tables[task]) for task in files]
    path = write_results(folder, results, aligned, tables, settings)
    write_report(folder)
    for line in format_results(results):
        print(line)
    print(f"{path}, {folder / 'report.html'}")
    return results


@programs.register("evaluate.tasks")
def evaluation_programs(mesh: Mesh, length: int | None) -> list[programs.Program]:
    """Returns the largest program that scores options; [] where answers are generated.

    The model is that of the training run in the same gin files, or else `evaluate.model`.
    """
    from mlx_pretrain.train import TrainConfig  # imports the trainer, which an evaluation does not need

    settings = gin.get_bindings(EvaluateConfig)
    if settings.get("generate"):
        return []
    config = TrainConfig().model if programs.is_bound("train.steps") else read_model_config(settings["model"])
    config = dataclasses.replace(config, dtype=settings.get("dtype") or config.dtype)
    scorer = Scorer(config, abstract_params(config, mesh), mesh, max_length=length or settings.get("max_length"))
    (program, arguments, rows, length), prefix = scorer.largest_program(), scorer.max_length
    return [programs.Program(
        "scoring of options",
        program,
        arguments,
        mesh=mesh,
        batch=f"{rows} x {length} tokens after a prefix of {prefix}",
        parameters=config.parameters(),
        tokens=rows * length,
        model_flops=rows * length * config.flops_per_token(2 * prefix + length) / 3,  # the forward pass
        remedies=lambda excess: [f"evaluate.max_length={int(prefix / max(excess, 2))}"],
    )]


if __name__ == "__main__":
    run(main, EvaluateConfig, "evals.run", joins=True)
