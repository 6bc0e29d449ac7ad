"""Evaluates a decoder on held-out text: loss and bits per byte of every language."""

import collections
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh

from mlx_pretrain.data.loader import local_rows, to_devices
from mlx_pretrain.data.token_store import PAD_ID, TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.train_step import make_eval_step

_IN_FLIGHT = 4  # batches


class HeldOutEvaluator:
    """Evaluates parameters on a split of a token store.

        evaluate = HeldOutEvaluator(TokenStore("tokens"), config, mesh)
        evaluate(params)  # {"loss": 3.2, "bits_per_byte": 1.1, "loss/en": 3.0, ...}
    """

    def __init__(
        self,
        store: TokenStore,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        split: str = "heldout",
        batch_size: int = 16,
        max_sequences: int | None = None,
        chunk_tokens: int | None = None,
        languages: Collection[str] | None = None,
    ):
        """Reads the rows.

        Args:
          store: the token store.
          config: configuration of the model to evaluate.
          mesh: mesh of the parameters.
          split: split of the store.
          batch_size: sequences per step, over all devices; rounded up to a multiple of the devices that split it.
          max_sequences: sequences of each language, evenly spaced; None: all.
          chunk_tokens: see `losses.cross_entropy`.
          languages: languages to evaluate; None: all of the split.

        Raises:
          InputError: there is nothing to evaluate.
        """
        parts = store.parts(split)
        languages = parts if languages is None else languages
        self.languages = sorted(language for language in languages if parts[language].sequences)
        if not self.languages:
            raise InputError(f"{store.path}: split {split!r} is empty")
        rows = [_spread_rows(array, max_sequences) for array in store.arrays(split, self.languages)]
        self._bytes_per_token = np.array([parts[l].bytes / parts[l].tokens for l in self.languages])
        tokens = np.concatenate(rows).astype(np.int32)
        language_id = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
        batch_size += -batch_size % partitioning.shards(mesh, "batch")
        # The last batch is filled with padding, which weighs nothing.
        missing = -len(tokens) % batch_size
        self._tokens = np.pad(tokens, ((0, missing), (0, 0)), constant_values=PAD_ID)
        self._language_id = np.pad(language_id, (0, missing))
        self._batch_size = batch_size
        self._sharding = partitioning.batch_sharding(mesh)
        self._rows = local_rows(self._sharding, batch_size)
        self._step = jax.jit(make_eval_step(config, len(self.languages), chunk_tokens))

    def __call__(self, params: Any, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Evaluates parameters; calls `check` before each batch.

        Returns:
          `loss` (nats per token, over the tokens of all languages), `bits_per_byte` (mean over languages), and both
          for each language as `loss/<language>`, `bits_per_byte/<language>`.

        Bits per byte are exact for all rows; with `max_sequences` they use the split's mean bytes per token.
        """
        totals, started = np.zeros((2, len(self.languages))), collections.deque()
        for start in range(0, len(self._tokens), self._batch_size):
            check()
            rows = start + self._rows
            batch = {"tokens": self._tokens[rows], "language_id": self._language_id[rows]}
            batch = to_devices(batch, self._sharding, self._batch_size, self._rows)
            started.append(self._step(params, batch["tokens"], batch["language_id"]))
            # Some batches stay under way, so that devices need not wait; not all, for they take memory.
            if len(started) > _IN_FLIGHT:
                totals += np.array(jax.device_get(started.popleft()))
        for sums in jax.device_get(list(started)):
            totals += np.array(sums)
        nll, tokens = totals
        loss = nll / tokens
        bits = loss / math.log(2) / self._bytes_per_token
        return {
            "loss": float(nll.sum() / tokens.sum()),
            "bits_per_byte": float(bits.mean()),
            **{f"loss/{l}": float(x) for l, x in zip(self.languages, loss)},
            **{f"bits_per_byte/{l}": float(x) for l, x in zip(self.languages, bits)},
        }


def _spread_rows(array: ts.TensorStore, n: int | None) -> np.ndarray:
    """Reads `n` evenly spaced rows, or all when there are fewer or `n` is None."""
    rows = array.shape[0]
    return array[np.arange(rows) if n is None or n >= rows else np.arange(n) * rows // n].read().result()
