"""Decoders with their tokenizers, read from a training run, a Hugging Face folder or a GGUF file."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.convert.decoders import CONFIG, open_decoder, read_config
from mlx_pretrain.convert.gguf import GGUF
from mlx_pretrain.convert.special_ids import SpecialIds, read_special_ids
from mlx_pretrain.convert.weights import read_object
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, TOKENIZER, UNK_ID
from mlx_pretrain.data.tokenizers import SubwordTokenizer, Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.generation import generate
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.checkpoints import COMPUTE_FIELDS
from mlx_pretrain.training.checksums import checksums
from mlx_pretrain.training.train_state import abstract_params

HF_TOKENIZER = "tokenizer.json"
# Fields that digests leave out: they do not change the parameters, or these show them.
NOT_DIGESTED = (*COMPUTE_FIELDS, "attention_bias")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its tokenizer.

    Example:
      model = load_language_model("runs/demo/pretrain")
      model.generate(["Once upon a time"], max_new_tokens=50, temperature=0.8, seed=1)    # list of str
      Scorer(model.config, model.params, model.mesh)                                      # log-likelihoods

    Attributes:
      path: file or folder that the model was read from.
      step: step of the checkpoint; None for models that are no training run of ours.
      config, params: configuration and parameters of the decoder; `params` on `mesh`.
      mesh: devices of the parameters; None: they are on none.
      tokenizer: our own or Hugging Face's.
      prefix_ids: ids put before every text: BOS where the model was trained with one.
      bos_id: id from which the first token is predicted where no other precedes it: BOS, or else an id of `eos_ids`.
      eos_ids: ids that end a document.
      suppressed_ids: ids that occur in no text.
      pad_id: id of padding; None: not stated.
    """

    path: str
    step: int | None
    config: DecoderConfig
    params: Any
    mesh: Mesh | None
    tokenizer: Tokenizer | SubwordTokenizer
    prefix_ids: tuple[int, ...]
    bos_id: int
    eos_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def fingerprint(self) -> str:
        """Returns a digest of configuration, tokenizer, special ids and parameters, the same on any mesh."""
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_DIGESTED}
        ids = [self.prefix_ids, self.bos_id, self.eos_ids, self.suppressed_ids]
        return fingerprint(self.params, config, self.tokenizer.sha256, ids)

    def generate(self, prompts: Sequence[str], until: Sequence[str] = (), **settings: Any) -> list[str]:
        """Continues texts, see `generate_tokens`."""
        return self.generate_tokens(self.tokenizer.encode_batch(list(prompts)), until, **settings)

    def generate_tokens(
        self, prompts: Sequence[np.ndarray], until: Sequence[str] = (), **settings: Any
    ) -> list[str]:
        """Continues token ids.

        Args:
          prompts: int `[tokens]` each; `prefix_ids` are put before those that do not begin with them.
          until: texts that end a continuation and are left out; may be special tokens spelt out.
          settings: further arguments of `generation.generate`.

        Returns:
          The text that each continuation adds to its prompt, without special tokens.
        """
        prompts = [with_prefix(self.prefix_ids, ids) for ids in prompts]
        prompts = [ids if len(ids) else np.array([self.bos_id], np.int32) for ids in prompts]
        with partitioning.use(self.mesh):
            new = generate(
                self.config, self.params, prompts, prefix_ids=(), eos_ids=self.eos_ids,
                suppressed_ids=self.suppressed_ids, vocab_size=self.tokenizer.vocab_size, **settings,
            )
        return [continuation(self.tokenizer, *pair, until) for pair in zip(prompts, new)]


def with_prefix(prefix_ids: Sequence[int], ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns ids int32 `[tokens]` that begin with `prefix_ids`, put before them unless they begin so already."""
    prefix, ids = np.asarray(prefix_ids, np.int32), np.asarray(ids, np.int32)
    return ids if np.array_equal(ids[: len(prefix)], prefix) else np.concatenate([prefix, ids])


def continuation(
    tokenizer: Tokenizer | SubwordTokenizer, prompt: Sequence[int] | np.ndarray, new: Sequence[int],
    until: Sequence[str] = (),
) -> str:
    """Returns the text that new ids add to the text of a prompt.

    It is not the text of the new ids alone: many tokenizers drop the space that a text begins with.

    Args:
      tokenizer: tokenizer of both.
      prompt: ids `[tokens]` of the prompt.
      new: ids `[tokens]` that follow.
      until: texts that end the continuation, the first to occur; may be special tokens spelt out.

    Returns:
      The text before the first of `until`, without special tokens.
    """
    special, ids, text = tokenizer.special_tokens, list(prompt), tokenizer.decode(prompt)
    # Pieces of the text: (as `until` is looked for, as it is returned).
    pieces: list[tuple[str, str]] = []
    for is_special, run in itertools.groupby(new, special.__contains__):
        run = list(run)
        ids += run
        if is_special:
            pieces += [(special[token], "") for token in run]
            continue
        longer = tokenizer.decode(ids)
        # Half a character at the end of the new text may garble the text before it.
        added = longer.removeprefix(text) if longer.startswith(text) else tokenizer.decode(run)
        pieces.append((added, added))
        text = longer
    searched = "".join(piece for piece, _ in pieces)
    for stop in filter(None, until):
        searched = searched.split(stop)[0]
    left, kept = len(searched), []
    for piece, plain in pieces:
        kept.append(plain[: max(left, 0)])
        left -= len(piece)
    return "".join(kept)


def fingerprint(params: Any, *facts: Any, saved: Mapping[str, str] | None = None) -> str:
    """Returns a digest of the parameters' bytes and of facts in JSON, the same on any mesh.

    With `saved`, their checksums in a checkpoint (`checkpoints.saved_checksums`), only a part of them is needed.
    """
    sums = checksums(params) if saved is None else saved
    return hashlib.sha256(json.dumps([*facts, sums], sort_keys=True).encode()).hexdigest()


def load_language_model(
    path: epath.PathLike,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    weights: str = "last",
    dtype: str | None = None,
) -> LanguageModel:
    """Reads a decoder with its tokenizer.

    Args:
      path: folder of a training run, or folder with config.json, safetensors and tokenizer.json, local or gs://; or a
        local .gguf file.
      mesh: devices for the parameters; None: all devices, replicated.
      step: step of a run's checkpoint; None: the latest.
      weights: "last", or "ema" for the average of the weights, which runs with `train.average` keep.
      dtype: compute dtype, "float32" or "bfloat16"; None: that of the run, float32 for other models.

    Raises:
      InputError: `path` holds no model, it cannot be read, or the tokenizer's ids exceed the vocabulary.
    """
    path, mesh = epath.Path(path), partitioning.make_mesh() if mesh is None else mesh
    if is_run(path, step, weights):
        config = checkpoints.load_model(path)
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        tokenizer = Tokenizer(path / TOKENIZER)
        with partitioning.use(mesh):
            params, step = checkpoints.restore_params(path, abstract_params(config, mesh), step, weights)
        return from_run(path, step, config, params, mesh, tokenizer)
    with open_pretrained(path, dtype or "float32") as (config, params, tokenizer, ids):
        return from_pretrained(path, config, params, mesh, tokenizer, ids)


def is_run(path: epath.PathLike, step: int | None = None, weights: str = "last") -> bool:
    """Returns whether a path is that of a training run, and neither a Hugging Face folder nor a GGUF file.

    Raises:
      InputError: it is none, but a step or other weights than the last are asked for.
    """
    path = epath.Path(path)
    if path.suffix != ".gguf" and not (path / CONFIG).exists():
        return True
    if step is not None or weights != "last":
        raise InputError(f"{path}: step = {step}, weights = {weights!r}, but this is no training run")
    return False


@contextlib.contextmanager
def open_pretrained(
    path: epath.PathLike, dtype: str = "float32"
) -> Iterator[tuple[DecoderConfig, Any, SubwordTokenizer, SpecialIds]]:
    """Opens a Hugging Face folder or a GGUF file.

    Yields:
      The configuration, a tree of parameters that are read when they are indexed (`decoders.StoredParameter`), the
      tokenizer and the ids that begin and end a text.

    Raises:
      InputError: a file is missing or malformed; at the end of the block, a tensor has not been read.
    """
    path = epath.Path(path)
    if path.suffix == ".gguf":
        file = GGUF(path)
        config, opened = file.decoder_config(dtype), file.open_decoder
        tokenizer, ids = SubwordTokenizer(path, file.tokenizer()), file.special_ids()
    else:
        config, opened = read_config(path, dtype), functools.partial(open_decoder, path)
        tokenizer = SubwordTokenizer(path / HF_TOKENIZER)
        ids = read_special_ids(path, read_object(path / CONFIG), tokenizer)
    with opened(config) as params:
        yield config, params, tokenizer, ids


def read_model_config(path: epath.PathLike) -> DecoderConfig:
    """Reads the configuration of the decoder that `load_language_model` reads.

    Raises:
      InputError: the folder holds no model, or it cannot be read.
    """
    path = epath.Path(path)
    if path.suffix == ".gguf":
        return GGUF(path).decoder_config()
    return read_config(path) if (path / CONFIG).exists() else checkpoints.load_model(path)


def from_pretrained(
    path: epath.PathLike,
    config: DecoderConfig,
    params: Any,
    mesh: Mesh | None,
    tokenizer: SubwordTokenizer,
    ids: SpecialIds,
) -> LanguageModel:
    """Returns a model with a Hugging Face tokenizer.

    Parameters in host memory or in files (`open_pretrained`) are put on `mesh`; without one, or if they are arrays
    there already, maybe a part of the model's, they stay as they are.

    Raises:
      InputError: the tokenizer's ids, or those that begin or end a document, exceed the vocabulary, or no id begins or
        ends one.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    bos = () if ids.bos_id is None else (ids.bos_id,)
    if not bos + ids.eos_ids:
        raise InputError(f"{path}: neither a bos_token_id nor an eos_token_id")
    prefix_ids = tuple(tokenizer.prefix_ids.tolist()) if ids.prefix_ids is None else ids.prefix_ids
    for name, tokens in (("bos_token_id", bos), ("eos_token_id", ids.eos_ids)):
        if beyond := [token for token in tokens if not 0 <= token < config.vocab_size]:
            raise InputError(f"{path}: {name} {beyond[0]} is not one of the model's {config.vocab_size} ids")
    if mesh is not None and not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
        params = jax.tree.map(partitioning.put_parts, params, abstract_params(config, mesh))
    return LanguageModel(str(path), None, config, params, mesh, tokenizer, prefix_ids, (bos or ids.eos_ids)[0],
                         ids.eos_ids or bos, pad_id=ids.pad_id)


def from_run(
    path: epath.PathLike, step: int | None, config: DecoderConfig, params: Any, mesh: Mesh | None, tokenizer: Tokenizer
) -> LanguageModel:
    """Returns a model with one of our own tokenizers; `params` may be None where only texts are encoded."""
    return LanguageModel(str(path), step, config, params, mesh, tokenizer, (BOS_ID,), BOS_ID, (EOS_ID,),
                         (PAD_ID, UNK_ID, BOS_ID), PAD_ID)
