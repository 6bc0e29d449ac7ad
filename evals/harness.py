"""Runs lm-evaluation-harness on our decoders.

    python -m evals.harness run --model mlx_pretrain --model_args path=RUN --tasks arc_easy

The arguments are those of `lm_eval`. The model is a training run, a Hugging Face folder of a LLaMA or Qwen2, or a GGUF
file; `model_args` are `path`, `step`, `weights`, `dtype`, `max_length` and `max_gen_toks`. Common prefixes are computed
once (`Scorer`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from evals.scoring.generations import encode_prompts, generate_answers
from evals.scoring.requests import encode_pairs
from mlx_pretrain.command_line import errors_as_one_line
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.inference.scoring import Request, Scorer

WINDOW = 8192  # requests among which common prefixes are looked for


@register_model("mlx_pretrain")
class MLXPretrain(LM):
    """A decoder of this project behind the harness's interface of a model.

        import lm_eval
        model = MLXPretrain(path="runs/demo/pretrain", dtype="bfloat16")
        results = lm_eval.simple_evaluate(model, tasks=["arc_easy"], num_fewshot=0)
        print(results["results"]["arc_easy"]["acc,none"])
    """

    def __init__(
        self,
        path: str | None = None,
        step: int | None = None,
        weights: str = "last",
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        device: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ):
        """Loads the model.

        Args:
          path, step, weights, dtype: see `load_language_model`.
          max_length: tokens of context and continuation; None: the model's positions.
          max_gen_toks: greatest number of tokens to generate where the task sets none.
          batch_size, device, max_batch_size: passed by the harness; they change nothing.
          **unknown: refused.

        Raises:
          InputError: no path, an unknown argument, or no such model there.
        """
        super().__init__()
        if unknown or path is None:
            cause = f"unknown {', '.join(sorted(unknown))}" if unknown else "no path"
            raise InputError(f"model_args: {cause}; known are path, step, weights, dtype, max_length, max_gen_toks")
        for name, value in (("step", step), ("max_length", max_length), ("max_gen_toks", max_gen_toks)):
            if value is not None and (not isinstance(value, int) or value < (name != "step")):
                raise InputError(f"model_args: {name} = {value!r}: must be a positive integer")
        self._model = load_language_model(str(path), step=step, weights=weights, dtype=dtype)
        self._scorer = Scorer(self._model.config, self._model.params, self._model.mesh, max_length=max_length)
        self._max_gen_toks = max_gen_toks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, greedy) of each continuation; greedy: it is the model's most likely one."""
        encoded = encode_pairs(self._model, [request.args for request in requests])
        answers = [(score.log_likelihood, score.greedy) for score in self._score(encoded)]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows without overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self._model.tokenizer.encode(request.args[0])
            if tokens[:1] == [self._model.bos_id]:  # spelt out in the text; the windows begin with it anyway
                tokens = tokens[1:]
            pairs = utils.get_rolling_token_windows(
                token_list=tokens, prefix_token=self._model.bos_id, max_seq_len=self._scorer.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append(Request(np.array(context), np.array(continuation)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [score.log_likelihood for score in self._score(windows)])
        for request, answer in zip(requests, sums.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to the task's first stop sequence, sampled if it has a temperature, else greedy."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            # The harness has several names for the number of tokens, and a temperature alone makes a task sample.
            try:
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self._max_gen_toks)
            except (TypeError, ValueError) as error:
                raise InputError(f"{requests[numbers[0]].task_name}: generation_kwargs: {error}") from None
            new = settings["max_gen_toks"]
            prompts = encode_prompts(
                self._model, [requests[number].args[0] for number in numbers], new, self._scorer.max_length)
            texts = generate_answers(
                self._model, [ids for ids, _ in prompts], [stop for stop in settings["until"] if stop],
                max_new_tokens=new, top_p=float(settings.get("top_p", 1.0)),
                temperature=float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0)
            for number, text in zip(numbers, texts):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _score(self, requests: Sequence[Request]) -> list[Any]:
        windows = ((start, requests[start : start + WINDOW]) for start in range(0, len(requests), WINDOW))
        return [score for _, scores in self._scorer(windows) for score in scores]


def main() -> None:
    """Runs lm_eval; an InputError of a model or a request ends it with one line."""
    with errors_as_one_line():
        cli_evaluate()


if __name__ == "__main__":
    main()
