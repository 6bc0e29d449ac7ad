"""A language model as judge: would it say yes or no to the text? (AskLLM, arXiv 2402.09668)

The score is log P(yes) - log P(no) after a prompt that holds the document, under a decoder of this project. (AskLLM
takes P(yes) of an encoder-decoder; log-odds, the mean over several templates and the cutting of documents are ours.)
"""

import functools
from collections.abc import Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mlx_pretrain import checkpoints, partitioning
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.store import BOS_ID, PAD_ID, TOKENIZER
from mlx_pretrain.data.tokenizer import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, logits
from mlx_pretrain.train_state import abstract_params

# AskLLM's question (arXiv 2402.09668, page 4), and the same with the options the other way round: models favour a
# place. Braces are for the document alone.
_QUESTION = """###
{document}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training a large-language \
model? An informative datapoint should be well-formatted, contain some usable knowledge of the world, and strictly NOT \
have any harmful, racist, sexist, etc. content.

OPTIONS:
"""
TEMPLATES = (_QUESTION + "- yes\n- no\n\nANSWER:", _QUESTION + "- no\n- yes\n\nANSWER:")
_PLACE = "{document}"


@gin.configurable
class LanguageModelJudge:
    """Log-odds of one answer against another, from a checkpoint of a training run.

    Rows of one length are computed together, `batch_size` at a time whatever their number, so a document's score does
    not depend on the others, and nothing is compiled more than once for each length.

    Attributes:
      name: of the rater.
      config: of the decoder.
    """

    def __init__(
        self,
        run_dir: epath.PathLike = gin.REQUIRED,
        step: int | None = None,
        templates: Sequence[str] = TEMPLATES,
        yes: str = " yes",
        no: str = " no",
        lengths: Sequence[int] = (256, 512, 1024, 2048),
        batch_size: int = 16,
        name: str = "judge",
    ):
        """Loads the model.

        Args:
          run_dir: folder of a training run.
          step: which checkpoint; None: the latest.
          templates: prompts with {document} once in each; their scores are averaged.
          yes, no: the answers; of an answer of several tokens, the log-probabilities are summed.
          lengths: rows are filled up to the next of these, in tokens; they are cut to the model's positions. A document
            that does not fit the longest is cut at its end.
          batch_size: rows computed at a time, over all devices.
          name: of the rater.

        Raises:
          InputError: no run or checkpoint there, or prompt and answers do not leave room for a document.
        """
        self.name = name
        self.config = checkpoints.load_model(run_dir)
        self._tokenizer = Tokenizer(epath.Path(run_dir) / TOKENIZER)
        if not templates or any(template.count(_PLACE) != 1 for template in templates):
            raise InputError(f"LanguageModelJudge.templates = {list(templates)}: each must hold {_PLACE} once")
        self._frames = [self._tokenizer.encode_batch(template.split(_PLACE)) for template in templates]
        self._answers = self._tokenizer.encode_batch([yes, no])
        if not all(map(len, self._answers)) or yes == no:
            raise InputError(f"LanguageModelJudge: yes={yes!r} and no={no!r} must differ and not be empty")
        if not lengths or min(lengths) < 1:
            raise InputError(f"LanguageModelJudge.lengths = {list(lengths)}: must be positive numbers of tokens")
        self._lengths = sorted({min(length, self.config.max_length) for length in lengths})
        spent = max(map(len, self._answers))  # with BOS, and without the last token of an answer, which is not read
        self._room = [self._lengths[-1] - spent - len(head) - len(tail) for head, tail in self._frames]
        if min(self._room) < 1:
            raise InputError(f"LanguageModelJudge: prompt and answer leave no room in {self._lengths[-1]} tokens for a "
                             f"document; the model of {run_dir} has {self.config.max_length} positions")
        self._mesh = partitioning.make_mesh()
        if batch_size < 1 or batch_size % self._mesh.size:
            raise InputError(f"LanguageModelJudge.batch_size = {batch_size}: must be a multiple of "
                             f"{self._mesh.size}, the number of devices")
        self._batch_size = batch_size
        with partitioning.use(self._mesh):
            abstract = abstract_params(self.config, self._mesh)
            self._params, self.step = checkpoints.restore_params(run_dir, abstract, step)

    def score(self, documents: Sequence[Document]) -> np.ndarray:
        """Mean over the templates of log P(yes) - log P(no), nats: float64 `[documents]`; nan for an empty document."""
        texts = self._tokenizer.encode_batch([document.text for document in documents])
        prompts = [
            np.concatenate([[BOS_ID], head, text[:room], tail])
            for text in texts
            for (head, tail), room in zip(self._frames, self._room)
        ]
        if all(len(answer) == 1 for answer in self._answers):
            # Both answers are read off the prompt's last position.
            rows = [(prompt, np.stack(self._answers, axis=1)) for prompt in prompts]
        else:
            rows = [(prompt, answer[:, None]) for prompt in prompts for answer in self._answers]
        likelihood = self._log_likelihood(rows).reshape(len(texts), len(self._frames), 2)
        odds = (likelihood[..., 0] - likelihood[..., 1]).mean(axis=1)
        return np.where([len(text) > 0 for text in texts], odds, np.nan)

    def _log_likelihood(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Log P(answer | prompt): float64 `[rows, answers]`, for rows of prompt and answers `[tokens, answers]`."""
        if not rows:
            return np.zeros((0, 1))
        # Of several answers in a row, each has one token, which nothing reads.
        inputs = [np.concatenate([prompt, answers[:-1, 0]]) for prompt, answers in rows]
        buckets = np.searchsorted(self._lengths, [len(row) for row in inputs])
        n_targets, n_answers = max(map(len, self._answers)), rows[0][1].shape[1]
        found = np.zeros((len(rows), n_answers))
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                tokens = np.full((self._batch_size, self._lengths[bucket]), PAD_ID, np.int32)
                first = np.zeros(self._batch_size, np.int32)
                targets = np.full((self._batch_size, n_targets, n_answers), -1, np.int32)
                for i, row in enumerate(batch):
                    prompt, answers = rows[row]
                    tokens[i, : len(inputs[row])] = inputs[row]
                    first[i] = len(prompt) - 1
                    targets[i, : len(answers)] = answers
                with partitioning.use(self._mesh):
                    given = jax.device_put((tokens, first, targets), partitioning.batch_sharding(self._mesh))
                    values = _answer_likelihood(self.config, self._params, *given)
                found[batch] = np.asarray(values)[: len(batch)]
        return found


@functools.partial(jax.jit, static_argnums=0)
def _answer_likelihood(
    config: DecoderConfig, params: Any, tokens: jax.Array, first: jax.Array, targets: jax.Array
) -> jax.Array:
    """Log-likelihood of continuations.

    Args:
      tokens: int `[batch, length]`, padded at the end.
      first: int `[batch]`, position from which the first token of the answers is predicted.
      targets: int `[batch, tokens, answers]`, -1 where an answer is over; its tokens but the last are in `tokens`.

    Returns:
      float32 `[batch, answers]`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    # Causal: the padding behind a row does not reach it.
    hidden, _ = Decoder(config).apply({"params": params}, tokens, positions)
    where = jnp.minimum(first[:, None] + jnp.arange(targets.shape[1]), tokens.shape[1] - 1)
    scores = logits(params, jnp.take_along_axis(hidden, where[..., None], axis=1))
    found = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.maximum(targets, 0), axis=-1)
    return jnp.where(targets >= 0, found, 0.0).sum(axis=1)
