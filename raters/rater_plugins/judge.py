"""Rates documents by a language model that is asked for yes or no (AskLLM, arXiv 2402.09668).

The score is log P(yes) - log P(no) after a prompt that holds the document. (AskLLM takes P(yes) of an
encoder-decoder; log-odds, the mean over several templates and the cutting of documents are ours.)
"""

from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model, with_prefix
from mlx_pretrain.inference.scoring import Request, Scorer
from raters.rater_plugins.base import Rater

# AskLLM's question (arXiv 2402.09668, page 4), and the same with the options in the other order, as models have a
# position bias. Braces mark the place of the document.
_QUESTION = """###
{document}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training a large-language \
model? An informative datapoint should be well-formatted, contain some usable knowledge of the world, and strictly NOT \
have any harmful, racist, sexist, etc. content.

OPTIONS:
"""
TEMPLATES = (_QUESTION + "- yes\n- no\n\nANSWER:", _QUESTION + "- no\n- yes\n\nANSWER:")
_PLACEHOLDER = "{document}"


@gin.configurable
class LanguageModelJudge(Rater):
    r"""Log-odds of one answer against another under a decoder; common prefixes of prompts are computed once.

        judge = LanguageModelJudge("SmolLM2-135M-Instruct.gguf", before="<|im_start|>user\n",
                                   after="<|im_end|>\n<|im_start|>assistant\n", yes="yes", no="no")
        judge.score([Document("1", "The water boils at 100 degrees.", "en", "")])   # float64 [1]

    Attributes:
      name: name of the rater.
      config: configuration of the decoder.
    """

    def __init__(
        self,
        model: epath.PathLike = gin.REQUIRED,
        step: int | None = None,
        templates: Sequence[str] = TEMPLATES,
        before: str = "",
        after: str = "",
        yes: str = " yes",
        no: str = " no",
        max_length: int = 2048,
        name: str = "judge",
    ):
        """Loads the model.

        Args:
          model: folder of a training run, Hugging Face folder of a LLaMA or Qwen2, or GGUF file.
          step: checkpoint of a run; None: the latest.
          templates: prompts with {document} once in each; their scores are averaged.
          before, after: text around every prompt, for a chat model (whose answers begin without a space) e.g.
            "<|im_start|>user\\n" and "<|im_end|>\\n<|im_start|>assistant\\n".
          yes, no: the answers; the log-probabilities of an answer's tokens are summed.
          max_length: tokens of prompt and answer, at most the model's positions; longer documents are cut at their end.
          name: name of the rater.

        Raises:
          InputError: the folder holds no model, or prompt and answers fill its context.
        """
        self.name = name
        loaded = load_language_model(model, step=step)
        self._model, self.config, self._tokenizer = loaded, loaded.config, loaded.tokenizer
        if not templates or any(template.count(_PLACEHOLDER) != 1 for template in templates):
            raise InputError(f"LanguageModelJudge.templates = {list(templates)}: each must hold {_PLACEHOLDER} once")
        if before.count(_PLACEHOLDER) or after.count(_PLACEHOLDER):
            raise InputError(f"LanguageModelJudge.before and after: {_PLACEHOLDER} belongs into templates")
        prompts = [(before + template + after).split(_PLACEHOLDER) for template in templates]
        self._frames = [self._tokenizer.encode_batch(prompt) for prompt in prompts]
        self._frames = [(with_prefix(loaded.prefix_ids, head), tail) for head, tail in self._frames]
        self._answers = self._tokenizer.encode_batch([yes, no])
        self._prompts = {"prompts": prompts, "answers": [yes, no], "max_length": max_length}
        if not all(map(len, self._answers)) or yes == no:
            raise InputError(f"LanguageModelJudge: yes={yes!r} and no={no!r} must differ and not be empty")
        if not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"LanguageModelJudge.max_length = {max_length!r}: must be a positive integer")
        length = min(max_length, self.config.max_length)
        spent = max(map(len, self._answers)) - 1  # the last token of an answer is not fed
        self._room = [length - spent - len(head) - len(tail) for head, tail in self._frames]
        if min(self._room) < 1:
            raise InputError(f"LanguageModelJudge: prompt and answer leave no room in {length} tokens for a document; "
                             f"the model of {model} has {self.config.max_length} positions")
        self._scorer = Scorer(self.config, loaded.params, loaded.mesh, max_length=length)

    @property
    def settings(self) -> dict[str, Any]:
        """Prompts, and fingerprint of the model."""
        return {"model": self._model.fingerprint(), "dtype": self.config.dtype, **self._prompts}

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Returns the mean over the templates of log P(yes) - log P(no), nats: float64 `[documents]`.

        Documents without tokens have nan.
        """
        texts = self._tokenizer.encode_batch([document.text for document in documents])
        requests = [
            Request(np.concatenate([head, text[:room], tail]), answer)
            for text in texts
            for (head, tail), room in zip(self._frames, self._room)
            for answer in self._answers
        ]
        likelihood = np.array([score.log_likelihood for score in self._scorer.score(requests)])
        likelihood = likelihood.reshape(len(texts), len(self._frames), 2)
        odds = (likelihood[..., 0] - likelihood[..., 1]).mean(axis=1)
        return np.where([len(text) > 0 for text in texts], odds, np.nan)
